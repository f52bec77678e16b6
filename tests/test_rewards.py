"""The graders: tables of answers, and properties of any text. Published data: see test_real_data.py."""
import importlib.util
import re
import signal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from grading import latex
from grading.equations import arithmetic
from rewards import Grade, equations, equations_hold, grade

NEEDS_MATH_VERIFY = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None,
                                       reason="pip install 'math-verify[antlr4_13_2]'")
FORMATS = ["hash", "final_answer", "trigger", "boxed", "minerva", "python"]
DATASETS = ["toy", "gsm8k", "svamp", "mathqa", "mathqa-numeric", "math", "arc"]


@pytest.fixture(autouse=True)
def no_hang():
    """Not a measurement: a pattern that backtracks needs hours for some of these texts."""
    signal.alarm(600)
    yield
    signal.alarm(0)


# --- numbers --------------------------------------------------------------------------------------

HASH = [  # what follows "#### ", gold, verdict
    ("72", "72", "correct"),
    ("70", "72", "wrong"),
    ("-72", "72", "wrong"),
    ("1,200.", "1200", "correct"),
    ("1200", "1,200", "correct"),
    ("1.200", "1200", "wrong"),
    ("12,00", "1200", "correct"),  # the official regex drops every comma
    ("007", "7", "correct"),
    ("-0", "0", "correct"),
    (".5", "0.5", "correct"),
    ("-$72", "-72", "correct"),
    *[(text, "72", "correct") for text in ("$72", "72%", "72 clips", "72</s>", "72\r\n")],
    ("72\n\nQuestion: Next?\n#### 3", "72", "correct"),
    ("72\0#### 3", "72", "correct"),
    ("**72**", "72", "unparsed"),
    ("6/2", "3", "unparsed"),
    ("6/2", "6", "unparsed"),
    ("10000000000000001", "10000000000000000", "wrong"),
    ("71.99999", "72", "wrong"),
    ("nan", "72", "unparsed"),
    ("７２", "72", "unparsed"),
    ("1e999999999", "1", "unparsed"),
    ("9" * 5000, "9" * 5000, "unparsed"),
]
FINAL_ANSWER = [  # what follows "Final answer: ", verdict where the gold answer is 18
    ("\\$18.00.", "correct"),
    ("$\\boxed{18}$", "correct"),
    ("9 \\times 2 = 18", "correct"),
    ("9 * 2 = 18", "correct"),
    ("She makes $18 a day.", "correct"),
    ("18 (9 eggs for $2 each)", "correct"),
    ("20\nNo.\nFinal answer: 18", "correct"),
    ("18\nNo.\nFinal answer: 20", "wrong"),
    ("18\n\nQuestion: 3+4?\nFinal answer: 7", "correct"),
    *[(text, "unparsed") for text in ("18 * 2", "18 or 19", "18 dollars and 50 cents", "17-18", "18 million",
                                      "eighteen", "1,8", "18e3/2", "")],
]
TRIGGER = [  # what follows "Therefore, the answer is: ", gold, verdict
    ("51.", "51.0", "correct"),
    ("5\nTherefore, the answer is: 51", "51.0", "correct"),
    ("51 dollars\n\nQuestion:\n2?", "51.0", "correct"),
    ("51.005", "51.0", "correct"),
    ("51.01", "51.0", "correct"),
    ("51.011", "51.0", "wrong"),
    ("0.03", "0.036", "wrong"),
    ("1/3", "0.3333333333333333", "correct"),
    ("1_00", "100", "unparsed"),
]
NUMBERS = [  # format, text, gold, verdict
    *[("hash", "48/2=24, 48+24=72\n#### " + text, *rest) for text, *rest in HASH],
    *[("final_answer", "Final answer: " + text, "18", verdict) for text, verdict in FINAL_ANSWER],
    *[("trigger", "Therefore, the answer is: " + text, *rest) for text, *rest in TRIGGER],
    ("hash", "\0#### 72", "72", "unparsed"),
    ("hash", "####72", "72", "unparsed"),
    ("hash", "72", "72", "unparsed"),
    ("final_answer", "FINAL ANSWER: 18", "18", "correct"),
    ("final_answer", "**Final answer:** 18", "18", "correct"),
    ("final_answer", "Final answer:\n\n18", "18", "correct"),
    ("final_answer", "Final answer: 9 * 2 = 18", "9", "wrong"),
    ("final_answer", "Final answer: 1e3/2", "0.5", "unparsed"),
    ("trigger", "51", "51.0", "correct"),
    ("trigger", "It is 51", "51.0", "unparsed"),
    ("minerva", "Final Answer: The final answer is $16$. I hope it is correct.", "16", "correct"),
]


@pytest.mark.parametrize("answer_format, text, gold, verdict", NUMBERS)
def test_numbers(answer_format, text, gold, verdict):
    assert grade(text, gold, "svamp", answer_format).verdict == verdict


def test_one_vote():
    """Votes counted as strings once gave "18" and "18.0" half a majority each."""
    texts = ["#### 18", "#### 18.0", "#### $18", "#### 18 dollars", "#### 018", "#### 1.8e1"]
    assert {grade(text, "18", "gsm8k").answer for text in texts} == {"18"}
    assert grade("#### 1/3", "5", "gsm8k").answer == "1/3"
    assert grade("#### 2.50", "5", "gsm8k").answer == "2.5"


@pytest.mark.parametrize("dataset, answer_format", [("svamp", "trigger"), ("mathqa-numeric", "final_answer")])
@pytest.mark.parametrize("number, gold", [("51.005", "51.0"), ("0.33", "0.3333333333333333"), ("1/3", "0.33")])
def test_the_tolerance_does_not_change_the_answer(dataset, answer_format, number, gold):
    """Votes are counted without gold; with gold in place of the answers, right ones would win as one block."""
    text = {"trigger": "Therefore, the answer is: ", "final_answer": "Final answer: "}[answer_format] + number
    assert grade(text, gold, dataset, answer_format) == Grade("correct", number)


@given(st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=10**6))
def test_spelling_is_exact_and_reads_back(value):
    spelled = latex.spell(value)
    assert Fraction(spelled) == value
    assert rewards.read_number(spelled) == spelled
    assert latex.read_latex(spelled) == spelled


# --- letters --------------------------------------------------------------------------------------

LETTERS = [  # gold, verdict, what follows "Final answer: "
    ("C", "correct", ["C", "c", "(C)", "C)", "C.", "**C**", r"$\boxed{\text{C}}$", "C. Days get shorter.",
                      "The correct answer is (C).", "Option C"]),
    ("C", "wrong", ["D. Days get shorter."]),
    ("C", "unparsed", ["C and D", "F", ""]),
    ("B", "correct", ["B, because A and C are wrong", "I think it is B"]),
    ("A", "correct", ["A"]),
    ("A", "wrong", ["I think it is B"]),
    ("A", "unparsed", ["A planet spins faster.", "A or C"]),
    ("D", "unparsed", ["Days get shorter"]),
    ("E", "unparsed", ["None of the above"]),
    ("3", "correct", ["3"]),
    ("3", "wrong", ["C"]),
    ("3", "unparsed", ["3.5 hours"]),
]


@pytest.mark.parametrize("gold, verdict, answers", LETTERS)
def test_letters(gold, verdict, answers):
    for answer in answers:
        text = f"A faster spin is a shorter day, so A and B are out.\n\nFinal answer: {answer}"
        assert grade(text, gold, "arc").verdict == verdict, answer


@pytest.mark.parametrize("verdict, answers", [
    ("correct", ["a", "A", "(a)", "a ) 38", "option a"]),
    ("wrong", ["b"]),
    ("unparsed", ["ab", "38", "a large number"])])
def test_mathqa_letters(verdict, answers):
    for answer in answers:
        assert grade(f"Therefore, the answer is: {answer}", "a", "mathqa").verdict == verdict, answer


def test_mathqa_letters_without_the_trigger():
    assert grade("a", "a", "mathqa").verdict == "correct"
    assert grade("It is a large number, so a choice is hard.", "a", "mathqa").verdict == "unparsed"


# --- MATH -----------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("answer, gold", SAME_SPELLING)
def test_math_same_spelling(answer, gold):
    got = grade(rf"So $\boxed{{{answer}}}$.", gold, "math")
    assert got.verdict == "correct"
    assert got.answer == latex.read_latex(gold)


@pytest.mark.parametrize("answer, gold", DIFFERENT)
def test_math_different(answer, gold, monkeypatch):
    monkeypatch.setattr(latex.sandbox, "run", None)  # calling it would be an error
    assert grade(rf"So $\boxed{{{answer}}}$.", gold, "math").verdict == "wrong"


@NEEDS_MATH_VERIFY
@pytest.mark.parametrize("answer, gold, verdict", [
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
    ("10^{1000000000}", "2^{2005}", "timeout")])
def test_math_verify(answer, gold, verdict):
    assert grade(rf"So $\boxed{{{answer}}}$.", gold, "math").verdict == verdict


@pytest.mark.parametrize("text, answer", [
    (r"\boxed{5}", "5"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\{1,2\}}", r"\{1, 2\}"),
    (r"\boxed{4} no, \boxed{5}", "5"),
    (r"\boxed{5} or \boxed{6", "5"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\fbox{5}", "5"),
    *[(text, None) for text in (r"\boxed{5", r"\boxed{}", r"\boxed", "5")]])
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


# --- any text -------------------------------------------------------------------------------------

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
            assert again == Grade("correct", answer)


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


# --- equations ------------------------------------------------------------------------------------


def test_equations():
    text = "so 48/2 = <<48/2 = 24>>24, <<24 + 48=72>>, <<a<b>c>> <<>> <<5=5>"
    assert equations(text) == ["48/2=24", "24+48=72", ""]
    assert equations("no equation") == []


@given(st.text(alphabet="<>1= \n", max_size=40))
def test_equations_are_those_of_the_authors(text):
    found = re.findall(r"<<([^>]*)>>", text)  # the definition; its search is quadratic, ours is not
    assert equations(text) == [content.replace(" ", "") for content in found]


@pytest.mark.parametrize("equation", [
    "48/2=24", "48 / 2 = 24", "3*(4+5)-2=25", "-(3-5)=2", "7//2=3", "2**10=1024", ".5*4=2.0", "10/3=3.333",
    "0.1+0.2=0.3", "28=28", "3+4=7=7",
    "3+4=7=8",  # the authors look at the first two sides
    "(" * 90 + "1" + ")" * 90 + "=1"])
def test_equations_that_hold(equation):
    assert equations_hold(f"so <<{equation}>>.")


@pytest.mark.parametrize("equation", [
    "48/2=26", "10/3=3.33",
    "3+4", "", "=7", "3+4=",
    "3/4=3/4",  # the right side must be a number
    "5/0=0", "$3+4=7", "1,000+1=1001", "20%*50=10", "3x4=12", "07+1=8", "2(3)=6", "...=1",
    "9**9**9=1", "9**-9**9=0", "((9**99)**99)**99=1", "2**0.5=1.414", "9" * 5000 + "=1", "1=" + "9" * 5000,
    "(" * 5000 + "=1", "-" * 5000 + "1=1",
    "__import__('os').abort()=1", "(lambda:1)()=1", "nan=nan", "1=nan", "٣+٤=7"])
def test_equations_that_do_not_hold(equation):
    assert not equations_hold(f"so <<{equation}>>.")


def test_one_wrong_equation_is_enough():
    assert equations_hold("<<1+1=2>> <<2+2=4>>")
    assert not equations_hold("<<1+1=2>> <<2+2=5>>")
    assert equations_hold("no equation at all")  # as the authors: such a path is kept


ARITHMETIC = st.recursive(
    st.integers(0, 99).map(str) | st.decimals(0, 9, places=2).map(str),
    lambda part: st.tuples(part, st.sampled_from(["+", "-", "*", "/", "//"]), part).map(
        lambda parts: "({}{}{})".format(*parts)), max_leaves=6)


@given(ARITHMETIC)
def test_arithmetic_is_exact(expression):
    """Against Python's own evaluation with every number literal made a Fraction."""
    exact = re.sub(r"[0-9.]+", lambda number: f"Fraction('{number[0]}')", expression)
    try:
        value = eval(exact, {"Fraction": Fraction})
    except ZeroDivisionError:
        value = None
    assert arithmetic(expression) == value
