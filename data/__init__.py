"""Problems, prompts and their encoding.

A task is a name of TASKS; `load_problems(task, split)` returns its questions. Dev is always held out
of train, never of test.
"""
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

TASKS = ("toy", "gsm8k")
SPLITS = ("train", "dev", "test")
ANSWER_FORMATS = ("hash", "final_answer")
DOWNLOADS = Path("downloads")
GSM8K_DEV_SIZE = 1000  # held out of the 7,473 training questions, as IRPO does

# {question} is all that varies. No template ends in a space, which tokenizers would join to what
# follows. "irpo" is the zero-shot prompt of IRPO's appendix for GSM8K.
PROMPTS = {
    "plain": "{question}\n",
    "irpo": "Your task is to answer the question below. Give step by step reasoning before you answer, "
            'and when you\'re ready to answer, please use the format "Final answer: ..."\n'
            "Question: {question}\nSolution:",
}


@dataclass(frozen=True)
class Problem:
    """A question, its right answer, and a gold solution in the format of the data set."""
    id: str
    question: str
    answer: str
    solution: str


def load_problems(task: str, split: str, path: str | Path | None = None,
                  toy_steps: tuple[int, ...] = (2, 3)) -> list[Problem]:
    """The problems of split train, dev or test; `path` reads a local folder instead of downloads/.

    toy_steps: relations per story of the toy world, drawn from these numbers.
    """
    for name, value, known in (("task", task, TASKS), ("split", split, SPLITS)):
        if value not in known:
            raise SystemExit(f"unknown {name} {value!r}: choose from {', '.join(known)}")
    if task == "toy":
        from data import toy  # here, so that `python -m data.toy` is not imported twice
        return [Problem(**row) for row in toy.problems(split, toy_steps)]
    if split == "test":
        return read_gsm8k(Path(path or DOWNLOADS / task) / "test.jsonl")
    train = Path(path or DOWNLOADS / task) / "train.jsonl"
    problems = read_gsm8k(train)
    if len(problems) <= GSM8K_DEV_SIZE:
        raise SystemExit(f"{train} has {len(problems)} problems: dev alone takes {GSM8K_DEV_SIZE}")
    dev = set(random.Random("gsm8k dev").sample(range(len(problems)), GSM8K_DEV_SIZE))
    return [p for i, p in enumerate(problems) if (i in dev) == (split == "dev")]


def read_gsm8k(path: Path) -> list[Problem]:
    """GSM8K's own lines: {"question": ..., "answer": "... #### 72"}."""
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: put GSM8K's {path.name} there, or name the folder "
                         "that has it with --data_path")
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            question, solution = row["question"].strip(), row["answer"].strip()
            answer = solution.split("####")[1].strip()
        except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            raise SystemExit(f"{path}, line {number}: expected a JSON object with a question and an "
                             f"answer that ends in '#### N' ({error!r})") from None
        problems.append(Problem(f"{path.stem}-{number}", question, answer, solution))
    return problems


def gold_text(problem: Problem, answer_format: str) -> str:
    """A gold solution in the format that the model is asked for; "" keeps the data set's own.

    For "final_answer" the calculator marks <<...>> go and "#### 72" becomes "Final answer: 72": a
    winner in another format would teach the model that format.
    """
    if answer_format != "final_answer":
        return problem.solution
    steps = re.sub(r"<<[^>]*>>", "", problem.solution.split("####")[0]).strip()
    return f"{steps}\nFinal answer: {problem.answer}"


def tags(task: str, problem_id: str, text: str) -> dict[str, str]:
    """What the task's world knows about a response, by which accuracy is broken down."""
    if task == "toy":
        from data import toy
        return toy.tags(problem_id, text)
    return {}


def encode_prompt(tokenizer, text: str) -> list[int]:
    """The ids of a prompt: exactly one BOS, then the text. Every prompt is encoded here."""
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def encode_solution(tokenizer, text: str) -> list[int]:
    """The ids of a written solution as a response: its text, then EOS."""
    return [*tokenizer.encode(text), tokenizer.eos_id]
