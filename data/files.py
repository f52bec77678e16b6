"""Read problems from the data sets' files: one short reader per record format, and the first bad record is an error.

A solution is kept as its data set writes it: GSM8K's ends in "#### 72", MATH's has its answer in a box, ReFT's are
programs or end in "Therefore, the answer is: 72.0". SVAMP's test set, ARC and ReFT's test sets have no solutions: "".
"""
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path

from infra import InputError


@dataclass(frozen=True)
class Problem:
    """A question, its right answer, and a gold solution in the format of the data set, or "" where there is none."""
    id: str
    question: str
    answer: str
    solution: str


# The files of each split. Where there is no "dev", dev is held out of train. SVAMP publishes only a test set, and
# MathQA no numeric answers: what they lack comes from ReFT.
FILES = {
    "publisher": {
        "gsm8k": {"train": ["train.jsonl"], "test": ["test.jsonl"]},
        "svamp": {"train": ["svamp_nl.json"], "test": ["SVAMP.json"]},
        "mathqa": {"train": ["train.json"], "dev": ["dev.json"], "test": ["test.json"]},
        "mathqa-numeric": {"train": ["mathqa-numeric_nl.json"], "test": ["mathqa-numeric_test_set.json"]},
        # prm800k splits the 12,500 problems in another way: unique_id tells the original split
        "math": {"train": ["train.jsonl", "test.jsonl"], "test": ["train.jsonl", "test.jsonl"]},
        "arc": {"train": ["ARC-Challenge-Train.jsonl", "ARC-Easy-Train.jsonl"],  # both, as IRPO
                "dev": ["ARC-Challenge-Dev.jsonl"], "test": ["ARC-Challenge-Test.jsonl"]}},
    **{source: {task: {"train": [f"{task}_{ending}.json"], "test": [f"{task}_test_set.json"]}
                for task in ("gsm8k", "svamp", "mathqa", "mathqa-numeric")}
       for source, ending in (("reft", "nl"), ("program", "python_sdp"))},
}


NUMBER = (int, Decimal, str)  # how data sets write numeric answers
LETTERS = "ABCDE"  # of choices; the graders know no more
ANSWERS = {  # how answers of your own data can be compared (--answer), and what a record's must be
    "number": "a number", "letter": "the letter of a choice", "text": "text", "latex": "a formula in LaTeX",
    "python": "the number that a program returns"}


def read_problems(path: Path, task: str) -> list[Problem]:
    """Read all problems of a file; InputError names file, place and fault of the first bad record."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: `make data TASK={task}` downloads the files of {task}, and --path "
                         "names a folder that has them; records of your own are named by --task FILE")
    problems, place, row = [], "line 1", {}
    try:
        for place, row in records(path.read_text(encoding="utf-8-sig")):  # noqa: B007 (both name a fault)
            problems.append(read_record(row, task, f"{path.stem}-{len(problems) + 1}"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        fault = f"line {error.lineno}: not JSON: {error.msg}"
    except KeyError as error:
        fault = f"{place}: no field {error}"
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        fault = f"line {error.lineno}: {error}" if hasattr(error, "lineno") else f"{place}: {error}"
    else:
        fault = "" if problems else f"{place}: no records"
    if fault:
        raise InputError(f"{path}, {fault}. Expected one record per line, or an array of records, like "
                         f"{reader(row, task).__doc__.splitlines()[0]}")
    return problems


def records(text: str) -> Iterator[tuple[str, dict]]:
    """Yield (place, record) of JSON lines, or of one JSON array. No digit of a decimal is lost."""
    if text.lstrip().startswith("["):
        for i, row in enumerate(json.loads(text, parse_float=Decimal), start=1):
            yield f"record {i}", row
        return
    for i, line in enumerate(text.split("\n"), start=1):  # splitlines would also split at U+2028 within a text
        if line.strip():
            try:
                row = json.loads(line, parse_float=Decimal)
            except (ValueError, RecursionError) as error:  # the latter where brackets are nested without end
                error.lineno = i  # json counts from this line
                raise
            yield f"line {i}", row


def read_record(row: dict, task: str, name: str) -> Problem:
    """Read one record in the format of its data set (or of your own data: a kind of answer), or in ReFT's.

    Where it has no id, `name` is its id.

    ValueError for a record that no response can answer: the gold answer must be one that the task's grader reads.
    """
    from rewards import EXTRACT, READ  # here, since it loads torch, which a download does without
    if not isinstance(row, dict):
        raise ValueError(f"not an object but {row!r:.60}")
    problem = reader(row, task)(row, name)
    for text in astuple(problem):
        text.encode()  # ValueError for half of a surrogate pair, which no tokenizer takes
    answer = READ[task](problem.answer)
    if answer is None or not is_bare(problem.answer, task, len(row.get("choices") or LETTERS)):
        name, why = ("answer", f"not {ANSWERS[task]}, as --answer {task} expects") if task in ANSWERS else (
            "the right answer", f"which the grader of {task} cannot read")
        raise ValueError(f"{name} is {problem.answer!r:.60}, {why}")
    for marks in ("hash", "final_answer") if task in ("number", "letter", "text") else ():
        said = EXTRACT[marks](problem.solution.strip().split("\n")[-1])
        if said and READ[task](said) not in (None, answer):
            raise ValueError(f"solution ends in {said!r:.60}, and answer is {problem.answer!r:.60}")
    return problem


def is_bare(answer: str, task: str, choices: int) -> bool:
    """Whether a gold answer is only an answer: graders read "Apollo 11" as a number, "B minor" as a letter, "NaN" as
    LaTeX."""
    if task == "letter":
        return bool(re.fullmatch(rf"(?i)\W*[{LETTERS[:choices]}]\W*", answer))
    if task in ("number", "python") and answer[0].isalpha() or "\n" in answer:
        return False
    return task == "text" or answer.lower() not in ("null", "none", "nan")


def reader(row: dict, task: str) -> Callable[[dict, str], Problem]:
    return reft if isinstance(row, dict) and "answer_value" in row else READERS[task]


def text_of(row: dict, field: str, kinds: tuple[type, ...] = (str,), optional: bool = False) -> str:
    """Return a field as text without spaces around it; ValueError for another kind of value, and for an empty one.

    An optional field may be missing, null or empty, which is "".
    """
    if optional and row.get(field) in (None, ""):
        return ""
    if not isinstance(row[field], kinds) or isinstance(row[field], bool) or not (text := str(row[field]).strip()):
        raise ValueError(f"{field} is {row[field]!r:.60}, not {'a number or text' if int in kinds else 'text'}")
    return text


# Each reader's docstring begins with the record that it expects, which error messages show.

def gsm8k(row: dict, name: str) -> Problem:
    """{"question": ..., "answer": "48/2 = <<48/2=24>>24 ... #### 72"}"""
    solution = text_of(row, "answer")
    if "####" not in solution:
        raise ValueError("the answer does not end in '#### N'")
    return Problem(name, text_of(row, "question"), solution.split("####")[1].strip(), solution)


def svamp(row: dict, name: str) -> Problem:
    """{"Body": ..., "Question": ..., "Equation": ..., "Answer": 51.0}"""
    body = text_of(row, "Body")
    end = "" if body.endswith((".", "?", "!")) else "."
    return Problem(name, f"{body}{end} {text_of(row, 'Question')}", text_of(row, "Answer", NUMBER), "")


def mathqa(row: dict, name: str) -> Problem:
    """{"Problem": ..., "Rationale": ..., "options": "a ) 38 , b ) ...", "correct": "a"}"""
    options, correct = text_of(row, "options"), text_of(row, "correct")
    if correct not in tuple("abcde") or f"{correct} )" not in options:
        raise ValueError(f"correct is {correct!r}, not one of the options a to e: {options}")
    rationale = text_of(row, "Rationale", optional=True).strip('"').strip()
    return Problem(name, f"{text_of(row, 'Problem')}\n{options}", correct,
                   f"{rationale}\nTherefore, the answer is: {correct}")


def reft(row: dict, name: str) -> Problem:
    """{"question": ..., "answer_cot": words or "def solution(): ...", "answer_value": "203.0"}

    As in ReFT's training, the trigger follows every solution in words, although SVAMP's already say "Therefore, the
    answer is <203>."
    """
    answer, solution = text_of(row, "answer_value", NUMBER), text_of(row, "answer_cot", optional=True)
    if solution and not solution.startswith("def solution"):
        solution += f"\nTherefore, the answer is: {answer}"
    return Problem(name, text_of(row, "question"), answer, solution)


def math(row: dict, name: str) -> Problem:
    """{"problem": ..., "solution": "... $\\boxed{2}$", "answer": "2", "unique_id": "test/algebra/1.json"}"""
    if not text_of(row, "unique_id").startswith(("train/", "test/")):
        raise ValueError(f"unique_id is {row['unique_id']!r}: it must say train/ or test/")
    solution = text_of(row, "solution", optional=True)
    return Problem(row["unique_id"], text_of(row, "problem"), text_of(row, "answer"), solution)


def arc(row: dict, name: str) -> Problem:
    """{"id": ..., "question": {"stem": ..., "choices": [{"text", "label"}, ...]}, "answerKey": "C"}

    There are three to five choices, labelled A to E or 1 to 5. Labels are shown, and answered, as they are.
    """
    choices = row["question"]["choices"]
    texts = [text_of(choice, "text") for choice in choices]
    labels, key = [text_of(choice, "label") for choice in choices], text_of(row, "answerKey")
    if not 3 <= len({*labels}) == len(labels) <= 5 or key not in labels:
        raise ValueError(f"answerKey {key!r} is not among 3 to 5 different labels: {labels}")
    lines = [text_of(row["question"], "stem"), *(f"({label}) {text}" for label, text in zip(labels, texts))]
    return Problem(text_of(row, "id", optional=True) or name, "\n".join(lines), key, "")


def own(row: dict, name: str) -> Problem:
    """{"question": ..., "answer": ...}, and where there are any, "solution": ..., "choices": [..., ...], "id": ...

    Two to five choices are shown below the question as (A), (B) ...
    """
    question, answer = text_of(row, "question"), text_of(row, "answer", NUMBER)
    for field in ("solution", "choices"):  # a slip in an optional one would not be noticed
        if field not in row and (near := get_close_matches(field, row, 1, 0.8)):
            raise ValueError(f"field {near[0]!r}: did you mean {field!r}?")
    if (choices := row.get("choices")) is not None:
        texts = [str(choice).strip() for choice in choices if isinstance(choice, NUMBER)] if choices else []
        if not isinstance(choices, list) or not 2 <= len({*texts} - {""}) == len(choices) <= len(LETTERS):
            raise ValueError(f"choices is {choices!r:.60}, not a list of 2 to {len(LETTERS)} different texts")
        question = "\n".join([question, *(f"({letter}) {text}" for letter, text in zip(LETTERS, texts))])
    return Problem(text_of(row, "id", NUMBER, optional=True) or name, question, answer,
                   text_of(row, "solution", optional=True))


READERS = {"gsm8k": gsm8k, "svamp": svamp, "mathqa": mathqa, "mathqa-numeric": reft, "math": math, "arc": arc,
           **dict.fromkeys(ANSWERS, own)}
