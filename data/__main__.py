"""Show problems as a model is asked and taught them: which tokens are trained on is a matter of colour.

    python -m data --task toy --show 3
    python -m data --task gsm8k --prompt irpo --show 3 --path DIR
    python -m data --task gsm8k --prompt reft --show 3 --model DIR    # its tokens, shade by shade

Grey is the prompt, mask 0; green the gold solution, mask 1. With NO_COLOR set, the solution stands in
double brackets.
"""
import argparse
import os

import data
from data.prompts import (ANSWER_FORMATS, CHATS, PROMPT_FORMATS, PROMPTS, encode_prompt,
                          encode_solution, gold_text, needs_examples, prompt_text)
from data.tokenizer import load_tokenizer

GREY, GREEN = ("\033[90m", "\033[37m"), ("\033[32m", "\033[92m")  # two shades, for token beside token


def paint(pieces: list[str], shades: tuple[str, str]) -> str:
    """Neighbouring pieces in alternating shades."""
    if "NO_COLOR" in os.environ:
        return "".join(pieces) if shades is GREY else f"[[{''.join(pieces)}]]"
    return "".join(f"{shades[i % 2]}{piece}\033[0m" for i, piece in enumerate(pieces))


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text; BOS and EOS by name."""
    names = {tokenizer.bos_id: "<BOS>", tokenizer.eos_id: "<EOS>"}
    texts, shown = [], ""
    for i, token in enumerate(ids):
        text = tokenizer.decode(ids[:i + 1])
        texts.append(names.get(token) or text[len(shown):])
        shown = text
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="toy", choices=data.TASKS, help="data set")
    parser.add_argument("--split", default="train", choices=data.SPLITS, help="train, dev or test")
    parser.add_argument("--path", help="folder with the data set's files, or one file")
    parser.add_argument("--source", default="publisher", choices=data.SOURCES, help="whose files")
    parser.add_argument("--prompt", default="plain", choices=PROMPTS, help="prompt template")
    parser.add_argument("--chat", default="", choices=CHATS, help="wrap prompts for this chat model")
    parser.add_argument("--answer_format", choices=ANSWER_FORMATS, help="how an answer is marked")
    parser.add_argument("--model", help="model directory, whose tokenizer is used")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="the first N problems")
    args = parser.parse_args()
    answer_format = args.answer_format or PROMPT_FORMATS.get(args.prompt)
    source = "program" if answer_format == "python" else args.source
    problems = data.load_problems(args.task, args.split, args.path, source)
    tokenizer = load_tokenizer(args.model) if args.model else None
    solved = data.examples(args.task, args.path) if needs_examples(args.prompt, args.task) else []
    for problem in problems[:args.show]:
        examples = [example for example in solved if example.id != problem.id][:4]
        prompt = prompt_text(args.prompt, args.task, problem.question, examples, args.chat)
        gold = gold_text(problem, answer_format) if answer_format else problem.solution
        print(f"--- {problem.id}, answer {problem.answer}")
        if not gold:
            print(paint([prompt], GREY) + "\n--- no gold solution in these files")
        elif tokenizer:
            prompt_ids, gold_ids = encode_prompt(tokenizer, prompt), encode_solution(tokenizer, gold)
            print(paint(token_texts(tokenizer, prompt_ids), GREY)
                  + paint(token_texts(tokenizer, gold_ids), GREEN))
            print(f"--- {len(prompt_ids)} tokens of prompt with mask 0, {len(gold_ids)} of solution with "
                  "mask 1")
        else:
            print(paint([prompt], GREY) + paint([gold, "<EOS>"], GREEN))
    print(f"--- {len(problems):,} problems in {args.task} {args.split}")


if __name__ == "__main__":
    main()
