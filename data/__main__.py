"""Show problems as a model is asked and taught them, with the loss mask in colour.

    python -m data --task toy --show 3
    python -m data --task gsm8k --prompt irpo --show 3 --path DIR
    python -m data --task gsm8k --prompt reft --show 3 --model DIR    # its tokens, in alternating shades, and ids
    python -m data --task gsm8k --chat own --show 3 --model DIR       # as a chat

Grey is the prompt, mask 0; green is the gold solution, mask 1. With NO_COLOR set, the solution is in double brackets.
"""
import os
from dataclasses import dataclass

from data import SPLITS
from data.prompts import gold_text
from data.task import TaskOptions
from data.tokenizer import load_tokenizer, pieces
from infra import InputError
from infra.config import option, parse_config
from infra.progress import printable
from infra.run import run_script

GREY, GREEN = ("\033[90m", "\033[37m"), ("\033[32m", "\033[92m")  # two shades, to tell neighbouring tokens apart


@dataclass(frozen=True)
class Config(TaskOptions):
    split: str = option("train", "train, dev or test", SPLITS)
    model: str = option("", "model directory, whose tokenizer is used")
    show: int = option(3, "how many problems to show", low=0)


def paint(texts: list[str], shades: tuple[str, str]) -> str:
    """Join texts, neighbours in different shades."""
    texts = [*map(printable, texts)]
    if "NO_COLOR" in os.environ:
        return "".join(texts) if shades is GREY else f"[[{''.join(texts)}]]"
    return "".join(f"{shades[i % 2]}{text}\033[0m" for i, text in enumerate(texts))


def token_texts(tokenizer, ids: list[int], chat: str = "") -> list[str]:
    """Return the text that each token adds; BOS and EOS by name, and in a chat all special tokens by theirs."""
    names = {tokenizer.bos_id: "<BOS>", tokenizer.eos_id: "<EOS>"}
    if chat:
        names = {token: name for name, token in tokenizer.specials.items()}
    return [names.get(token) or piece for token, piece in pieces(tokenizer, ids)]


def main() -> None:
    config = parse_config(Config, {}, __doc__)
    problems = config.problems(config.split)
    if config.chat and not config.model:
        raise InputError(f"--chat {config.chat} makes token ids: give --model DIR, whose tokenizer and template to use")
    tokenizer = load_tokenizer(config.model) if config.model else None
    for problem in problems[:config.show]:
        prompt, gold = [config.prompt_text(problem)], [gold_text(problem, config.marks), "<EOS>"]
        if tokenizer:
            ids = config.prompt_ids(tokenizer, problem), config.gold_ids(tokenizer, problem) or []
            prompt, gold = (token_texts(tokenizer, some, config.chat) for some in ids)
        solution = paint(gold, GREEN) if problem.solution else "\n--- no gold solution in these files"
        print(f"--- {printable(f'{problem.id}, answer {problem.answer}')}\n{paint(prompt, GREY)}{solution}")
        for some, name, mask in zip(ids if tokenizer else (), ("prompt", "solution"), (0, 1)):
            if some:
                print(f"--- {len(some)} {name} tokens with mask {mask}: {' '.join(map(str, some))}")
    print(f"--- {len(problems):,} problems in {config.task} {config.split}")


if __name__ == "__main__":
    run_script(main)
