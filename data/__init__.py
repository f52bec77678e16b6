"""Load problems: a question, its right answer, and a gold solution where the data set has one.

`load_problems(task, split)` reads the files that `make data TASK=...` downloads into downloads/, or those of your own
data; the toy world is generated. Dev never overlaps test: it is the data set's own dev file, or is held out of train.

    python -m data --task toy --show 3       # problems as a model sees them, with the loss mask in colour
"""
import functools
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from data.files import ANSWERS, FILES, Problem, read_problems, records  # noqa: F401  ANSWERS for data/task.py
from infra import InputError

TASKS = ("toy", *FILES["publisher"])
SPLITS = ("train", "dev", "test")
SOURCES = ("publisher", "reft")
DOWNLOADS = Path("downloads")


def load_problems(task: str, split: str, path: str | Path | None = None, source: str = "publisher",
                  toy_steps: tuple[int, ...] = (2, 3, 4, 5), toy_gold: float = 0.0, answer: str = "") -> list[Problem]:
    """Load the problems of a split (train, dev or test), in the order of the files.

    task: a data set, or a file or folder of your own; `answer` is the kind of its answers.
    path: a folder to read instead of downloads/TASK.
    source: whose files; "reft" and "program" are ReFT's solutions in natural language and as programs.
    toy_steps, toy_gold: the numbers of steps to draw from, and the granularity of gold (data/toy.py).
    """
    if answer and split in SPLITS:
        return own_problems(task, answer)[split]
    if not task:
        raise InputError(f"--task is missing: choose from {', '.join(TASKS)}, or name a file or folder of your own")
    for name, value, known in (("task", task, TASKS), ("split", split, SPLITS)):
        if value not in known:
            raise InputError(f"unknown {name} {value!r}: choose from {', '.join(known)}")
    if task == "toy":
        from data import toy  # here, so that `python -m data.toy` does not import it twice
        return [Problem(**row) for row in toy.problems(split, toy_steps, toy_gold)]
    if task not in FILES[source]:
        raise InputError(f"{task} has no files of source {source!r}: it has "
                         f"{', '.join(name for name in FILES if task in FILES[name])}")

    names = FILES[source][task]
    own_files = names.get(split, names["train"])  # dev may be held out of train
    files = [Path(path or DOWNLOADS / task, name) for name in own_files]
    problems = with_unique_ids([problem for file in files for problem in read_problems(file, task)])

    if task == "math":  # prm800k's files mix the original 7,500 and 5,000
        original = "test/" if split == "test" else "train/"
        problems = [problem for problem in problems if problem.id.startswith(original)]
        if not problems:
            raise InputError(f"{files[0]} has no problem whose unique_id begins with {original}")
    if "dev" not in names and split != "test":
        problems = held_out(problems, ["dev"], files[0])[split]
    return problems


def has_choices(task: str) -> bool:
    """Tell whether a record of your own data has choices; what is wrong with the files is read_problems' to say."""
    files = sorted(Path(task).glob("*.jsonl")) if Path(task).is_dir() else [Path(task)]
    try:
        return any(row.get("choices") for file in files for _, row in records(file.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


@functools.cache
def own_problems(task: str, answer: str) -> dict[str, list[Problem]]:
    """Read your own data: one file, or a folder with train.jsonl and, where they exist, dev.jsonl and test.jsonl.

    A split that has no file is held out of train. InputError if a question is in two files. Ids are unique.
    """
    files = {split: Path(task, f"{split}.jsonl") for split in SPLITS} if Path(task).is_dir() else {"train": Path(task)}
    found = {split: read_problems(file, answer) for split, file in files.items() if file.exists()}
    if not found:
        raise InputError(f"{task} has no train.jsonl, no dev.jsonl and no test.jsonl")
    unique = iter(with_unique_ids([problem for problems in found.values() for problem in problems]))
    found = {split: [next(unique) for _ in problems] for split, problems in found.items()}

    seen: dict[str, tuple[str, Problem]] = {}
    for split, problem in ((split, problem) for split, problems in found.items() for problem in problems):
        before, same = seen.setdefault(normalized(problem.question), (split, problem))
        if before == split and same.answer != problem.answer:
            raise InputError(f"{files[split]} asks twice, in {same.id} and {problem.id}, with the answers "
                             f"{same.answer!r:.40} and {problem.answer!r:.40}: {problem.question!r:.100}")
        if before != split:
            raise InputError(f"{files[split]} asks, in {problem.id}, what {files[before]} asks in {same.id}: "
                             f"{problem.question!r:.100}. A question must be in one split only.")

    absent = [split for split in SPLITS if split not in found]
    if "train" in absent:
        return found | dict.fromkeys(absent, [])
    if absent:
        found |= held_out(found["train"], absent, files["train"], normalized)
        print(f"{task}: a hash of the question divides {files['train'].name} into " + ", ".join(
            f"{len(found[split])} problems for {split}" for split in ("train", *absent)))
    return found


def normalized(question: str) -> str:
    """Case and spaces do not make another question."""
    return " ".join(question.split()).casefold()


def with_unique_ids(problems: list[Problem]) -> list[Problem]:
    """Append its position to every id that occurred before."""
    unique: dict[str, Problem] = {}
    for i, problem in enumerate(problems):
        name = problem.id
        while name in unique:
            name += f"#{i}"
        unique[name] = replace(problem, id=name)
    return list(unique.values())


def held_out(problems: list[Problem], splits: list[str], file: Path,
             text_of: Callable[[str], str] = str) -> dict[str, list[Problem]]:
    """Divide a train file: for each split a fifth of the questions, at most 1,000 (IRPO's number for GSM8K and MATH).

    They are ranked by a hash of their text, so that copies of a question stay together, and so that ReFT's files with
    solutions in words and as programs have nearly the same dev questions. text_of: what copies of a question share.
    """
    first = {text_of(problem.question): problem.question for problem in reversed(problems)}
    questions = sorted(first, key=lambda shared: hashlib.sha256(first[shared].encode()).digest())
    size = min(1000, len(questions) // 5)
    if not size:
        raise InputError(f"{file} has {len(problems)} problems: too few to hold {' and '.join(splits)} out of train")
    split_of = {question: split for i, split in enumerate(splits) for question in questions[i * size:(i + 1) * size]}
    return {split: [problem for problem in problems if split_of.get(text_of(problem.question), "train") == split]
            for split in ("train", *splits)}


@functools.cache
def examples(task: str, path: str | None, answer: str = "") -> list[Problem]:
    """Choose five short training problems for few-shot prompts: four, and a spare if one of them is asked."""
    short = [problem for problem in load_problems(task, "train", path, answer=answer)
             if 0 < len(problem.solution) <= 400]
    if len(short) < 5:
        raise InputError("--prompt irpo needs five solved problems with at most 400 characters, four to show and one "
                         f"more for when one of them is asked, and {task} has {len(short)}: give another --prompt")
    return sorted(short, key=lambda problem: hashlib.sha256(problem.id.encode()).digest())[:5]


def tags(task: str, question: str, text: str) -> dict[str, str]:
    """Say what is known of a response besides its verdict; accuracy is broken down by these tags."""
    if task == "toy":
        from data import toy
        return toy.tags(question, text)
    return {}
