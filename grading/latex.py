r"""MATH's answers, which are LaTeX (`\tfrac12`, `[2,5)`, `\text{(C)}`, `14,\!400`): read and compare them.

Two answers are equal if they have the same canonical spelling. If they do not, but their brackets and number of
elements agree, math-verify (sympy) compares each pair of differing elements, in its own process under a time limit.
It never sees a full response, in which it would find answers that nobody marked, nor 2112_6, whose base it ignores.

Order counts, as in the papers' string matching: a list or union in another order is wrong, even if it is the same set.
Numbers are compared exactly and must be worked out: 2/4 is not 1/2, and \sin^2x+\cos^2x is not yet 1. Units, %, $ and
degree signs are dropped on both sides. Votes count spellings: \sqrt{12} and 2\sqrt{3} are two votes, since comparing
all pairs would cost too much.

Left out: algebra of our own. Without math-verify (`pip install "math-verify[antlr4_13_2]"`), `require_math_verify()`
raises, and so does the first comparison that needs it.

    read_latex(r"\left(3,\tfrac\pi2\right)")    ->  (3, \frac{\pi}{2})
    compare(r"2\sqrt3", r"\sqrt{12}")           ->  "correct"
"""
import importlib.util
import re
from decimal import Context
from fractions import Fraction

from grading import formats, sandbox

MAX_LATEX = 400  # characters; the longest of the 5,000 MATH test answers has 81
MAX_DIGITS = 100  # longer "numbers" are repetition; Python refuses to read 4,300 digits

_NAME = r"m?(?:\\(?:angle|overline|triangle|vec)\s*\{?\s*)?\\?[a-zA-Z]+\}?'*(?:_\{?\w+\}?)?(?:\([a-zA-Z0-9,\s]*\))?"
_NO_UNIT = (r"\b(?:plus|minus|times|divided|multiplied|squared|cubed|choose|factorial|half|halves|hundred|thousand"
            r"|million|billion|dozen|is|but|not|or|nor|never|wrong|incorrect|false|mod|over|[abcnxyz]{2})\b")
_SPELLINGS = [  # (pattern, its one spelling), applied in this order to both answers
    (formats.THIN_COMMA, ","),
    (formats.DASHES, "-"),
    (r"(?<!\\)\\[()\[\]]|[\n\t]", " "),
    (r",\s*\\!\s*|\{,\}", ""),  # 14,\!400 and 14{,}400
    (r"(?<!\\)\\!|\\(?:left|right|[bB]igg?[lmr]?|displaystyle|textstyle|limits|bf|rm)(?![a-zA-Z])", ""),
    (r"\\(?:text)?color\s*\{[a-zA-Z]*\}", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])", " "),
    (r"(?:\\?%|\^\s*\{?\s*\\circ\s*\}?|°),|,(?=\\\$)", ", "),  # 45^\circ,135^\circ is no 45,135
    (r"\\?[$%]|\s*\^\s*\{?\s*\\circ\s*\}?|°|\\degree(?![a-zA-Z])", ""),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(le|ge|ne)(?:q|qslant)(?![a-zA-Z])", r"\\\1"),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"(?<=[0-9}])\s*\\(?:mathrm|operatorname)\s*\{(?!\s*[ie]\s*\})", r"\\text{"),  # 5\,\mathrm{m}, but not 5\mathrm{i}
    (r"\\(?:math(?:rm|bf|it|sf|tt)|boldsymbol|bm)\s*\{([a-zA-Z]|[^{}a-zA-Z]*)\}", r"\1"),
    (r"\\(?:mathbf|mathsf|boldsymbol|bm)(?![a-zA-Z])", ""),
    (r"\\(?:mbox|mathrm|textbf|textrm|textit|textsf)\s*\{", r"\\text{"),
    (r"π|(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
    ("∞", r"\\infty "),
    ("∪", r"\\cup "),
    (r"\\varnothing(?![a-zA-Z])|∅|^\s*\\\{\s*\\\}\s*$", r"\\emptyset "),
    (r",?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)", ","),
    (rf"(?<=[0-9a-zA-Z}}!])\s*\\text\s*\{{(?![^{{}}]*(?:[,=]|{_NO_UNIT})).*", ""),  # \text{ cm}^2 is a unit; drop it
    (r"\\text\s*\{([^{}]*)\}", r"\1"),
    (rf"(?<=[0-9}}])\s+(?![a-zA-Z. ]*{_NO_UNIT})[a-zA-Z]{{2}}[a-zA-Z. ]*(?:\^\{{?[0-9]\}}?)?$", ""),  # 39 degrees
    (r"\\sqrt\s*([0-9a-zA-Z])", r"\\sqrt{\1}"),
    (r"\{((?:[^{}]|\{[^{}]*\})*)\\over(?![a-zA-Z])((?:[^{}]|\{[^{}]*\})*)\}", r"\\frac{\1}{\2}"),
    (r"^((?:[^{}]|\{[^{}]*\})*)\\over(?![a-zA-Z])((?:[^{}]|\{[^{}]*\})*)$", r"\\frac{\1}{\2}"),
    (r"\\frac\s*([0-9a-zA-Z]|\\pi(?![a-z]))", r"\\frac{\1}"),
    (r"(\\frac\s*\{(?:[^{}]|\{[^{}]*\})*\})\s*([0-9a-zA-Z]|\\pi(?![a-z]))", r"\1{\2}"),
    (r"([_^])\{([0-9a-zA-Z])\}", r"\1\2"),
    (r"\\begin\{array\}\s*\{[clr|\s]*\}", r"\\begin{array}"),
    (r"\(\s*\\begin\{(?:array|matrix)\}(.*)\\end\{(?:array|matrix)\}\s*\)", r"\\begin{pmatrix}\1\\end{pmatrix}"),
    (r"\[\s*\\begin\{(?:array|matrix)\}(.*)\\end\{(?:array|matrix)\}\s*\]", r"\\begin{bmatrix}\1\\end{bmatrix}"),
    (r"\\\\\s*\\end\{", r"\\end{"),
]
_DECIMAL = re.compile(r"(-?)([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9]+\.?[0-9]*|\.[0-9]+)")
_FRACTION = re.compile(r"(-?)([0-9]*)\\frac\{(-?[0-9]+)\}\{(-?[0-9]+)\}")
_SLASHED = re.compile(r"(-?)(?:([0-9]+) )?(-?[0-9]+)/(-?[0-9]+)")
_SPELLED = re.compile(r"-?[0-9]+([./][0-9]+)?")  # what spell() returns
_MATRIX = re.compile(r"\\begin\{(\w+)\}(.*)\\end\{\1\}")
_ASSIGNED = re.compile(  # x = 5, x_1 = 5, \theta = 60, f(x) = x^2, (x,y) = (3,4), x \in [2,5)
    rf"(?:{_NAME}|\(\s*{_NAME}(?:\s*,\s*{_NAME})*\s*\))\s*(?:=|\\in(?![a-zA-Z]))([^=]*)")
_AROUND = r"(?:(?!(?i:\b(?:or|nor|not|never|cannot)\b|n['’]t\b))[^$])*"  # neither a denial nor an alternative
_ONE_FORMULA = re.compile(rf"{_AROUND}(?<![-\\])\$((?:[^$\\]|\\.)+)\${_AROUND}")  # a sentence around $16$
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPEN, _CLOSE = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")
_LEAF = "\0"  # stands for an element in a shape: "(\0, \0)" is the shape of every pair


def spell(value: Fraction) -> str:
    """Spell a rational in one way: "18", "-0.5", and "1/3" where no decimal is exact."""
    if 10 ** value.denominator.bit_length() % value.denominator:  # it has a prime factor besides 2 and 5
        return str(value)
    exact = Context(prec=10 * MAX_DIGITS)  # 2 ** -330 has 330 places
    return format(exact.divide(value.numerator, value.denominator), "f")


def read_latex(phrase: str) -> str | None:
    """Return the canonical spelling of an answer, None if it is empty or absurdly long."""
    shape, leaves = _parse(phrase)
    remaining = iter(leaves)
    return re.sub(_LEAF, lambda _: next(remaining), shape) or None


def compare(gold: str, answer: str) -> str:
    """Judge two answers whose spellings differ: equal if they have the same shape and equal elements."""
    (gold_shape, golds), (answer_shape, answers) = _parse(gold), _parse(answer)
    pairs = [pair for pair in zip(golds, answers, strict=False) if pair[0] != pair[1]]
    if gold_shape != answer_shape or not all(_open_question(*pair) for pair in pairs):
        return "wrong"
    require_math_verify()
    for gold_leaf, answer_leaf in pairs:
        outcome = sandbox.run("verify", {"gold": gold_leaf, "answer": answer_leaf})
        if outcome.value is not True:
            return "timeout" if outcome.status == "timeout" else "wrong"
    return "correct"


def formulas(text: str) -> set[str | None]:
    """Return the canonical spellings of the formulas in a text, whole and on each side of an equals sign."""
    found = re.sub(r"\\[()\[\]]|\$\$", "$", text.replace(r"\$", "")).split("$")[1::2]
    return {read_latex(part.strip(" ,;?")) for formula in found for part in (formula, *formula.split("="))}


def require_math_verify() -> None:
    """Raise if math-verify is missing, with the remedy: better at the start than after a day of sampling."""
    if importlib.util.find_spec("math_verify") is None:
        raise ModuleNotFoundError("grading MATH needs math-verify: pip install 'math-verify[antlr4_13_2]'")


def _open_question(gold: str, answer: str) -> bool:
    """Decide whether two different leaves are worth asking math-verify about."""
    number = _SPELLED.fullmatch(answer)
    if number and re.fullmatch(r"-?[0-9./]+[a-zA-Z]+", gold):
        return False  # math-verify would take 12 for 12ab, as if ab were a unit
    if _SPELLED.fullmatch(gold) or number and number[1]:
        return False  # numbers were compared exactly, and 28.27 is not 9 pi
    if re.search(r"[0-9A-Z]_|:|[0-9] [0-9]", f"{gold}{answer}") or ("=" in gold) != ("=" in answer):
        return False  # math-verify would take 2112_7 for 2112_6, 3 for the ratio 3:1, and 13 for x^2+y^2=13
    return bool(gold and answer) and not gold.isalpha() and not answer.isalpha()


# --- phrase -> shape and leaves -------------------------------------------------------------------


def _parse(phrase: str) -> tuple[str, list[str]]:
    if len(phrase) > MAX_LATEX:
        return "", []
    formula = _ONE_FORMULA.fullmatch(phrase)
    latex, leaves = formula[1] if formula else phrase, []
    for pattern, spelling in _SPELLINGS:
        latex = re.sub(pattern, spelling, latex)
    return _shape(latex, leaves), leaves


def _shape(latex: str, leaves: list[str]) -> str:
    """Return brackets, commas, unions and rows with _LEAF for each element; append the elements to `leaves`."""
    latex = latex.strip().rstrip(".").rstrip().removeprefix("+")
    if not latex:
        return ""
    if _DECIMAL.fullmatch(latex):  # before the comma of 15,000 can make it a list
        leaves.append(_leaf(latex))
        return _LEAF
    if assigned := _ASSIGNED.fullmatch(latex):
        return _shape(assigned[1], leaves)
    if matrix := _MATRIX.fullmatch(latex):
        rows = [_joined(_split(row, "&"), " & ", leaves) for row in _split(matrix[2], r"\\")]
        return rf"\begin{{{matrix[1]}}}" + r" \\ ".join(rows) + rf"\end{{{matrix[1]}}}"
    for separator, spelling in ((r"\cup", r" \cup "), (",", ", ")):
        if len(parts := _split(latex, separator)) > 1:
            return _joined(parts, spelling, leaves)
    if inner := _inside(latex):
        open_, *_, close = _TOKEN.findall(latex)
        elements = _split(inner, ",")
        if len(elements) == 1 and open_ in ("(", "{"):  # (C) and {5} are C and 5
            return _shape(inner, leaves)
        return open_ + _joined(elements, ", ", leaves) + close
    leaves.append(_leaf(latex))
    return _LEAF


def _joined(parts: list[str], separator: str, leaves: list[str]) -> str:
    return separator.join(_shape(part, leaves) for part in parts)


def _split(latex: str, separator: str) -> list[str]:
    """Split at each separator outside brackets; a half-open interval may close ( with ]."""
    parts, depth, start = [], 0, 0
    for token in _TOKEN.finditer(latex):
        depth += (token[0] in _OPEN) - (token[0] in _CLOSE)
        if depth == 0 and token[0] == separator:
            parts.append(latex[start:token.start()])
            start = token.end()
    return [*parts, latex[start:]]


def _inside(latex: str) -> str | None:
    """Return the content of the outermost pair of brackets, if one pair encloses everything."""
    depth, tokens = 0, _TOKEN.findall(latex)
    for i, token in enumerate(tokens):
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth <= 0:
            return "".join(tokens[1:-1]) if depth == 0 and 0 < i == len(tokens) - 1 else None
    return None


def _leaf(latex: str) -> str:
    # Keep the space that ends a command (\tan x) and the one between digits (3 1/4), drop all others.
    spaces = r"(\\[a-zA-Z]+)\s+(?=[a-zA-Z])|(?<=[0-9.])(\s)\s*(?=[0-9.])|\s+"
    latex = re.sub(spaces, lambda m: (m[1] or "") + " " if m[1] or m[2] else "", latex)
    value = _rational(latex)
    if value is not None:
        return spell(value)
    return latex.lower() if latex.isalpha() and len(latex) > 1 else latex


def _rational(latex: str) -> Fraction | None:
    """Read a decimal, a reduced fraction or a mixed number; 2/4 is none of them, it must be reduced first."""
    if len(latex) > MAX_DIGITS:
        return None
    if decimal := _DECIMAL.fullmatch(latex):
        value = Fraction(decimal[2].replace(",", ""))
        return -value if decimal[1] else value
    fraction = _SLASHED.fullmatch(latex) or _FRACTION.fullmatch(latex)
    if fraction is None:
        return None
    sign, whole, top, bottom = fraction.groups()
    value = reduced(top, bottom)
    if value is None or (sign or whole) and value < 0 or whole and value > 1:
        return None
    value += int(whole or 0)
    return -value if sign else value


def reduced(top: str, bottom: str) -> Fraction | None:
    """Return the value of top/bottom, None if the fraction could still be reduced."""
    value = Fraction(int(top), int(bottom) or 1)
    return value if value.denominator == abs(int(bottom)) > 1 else None
