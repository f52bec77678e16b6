"""Files of the data sets -> problems. One short reader per record format; a bad record stops at once.

A solution is kept as its data set writes it: GSM8K's ends in "#### 72", MATH's has its answer in a
box, ReFT's are programs or end in "Therefore, the answer is: 72.0". SVAMP's test set, ARC and ReFT's
test sets have no solutions: "".
"""
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Problem:
    """A question, its right answer, and a gold solution in the format of the data set, or ""."""
    id: str
    question: str
    answer: str
    solution: str


# Which files make a split. Without a "dev" it is held out of train. SVAMP has only its test set, and
# MathQA no numeric answers, so their "publisher" is ReFT as far as needed.
FILES = {
    "publisher": {
        "gsm8k": {"train": ["train.jsonl"], "test": ["test.jsonl"]},
        "svamp": {"train": ["svamp_nl.json"], "test": ["SVAMP.json"]},
        "mathqa": {"train": ["train.json"], "dev": ["dev.json"], "test": ["test.json"]},
        "mathqa-numeric": {"train": ["mathqa-numeric_nl.json"], "test": ["mathqa-numeric_test_set.json"]},
        # prm800k's files, which split the 12,500 anew: unique_id tells the original split
        "math": {"train": ["train.jsonl", "test.jsonl"], "test": ["train.jsonl", "test.jsonl"]},
        "arc": {"train": ["ARC-Challenge-Train.jsonl", "ARC-Easy-Train.jsonl"],  # both, as IRPO
                "dev": ["ARC-Challenge-Dev.jsonl"], "test": ["ARC-Challenge-Test.jsonl"]}},
    **{source: {task: {"train": [f"{task}_{ending}.json"], "test": [f"{task}_test_set.json"]}
                for task in ("gsm8k", "svamp", "mathqa", "mathqa-numeric")}
       for source, ending in (("reft", "nl"), ("program", "python_sdp"))},
}


def read_problems(path: Path, task: str) -> list[Problem]:
    """All problems of a file; SystemExit names file, line and fault of the first bad record."""
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: `make data TASK={task}` downloads the files of {task}; "
                         "--path names a folder that has them, or one file")
    problems = []
    try:
        for line, row in records(path.read_text(encoding="utf-8")):
            try:
                problems.append(read_record(row, task, f"{path.stem}-{len(problems) + 1}"))
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                fault = f"no field {error}" if isinstance(error, KeyError) else error
                raise SystemExit(f"{path}, line {line}: {fault}. Expected a record like "
                                 f"{reader(row, task).__doc__.splitlines()[0]}") from None
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path}, line {error.lineno}: not JSON: {error.msg}. Expected records like "
                         f"{READERS[task].__doc__.splitlines()[0]}") from None
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} is not UTF-8 text: {error}") from None
    if not problems:
        raise SystemExit(f"{path} has no records")
    return problems


def records(text: str) -> Iterator[tuple[int, dict]]:
    """(line, record) of JSON lines or of one JSON array; decimals stay text, so no digit is lost."""
    decoder, at, line = json.JSONDecoder(parse_float=str), 0, 1

    def skip(pattern: str) -> None:
        nonlocal at, line
        end = re.compile(pattern).match(text, at).end()
        line += text.count("\n", at, end)
        at = end

    skip(r"\s*")
    is_array = text.startswith("[", at)
    skip(r"\[?\s*")
    while text[at:at + 1] != ("]" if is_array else ""):
        row, end = decoder.raw_decode(text, at)
        yield line, row
        line += text.count("\n", at, end)
        at = end
        skip(r"\s*,?\s*")
    if is_array:
        skip(r"\]\s*")
        if at < len(text):
            raise json.JSONDecodeError("more text behind the array", text, at)


def read_record(row: dict, task: str, name: str) -> Problem:
    """One record in its data set's format, or in ReFT's; `name` serves where it has no id."""
    if not isinstance(row, dict):
        raise ValueError(f"not an object but {row!r:.60}")
    problem = reader(row, task)(row, name)
    if not problem.question.strip() or not problem.answer.strip():
        raise ValueError("the question or the answer is empty")
    return problem


def reader(row: dict, task: str) -> Callable[[dict, str], Problem]:
    return reft if isinstance(row, dict) and "answer_value" in row else READERS[task]


def gsm8k(row: dict, name: str) -> Problem:
    """{"question": ..., "answer": "48/2 = <<48/2=24>>24 ... #### 72"}"""
    question, solution = row["question"].strip(), row["answer"].strip()
    if "####" not in solution:
        raise ValueError("the answer does not end in '#### N'")
    return Problem(name, question, solution.split("####")[1].strip(), solution)


def svamp(row: dict, name: str) -> Problem:
    """{"Body": ..., "Question": ..., "Equation": ..., "Answer": 51.0}"""
    body = row["Body"].strip()
    return Problem(name, f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {row['Question'].strip()}",
                   str(row["Answer"]), "")


def mathqa(row: dict, name: str) -> Problem:
    """{"Problem": ..., "Rationale": ..., "options": "a ) 38 , b ) ...", "correct": "a"}"""
    if row["correct"] not in tuple("abcde"):
        raise ValueError(f"correct is {row['correct']!r}, not one of a to e")
    rationale = row["Rationale"].strip().strip('"').strip()
    return Problem(name, f"{row['Problem'].strip()}\n{row['options'].strip()}", row["correct"],
                   f"{rationale}\nTherefore, the answer is: {row['correct']}")


def reft(row: dict, name: str) -> Problem:
    """{"question": ..., "answer_cot": words or "def solution(): ...", "answer_value": "203.0"}

    The trigger goes behind every solution in words, as in ReFT's training, although SVAMP's already
    say "Therefore, the answer is <203>."
    """
    answer, solution = str(row["answer_value"]), row.get("answer_cot", "").strip()
    if solution and not solution.startswith("def solution"):
        solution += f"\nTherefore, the answer is: {answer}"
    return Problem(name, row["question"].strip(), answer, solution)


def math(row: dict, name: str) -> Problem:
    """{"problem": ..., "solution": "... $\\boxed{2}$", "answer": "2", "unique_id": "test/algebra/1.json"}"""
    if not row["unique_id"].startswith(("train/", "test/")):
        raise ValueError(f"unique_id is {row['unique_id']!r}: it must say train/ or test/")
    return Problem(row["unique_id"], row["problem"].strip(), row["answer"], row["solution"].strip())


def arc(row: dict, name: str) -> Problem:
    """{"id": ..., "question": {"stem": ..., "choices": [{"text", "label"}, ...]}, "answerKey": "C"}

    Three to five choices, labelled A to E or 1 to 5; the labels are asked and answered as they are.
    """
    choices = row["question"]["choices"]
    labels = [choice["label"] for choice in choices]
    if not 3 <= len(choices) <= 5 or row["answerKey"] not in labels:
        raise ValueError(f"answerKey {row['answerKey']!r} is not among the 3 to 5 labels {labels}")
    lines = [row["question"]["stem"].strip(), *(f"({c['label']}) {c['text'].strip()}" for c in choices)]
    return Problem(row.get("id") or name, "\n".join(lines), row["answerKey"], "")


READERS = {"gsm8k": gsm8k, "svamp": svamp, "mathqa": mathqa, "mathqa-numeric": reft, "math": math,
           "arc": arc}
