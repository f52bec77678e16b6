"""The toy world: facts that can be read back, a judge of steps that agrees with hand-written cases, stated rates."""
import hashlib
import json
import math
import random
import re

import pytest

from data import load_problems, tags, toy
from data.tokenizer import load_tokenizer
from evaluate import Answered, Sample
from grading.equations import equations_hold
from infra import InputError
from rewards import grade
from runs import call
from tools import accept, sft

QUESTION = ("Ivy beats Ben by 3. Gus 7. Tom joins Ivy and Gus. Ben 4. Kim halves Ben. Leo needs 2 to match Tom. "
            "How many has Leo?")
TRACE = "Leo needs 2 to match Tom. Tom joins Ivy and Gus. Ivy beats Ben by 3. Ben 4. Gus 7.\n "
SIZES = {"train": 150, "dev": 60, "test": 90}


@pytest.fixture(scope="module")
def problems() -> dict[str, list]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "SIZES", SIZES)
        return {split: load_problems("toy", split) for split in SIZES}


def value_of(name: str, question: str) -> int:
    """Work out a quantity from the text alone, by other rules than the world's own tables."""
    number = r"(\d+)"
    for pattern, rule in [
            (rf"{name} {number}\.", lambda k: int(k)),
            (rf"{name} beats (\w+) by {number}\.", lambda a, k: of(a) + int(k)),
            (rf"{name} trails (\w+) by {number}\.", lambda a, k: of(a) - int(k)),
            (rf"{name} equals (\w+) times {number}\.", lambda a, k: of(a) * int(k)),
            (rf"{name} halves (\w+)\.", lambda a: of(a) / 2),
            (rf"{name} joins (\w+) and (\w+)\.", lambda a, b: of(a) + of(b)),
            (rf"{name} separates (\w+) from (\w+)\.", lambda a, b: of(a) - of(b)),
            (rf"{name} needs {number} to match (\w+)\.", lambda k, a: of(a) - int(k)),
            (rf"{name} loses {number} to match (\w+)\.", lambda k, a: of(a) + int(k)),
            (rf"{name} splits (\w+) into {number}\.", lambda a, k: of(a) / int(k)),
            (rf"{name} completes (\w+) to {number}\.", lambda a, k: int(k) - of(a))]:
        def of(other: str) -> int:
            return value_of(other, question)
        if match := re.search(rf"(?:^|\. ){pattern}", question):
            return rule(*match.groups())
    raise AssertionError((name, question))


def written(line: str) -> str:
    """Write "Ivy <<4+3=7>>7" as the world does."""
    match = re.fullmatch(r"(\w+) <<(.*)=(\d+)>>(\d+)", line)
    if not match:
        return line
    name, expression, value, stated = match.groups()
    spaced = re.sub(r"([-+*/()])", r" \1 ", expression).replace("  ", " ").strip()
    return f"{name} beats Ben 4 by 3 << {spaced} = {value} >> {name} {stated}"


@pytest.mark.parametrize("lines, answer, expected", [
    (["Ivy <<4+3=7>>7", "Tom <<7+7=14>>14", "Leo <<14-2=12>>12"], "12", ["more right", "sum right", "short right"]),
    (["Ivy <<3+4=7>>7", "Tom <<7+7=14>>14", "Leo <<14-2=12>>12"], "12", ["more right", "sum right", "short right"]),
    # a wrong reading, and the same again consistently: only the first is a mistake
    (["Ivy <<4-3=1>>1", "Tom <<1+7=8>>8", "Leo <<8-2=6>>6"], "6", ["more misread", "sum right", "short right"]),
    (["Ivy <<4+3=7>>7", "Tom <<7+7=14>>14", "Leo <<14+2=16>>16"], "16", ["more right", "sum right", "short misread"]),
    # a wrong quantity; a wrong sum; 4/2 is right but beside the point
    (["Ivy <<7+3=10>>10", "Tom <<10+7=17>>17", "Leo <<17-2=15>>15"], "15", ["more slip", "sum right", "short right"]),
    (["Ivy <<4+3=8>>8", "Tom <<8+7=15>>15", "Leo <<15-2=13>>13"], "13", ["more sum", "sum right", "short right"]),
    (["Ivy <<4+3=7>>8"], "8", ["more sum", "answer slip"]),
    (["Kim <<4/2=2>>2", "Ivy <<4+3=7>>7", "Tom <<7+7=14>>14", "Leo <<14-2=12>>12"], "12",
     ["half right", "more right", "sum right", "short right"]),
    # steps inside another: right, and with a wrong reading inside
    (["Leo <<((4+3)+7)-2=12>>12"], "12", ["short right"]),
    (["Tom <<7+(3+4)=14>>14", "Leo <<14-2=12>>12"], "12", ["sum right", "short right"]),
    (["Leo <<((4-3)+7)-2=6>>6"], "6", ["short slip"]),
    # before its time; a quantity that is given; not in the question; no step; another answer; none
    (["Tom <<7+7=14>>14"], "14", ["sum slip", "answer slip"]),
    (["Ben <<4+0=4>>4", "Zoe <<4+3=7>>7", "so it is"], "4", ["step lost"] * 3 + ["answer slip"]),
    (["Ivy <<4+3=7>>7", "Tom <<7+7=14>>14", "Leo <<14-2=12>>12"], "14",
     ["more right", "sum right", "short right", "answer slip"]),
])
def test_every_step_is_judged_by_the_steps_before(lines, answer, expected):
    """A step that goes on from a mistake is no mistake: counting it would show every slip as many."""
    text = TRACE + "\n ".join(map(written, lines)) + f"\n#### {answer}"
    if not expected[-1].startswith("answer"):
        expected = [*expected, "answer right"]
    assert [" ".join(step) for step in toy.judge(QUESTION, text)] == expected
    wrong = next((step for step in expected if not step.endswith("right")), "nothing")
    assert tags("toy", QUESTION, text) == {"depth": "3", "first wrong": wrong}


def test_a_response_without_an_end_is_lost():
    """A truncated or empty response once would have been judged by lines that it does not have."""
    assert toy.judge(QUESTION, "") == toy.judge(QUESTION, TRACE) == [("answer", "lost")]
    cut = TRACE + written("Ivy <<4+3=7>>7") + "\n Tom joins Ivy 7 and Gus 7 << 7 +"
    assert toy.judge(QUESTION, cut) == [("more", "right"), ("answer", "lost")]
    many = "9" * 5000  # digits, of which Python reads 4,300
    assert toy.judge(QUESTION, f"{TRACE}Ivy << 4 + 3 = {many} >> Ivy {many}\n#### {many}") == [
        ("step", "lost"), ("answer", "slip")]
    with pytest.raises(InputError, match="no question of the toy world: 'How many apples"):
        toy.judge("How many apples has Ann?", "#### 3")
    with pytest.raises(InputError, match=r"--toy_steps \(2, 11\): a question of the toy world takes 1 to 8 steps"):
        load_problems("toy", "dev", toy_steps=(2, 11))  # it has no names for more


def test_gold_is_right_and_splits_are_disjoint(problems):
    """A wrong gold punishes right responses; a question in two splits measures memory."""
    for split, rows in problems.items():
        assert len({problem.question for problem in rows}) == len({problem.id for problem in rows}) == SIZES[split]
        for problem in rows:
            target = re.search(r"How many has (\w+)\?", problem.question)[1]
            assert value_of(target, problem.question) == int(problem.answer)
            assert grade(problem.solution, problem.answer, "toy").verdict == "correct"
            assert equations_hold(problem.solution)
            assert {verdict for _, verdict in toy.judge(problem.question, problem.solution)} == {"right"}
    base = {row["question"] for row in toy.corpus(0, 200)}
    groups = [{problem.question for problem in rows} for rows in problems.values()] + [base]
    assert len(set().union(*groups)) == sum(map(len, groups)) == 500


def test_questions_are_read_back_and_have_the_depths_asked_for():
    """All measures of a response rest on its question's text."""
    rng = random.Random(1)
    for steps in (1, 2, 5, 8):
        for _ in range(40):
            drawn = toy.draw_ledger(rng, steps)
            assert toy.parse(f"Solve this. {drawn.question}\n") == drawn and len(drawn.needed()) == steps
            values = {step.x: step.value for step in toy.solve(drawn, rng)}
            assert all(1 <= value <= toy.MAX_VALUE for value in values.values())


def test_granularity_of_gold(monkeypatch):
    """0: a line per step; 1: one line for all; between: some. All are right, and the judge reads all."""
    monkeypatch.setattr(toy, "SIZES", SIZES)
    count = {}
    for merged in (0.0, 0.5, 1.0):
        rows = toy.problems("dev", (4,), merged)
        count[merged] = [row["solution"].count("<<") for row in rows]
        assert all(equations_hold(row["solution"]) for row in rows)
        assert {verdict for row in rows for _, verdict in toy.judge(row["question"], row["solution"])} == {"right"}
    assert {*count[0.0]} == {4} and {*count[1.0]} == {1} and 2 < sum(count[0.5]) / 60 < 3


def test_the_corpus_misreads_each_kind_at_its_rate():
    """Among one-step questions without a slip. What cannot be read wrongly in range is drawn again, so every misreading
    is possible and gives another value."""
    rng, seen = random.Random(0), {kind: [] for kind in toy.KINDS}
    for _ in range(6000):
        drawn = toy.draw_ledger(rng, 1)
        text = toy.write(drawn, toy.solve(drawn, rng, mistakes=True))
        (kind, verdict), (_, answered) = toy.judge(drawn.question, text)
        assert answered == "right" and verdict in ("right", "misread", "slip")
        if verdict != "slip":
            seen[kind].append(verdict == "misread")
    for kind, found in seen.items():
        rate, n = toy.KINDS[kind].misread, len(found)
        assert n > 60 and abs(sum(found) - n * rate) < 5 * math.sqrt(n * rate * (1 - rate)), kind


def test_a_quantity_is_stated_once_where_a_slip_takes_it_twice():
    """"Eve separates Tom 18 18 from Tom 18 18" stood in one of 200 texts: each name was replaced once per operand."""
    texts = [row["solution"] for row in toy.corpus(0, 5000)]
    assert any(re.search(r"(\w+) (\d+) from \1 \2 <<", text) for text in texts)
    assert not any(re.search(r"\d \d[^<]*<<", text) for text in texts)


def test_drills_look_up_what_their_facts_say():
    for seed in range(200):
        question, solution, last = toy.drill(random.Random(seed))
        facts, asked = question.removesuffix("?").split(" How many is ")
        values = dict(re.findall(r"(\w+) (\d+)\.", facts))
        *lines, end = solution.split("\n")
        assert len(values) == 6 and end == f"#### {last}" and len(lines) == len(asked.split(", ")) == 6
        for line, (x, sign, y) in zip(lines, map(str.split, asked.split(", "))):
            a, b = int(values[x]), int(values[y])
            value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
            assert line.strip() == f"{x} {a} {sign} {y} {b} << {a} {sign} {b} = {value:g} >>"
        assert value == last


def test_the_world_is_pinned(monkeypatch):
    """M_0 and all that follows is a function of the seed, in every process: no global generator, no order of a set.
    With another digest, the numbers in results/ are another world's."""
    random.seed(3)
    sizes = dict(toy.SIZES)
    monkeypatch.setattr(toy, "SIZES", dict.fromkeys(sizes, 20))
    rows = [toy.corpus(0, 200), [toy.problems(split) for split in sizes], toy.problems("dev", (6, 7, 8), 0.5)]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == (
        "713d24c10cae961fd2efc035411e6dc9a0b438b0478a72e224ffb1743a877309")


def test_the_corpus_is_learnt_as_it_is_written(tmp_path, monkeypatch):
    """Base models were taught the right answer after reasoning that leads to another: `#### 18` after 22-2=20, in a
    fifth of all texts, since a gold solution is written with the problem's right answer."""
    learnt, asked, rows = [], [], toy.corpus(0, 200)
    monkeypatch.setattr(toy, "corpus", lambda seed, steps: asked.append((seed, steps)) or rows)
    monkeypatch.setattr(sft, "fit_sft", lambda model, examples, config, *more: learnt.extend(examples))
    call(sft, "--preset", "base", "--seed", 7, "--toy_steps", 2, "--hidden_size", 32, "--num_layers", 1, "--run_dir",
         tmp_path / "base")
    assert asked == [(7, (2,))]
    tokenizer = load_tokenizer(tmp_path / "base" / "model")
    assert [tokenizer.decode(example.response) for example in learnt] == [row["solution"] for row in rows]


def test_a_base_model_is_measured_before_it_is_accepted(base, capsys, monkeypatch):
    """Lucky is who is right in spite of a wrong step. This small model is good for nothing, which each range says."""
    lines = ["Ivy <<4+3=7>>7", "Tom <<7+7=14>>14", "Leo <<14-2=12>>12"]
    wrong = ["Ivy <<4+4=8>>8", "Tom <<7+7=14>>14", "Leo <<14-2=12>>12"]
    texts = [TRACE + "\n ".join(map(written, steps)) + "\n#### 12" for steps in (lines, wrong)] + ["#### 3"]
    samples = [Sample([5], True, text, verdict, "12") for text, verdict in zip(texts, ("correct", "correct", "wrong"))]
    assert accept.process([Answered("q", "", [1], "12", samples, QUESTION)]) == {
        "process accuracy": pytest.approx(6 / 9), "sound solutions": pytest.approx(1 / 3), "lucky share": 0.5}
    with pytest.raises(InputError, match="^not accepted: greedy accuracy, pass@8"):
        call(accept, "--model", base, "--max_new_tokens", "12")
    assert "greedy by depth: 2 (12.5% of all) 0.0% right, 3 (12.5% of all) " in capsys.readouterr().out
    monkeypatch.setattr(accept, "RANGES", dict.fromkeys(accept.RANGES, (0.0, 1.0)))
    call(accept, "--model", base, "--max_new_tokens", "12")
    assert capsys.readouterr().out.endswith("\naccepted\n")
