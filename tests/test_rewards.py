"""The graders: tables of answers, properties over any text, and real data where it is present."""

import re
import signal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grading import latex
import rewards
from rewards import equations, equations_hold, grade

NEEDS_MATH_VERIFY = pytest.mark.skipif(
    latex.importlib.util.find_spec("math_verify") is None,
    reason="pip install 'math-verify[antlr4_13_2]'",
)
FORMATS = ["hash", "final_answer", "trigger", "boxed", "minerva", "python"]
DATASETS = ["toy", "gsm8k", "svamp", "mathqa", "mathqa-numeric", "math", "arc"]


@pytest.fixture(autouse=True)
def no_hang():
    """Not a measurement: a pattern that backtracks needs hours for some texts below."""
    signal.alarm(600)
    yield
    signal.alarm(0)


# ---- numbers -------------------------------------------------------------------------------------

NUMBERS = [  # format, text, gold, verdict
    ("hash", "48/2=24, 48+24=72\n#### 72", "72", "correct"),
    ("hash", "#### 70", "72", "wrong"),
    ("hash", "#### -72", "72", "wrong"),
    ("hash", "#### 1,200.", "1200", "correct"),
    ("hash", "#### 1200", "1,200", "correct"),
    ("hash", "#### 1.200", "1200", "wrong"),
    ("hash", "#### 12,00", "1200", "correct"),  # the official regex drops every comma
    ("hash", "#### 007", "7", "correct"),
    ("hash", "#### -0", "0", "correct"),
    ("hash", "#### .5", "0.5", "correct"),
    ("hash", "#### $72", "72", "correct"),
    ("hash", "#### -$72", "-72", "correct"),
    ("hash", "#### 72%", "72", "correct"),
    ("hash", "#### 72 clips", "72", "correct"),
    ("hash", "#### 72</s>", "72", "correct"),
    ("hash", "#### 72\r\n", "72", "correct"),
    ("hash", "#### 72\n\nQuestion: Next?\n#### 3", "72", "correct"),
    ("hash", "#### 72\0#### 3", "72", "correct"),
    ("hash", "\0#### 72", "72", "unparsed"),
    ("hash", "####72", "72", "unparsed"),
    ("hash", "#### **72**", "72", "unparsed"),
    ("hash", "#### 6/2", "3", "unparsed"),
    ("hash", "#### 6/2", "6", "unparsed"),
    ("hash", "#### 10000000000000001", "10000000000000000", "wrong"),
    ("hash", "#### 71.99999", "72", "wrong"),
    ("hash", "#### nan", "72", "unparsed"),
    ("hash", "#### ７２", "72", "unparsed"),
    ("hash", "#### 1e999999999", "1", "unparsed"),
    ("hash", "#### " + "9" * 5000, "9" * 5000, "unparsed"),
    ("hash", "72", "72", "unparsed"),
    ("final_answer", "FINAL ANSWER: 18", "18", "correct"),
    ("final_answer", "**Final answer:** 18", "18", "correct"),
    ("final_answer", "Final answer:\n\n18", "18", "correct"),
    ("final_answer", "Final answer: \\$18.00.", "18", "correct"),
    ("final_answer", "Final answer: $\\boxed{18}$", "18", "correct"),
    ("final_answer", "Final answer: 9 \\times 2 = 18", "18", "correct"),
    ("final_answer", "Final answer: 9 * 2 = 18", "9", "wrong"),
    ("final_answer", "Final answer: 9 * 2", "9", "unparsed"),
    ("final_answer", "Final answer: She makes $18 a day.", "18", "correct"),
    ("final_answer", "Final answer: 18 (9 eggs for $2 each)", "18", "correct"),
    ("final_answer", "Final answer: 18 or 19", "18", "unparsed"),
    ("final_answer", "Final answer: 18 dollars and 50 cents", "18", "unparsed"),
    ("final_answer", "Final answer: 17-18", "18", "unparsed"),
    ("final_answer", "Final answer: 2 million", "2", "unparsed"),
    ("final_answer", "Final answer: eighteen", "18", "unparsed"),
    ("final_answer", "Final answer: 1,3", "13", "unparsed"),
    ("final_answer", "Final answer: 1e3/2", "0.5", "unparsed"),
    ("final_answer", "Final answer:", "18", "unparsed"),
    ("final_answer", "Final answer: 20\nNo.\nFinal answer: 18", "18", "correct"),
    ("final_answer", "Final answer: 20\nNo.\nFinal answer: 18", "20", "wrong"),
    ("final_answer", "Final answer: 18\n\nQuestion: 3+4?\nFinal answer: 7", "18", "correct"),
    ("trigger", "Therefore, the answer is: 51.", "51.0", "correct"),
    ("trigger", "Therefore, the answer is: 5\nTherefore, the answer is: 51", "51.0", "correct"),
    ("trigger", "Therefore, the answer is: 51 dollars\n\nQuestion:\n2?", "51.0", "correct"),
    ("trigger", "Therefore, the answer is: 51.005", "51.0", "correct"),
    ("trigger", "Therefore, the answer is: 51.01", "51.0", "correct"),
    ("trigger", "Therefore, the answer is: 51.011", "51.0", "wrong"),
    ("trigger", "Therefore, the answer is: 0.03", "0.036", "wrong"),
    ("trigger", "Therefore, the answer is: 1/3", "0.3333333333333333", "correct"),
    ("trigger", "Therefore, the answer is: 1_00", "100", "unparsed"),
    ("trigger", "51", "51.0", "correct"),
    ("trigger", "It is 51", "51.0", "unparsed"),
    ("minerva", "Final Answer: The final answer is $16$. I hope it is correct.", "16", "correct"),
]


@pytest.mark.parametrize(("answer_format", "text", "gold", "verdict"), NUMBERS)
def test_numbers(answer_format, text, gold, verdict):
    assert grade(text, gold, "svamp", answer_format).verdict == verdict


def test_one_vote():
    """Votes counted as strings once gave "18" and "18.0" half a majority each."""
    texts = ["#### 18", "#### 18.0", "#### $18", "#### 18 dollars", "#### 018", "#### 1.8e1"]
    assert {grade(text, "18", "gsm8k").answer for text in texts} == {"18"}
    assert grade("#### 1/3", "5", "gsm8k").answer == "1/3"
    assert grade("#### 2.50", "5", "gsm8k").answer == "2.5"


@given(st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=10**6))
def test_spelling_is_exact_and_reads_back(value):
    spelled = latex.spell(value)
    assert Fraction(spelled) == value
    assert rewards.read_number(spelled) == spelled
    assert latex.read_latex(spelled) == spelled


# ---- letters -------------------------------------------------------------------------------------

LETTERS = [  # text after "Final answer: ", gold, verdict
    ("C", "C", "correct"),
    ("c", "C", "correct"),
    ("(C)", "C", "correct"),
    ("C)", "C", "correct"),
    ("C.", "C", "correct"),
    ("**C**", "C", "correct"),
    ("$\\boxed{\\text{C}}$", "C", "correct"),
    ("C. Days get shorter.", "C", "correct"),
    ("D. Days get shorter.", "C", "wrong"),
    ("B, because A and C are wrong", "B", "correct"),
    ("The correct answer is (C).", "C", "correct"),
    ("Option C", "C", "correct"),
    ("I think it is B", "B", "correct"),
    ("I think it is B", "A", "wrong"),
    ("A", "A", "correct"),
    ("A planet spins faster.", "A", "unparsed"),
    ("Days get shorter", "D", "unparsed"),
    ("A or C", "A", "unparsed"),
    ("C and D", "C", "unparsed"),
    ("None of the above", "E", "unparsed"),
    ("F", "C", "unparsed"),
    ("3", "3", "correct"),
    ("3.5 hours", "3", "unparsed"),
    ("C", "3", "wrong"),
    ("", "C", "unparsed"),
]


@pytest.mark.parametrize(("answer", "gold", "verdict"), LETTERS)
def test_letters(answer, gold, verdict):
    text = f"A faster spin is a shorter day, so A and B are out.\n\nFinal answer: {answer}"
    assert grade(text, gold, "arc").verdict == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Therefore, the answer is: a", "correct"),
        ("Therefore, the answer is: A", "correct"),
        ("Therefore, the answer is: (a)", "correct"),
        ("Therefore, the answer is: a ) 38", "correct"),
        ("Therefore, the answer is: option a", "correct"),
        ("Therefore, the answer is: b", "wrong"),
        ("Therefore, the answer is: ab", "unparsed"),
        ("Therefore, the answer is: 38", "unparsed"),
        ("Therefore, the answer is: a large number", "unparsed"),
        ("It is a large number, so a choice is hard.", "unparsed"),
        ("a", "correct"),
    ],
)
def test_mathqa_letters(text, verdict):
    assert grade(text, "a", "mathqa").verdict == verdict


# ---- MATH ----------------------------------------------------------------------------------------

SAME_SPELLING = [
    (r"\tfrac12", r"\frac{1}{2}"),
    (".5", r"\frac{1}{2}"),
    ("-2/3", r"-\frac{2}{3}"),
    (r"137\frac12", "137.5"),
    (r"14{,}400", r"14,\!400"),
    (r"\$15,000", r"\$15,\!000"),
    ("4.00", "4"),
    (r"44\%", "44"),
    (r"39^{\circ}", "39"),
    ("39 degrees", r"39^\circ"),
    (r"440\text{ cm}^2", "440"),
    (r"10\,\mathrm{units}", "10"),
    ("x = 5", "5"),
    (r"x\in[-2,7]", r"\left[-2, 7\right]"),
    (r"10\sqrt2", r"10\sqrt{2}"),
    (r"(3,\dfrac\pi2)", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"1 \text{ and } -2", "1,-2"),
    ("Evelyn", r"\text{Evelyn}"),
    ("C", r"\text{(C)}"),
    (r"\begin{pmatrix}1/5\\0\end{pmatrix}", r"\begin{pmatrix} \frac{1}{5} \\ 0 \end{pmatrix}"),
    ("x^{2}", "x^2"),
    (r"2 \tan x", r"2\tan x"),
]
DIFFERENT = [  # answer, gold: decided without math-verify
    (r"\frac{2}{4}", r"\frac{1}{2}"),
    (r"\frac{137}{2}", r"137\frac{1}{2}"),
    ("(0,5)", "[0,5)"),
    ("(1,2)", "(2,1)"),
    ("-2,1", "1,-2"),
    ("461415", "4,6,14,15"),
    ("1, 200", "1200"),
    ("28.27", r"9\pi"),
    ("3.464", r"2\sqrt{3}"),
    ("2112_7", "2112_6"),
    ("2112", "2112_6"),
    ("1:3", "3:1"),
    ("3", "3:1"),
    (r"\sin^2x+\cos^2x", "1"),
    ("10^{1000000000}", "5"),
    (r"\text{Briana}", r"\text{Evelyn}"),
    (r"\begin{bmatrix}6\\3\end{bmatrix}", r"\begin{pmatrix}6\\3\end{pmatrix}"),
    ("__import__('os').abort()", "5"),
]


@pytest.mark.parametrize(("answer", "gold"), SAME_SPELLING)
def test_math_same_spelling(answer, gold):
    got = grade(rf"So $\boxed{{{answer}}}$.", gold, "math")
    assert got.verdict == "correct"
    assert got.answer == latex.read_latex(gold)


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_math_different(answer, gold, monkeypatch):
    monkeypatch.setattr(latex.sandbox, "run", None)  # calling it would be an error
    assert grade(rf"So $\boxed{{{answer}}}$.", gold, "math").verdict == "wrong"


@NEEDS_MATH_VERIFY
@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        (r"\sqrt{12}", r"2\sqrt{3}", "correct"),
        (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}", "correct"),
        (r"4.5\pi", r"\frac{9\pi}{2}", "correct"),
        (r"(3,\pi/2)", r"\left(3,\frac{\pi}{2}\right)", "correct"),
        ("9i+6", "6+9i", "correct"),
        (r"\frac{3i}{2}+\frac32", r"\frac{3}{2}+\frac{3}{2}i", "correct"),
        ("x^2-4", "(x-2)(x+2)", "correct"),
        (r"\sqrt{31}", r"\sqrt{13}", "wrong"),
        ("2^{2006}", "2^{2005}", "wrong"),
        (r"(3,\pi/3)", r"\left(3,\frac{\pi}{2}\right)", "wrong"),
        (r"\frac", r"\sqrt{13}", "wrong"),
        ("10^{1000000000}", "2^{2005}", "timeout"),
    ],
)
def test_math_verify(answer, gold, verdict):
    assert grade(rf"So $\boxed{{{answer}}}$.", gold, "math").verdict == verdict


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1,2\}}", r"\{1, 2\}"),
        (r"\boxed{4} no, \boxed{5}", "5"),
        (r"\boxed{5} or \boxed{6", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{5", None),
        (r"\boxed{}", None),
        (r"\boxed", None),
        ("5", None),
    ],
)
def test_box(text, answer):
    """The last closed box, by brace count: a regex up to the first brace reads \\frac{1 here."""
    assert grade(text, "5", "math").answer == answer


def test_without_math_verify(monkeypatch):
    """A grader once scored 0 on all of MATH because an import failed inside its `except`."""
    monkeypatch.setattr(latex.importlib.util, "find_spec", lambda name: None)
    assert grade(r"\boxed{\tfrac12}", "0.5", "math").verdict == "correct"  # strings are enough
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        grade(r"\boxed{\sqrt{12}}", r"2\sqrt{3}", "math")
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        rewards.require_math_verify()


def test_unknown_names_are_errors():
    with pytest.raises(KeyError):
        grade("#### 5", "5", "gsm8k", "hashes")
    with pytest.raises(KeyError):
        grade("#### 5", "5", "gsm9k", "hash")


# ---- any text ------------------------------------------------------------------------------------

PIECES = """#### |Final answer:|Therefore, the answer is:|\\boxed{|}|{|. I hope it is correct
|Final Answer: The final answer is|\nQuestion:|\\frac|\\text{|$|18|-|1,200|1e9|/|=|or|A|(c)|.|,|\\
|\\sqrt2|_6|^|(|[|)|]|\\cup|\\pm|&|\\begin{pmatrix}|\\end{pmatrix}|<<|>>|3+4=7|\0|\ud800|٣|٠|×|−|%|x
|\\infty|def solution():\n|   return 18\n|\n\n|```python\n|```|    |""".split("|")
PIECE = st.sampled_from(PIECES) | st.text(max_size=5)
ANY_TEXT = st.lists(PIECE, max_size=12).map("".join)


@NEEDS_MATH_VERIFY
@settings(max_examples=400, deadline=None)
@given(ANY_TEXT, ANY_TEXT, st.sampled_from(DATASETS), st.sampled_from([None, *FORMATS]))
def test_any_text_gets_a_verdict(text, gold, dataset, answer_format):
    got = grade(text, gold, dataset, answer_format)
    assert got.verdict in ("correct", "wrong", "unparsed", "timeout")
    assert got.verdict in ("unparsed", "timeout") or got.answer
    assert got == grade(text, gold, dataset, answer_format)
    equations_hold(text)


@given(ANY_TEXT, ANY_TEXT)
def test_canonical_answers_grade_themselves(text, gold):
    """Both sides go through one reader, so what it wrote must read back as the same answer."""
    for dataset in ("gsm8k", "mathqa", "arc"):
        answer = grade(text, gold, dataset, "final_answer").answer
        if answer is not None:
            again = grade(f"Final answer: {answer}", answer, dataset, "final_answer")
            assert again == rewards.Grade("correct", answer)


LONG = 100_000
SLOW_FOR_BACKTRACKING = """9|1,|1,000|$1|1 a |<<|<<1|\\boxed{|{|(|A or |Final answer: |#### |\n| |=1
|\\frac{|```python\n|option |\\text{|1/|-""".split("|")


@pytest.mark.parametrize("piece", SLOW_FOR_BACKTRACKING)
def test_long_texts_take_linear_time(piece):
    """<<([^>]*)>> on 50,000 opening brackets and no closing one takes a minute, for example."""
    body = piece * (LONG // len(piece))
    for answer_format in FORMATS:
        for dataset in ("gsm8k", "arc", "math"):
            for marker in ("", "#### ", "Final answer: ", "Therefore, the answer is: "):
                got = grade(f"{marker}{body}", "no answer", dataset, answer_format)
                assert got.verdict in ("wrong", "unparsed")
    assert grade("def solution():\n" + body, "72", "gsm8k", "python").verdict == "unparsed"
    assert equations(body) == []


# ---- equations -----------------------------------------------------------------------------------


def test_equations():
    text = "so 48/2 = <<48/2 = 24>>24, <<24 + 48=72>>, <<a<b>c>> <<>> <<5=5>"
    assert equations(text) == ["48/2=24", "24+48=72", ""]
    assert equations("no equation") == []


@given(st.text(alphabet="<>1= \n", max_size=40))
def test_equations_are_those_of_the_authors(text):
    found = re.findall(r"<<([^>]*)>>", text)  # the definition; its search is quadratic, ours is not
    assert equations(text) == [content.replace(" ", "") for content in found]


@pytest.mark.parametrize(
    ("equation", "holds"),
    [
        ("48/2=24", True),
        ("48/2=26", False),
        ("48 / 2 = 24", True),
        ("3*(4+5)-2=25", True),
        ("-(3-5)=2", True),
        ("7//2=3", True),
        ("2**10=1024", True),
        (".5*4=2.0", True),
        ("10/3=3.333", True),
        ("10/3=3.33", False),
        ("0.1+0.2=0.3", True),
        ("28=28", True),
        ("3+4=7=7", True),
        ("3+4=7=8", True),  # the authors look at the first two sides
        ("3+4", False),
        ("", False),
        ("=7", False),
        ("3+4=", False),
        ("3/4=3/4", False),  # the right side must be a number
        ("5/0=0", False),
        ("$3+4=7", False),
        ("1,000+1=1001", False),
        ("20%*50=10", False),
        ("3x4=12", False),
        ("07+1=8", False),
        ("2(3)=6", False),
        ("...=1", False),
        ("9**9**9=1", False),
        ("9**-9**9=0", False),
        ("((9**99)**99)**99=1", False),
        ("2**0.5=1.414", False),
        ("9" * 5000 + "=1", False),
        ("1=" + "9" * 5000, False),
        ("(" * 90 + "1" + ")" * 90 + "=1", True),
        ("(" * 5000 + "=1", False),
        ("-" * 5000 + "1=1", False),
        ("__import__('os').abort()=1", False),
        ("(lambda:1)()=1", False),
        ("nan=nan", False),
        ("1=nan", False),
        ("٣+٤=7", False),
    ],
)
def test_equations_hold(equation, holds):
    assert equations_hold(f"so <<{equation}>>.") is holds


def test_one_wrong_equation_is_enough():
    assert equations_hold("<<1+1=2>> <<2+2=4>>")
    assert not equations_hold("<<1+1=2>> <<2+2=5>>")
    assert equations_hold("no equation at all")  # as the authors: such a path is kept


ARITHMETIC = st.recursive(
    st.integers(0, 99).map(str) | st.decimals(0, 9, places=2).map(str),
    lambda part: st.tuples(part, st.sampled_from(["+", "-", "*", "/", "//"]), part).map(
        lambda parts: "({}{}{})".format(*parts)
    ),
    max_leaves=6,
)


@given(ARITHMETIC)
def test_arithmetic_is_exact(expression):
    """Against Python's own evaluation with every number literal made a Fraction."""
    exact = re.sub(r"[0-9.]+", lambda number: f"Fraction('{number[0]}')", expression)
    try:
        value = eval(exact, {"Fraction": Fraction})
    except ZeroDivisionError:
        value = None
    assert rewards.arithmetic(expression) == value
