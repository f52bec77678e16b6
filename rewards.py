"""Text in, verdict out: the one place that decides whether a model's answer is right.

Two steps. *Extract* finds the phrase that an answer format marks (`#### 72`, `Final answer: 72`,
`\\boxed{72}`, ...). *Read* turns the phrase into a canonical answer: a number, a letter, or LaTeX
(`latex.py`). The gold answer goes through the same reader. Numbers are exact rationals, so "18",
"18.0" and "$18" are one vote, and 10000000000000001 is not 1e16.

    grade("9 * 2 = 18\\n#### 18", "18", "gsm8k")          ->  Grade("correct", "18")
    grade("I do not know.", "18", "gsm8k")               ->  Grade("unparsed", None)
    grade_programs(texts, golds, "svamp", workers=2)     program chains of thought (`sandbox.py`)
    equations_hold("48/2=<<48/2=24>>24")                 ->  True, the filter of RFT

Where the papers' own graders disagree with each other, or with common sense:
  - An answer must be given, not implied: no marker, a number in words, or an expression that is not
    worked out (6/2, 9 * 2) is "unparsed".
  - Hedging earns nothing: among two numbers, a range, or "A or C" none is chosen.
  - Of several marked answers the last counts, but nothing behind a new "\\nQuestion:". `####` and
    Minerva's sentence are read from the front: there the official graders take the first.

Left out: choosing an ARC option by its text (that needs the choices), and units, which are dropped.
MATH needs `pip install "math-verify[antlr4_13_2]"`; call `require_math_verify()` at the start of a
run to hear that it is missing before the first answer does.
"""

import ast
import operator
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from grading import latex
from grading import sandbox
from infra.parallel import computed, node_size

require_math_verify = latex.require_math_verify  # for the drivers to call at start

OWN_FORMAT = {"toy": "hash", "gsm8k": "hash", "svamp": "trigger", "mathqa": "trigger",
              "mathqa-numeric": "trigger", "math": "boxed", "arc": "final_answer"}  # fmt: skip
REFT_FORMATS = ("trigger", "python")


@dataclass(frozen=True)
class Grade:
    verdict: str  # "correct" | "wrong" | "unparsed" (no answer found) | "timeout"
    answer: str | None  # canonical: equal answers are equal strings, so they can be counted


def grade(text: str, gold: str, dataset: str, answer_format: str | None = None) -> Grade:
    """Judge one response; `answer_format` None is the data set's own. Any text gets a verdict."""
    answer_format = answer_format or OWN_FORMAT[dataset]
    if answer_format == "python":
        return grade_programs([text], [gold], dataset, workers=1)[0]
    text = text.partition("\0")[0]  # NUL ends a text, as for the authors of RFT
    return _judge(EXTRACT[answer_format](text), gold, dataset, answer_format)


def grade_programs(
    texts: Sequence[str], golds: Sequence[str], dataset: str, workers: int = 2
) -> list[Grade]:
    """Run each program in a locked process of its own and judge what its solution() returns."""
    programs = {i: code for i, text in enumerate(texts) if (code := _program(text)) is not None}
    jobs = [{"code": code} for code in programs.values()]
    outcomes = dict(zip(programs, sandbox.run_all("program", jobs, workers), strict=True))
    grades = []
    for i, gold in zip(range(len(texts)), golds, strict=True):
        outcome = outcomes.get(i, sandbox.Outcome("failed"))
        if outcome.status == "timeout":
            grades.append(Grade("timeout", None))
        else:
            grades.append(_judge(_one_word(outcome.value), gold, dataset, "python"))
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
    phrase = phrase and (_boxed(phrase) or phrase)
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
    """ReFT's tolerance, 0.01: its golds are rounded (0.3333333333333333), its programs use floats.

    But no more than 5 % of the gold: 0.01 alone lets 0.03 pass for 0.036. Everything else is exact.
    """
    difference = abs(Fraction(answer) - Fraction(gold))
    return difference <= min(Fraction(1, 100), abs(Fraction(gold)) / 20)


# ---- extract: text -> phrase ---------------------------------------------------------------------

_HASH = re.compile(r"#### ([^\s*+<]\S*)")  # markup, annotations and a plus sign are no answer here
_FINAL_ANSWER = re.compile(r"(?i:final answer)[*_]* ?:[*_]*")
_TRIGGER = re.compile(r"Therefore, the answer is:")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")
_MINERVA = "Final Answer: The final answer is"
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_TOP_LEVEL = ("def ", "class ", "import ", "from ", "@", "#")


def _hash(text: str) -> str | None:
    """The word after the first `#### ` (one space): what follows may be the next question.

    Any comma between digits is dropped, as OpenAI and the authors of RFT do: 1,3 is 13 here.
    """
    match = _HASH.search(text)
    return re.sub(r"(?<=[0-9]),(?=[0-9])", "", match[1]) if match else None


def _marked(text: str, marker: re.Pattern) -> str | None:
    """The first line after the last marker, looking no further than a new question."""
    first = marker.search(text)
    if first is None:
        return None
    end = text.find("\nQuestion:", first.end())
    *_, last = marker.finditer(text[: end if end >= 0 else len(text)])
    line = text[last.end() : end if end >= 0 else len(text)].strip().partition("\n")[0]
    return line or None


def _final_answer(text: str) -> str | None:
    return _marked(text, _FINAL_ANSWER)


def _trigger(text: str) -> str | None:
    """ReFT's trigger; a text that is nothing but one word is taken as the answer, as ReFT does."""
    return _marked(text, _TRIGGER) if _TRIGGER.search(text) else _one_word(text)


def _boxed(text: str) -> str | None:
    """Content of the last box that is closed, by brace count in one pass."""
    stack, box = [], None
    for match in _BOX.finditer(text):
        token = match[0]
        if token == "}":
            start = stack.pop() if stack else None
            if start is not None and (box is None or start > box[0]):
                box = (start, match.start())
        elif not token.startswith((r"\{", r"\}")):
            stack.append(match.end() if token != "{" else None)
    return text[slice(*box)].strip() or None if box else None


def _minerva(text: str) -> str | None:
    """The first `Final Answer: The final answer is ... . I hope it is correct.`"""
    sentence = text.partition(_MINERVA)[2].partition(". I hope it is correct")[0]
    return sentence.strip().partition("\n\n")[0] or None


def _one_word(value: object) -> str | None:
    """A value that is one word: "72" is an answer, "72 clips" and a list are not."""
    words = value.split(maxsplit=1) if isinstance(value, str) else []
    return words[0] if len(words) == 1 else None


def _program(text: str) -> str | None:
    """The program in a text, without code fence and without what the model wrote after it.

    The text must hold `def solution` (where the prompt already does, put it back in front). The
    authors stop at the first blank line, which also cuts programs that contain one. Here a blank
    line is the end only if the line after it is neither indented nor a definition or an import.
    They also turn sys.exit into print; here a program that leaves has returned no answer.
    """
    fenced = _FENCE.search(text)
    lines = (fenced[1] if fenced else text.partition("\nQuestion:")[0]).split("\n")
    starts = [i for i, line in enumerate(lines) if re.match(r"def solution\b", line)]
    if not starts:
        return None
    for i in range(starts[0] + 1, len(lines)):
        goes_on = not lines[i] or lines[i][0].isspace() or lines[i].startswith(_TOP_LEVEL)
        if not goes_on and not lines[i - 1].strip():
            return "\n".join(lines[:i])
    return "\n".join(lines)


EXTRACT = {"hash": _hash, "final_answer": _final_answer, "trigger": _trigger, "boxed": _boxed,
           "minerva": _minerva}  # fmt: skip


# ---- read: phrase -> canonical number or letter --------------------------------------------------

# ASCII digits, commas between groups of three: "1,3", "1.2.3", "1_00" and "5:30" are no numbers.
_NUMBER = re.compile(
    r"(?<![\w.,/])(?<![0-9]:)(-?\$?-?)"
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
    r"([eE][-+]?[0-9]{1,2})?(?:/([0-9]+))?"
    r"(?![.,:/_^]?[0-9]|[_^*]|/\s*(?![\sa-zA-Z])|[eE][-+]?[0-9])"
)
_UNFINISHED = re.compile(  # after a number: an operator, another number, "dollars and 50 cents"
    r"\s*(?:[a-zA-Z]+\s+){0,2}(?:and|or|to|\\times|\\cdot|\\div|[-–+*/x×÷=^,;&])\s*[-$\\]*\.?[0-9]"
    r"|\s*(?:[a-zA-Z]+\s+)?[$\\]*\.?[0-9]|\s*(?:hundred|thousand|million|billion|dozen)\b"
)
_LETTER = re.compile(  # at the start: "(C)", "C.", "a ) 38", "Option C", "B because"
    r"\W*(?:(?i:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?):?\s*)?\(?"
    r"(?:([A-Ea-e1-5])(?=\s*(?:$|[).:,;<>\]}](?![0-9])|[\"'”](?!\w)|[-–]\s))|([B-E])(?=\s))"
)
_OTHER_LETTER = re.compile(r"\W*(?:\b(?:or|and)\b|[&/,])\W*(?:[A-E]\b|[a-e]\b(?!\s+\w))")
_LETTER_INSIDE = re.compile(  # in a sentence: "(c)" or a capital, but not the article A
    r"\(([A-Ea-e])\)|(?<![\w'’-])([B-E]|A(?!\s+(?!(?:or|and|is|because)\b)[a-z]))(?![\w'’-])"
)


def read_number(phrase: str) -> str | None:
    """The number a phrase gives: "18", "$18.00.", "9 * 2 = 18", "Janet makes $18 a day"."""
    phrase = _plain(phrase)
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


def read_letter(phrase: str) -> str | None:
    """The option a phrase names: "C", "(C)", "C. Days get shorter", "The answer is (C)."."""
    phrase = _plain(phrase)
    match = _LETTER.match(phrase)
    if match:
        second = _OTHER_LETTER.match(phrase, match.end())
        return None if second else (match[1] or match[2]).upper()
    found = {(match[1] or match[2]).upper() for match in _LETTER_INSIDE.finditer(phrase)}
    return found.pop() if len(found) == 1 else None


def read_mathqa_letter(phrase: str) -> str | None:
    letter = read_letter(phrase)
    return letter.lower() if letter and letter.isalpha() else None


def _plain(phrase: str) -> str:
    """Without Markdown bold and the LaTeX around a number or a letter."""
    phrase = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\b", "", phrase)
    for mark, plain in (("{,}", ","), (r"\$", "$"), (r"\!", ""), (r"\,", ""), ("−", "-")):
        phrase = phrase.replace(mark, plain)
    phrase = re.sub(r"\$([^$]*)\$", r" \1 ", phrase)
    return re.sub(r"^- +", "-", phrase.replace("**", "").replace("`", "").strip(" _*"))


READ = {"toy": read_number, "gsm8k": read_number, "svamp": read_number, "arc": read_letter,
        "mathqa": read_mathqa_letter, "mathqa-numeric": read_number,
        "math": latex.read_latex}  # fmt: skip


# ---- equations of RFT ----------------------------------------------------------------------------

MAX_EQUATION = 200  # characters; the longest of GSM8K has 40
MAX_BITS = 4096  # of any intermediate value
_ARITHMETIC = re.compile(r"[0-9.+\-*/() ]+")
_VALUE = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")


def equations(text: str) -> list[str]:
    """The contents of every <<...>>, spaces removed: RFT's key for a reasoning path."""
    return [content.replace(" ", "") for content in _annotations(text)]


def _annotations(text: str) -> list[str]:
    """Same matches as <<([^>]*)>>, but each << is scanned once: 50,000 of them take no time."""
    return [content for content, end in re.findall(r"<<([^>]*)(>?>?)", text) if end == ">>"]


def equations_hold(text: str) -> bool:
    """RFT's check (App. A): each equation evaluates to its right side; none at all passes.

    As the authors' code: "=" must be there, the difference is below 1e-3 since right sides are
    rounded (10/3=3.333), and what follows a second "=" is not looked at.
    """
    return all(_holds(equation) for equation in _annotations(text))


def _holds(equation: str) -> bool:
    """Spaces count here, unlike in the key: 1 0=10 is no equation."""
    left, *right = map(str.strip, equation.split("="))
    if not right or not _VALUE.fullmatch(right[0]) or len(right[0]) > MAX_EQUATION:
        return False
    value = arithmetic(left)
    return value is not None and abs(value - Fraction(right[0])) < Fraction(1, 1000)


def arithmetic(expression: str) -> Fraction | None:
    """Exact value of + - * / // ** and parentheses; None if it is anything else or too large."""
    if len(expression) > MAX_EQUATION or not _ARITHMETIC.fullmatch(expression):
        return None
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, OverflowError):
        return None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float()):
            return Fraction(str(node.value))  # str of a float is the decimal that was written
        case ast.UnaryOp():
            return _OPERATORS[type(node.op)](_value(node.operand))
        case ast.BinOp():
            value = Fraction(_OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
            if _bits(value) > MAX_BITS:
                raise OverflowError("number too large")
            return value
    raise SyntaxError("not arithmetic")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """9**9**9 has 370 million digits: refuse by size before working it out."""
    if exponent.denominator != 1 or abs(exponent) * _bits(base) > MAX_BITS:
        raise OverflowError("number too large")
    return base ** int(exponent)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Pow: _power,
              ast.USub: operator.neg, ast.UAdd: operator.pos}  # fmt: skip
