"""The graders: tables of answers, and properties of any text. Published data: see test_real_data.py."""
import importlib.util
import re
import signal
import time
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import evaluate
from infra import InputError
import rewards
import rft
from evaluate import SampleOptions
from grading import formats, latex, letters
from grading.equations import arithmetic
from infra.run import write_records
from rewards import Grade, equations, equations_hold, grade, plain_equations
from sample import Response
from tools import evaluation

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
    *[(text, "unparsed") for text in ("18 * 2", "18 or 19", "18 dollars and 50 cents", "17-18",
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
    *[("final_answer", f"Final answer:\n{opening}\n18\n{closing}", "18", "correct")
      for opening, closing in ((r"\[", r"\]"), ("$$", "$$"), ("```", "```"), ("```text", "```"))],
    ("final_answer", r"Final answer: $-\boxed{18}$", "18", "wrong"),
    ("final_answer", "Final answer: 9 * 2 = 18", "9", "wrong"),
    ("final_answer", "Final answer: 1e3/2", "0.5", "unparsed"),
    ("trigger", "51", "51.0", "correct"),
    ("trigger", "It is 51", "51.0", "unparsed"),
    ("minerva", "Final Answer: The final answer is $16$. I hope it is correct.", "16", "correct"),
]


@pytest.mark.parametrize("answer_format, text, gold, verdict", NUMBERS)
def test_numbers(answer_format, text, gold, verdict):
    assert grade(text, gold, "svamp", answer_format).verdict == verdict


NO_NUMBER = r"""7*6|6-4|4^3|6³|4**3|x²|\sqrt{49}|√49|\frac{8}{4}|8/4|4!|7x|6n|3i|4\pi|3\sqrt{5}|3(7)|(4+4)|x-7|x - 7
7 x|7/x|7-|9%+9%|twice 6|half of 44|square root of 49|log 100|sqrt(49)|6 squared|7 plus tax|7 times 2|2 of 8|6 2/4|6 5/4
4 4|7 and a half|7 and one third|7 dollars and forty cents|not 7|it isn't 7|never 7|7 is wrong|7 or more|neither 7
more than 7|at least 7|up to 7|> 7|7±1|7 below zero|15% of 60 is 9|7. 8. 9.|7, 8|7 = 8|x=7, y=8|x = 7 or x = 8
1.000,50|7 000|7π|7 pi|7e|7 hundredths|7 (or 8)|7, maybe 8|7 eggs. Or 8 eggs|7, €8|x >= 7|x <= 7|x != 7|7!=8|7² m"""
NUMBER_SPELLINGS = {
    "-7": ["–7", "—7", "−7", "- 7", "-$7", "$-7", "minus 7", "negative 7", "Negative $7"],
    "7": ["+7", "$7$", r"\(7\)", r"\mathbf{7}", r"\text{7 cm}", r"\textcolor{red}{7}", "*7*", "It is **7**.",
          r"7^\circ", r"7\%", "7km/h", "7 km/h", "7-year-old", "7 times as many", "7 cats and dogs", "7 = 14/2",
          "14/2 = 7", "f(2) = 7", "3(2)+1 = 7", r"\sqrt{49} = 7", "7, not 8", "7 (not 8)", "7 because 3+4=7",
          "seven (7)", "7 M&M's", "7 K-cups", "7 cm²", r"7 \text{ cm}^2", "7 ft.^{2}", "7 m/s²", "7 (eggs or so)",
          r"\left(7\right)", r"7\quad"],
    "-0.5": ["-½", r"-\frac{1}{2}", "-1/2"],
    "3.75": ["3¾", "3 3/4", "3 and 3/4", r"3\frac{3}{4}", r"3\dfrac34"],
    "-3.75": ["-3 3/4", "-3¾"],
    "7000": ["7k", "$7K", "7 thousand", "7'000", "7’000", r"7\,000", "7 × 10^3", r"7 \times 10^{3}", "0.7*10^4", "7e3"],
    "2500000": ["2.5M", "$2.5 million", "$2.5m", "2.5 Million", "2.5-million", "0.0000025 trillion"],
    "36": ["3 dozen"],
    "0.007": ["7 x 10^-3"],
}


@pytest.mark.parametrize("phrase", re.split(r"[|\n]", NO_NUMBER))
def test_no_number_is_picked_out_of_an_expression_or_a_denial(phrase):
    """9*2 was 2, 3**2 was 32 (without its "bold"), \\sqrt{16} was 16, 5² was 5, and "not 18" was 18."""
    assert rewards.read_number(phrase) is None


def test_commas_belong_to_answers_in_words():
    """The hash format dropped those between digits from every answer."""
    assert grade("So.\n#### 1,2,3", "1,2,3", "text", "hash").verdict == "correct"
    assert grade("So.\n#### 1,3", "13", "gsm8k", "hash").answer == "13"


@pytest.mark.parametrize("number, phrases", NUMBER_SPELLINGS.items())
def test_usual_spellings_of_numbers(number, phrases):
    """An en dash lost the sign, 3½ was 3, and 5k was 5."""
    assert {phrase: rewards.read_number(phrase) for phrase in phrases} == dict.fromkeys(phrases, number)


@pytest.mark.parametrize("answer, number", [("3 1/2", "3.5"), ("7*2", None), ("9 - 2", None), ("5 million", "5000000")])
def test_the_hash_format_reads_the_line(answer, number):
    """The first word alone made 3 of "3 1/2"."""
    assert grade(f"So.\n#### {answer}\n", "3", "gsm8k") == Grade("wrong" if number else "unparsed", number)


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
    ("A", "correct", ["A", "A is correct because ice is not hot", "A since it never rains", "A is correct, not B"]),
    ("A", "wrong", ["I think it is B"]),
    ("A", "unparsed", ["A planet spins faster.", "A or C"]),
    ("D", "unparsed", ["Days get shorter"]),
    ("E", "unparsed", ["None of the above"]),
    ("3", "correct", ["3"]),
    ("3", "wrong", ["C"]),
    ("3", "unparsed", ["3.5 hours"]),
    ("D", "unparsed", ["D is wrong", "(D) is not right", "D can't be it", "not D", "anything but D", "never (D)",
                       "D C B A", "(D)(E)", "D. E.", "D/E", "D, C", "neither C nor D", "rule out D"]),
    ("A", "unparsed", ["A) 5 B) 6 C) 7", "A. Days B. Nights C. Weeks", "A to D", "A is false", "A B C D", "(a)(b)(c)"]),
    ("2", "unparsed", ["1. 2. 3. 4.", "(2)(3)", "2, 3"]),
    ("D", "correct", ["C is wrong; the answer is D", "Not C. The answer is (D).", "D, not C",
                      "D. A planet does not spin", "D. E. coli", "D is correct", "D because C is not hot", "D. 3 km"]),
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
    (r"440\text{ cm}^2", "440"), ("5 miles per hour", "5"), ("8 cm", "8"),
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
    (r"\alpha = 45^\circ", "45"), ("y_2=8", "8"), (r"h(x) = x^2", "x^2"), (r"m\angle B = 45^{\circ}", "45"),
    (r"\overline{CD} = 8", "8"), ("(p,q) = (8, 9)", "(8,9)"), ("+8", "8"), (r"(0,+\infty)", r"(0,\infty)"),
    (r"\boldsymbol{48}", "48"), (r"\mathbf{\frac38}", r"\frac{3}{8}"), ("3/-8", r"-\frac38"),
    (r"\frac{3}{-8}", r"-\frac38"),
    (r"\{ \}", r"\emptyset"), ("∅", r"\varnothing"), (r"\lbrace 8,9 \rbrace", r"\{8,9\}"), (r"8~\mathrm{g}", "8"),
    (r"8\,\mathrm{m/s}^2", "8"), (r"8\operatorname{cm}", "8"), (r"5\mathrm{i}", "5i"),
    (r"\left[\begin{array}{cc}8&9\end{array}\right]", r"\begin{bmatrix}8 & 9\end{bmatrix}"),
    (r"\left(\begin{matrix}8\\9\\\end{matrix}\right)", r"\begin{pmatrix}8\\9\end{pmatrix}"),
    (r"{\color{red}8}", "8"), (r"\textcolor{blue}{8}", "8"), (r"{\sqrt{3}\over 8}", r"\frac{\sqrt{3}}{8}"),
    (r"3\over8", r"\frac38"), ("–8", "-8"), (r"x\geqslant 8", r"x \ge 8"), (r"x = 8 \text{ or } x = 9", "8,9"),
    ("2π", r"2\pi"), ("3pi", r"3\pi"), ("(0,∞)", r"(0,\infty)"), ("[8,9)∪(9,10]", r"[8,9) \cup (9,10]"),
    (r"\mbox{Evelyn}", r"\text{Evelyn}"), (r"\(8\)", "8"),
    (r"45^\circ,135^\circ", r"45^\circ, 135^\circ"), (r"\$40,\$135", r"40, 135"), ("5%,10%", "5, 10"),
    ("2 3/8", r"\frac{19}{8}"), (r"2\ 3/8", "2.375"), (r"12\,345", "12345"), (r"11,\! 222", "11222"),
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
    *[(answer, "34") for answer in ("3 4", r"3\ 4", r"3\,4", r"3\;4", "3~4", r"3\qquad 4")],
    ("2 3/8", r"\frac{23}{8}"), ("2 3 x", "23x"), (r"5\mathrm{i}", "5"), ("13", "x^2+y^2=13"),
    ("x^2+y^2", "x^2+y^2=13"),
    *[(rf"5 \text{{ {words} }}", "5") for words in ("but 8", "not 8", "plus x", "thousand")],
    *[(f"5 {words}", "5") for words in ("plus x", "minus two", "squared", "choose two", "is wrong", "xy")],
    ("12", "12ab"), ("2", "2ab"),
    ("x_2=8", "9"), ("(p,q)=(9,8)", "(8,9)"), (r"\frac{3}{-8}", r"\frac38"), (r"{1\over 3}", r"\frac12"),
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
    *[(*pair, "wrong") for pair in (  # within math-verify's tolerance
        ("2^{-98}", "2^{-99}"), (r"\frac{1}{3^{50}}", r"\frac{1}{3^{51}}"), ("1-1", "e^{-100}"),
        ("2^{-98}x", "2^{-99}x"), ("1+10^{-20}", r"\sqrt{1}"), (r"\sqrt{10^{40}+1}", "10^{20}"),
        ("3.14159265358979", r"\pi"))],
    ("2^{-99}", r"\frac{1}{2^{99}}", "correct"),
    (r"0.7\sqrt2", r"\frac{7\sqrt2}{10}", "correct"),
    ("3y^2+3x^2-39=0", "x^2+y^2=13", "correct"),
    ("x^2+y^2=14", "x^2+y^2=13", "wrong"),
    ("x^2-y^2=13", "x^2+y^2=13", "wrong"),
    ("10^{1000000000}", "2^{2005}", "wrong"),
    (r"\binom{1000000}{500000}", "2^{2005}", "timeout")])
def test_math_verify(answer, gold, verdict):
    assert grade(rf"So $\boxed{{{answer}}}$.", gold, "math").verdict == verdict


@NEEDS_MATH_VERIFY
@pytest.mark.parametrize("prompt, answer, gold, verdict", [
    (r"Simplify $\sqrt{ 75 }$.", r"\sqrt{75}", r"5\sqrt3", "copied"),
    (r"Find \[\arctan \left( -1 \right).\]", r"\arctan(-1)", r"-\frac{\pi}{4}", "copied"),
    (r"For \$5, what is $$x = \sqrt{75}?$$", r"\sqrt{75}", r"5\sqrt3", "copied"),
    (r"Is $5\sqrt3$ real?", r"5\sqrt{3}", r"5\sqrt3", "correct"),
    (r"Simplify $\sqrt{76}$.", r"\sqrt{75}", r"5\sqrt3", "correct"),
    (r"Simplify $\sqrt{75}$.", r"\sqrt{74}", r"5\sqrt3", "wrong")])
def test_copying_the_question_is_no_work(prompt, answer, gold, verdict):
    """Any grader that asks a computer algebra system pays for \\sqrt{242} in the box where it was to be simplified."""
    [[got]] = rewards.grade_all([[rf"So $\boxed{{{answer}}}$."]], [gold], "math", "boxed", [prompt])
    assert got.verdict == verdict


@NEEDS_MATH_VERIFY
def test_copies_are_seen_wherever_samples_are_graded(tmp_path, monkeypatch, capsys):
    """An evaluation, grading its file again, and RFT: without the prompt, each would take a copy for work."""
    options = SampleOptions(task="math", prompt="plain")
    problem = data.Problem("q", r"Simplify $\sqrt{75}$.", r"5\sqrt3", "")
    tokenizer = SimpleNamespace(bos_id=1, eos_ids=(2,), encode=lambda text, *_: [3],
                                decode=lambda ids: r"So $\boxed{\sqrt{75}}$.")
    monkeypatch.setattr(evaluate, "sample_all", lambda *args: [[Response([5, 2], True)] * 2])
    answered = evaluate.answer(None, tokenizer, [problem], options)
    assert [sample.verdict for sample in answered[0].samples] == ["copied"] * 2
    found = evaluate.summarize(answered, "math")
    assert (found["accuracy"], found["pass@2"], found["verdicts"]) == (0, 0, {"copied": 1})

    once_right = [replace(answered[0], samples=[replace(answered[0].samples[0], verdict="correct")])]
    write_records(tmp_path / "samples.jsonl", once_right, {"task": "math", "marks": "boxed"})
    evaluation.rescore(tmp_path / "samples.jsonl")
    assert "q: correct in the file, copied now" in capsys.readouterr().out
    config = rft.Config(task="math", prompt="plain", model="m")
    assert rft.all_right_paths([answered[0].samples], [problem], config) == [[]]
    assert rft.all_right_paths([once_right[0].samples], [problem], config) == [[0]]


@pytest.mark.parametrize("text, answer", [
    (r"\boxed{5}", "5"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\{1,2\}}", r"\{1, 2\}"),
    (r"\boxed{4} no, \boxed{5}", "5"),
    (r"\boxed{5} or \boxed{6", "5"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\fbox{5}", "5"), (r"x = -\boxed{5}", "-5"), (r"- \boxed{5}", "5"),
    ("\\boxed{5}.\n\nQuestion: What is 3+4?\n\\boxed{7}", "5"), ("Hm.\nQuestion: What is 3+4?\n\\boxed{7}", "7"),
    *[(text, None) for text in (r"\boxed{5", r"\boxed{}", r"\boxed", "5")]])
def test_box(text, answer):
    """The last closed box, by brace count: a regex up to the first brace reads \\frac{1 here."""
    assert grade(text, "5", "math").answer == answer


@pytest.mark.parametrize("phrase, answer", [
    (r"The answer is $\$40$.", "40"), ("It is $5$.", "5"), ("It is not $5$.", None), ("$5$ or $6$", None),
    ("6, not $5$", None), ("-$5$", "-5"), (r"It is $8 \text{ or } 9$.", "8, 9"), ("It isn't $5$.", None)])
def test_a_sentence_around_a_formula(phrase, answer):
    """The formula counts, unless it is denied, or not all of the answer."""
    got = latex.read_latex(phrase)
    assert got == answer if answer else got not in ("5", "6")


def test_without_math_verify(monkeypatch):
    """A grader once scored 0 on all of MATH because an import failed inside its `except`."""
    monkeypatch.setattr(latex.importlib.util, "find_spec", lambda name: None)
    assert grade(r"\boxed{\tfrac12}", "0.5", "math").verdict == "correct"  # strings are enough
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        grade(r"\boxed{\sqrt{12}}", r"2\sqrt{3}", "math")
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        rewards.require_math_verify()


def test_unknown_names_are_errors():
    with pytest.raises(InputError, match="cannot grade 'gsm8k' in the format 'hashes': choose from toy, gsm8k"):
        grade("#### 5", "5", "gsm8k", "hashes")
    with pytest.raises(InputError, match="'gsm9k'"):
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
NASTY = r"""9|1,|1,000|$1|1 a |1 1/|½|²|1'|1e|9.|×10^|<<|<<1|<<1+1=2>>|<<1=1>>|>|\boxed{|\fbox{x}|{|}|(|(A|)
|[|A or |A. |C/|B, |/|/ |-|–|*|**|_|=|=1|x=|x_1=|(x,|\frac{|\text|\text{|\over|\sqrt|\mathrm{|\color{|\begin{array}|\\
|\!|\,|$|$$|$ |&|,|. |'|"|`|```|```python|~~~|option|not |minus |n't |5k |thousand
|B is wrong; the answer is |Final answer: |#### |Final Answer: The final answer is |. I hope|def solution|é
|٣""".replace("\n|", "|").split("|")
NASTY += ["|", "\n", "\t", " ", "\r\n", "\0", "\ud800", "\n    ", "\n```\n", "\nQuestion:", "answer is ",
          "\ndef solution():\n"]
MARKERS = [("hash", "#### C", "arc"), ("hash", "#### 5", "gsm8k"), ("final_answer", "Final answer: C. ", "arc"),
           ("final_answer", "Final answer: ", "gsm8k"), ("final_answer", "Final answer: ", "math"),
           ("boxed", r"\boxed{", "math"), ("trigger", "Therefore, the answer is: A", "mathqa"), ("boxed", "", "math"),
           ("minerva", "Final Answer: The final answer is ", "math")]


@pytest.mark.parametrize("piece", NASTY)
def test_no_text_takes_long(piece):
    """<<([^>]*)>> takes a minute for 50,000 brackets; "Final answer: C. " and 16,000 slashes took 12 s here."""
    body = (piece * LONG)[:LONG]
    tasks = [lambda text=marker + body + "!", rest=(dataset, answer_format): grade(text, "no answer", *rest)
             for answer_format, marker, dataset in MARKERS]
    tasks += [lambda task=task: task(body) for task in (
        equations, equations_hold, formats.program, latex.read_latex, letters.read_letter, rewards.read_number)]
    for i, task in enumerate(tasks):
        times = []
        for _ in range(2):  # the faster one, since a busy machine is slow
            start = time.process_time()
            task()
            times.append(time.process_time() - start)
        assert min(times) < 0.1, i


# --- equations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, found", [
    ("47 pieces - 25 pieces + 40 pieces = 62 pieces", ["47-25+40=62"]), ("9 games * $7 per game = $63", ["9*7=63"]),
    ("712 lbs. - 234 lbs. = 478 lbs.", ["712-234=478"]), ("$12.50/hour * 8 hours = $100", ["12.50*8=100"]),
    ("In 2019 3x4 = 12, and (12 + 1,000) ÷ 2 = 506.", ["3*4=12", "(12+1000)/2=506"]), ("(3 + 4 = 7)", ["3+4=7"]),
    ("2 + 3 = 5 × 4 = 20", ["2+3=5", "5*4=20"]), ("Cookies\n= 23 + 25\n= 48", ["23+25=48"]),
    ("Ann has 5.\n- 3 − .5 = 2.5", ["3-.5=2.5"]), ("4 * x + 600 = 10", []), ("six = 6; 20% of 50 = 10", []),
    ("2+3=<<2+3=5>>5", ["2+3=5"]), ("=" * 50000, []), ("1+" * 25000 + "=", []), ("1" * 50000 + "=1", [])],
    ids=lambda value: str(value)[:20])
def test_plain_equations(text, found):
    """SVAMP's solutions put units between the numbers. Nonsense that is long takes no time."""
    assert plain_equations(text) == found


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
