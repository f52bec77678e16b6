"""Text in, verdict out: the one place that decides whether a model's answer is right.

First *extract* the phrase that an answer format marks (`#### 72`, `Final answer: 72`, `\\boxed{72}`), then *read* it as
a canonical answer: a number (here), a letter or LaTeX (in grading/). The gold answer goes through the same reader.
Numbers are exact rationals, so "18", "18.0" and "$18" are one vote, and 10000000000000001 is not 1e16.

    grade("9 * 2 = 18\\n#### 18", "18", "gsm8k")          ->  Grade("correct", "18")
    grade("I do not know.", "18", "gsm8k")               ->  Grade("unparsed", None)
    grade_programs(texts, golds, "svamp", workers=2)     programs as solutions (grading/sandbox.py)
    equations_hold("48/2=<<48/2=24>>24")                 ->  True, RFT's filter (grading/equations.py)

Where the papers' own graders disagree with each other, or with common sense:
  - An answer must be given, not implied: no marker, a number in words, or an expression that is not worked out
    (6/2, 9 * 2) is "unparsed".
  - Hedging earns nothing: among two numbers, a range, or "A or C" none is chosen.
  - Of several marked answers the last counts, but nothing behind a new "\\nQuestion:". `####` and Minerva's sentence
    are read from the front: there the official graders take the first.

Left out: units, which are dropped. MATH needs `pip install "math-verify[antlr4_13_2]"`; call `require_math_verify()`
at the start of a run to learn that it is missing before the first answer needs it.
"""
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from grading import formats, latex, letters, sandbox
from grading.equations import equations, equations_hold  # noqa: F401  RFT's key and filter, for rft.py
from grading.latex import require_math_verify  # noqa: F401  for scripts to call before they start
from infra.parallel import computed, node_size

OWN_FORMAT = {"toy": "hash", "gsm8k": "hash", "svamp": "trigger", "mathqa": "trigger", "mathqa-numeric": "trigger",
              "math": "boxed", "arc": "final_answer"}
REFT_FORMATS = ("trigger", "python")


@dataclass(frozen=True)
class Grade:
    """A verdict, and the answer that the response itself gave, even where a tolerance made it correct."""
    verdict: str  # "correct" | "wrong" | "unparsed" (no answer found) | "timeout"
    answer: str | None  # canonical: equal answers are equal strings, so they can be counted


def grade(text: str, gold: str, dataset: str, answer_format: str | None = None) -> Grade:
    """Judge one response; `answer_format` None is the data set's own. Any text gets a verdict."""
    answer_format = answer_format or OWN_FORMAT[dataset]
    if answer_format == "python":
        return grade_programs([text], [gold], dataset, workers=1)[0]
    text = text.partition("\0")[0]  # NUL ends a text, as for the authors of RFT
    return _judge(EXTRACT[answer_format](text), gold, dataset, answer_format)


def grade_programs(texts: Sequence[str], golds: Sequence[str], dataset: str, workers: int = 2) -> list[Grade]:
    """Run each program in a locked process of its own and judge what its solution() returns."""
    programs = [formats.program(text) for text in texts]
    jobs = [{"code": code} for code in programs if code is not None]
    outcomes = iter(sandbox.run_all("program", jobs, workers))
    grades = []
    for code, gold in zip(programs, golds, strict=True):
        outcome = sandbox.Outcome("failed") if code is None else next(outcomes)
        if outcome.status == "timeout":
            grades.append(Grade("timeout", None))
        else:
            grades.append(_judge(formats.one_word(outcome.value), gold, dataset, "python"))
    return grades


def grade_all(texts: list[list[str]], golds: list[str], task: str, marks: str) -> list[list[Grade]]:
    """Grade all texts of each question, on all ranks; programs run side by side."""
    def judge(part: range) -> list[list[Grade]]:
        pairs = [(text, golds[i]) for i in part for text in texts[i]]
        if marks == "python":
            grades = iter(grade_programs(*zip(*pairs), task, workers=max(1, os.cpu_count() // node_size())))
        else:
            grades = iter([grade(text, gold, task, marks) for text, gold in pairs])
        return [[next(grades) for _ in texts[i]] for i in part]

    parts = [range(i, min(i + 64, len(texts))) for i in range(0, len(texts), 64)]
    return [group for part in computed(parts, judge) for group in part]


def _judge(phrase: str | None, gold: str, dataset: str, answer_format: str) -> Grade:
    read = READ[dataset]
    phrase = phrase and (formats.boxed(phrase) or phrase)
    answer = read(phrase) if phrase else None
    if answer is None:
        return Grade("unparsed", None)
    wanted = read(gold)
    if answer == wanted:
        return Grade("correct", answer)
    if wanted is None:
        return Grade("wrong", answer)
    if dataset == "math":
        return Grade(latex.compare(gold, phrase), answer)
    rounded = dataset == "mathqa-numeric" or answer_format in REFT_FORMATS
    near = rounded and read is read_number and _close(answer, wanted)
    return Grade("correct" if near else "wrong", answer)


def _close(answer: str, gold: str) -> bool:
    """Apply ReFT's tolerance, 0.01: its golds are rounded (0.3333333333333333), its programs use floats.

    But allow no more than 5 % of the gold: 0.01 alone lets 0.03 pass for 0.036. Everything else is exact. The tolerance
    changes the verdict only: the answer stays the response's own number, since votes are counted without knowing gold.
    For the gold 0.3333333333333333, 0.33 and 1/3 are both correct, and they are two different votes.
    """
    difference = abs(Fraction(answer) - Fraction(gold))
    return difference <= min(Fraction(1, 100), abs(Fraction(gold)) / 20)


# --- extract: text -> phrase ----------------------------------------------------------------------

_HASH = re.compile(r"#### ([^\s*+<]\S*)")  # markup, annotations and a plus sign are no answer here


def _hash(text: str) -> str | None:
    """Find the word after the first `#### ` (one space): what follows may be the next question.

    Any comma between digits is dropped, as OpenAI and the authors of RFT do: 1,3 is 13 here.
    """
    match = _HASH.search(text)
    return re.sub(r"(?<=[0-9]),(?=[0-9])", "", match[1]) if match else None


EXTRACT = {"hash": _hash, "final_answer": formats.final_answer, "trigger": formats.trigger, "boxed": formats.boxed,
           "minerva": formats.minerva}


# --- read: phrase -> canonical number -------------------------------------------------------------

# ASCII digits, commas between groups of three: "1,3", "1.2.3", "1_00" and "5:30" are no numbers.
_NUMBER = re.compile(
    r"(?<![\w.,/])(?<![0-9]:)(-?\$?-?)"
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
    r"([eE][-+]?[0-9]{1,2})?(?:/([0-9]+))?"
    r"(?![.,:/_^]?[0-9]|[_^*]|/\s*(?![\sa-zA-Z])|[eE][-+]?[0-9])")
_UNFINISHED = re.compile(  # after a number: an operator, another number, "dollars and 50 cents"
    r"\s*(?:[a-zA-Z]+\s+){0,2}(?:and|or|to|\\times|\\cdot|\\div|[-–+*/x×÷=^,;&])\s*[-$\\]*\.?[0-9]"
    r"|\s*(?:[a-zA-Z]+\s+)?[$\\]*\.?[0-9]|\s*(?:hundred|thousand|million|billion|dozen)\b")


def read_number(phrase: str) -> str | None:
    """Read the number that a phrase gives: "18", "$18.00.", "9 * 2 = 18", "Janet makes $18 a day"."""
    phrase = formats.plain(phrase)
    lead = re.match(r"[\s({\[<\"']*", phrase).end()
    match = _NUMBER.match(phrase, lead)
    if match and not _UNFINISHED.match(phrase, match.end()):
        return _number(match)
    if "=" in phrase:
        return read_number(phrase.rpartition("=")[2])
    values = {_number(match) for match in _NUMBER.finditer(phrase)}
    return values.pop() if len(values) == 1 and match is None else None


def _number(match: re.Match) -> str | None:
    sign, digits, power, divisor = match.groups()
    if len(match[0]) > latex.MAX_DIGITS or sign.count("-") > 1:
        return None
    digits = digits.replace(",", "")
    if divisor is None:
        value = Fraction(digits + (power or ""))
    else:  # 1/2 is a number; 6/2, 2/4 and 0.5/2 are divisions still to be done
        value = latex.reduced(digits, divisor) if digits.isdigit() and not power else None
    return None if value is None else latex.spell(-value if "-" in sign else value)


READ = {"toy": read_number, "gsm8k": read_number, "svamp": read_number, "mathqa-numeric": read_number,
        "mathqa": letters.read_mathqa_letter, "arc": letters.read_letter, "math": latex.read_latex}
