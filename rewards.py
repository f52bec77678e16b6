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
  - Work must be done: where the question has \\sqrt{242} and the answer is 11\\sqrt{2}, boxing \\sqrt{242} is
    "copied", though published graders accept any equal formula (17 questions of MATH-500 can be answered so). It
    counts as neither right nor wrong, so it is never chosen, rewarded or rejected: those graders' accuracy is our
    correct plus our copied. A \\sqrt{12} that is not in the question still equals 2\\sqrt{3}.
  - Of several marked answers the last counts, but nothing behind a new "\\nQuestion:". Of `####` and Minerva's
    sentence the first counts, as in the official graders.

Left out: units, which are dropped. MATH needs `pip install "math-verify[antlr4_13_2]"`; call `require_math_verify()`
at the start of a run to learn that it is missing before the first answer needs it.
"""
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from grading import formats, latex, letters, sandbox
from grading.equations import equations, equations_hold, plain_equations  # noqa: F401  RFT's keys and filter
from grading.latex import require_math_verify  # noqa: F401  for scripts to call before they start
from infra import InputError
from infra.parallel import computed, node_size

OWN_FORMAT = {"toy": "hash", "gsm8k": "hash", "svamp": "trigger", "mathqa": "trigger", "mathqa-numeric": "trigger",
              "math": "boxed", "arc": "final_answer",
              # your own data, by the kind of its answers
              "number": "hash", "letter": "final_answer", "text": "final_answer", "latex": "boxed", "python": "python"}
REFT_FORMATS = ("trigger", "python")


@dataclass(frozen=True)
class Grade:
    """A verdict, and the answer that the response itself gave, even where a tolerance made it correct."""
    verdict: str  # "correct" | "wrong" | "unparsed" (no answer found) | "copied" | "timeout" (nobody knows)
    answer: str | None  # canonical: equal answers are equal strings, so they can be counted
    score: float | None = None  # where a reward of your own was the judge (data/own.py)


def grade(text: str, gold: str, dataset: str, answer_format: str | None = None, prompt: str = "") -> Grade:
    """Judge one response to a prompt; `answer_format` None is the data set's own. Any text gets a verdict.

    dataset: a data set's name or, for data of your own, the kind of its answers (data.files.ANSWERS).
    """
    if dataset not in READ or answer_format not in (None, *EXTRACT, "python"):
        raise InputError(f"cannot grade {dataset!r} in the format {answer_format!r}: choose from {', '.join(READ)}; "
                         f"{', '.join(EXTRACT)}, python")
    answer_format = answer_format or OWN_FORMAT[dataset]
    if answer_format == "python":
        return grade_programs([text], [gold], dataset, workers=1)[0]
    text = text.partition("\0")[0]  # NUL ends a text, as for the authors of RFT
    return _judge(EXTRACT[answer_format](text), gold, dataset, answer_format, prompt)


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


def grade_all(texts: list[list[str]], golds: list[str], task: str, marks: str,
              prompts: list[str] | None = None) -> list[list[Grade]]:
    """Grade all texts of each question, on all ranks; programs run side by side."""
    def judge(part: range) -> list[list[Grade]]:
        if marks == "python":
            pairs = [(text, golds[i]) for i in part for text in texts[i]]
            grades = iter(grade_programs(*zip(*pairs), task, workers=max(1, sandbox.usable_cores() // node_size())))
            return [[next(grades) for _ in texts[i]] for i in part]
        return [[grade(text, golds[i], task, marks, prompts[i] if prompts else "") for text in texts[i]] for i in part]

    parts = [range(i, min(i + 64, len(texts))) for i in range(0, len(texts), 64)]
    return [group for part in computed(parts, judge) for group in part]


def _judge(phrase: str | None, gold: str, dataset: str, answer_format: str, prompt: str = "") -> Grade:
    read = READ[dataset]
    phrase = phrase and (formats.boxed(phrase) or phrase)
    if phrase and answer_format == "hash" and read is read_number:
        phrase = re.sub(r"(?<=[0-9]),(?=[0-9])", "", phrase)  # as OpenAI and the authors of RFT do: 1,3 is 13 here
    answer = read(phrase) if phrase else None
    if answer is None:
        return Grade("unparsed", None)
    wanted = read(gold)
    if answer == wanted:
        return Grade("correct", answer)
    if wanted is None:
        return Grade("wrong", answer)
    if read is latex.read_latex:
        verdict = latex.compare(gold, phrase)
        copied = verdict == "correct" and answer in latex.formulas(prompt)
        return Grade("copied" if copied else verdict, answer)
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

_HASH = re.compile(r"#### ([^\s*+<][^\n<]*)")  # markup, annotations and a plus sign are no answer here


def _hash(text: str) -> str | None:
    """Find the rest of the line after the first `#### ` (one space): what follows may be the next question."""
    match = _HASH.search(text)
    return match[1] if match else None


EXTRACT = {"hash": _hash, "final_answer": formats.final_answer, "trigger": formats.trigger, "boxed": formats.boxed,
           "minerva": formats.minerva}


# --- read: phrase -> canonical number -------------------------------------------------------------

# ASCII digits, commas between groups of three: "1,3", "1.2.3", "1_00" and "5:30" are no numbers.
_NUMBER = re.compile(
    r"(?<![\w.,/)\]}])(?<![0-9]:)([-+]?(?:[$€£¥] ?)?[-+]?)(?:([0-9]+)(?: and)? (?=[0-9]+/))?"
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,2})?(?:/([0-9]+))?"
    r"(?![.,:/_^]?[0-9]|[_^*]|[eE][-+]?[0-9])"
    r"((?: ?(?:[kKMB]|bn)\b(?![&-])|[ -](?i:hundred|thousand|million|billion|trillion|dozen)\b)*)")  # not 15 M&Ms
_SCALES = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "bn": 10**9, "hundred": 100, "thousand": 10**3,
           "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SPELLINGS = [  # (pattern, its one spelling): what read_number knows of other ways to write a number
    (r"[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]", lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("⁄", "/")),
    (r"\\[dtc]?frac ?([0-9])([0-9])", r" \1/\2"),
    (r"\\[dtc]?frac ?\{ ?([0-9]+) ?\} ?\{ ?([0-9]+) ?\}", r" \1/\2"),
    (r"\^ ?\{? ?\\circ ?\}?", "°"),
    (r"\\(?:[;: ]|q?quad\b|left\b|right\b|approx\b)", " "),
    (r"(?<=[0-9])['’](?=[0-9]{3}(?![0-9]))", ","),
    (r"(?i)\b(?:negative|minus) (?=[$€£]?\.?[0-9])", "-"),
    (r"(?<=[0-9]) ?(?:[×x*·]|\\times|\\cdot) ?10 ?(?:\^|\*\*) ?\{?([-+]?[0-9]{1,2})\}?(?![0-9])", r"e\1"),
    (r"(\$ ?[0-9.,]+ ?)([mb])\b", lambda m: m[1] + m[2].upper()),  # $5m
    (r"[<>!~]=|=/=", "≠"),
    (r"\b((?:[cdkm]?m|in|ft|yd|mi|s|inches|feet|yards|miles|meters|units)\.?\}?) ?(?:\^ ?\{?[23]\}?|[²³])(?![0-9])",
     r"\1"),  # 18 cm²
    (r" +", " "), (r"^- |(?<=[-+]) (?=[0-9]+/)", lambda m: m[0].strip())]
_EXPLANATION = re.compile(  # what may follow a number and says nothing about its value
    r" \((?!(?i:or|maybe) )(?=[^)]*[a-zA-Z]{2})|[.,;:] (?!(?:but )?[-$€£¥]*[0-9]|(?i:and|or|maybe|perhaps) )"
    r"|,? (?:because|since|which|where|so)\b")
_HEDGE = re.compile(r"(?i)\b(?:or|nor|not|never|neither|cannot|wrong|incorrect|false|except|below)\b|n['’]t\b")
_UNFINISHED_BEFORE = re.compile(  # an operator, a function or a bound stands before the number
    r"(?:[-+*/^×÷·⋅√∛±∓|⌊⌈<>≤≥≠]|\w\(|\b(?:root|sqrt|log|ln|sin|cos|tan|half|third|quarter|fifth|tenth|twice|double|triple"
    r"|square|sum|product|hundred|thousand|million|dozen|plus|minus|times)(?: of)?(?: and)?"
    r"|\b(?:than|at least|at most|up to|over|under|above|nearly|almost|between)) ?[$(]?$", re.IGNORECASE)
_UNFINISHED_AFTER = re.compile(  # ... or behind it; "18/day" and "18-year-old" are units
    r" ?(?:[+*^×÷·⋅√±∓|⌋⌉<>≤≥≠!]|[xyzn]\b|/ ?(?:[xyzn]\b|[^a-zA-Z ]|$)|- ?(?:[xyzn]\b|[^a-zA-Z ]|$)"
    r"|(?:squared|cubed|factorial|plus|minus|divided|multiplied|choose|half|halves|tenths|hundredths|thousandths"
    r"|pi|e)\b|π)|[(i](?!\w)|\("
    r"|.*\band (?:an?|one|two|three|four|five|six|seven|eight|nine|ten|\w+teen|\w+ty|half)\b", re.IGNORECASE)


def read_number(phrase: str) -> str | None:
    """Read the number that a phrase gives: "18", "$18.00.", "9 * 2 = 18", "18 = 9 * 2", "Janet makes $18 a day".

    Of the sides of an equation, those that are numbers must agree. Two numbers, a denial or an expression that is not
    worked out ("9 * 2", "5²", "5!", "half of 36") give none.
    """
    phrase = formats.plain(phrase)
    for pattern, spelling in _SPELLINGS:
        phrase = re.sub(pattern, spelling, phrase)
    sides = [_without_explanation(side) for side in _without_explanation(phrase).split("=")]
    if any(map(_HEDGE.search, sides)):
        return None
    values = {value for side in sides if (value := _only_number(side)) is not None}
    return values.pop() if len(values) == 1 else None


def _without_explanation(phrase: str) -> str:
    """Cut off what follows a number at the start."""
    phrase = phrase.lstrip(" ({[\"'")
    number = _NUMBER.match(phrase)
    explanation = number and _EXPLANATION.search(phrase, number.end())
    return phrase[:explanation.start()] if explanation else phrase


def _only_number(phrase: str) -> str | None:
    """Read the only number of a phrase, if no expression is around it."""
    match = _NUMBER.search(phrase)
    if match is None or "\\" in phrase:
        return None
    before, after = phrase[:match.start()], phrase[match.end():]
    if any(map(str.isnumeric, before + after)) or _UNFINISHED_BEFORE.search(before) or _UNFINISHED_AFTER.match(after):
        return None
    sign, whole, digits, power, bottom, scales = match.groups()
    if len(match[0]) > latex.MAX_DIGITS or len(re.findall("[-+]", sign)) > (not re.search(r"\b[b-zB-HJ-Z] $", before)):
        return None  # two signs, or the second term of x -5
    if bottom is None:
        value = Fraction(digits.replace(",", "") + (power or ""))
    else:  # 1/2 is a number; 6/2, 2/4 and 0.5/2 are divisions still to be done
        value = latex.reduced(digits, bottom) if digits.isdigit() and not power else None
    if value is None or whole and value > 1:
        return None
    value += int(whole or 0)
    for scale in re.findall(r"\w+", scales):
        value *= _SCALES.get(scale) or _SCALES[scale.lower()]
    return latex.spell(-value if "-" in sign else value)


def read_text(phrase: str) -> str | None:
    """Read any other answer: case, spaces, emphasis, quotes around it and a full stop behind it do not count."""
    return " ".join(formats.plain(unicodedata.normalize("NFKC", phrase)).strip(" .\"'").casefold().split()) or None


READ = {"toy": read_number, "gsm8k": read_number, "svamp": read_number, "mathqa-numeric": read_number,
        "mathqa": letters.read_mathqa_letter, "arc": letters.read_letter, "math": latex.read_latex,
        "number": read_number, "letter": letters.read_letter, "text": read_text, "latex": latex.read_latex,
        "python": read_number}
