"""The equations of a solution, GSM8K's <<48/2=24>> or plain ones: RFT's key for a path, and whether they hold.

Arithmetic is exact and bounded, and no text is ever evaluated as Python: a model wrote these expressions.
Left out: what GSM8K's equations do not need, such as 1,000 or 20% as numbers, functions, and comparisons.
"""
import ast
import operator
import re
from fractions import Fraction

MAX_EQUATION = 200  # characters; the longest in GSM8K has 40, and a limit keeps nonsense from taking seconds
MAX_EQUATIONS = 200  # of a text, for the same reason
MAX_BITS = 4096  # of any intermediate value
_ARITHMETIC = re.compile(r"[0-9.+\-*/() ]+")
_VALUE = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_TIMES = re.compile(r"(?<![^\W\d_])[x×](?![^\W\d_])")  # 3 x 4 and 3x4, and not the x of six
_WORDS = re.compile(r"/?[^\W\d_]+(?:[-'’/][^\W\d_]+)*\.?|[$€£]|(?<=[0-9]),(?=[0-9]{3})")  # and the comma of 1,000
_NUMBER = r"(?<![0-9.])-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)%?"
_EXPRESSION = re.compile(rf"\(*{_NUMBER}(?:\)*[ \t]*[-+*/][ \t]*\(*{_NUMBER})+\)*\s*$")
_RESULT = re.compile(rf"\s*({_NUMBER})")


def equations(text: str) -> list[str]:
    """Return the contents of every <<...>> without spaces: RFT's key for a reasoning path."""
    return [content.replace(" ", "") for content in _annotations(text)]


def plain_equations(text: str) -> list[str]:
    """Return the equations that are written without marks: "9 games x $7 per game = $63" is 9*7=63.

    Of a chain, 2 + 3 = 5 * 4 = 20, both count. Units, currencies and words do not.
    """
    text = _WORDS.sub(lambda word: "" if word[0] == "," else " ", _TIMES.sub("*", text)).replace("÷", "/")
    sides, found = text.replace("−", "-").split("="), []
    for left, right in zip(sides, sides[1:]):
        expression, result = _EXPRESSION.search(left[-MAX_EQUATION:]), _RESULT.match(right)
        if expression and result:
            left = re.sub(r"\s", "", expression[0])
            found.append((left if left.count("(") == left.count(")") else left.strip("()")) + f"={result[1]}")
    return found


def _annotations(text: str) -> list[str]:
    """Match what <<([^>]*)>> matches, but scan each << only once: 50,000 of them take no time."""
    return [content for content, end in re.findall(r"<<([^>]*)(>?>?)", text) if end == ">>"]


def equations_hold(text: str) -> bool:
    """Check that each equation evaluates to its right side (RFT, App. A); a text without equations passes.

    As in the authors' code, an equation must have a "=", the two sides may differ by less than 1e-3 since right sides
    are rounded (10/3=3.333), and anything after a second "=" is ignored.
    """
    annotations = _annotations(text)
    return len(annotations) <= MAX_EQUATIONS and all(map(_holds, annotations))


def _holds(equation: str) -> bool:
    """Check one equation. Spaces count here, unlike in the key: 1 0=10 is no equation."""
    left, *right = map(str.strip, equation.split("="))
    if not right or not _VALUE.fullmatch(right[0]) or len(right[0]) > MAX_EQUATION:
        return False
    value = arithmetic(left)
    return value is not None and abs(value - Fraction(right[0])) < Fraction(1, 1000)


def arithmetic(expression: str) -> Fraction | None:
    """Work out + - * / // ** and parentheses exactly; None for anything else and for huge numbers."""
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
    """Raise to an integer power, after a look at the size: 9**9**9 has 370 million digits."""
    if exponent.denominator != 1 or abs(exponent) * _bits(base) > MAX_BITS:
        raise OverflowError("number too large")
    return base ** int(exponent)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Pow: _power, ast.USub: operator.neg, ast.UAdd: operator.pos}
