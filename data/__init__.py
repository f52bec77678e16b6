"""Load problems: a question, its right answer, and a gold solution where the data set has one.

`load_problems(task, split)` reads the files that `make data TASK=...` downloads into downloads/; the toy world is
generated. Dev never overlaps test: it is the data set's own dev file, or is held out of train.

    python -m data --task toy --show 3       # problems as a model sees them, with the loss mask in colour
"""
import functools
import hashlib
from dataclasses import replace
from pathlib import Path

from data.files import FILES, Problem, read_problems

TASKS = ("toy", *FILES["publisher"])
SPLITS = ("train", "dev", "test")
SOURCES = ("publisher", "reft")
DOWNLOADS = Path("downloads")


def load_problems(task: str, split: str, path: str | Path | None = None, source: str = "publisher",
                  toy_steps: tuple[int, ...] = (2, 3), toy_world: str = "ways",
                  toy_gold: float = 0.0) -> list[Problem]:
    """Load the problems of a split (train, dev or test), in the order of the files.

    path: a folder to read instead of downloads/TASK, or one file that replaces the split's own.
    source: whose files; "reft" and "program" are ReFT's solutions in natural language and as programs.
    toy_steps, toy_world: the numbers of relations per story to draw from, and which toy world.
    toy_gold: the granularity of gold in the world "ledger" (data/ledger.py).
    """
    for name, value, known in (("task", task, TASKS), ("split", split, SPLITS)):
        if value not in known:
            raise SystemExit(f"unknown {name} {value!r}: choose from {', '.join(known)}")
    if task == "toy":
        from data import ledger, toy  # here, so that `python -m data.toy` does not import it twice
        if toy_world == "ledger":
            return [Problem(**row) for row in ledger.problems(split, toy_steps, toy_gold)]
        return [Problem(**row) for row in toy.problems(split, toy_steps, toy_world)]
    if task not in FILES[source]:
        raise SystemExit(f"{task} has no files of source {source!r}: it has "
                         f"{', '.join(name for name in FILES if task in FILES[name])}")

    names = FILES[source][task]
    path = Path(path or DOWNLOADS / task)
    no_dev_file = "dev" not in names
    own_files = names["train" if split == "dev" and no_dev_file else split]
    files = [path] if path.is_file() else [path / name for name in own_files]
    problems = with_unique_ids([problem for file in files for problem in read_problems(file, task)])

    if task == "math":  # prm800k's files mix the original 7,500 and 5,000
        original = "test/" if split == "test" else "train/"
        problems = [problem for problem in problems if problem.id.startswith(original)]
        if not problems:
            raise SystemExit(f"{files[0]} has no problem whose unique_id begins with {original}")
    if no_dev_file and split != "test":
        dev = dev_questions(problems)
        if not dev:
            raise SystemExit(f"{files[0]} has {len(problems)} problems: too few to hold dev out of train")
        problems = [problem for problem in problems if (problem.question in dev) == (split == "dev")]
    return problems


def with_unique_ids(problems: list[Problem]) -> list[Problem]:
    """Append its position to every id that occurred before."""
    unique: dict[str, Problem] = {}
    for i, problem in enumerate(problems):
        name = problem.id
        while name in unique:
            name += f"#{i}"
        unique[name] = replace(problem, id=name)
    return list(unique.values())


def dev_questions(problems: list[Problem]) -> set[str]:
    """Choose the dev questions of a train file: a fifth, at most 1,000 (IRPO's number for GSM8K and MATH).

    They are ranked by a hash of their text, so that copies of a question stay together, and so that ReFT's files with
    solutions in words and as programs have nearly the same dev questions.
    """
    questions = sorted({problem.question for problem in problems},
                       key=lambda question: hashlib.sha256(question.encode()).digest())
    return set(questions[:min(1000, len(questions) // 5)])


@functools.cache
def examples(task: str, path: str | None) -> list[Problem]:
    """Choose five short training problems for few-shot prompts: four, and one to replace the question itself."""
    short = [problem for problem in load_problems(task, "train", path) if len(problem.solution) <= 400]
    return sorted(short, key=lambda problem: hashlib.sha256(problem.id.encode()).digest())[:5]


def tags(task: str, problem_id: str, text: str, prompt: str = "") -> dict[str, str]:
    """Say what the task's world knows about a response; accuracy is broken down by these tags."""
    if task == "toy":
        from data import ledger, toy
        return ledger.tags(prompt, text) if problem_id.startswith("ledger") else toy.tags(problem_id, text)
    return {}
