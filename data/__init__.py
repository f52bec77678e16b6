"""Problems: a question, its right answer, and a gold solution where the data set has one.

`load_problems(task, split)` reads the files that `make data TASK=...` puts into downloads/; the toy
world is generated. Dev never touches test: it is the data set's own dev file, or held out of train.

    python -m data --task toy --show 3       # problems as a model sees them, masks in colour
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
                  toy_steps: tuple[int, ...] = (2, 3), toy_world: str = "ways") -> list[Problem]:
    """The problems of split train, dev or test, in the order of the files.

    path: a folder to read instead of downloads/TASK, or one file that stands for the split's own.
    source: whose files; "reft" and "program" are ReFT's natural-language and program solutions.
    toy_steps, toy_world: relations per story of the toy world, drawn from these numbers; which one.
    """
    for name, value, known in (("task", task, TASKS), ("split", split, SPLITS)):
        if value not in known:
            raise SystemExit(f"unknown {name} {value!r}: choose from {', '.join(known)}")
    if task == "toy":
        from data import toy  # here, so that `python -m data.toy` is not imported twice
        return [Problem(**row) for row in toy.problems(split, toy_steps, toy_world)]
    if task not in FILES[source]:
        raise SystemExit(f"{task} has no files of source {source!r}: it has "
                         f"{', '.join(name for name in FILES if task in FILES[name])}")
    names = FILES[source][task]
    path = Path(path or DOWNLOADS / task)
    held_out = split != "test" and "dev" not in names
    own_files = names["train" if held_out else split]
    files = [path] if path.is_file() else [path / name for name in own_files]
    problems = with_own_ids([problem for file in files for problem in read_problems(file, task)])
    if task == "math":  # prm800k's files mix the original 7,500 and 5,000
        original = "test/" if split == "test" else "train/"
        problems = [problem for problem in problems if problem.id.startswith(original)]
        if not problems:
            raise SystemExit(f"{files[0]} has no problem whose unique_id begins with {original}")
    if held_out:
        dev = held_out_questions(problems)
        if not dev:
            raise SystemExit(f"{files[0]} has {len(problems)} problems: too few to hold dev out of train")
        problems = [problem for problem in problems if (problem.question in dev) == (split == "dev")]
    return problems


def with_own_ids(problems: list[Problem]) -> list[Problem]:
    """The same problems; an id that was there before gets its place behind it."""
    first = {problem.id: i for i, problem in reversed(list(enumerate(problems)))}
    return [problem if first[problem.id] == i else replace(problem, id=f"{problem.id}#{i}")
            for i, problem in enumerate(problems)]


def held_out_questions(problems: list[Problem]) -> set[str]:
    """The dev questions of a train file: a fifth, at most 1,000 (IRPO's number for GSM8K and MATH).

    Ranked by a hash of their text, so that the copies of a question stay together, and ReFT's files
    with solutions in words and as programs have nearly the same dev questions.
    """
    questions = sorted({problem.question for problem in problems},
                       key=lambda question: hashlib.sha256(question.encode()).digest())
    return set(questions[:min(1000, len(questions) // 5)])


@functools.cache
def examples(task: str, path: str | None) -> list[Problem]:
    """Five short training problems for few-shot prompts: four, and one to replace the question itself."""
    short = [problem for problem in load_problems(task, "train", path) if len(problem.solution) <= 400]
    return sorted(short, key=lambda problem: hashlib.sha256(problem.id.encode()).digest())[:5]


def tags(task: str, problem_id: str, text: str) -> dict[str, str]:
    """What the task's world knows about a response, by which accuracy is broken down."""
    if task == "toy":
        from data import toy
        return toy.tags(problem_id, text)
    return {}
