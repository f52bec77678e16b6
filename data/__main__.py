"""Show problems as a model is asked and taught them, with the loss mask in colour.

    python -m data --task toy --show 3
    python -m data --task gsm8k --prompt irpo --show 3 --path DIR
    python -m data --task gsm8k --prompt reft --show 3 --model DIR    # its tokens, in alternating shades

Grey is the prompt, mask 0; green is the gold solution, mask 1. With NO_COLOR set, the solution is in double brackets.
"""
import os
from dataclasses import dataclass

from data import SPLITS
from data.prompts import gold_text
from data.task import TaskOptions
from data.tokenizer import load_tokenizer, pieces
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


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """Return the text that each token adds; BOS and EOS by name."""
    names = {tokenizer.bos_id: "<BOS>", tokenizer.eos_id: "<EOS>"}
    return [names.get(token) or piece for token, piece in pieces(tokenizer, ids)]


def main() -> None:
    config = parse_config(Config, {}, __doc__)
    problems = config.problems(config.split)
    tokenizer = load_tokenizer(config.model) if config.model else None
    for problem in problems[:config.show]:
        prompt, gold = [config.prompt_text(problem)], [gold_text(problem, config.marks), "<EOS>"]
        if tokenizer:
            prompt = token_texts(tokenizer, config.prompt_ids(tokenizer, problem))
            gold = token_texts(tokenizer, config.gold_ids(tokenizer, problem) or [])
        solution = paint(gold, GREEN) if problem.solution else "\n--- no gold solution in these files"
        print(f"--- {printable(f'{problem.id}, answer {problem.answer}')}\n{paint(prompt, GREY)}{solution}")
        if tokenizer and problem.solution:
            print(f"--- {len(prompt)} prompt tokens with mask 0, {len(gold)} solution tokens with mask 1")
    print(f"--- {len(problems):,} problems in {config.task} {config.split}")


if __name__ == "__main__":
    run_script(main)
