"""Generate the toy world: who has how many, in GSM8K's format, and a corpus that misreads it.

A question states some facts in random order, some of which nothing depends on, and asks for one quantity. A solution
first repeats the facts that it needs, from the question backwards, and then works them out, one line per quantity:

    Ivy beats Ben by 3. Gus 9. Tom joins Ivy and Gus. Ben 4. Kim halves Ben. How many has Tom?
    Tom joins Ivy and Gus. Ivy beats Ben by 3. Ben 4. Gus 9.
     Ivy beats Ben 4 by 3 << 4 + 3 = 7 >> Ivy 7
     Tom joins Ivy 7 and Gus 9 << 7 + 9 = 16 >> Tom 16
    #### 16

The base model learns from a corpus that makes mistakes. It misreads a fact of some kind at that kind's own rate ("Ivy
needs 3 to match Ben" as 4 + 3), and now and then takes a wrong quantity, more often the more of them are beside the
point. Then it goes on without a further slip, and its arithmetic is always right: a wrong solution looks like a right
one. `judge` tells every step's truth from the texts of question and solution.

Splits never share a question: the hash of a question's text decides which split it may appear in.

    python -m data.toy                # examples from the corpus, and its rates
    python -m data.toy --steps 6 7 8  # questions of six to eight steps
"""
import argparse
import hashlib
import operator
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

from grading.equations import arithmetic
from infra import InputError

NAMES = "Ann Ben Cat Dan Eve Gus Ivy Kim Leo Mia Ned Tom".split()
SPLITS = {"base": (0, 55), "train": (55, 70), "dev": (70, 85), "test": (85, 100)}  # percent of hashes
# Tokens of their own. With its space a number stands next to its name, which makes it easier to look up.
SYMBOLS = ["\n", "####", *(f"▁{sign}" for sign in ("<<", ">>", *"=+-*/()")), *(f"▁{n}" for n in range(100))]
MAX_STEPS = 8
MAX_FACTS = 8  # if the steps do not need more
DEPTHS = (2, 3, 4, 5)  # steps of a question's solution
SIZES = {"train": 1500, "dev": 500, "test": 1000}
MAX_VALUE = 30  # every quantity of a question is in 1..MAX_VALUE
VALUES = frozenset(range(1, MAX_VALUE + 1))
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul,
              "/": lambda left, right: left // right if right and left % right == 0 else -1}
MAX_STATED = 60  # what a solution with mistakes may state is in 0..MAX_STATED
COMMUTED = 0.3  # of sums and products: 3+4 for 4+3
DISTRACTORS = (0, 1, 2)  # extra facts, as far as MAX_FACTS allows
MERGED = 0.01  # of steps of the corpus: written inside the next one, so that its tokens exist
DRILLS = 0.25  # of the corpus: only looking numbers up, and arithmetic
SLIPS = 0.015  # chance per step of a wrong quantity, times 1 + the number of quantities beside the point


@dataclass(frozen=True)
class Kind:
    """A relation between a quantity x and others, a and b, with a number k."""
    text: str
    right: str  # how to read it: a, b or k, an operation, and another of them
    wrong: str  # how the corpus misreads it
    share: float  # weight in the draw of a question's kinds
    misread: float  # the rate at which the corpus misreads it
    numbers: tuple[int, ...] = ()  # what k may be


SMALL = tuple(range(1, 13))
KINDS = {
    "more": Kind("{x} beats {a} by {k}.", "a+k", "a-k", 0.18, 0.10, SMALL),
    "fewer": Kind("{x} trails {a} by {k}.", "a-k", "a+k", 0.16, 0.15, SMALL),
    "times": Kind("{x} equals {a} times {k}.", "a*k", "a+k", 0.12, 0.20, (2, 3, 4)),
    "half": Kind("{x} halves {a}.", "a/k", "a-k", 0.10, 0.30, (2,)),
    "sum": Kind("{x} joins {a} and {b}.", "a+b", "a-b", 0.13, 0.15),
    "gap": Kind("{x} separates {a} from {b}.", "a-b", "a+b", 0.12, 0.40),
    "short": Kind("{x} needs {k} to match {a}.", "a-k", "a+k", 0.05, 0.65, SMALL),
    "spare": Kind("{x} loses {k} to match {a}.", "a+k", "a-k", 0.04, 0.60, SMALL),
    "ratio": Kind("{x} splits {a} into {k}.", "a/k", "a*k", 0.03, 0.65, (2, 3, 4)),
    "rest": Kind("{x} completes {a} to {k}.", "k-a", "k+a", 0.02, 0.70, tuple(range(2, MAX_VALUE + 1))),
}


@dataclass(frozen=True)
class Fact:
    """What a question says about the quantity x: it is k (kind ""), or it follows from others."""
    x: str
    kind: str
    k: int = 0
    a: str = ""
    b: str = ""

    @property
    def operands(self) -> list[str]:
        return [name for name in (self.a, self.b) if name]

    @property
    def text(self) -> str:
        return self.told(self.a, self.b)

    def told(self, a: str, b: str) -> str:
        """Write the fact with these words for the quantities a and b."""
        template = KINDS[self.kind].text if self.kind else "{x} {k}."
        return template.format(x=self.x, a=a, b=b, k=self.k)

    def value(self, reading: str, values: dict[str, int]) -> int | None:
        return read(reading, values.get(self.a, 0), values.get(self.b, 0), self.k)

    def forms(self, reading: str, known: dict[str, list[str]]) -> list[str]:
        """Write a reading, such as "a+k", in all ways: `known` has those of a and b; sums and products either way."""
        parts = {"a": known.get(self.a, []), "b": known.get(self.b, []), "k": [str(self.k)]}
        sign = reading[1]
        pairs = [(left, right) for left in parts[reading[0]] for right in parts[reading[2]]]
        return [f"{left} {sign} {right}" for left, right in pairs] + [
            f"{right} {sign} {left}" for left, right in pairs if sign in "+*"]


@dataclass(frozen=True)
class Ledger:
    """The facts of a question, in the order in which it states them, and the quantity that it asks for."""
    facts: dict[str, Fact]
    target: str

    @property
    def question(self) -> str:
        return " ".join([*(fact.text for fact in self.facts.values()), f"How many has {self.target}?"])

    def needed(self, name: str = "") -> list[str]:
        """List the quantities to work out for `name`, or else for the target, in an order in which that is possible."""
        fact, found = self.facts[name or self.target], []
        for operand in fact.operands:
            found += [x for x in self.needed(operand) if x not in found]
        return [*found, fact.x] if fact.kind else found

    def misread(self) -> set[int]:
        """Compute what the target comes to where one fact or more are misread, in all ways."""
        found = {fact.x: {(fact.k, False)} for fact in self.facts.values()} | {"": {(0, False)}}
        for x in self.needed():
            fact, kind = self.facts[x], KINDS[self.facts[x].kind]
            found[x] = {(read(reading, a, b, fact.k), wrong_a or wrong_b or reading == kind.wrong)
                        for a, wrong_a in found[fact.a] for b, wrong_b in found[fact.b]
                        for reading in (kind.right, kind.wrong) if a is not None and b is not None}
        return {value for value, wrong in found[self.target] if wrong}


def read(reading: str, a: int, b: int, k: int) -> int | None:
    """Compute what a fact says by a reading; None unless that is a whole number from 0 to MAX_STATED."""
    numbers = {"a": a, "b": b, "k": k}
    value = OPERATIONS[reading[1]](numbers[reading[0]], numbers[reading[2]])
    return value if 0 <= value <= MAX_STATED else None


def draw_ledger(rng: random.Random, steps: int) -> Ledger:
    """Draw a question of `steps` steps: each uses the result of the one before, and perhaps another quantity.

    No kind and no value occurs twice, and no misreadings cancel: else a wrong solution would often end well.
    """
    while True:
        given, beside = rng.choice((1, 2, 3)), rng.choice(DISTRACTORS)
        size = min(given + steps + beside, max(MAX_FACTS, given + steps))
        names = rng.sample(NAMES, size)
        # by share, without replacement (Efraimidis and Spirakis 2006)
        order = sorted(KINDS, key=lambda kind: -rng.random() ** (1 / KINDS[kind].share))
        kinds, rest = [""] * given + order[:steps], iter(order[steps:])
        kinds += [next(rest) if rng.random() < 0.5 else "" for _ in names[len(kinds):]]
        for _ in range(10):  # draws of numbers; then other kinds, since these may never fit
            facts, values, unused = [], {}, names[:given]
            for x, kind in zip(names, kinds):
                last = facts[-1].x if given < len(facts) < given + steps else rng.choice([*values] or [""])
                fact = draw_fact(rng, x, kind, last, unused, values)
                if not fact:
                    break
                facts.append(fact)
                unused = [y for y in unused if y not in (fact.a, fact.b)]
                values[x] = fact.value(KINDS[kind].right, values) if kind else fact.k
            else:
                shown = rng.sample(facts, len(facts))
                ledger = Ledger({fact.x: fact for fact in shown}, names[given + steps - 1])
                if values[ledger.target] not in ledger.misread():
                    return ledger


def draw_fact(rng: random.Random, x: str, kind: str, a: str, given: list[str], values: dict[str, int]) -> Fact | None:
    """Draw what a relation of x to a needs, a number or a given quantity; None if no draw of some fits.

    A second quantity that was used before could cancel it: "what Ned has over Leo", where Ned has 1 more than Leo.
    """
    if not kind:
        return Fact(x, "", rng.choice(sorted(VALUES.difference(values.values()))))
    relation, numbers, b, one = KINDS[kind], KINDS[kind].numbers, "", a
    if not numbers and not given:
        return None
    for _ in range(5):
        k = rng.choice(numbers) if numbers else 0
        if not numbers:
            b = rng.choice(given)
            a, b = (one, b) if rng.random() < 0.5 else (b, one)
        x_a, x_b = values.get(a, 0), values.get(b, 0)
        value = read(relation.right, x_a, x_b, k)
        fits = value and value <= MAX_VALUE and value not in values.values()
        if a != b and fits and read(relation.wrong, x_a, x_b, k) not in (None, value):
            return Fact(x, kind, k, a, b)
    return None


@lru_cache(maxsize=4096)
def parse(question: str) -> Ledger:
    """Read a question back from any text that contains it. InputError if it is none of this world."""
    facts, names = {}, {name: rf"(?P<{name}>[A-Z]\w+)" for name in "xab"} | {"k": r"(?P<k>\d+)"}
    for kind, text in [("", "{x} {k}."), *((name, kind.text) for name, kind in KINDS.items())]:
        for match in re.finditer(r"\b" + text.replace(".", r"\.").format(**names), question):
            found = match.groupdict()
            k = int(found["k"]) if "k" in found else 2 if kind == "half" else 0
            facts[match.start()] = Fact(found["x"], kind, k, found.get("a", ""), found.get("b", ""))
    target = re.search(r"How many has (\w+)\?", question)
    if not target or not facts:
        raise InputError(f"this is no question of the toy world: {question!r}")
    return Ledger({fact.x: fact for _, fact in sorted(facts.items())}, target[1])


# --- solutions -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Step:
    x: str
    expression: str
    value: int
    right: bool  # no misreading and no slip, given the steps before
    said: str  # the fact, with the quantities that it was read with


def solve(ledger: Ledger, rng: random.Random, mistakes: bool = False, merged: float = 0.0) -> list[Step]:
    """Work out what is needed. A step is written inside the next one, as (4+3)+7, with probability `merged`.

    What cannot be read as intended, such as half of 7, is read the other way.
    """
    needed = ledger.needed()
    beside = len(ledger.facts) - len({x for y in needed for x in (y, *ledger.facts[y].operands)})
    while True:
        values, steps = {fact.x: fact.k for fact in ledger.facts.values() if not fact.kind}, []
        known = {x: [str(value)] for x, value in values.items()}
        for x in needed:
            fact, kind = ledger.facts[x], KINDS[ledger.facts[x].kind]
            taken, readings = fact, [kind.right, kind.wrong]
            if mistakes and rng.random() < SLIPS * (1 + beside):
                meant = rng.choice(fact.operands)
                other = rng.choice([y for y in values if values[y] != values[meant]] or [meant])
                taken = replace(fact, a=other) if meant == fact.a else replace(fact, b=other)
            if mistakes and rng.random() < kind.misread:
                readings.reverse()
            reading = next((reading for reading in readings if taken.value(reading, values) is not None), None)
            if not reading:
                break
            values[x] = taken.value(reading, values)
            forms = taken.forms(reading, known)
            expression = forms[-1] if rng.random() < COMMUTED else forms[0]
            said = taken.told(*(f"{y} {values.get(y)}" for y in (taken.a, taken.b)))[:-1]
            steps.append(Step(x, expression, values[x], taken == fact and reading == kind.right, said))
            known[x] = [f"( {expression} )" if x != ledger.target and rng.random() < merged else str(values[x])]
        else:
            return [step for step in steps if known[step.x] == [str(step.value)]]


def write(ledger: Ledger, steps: list[Step]) -> str:
    trace, left = [], [ledger.target]
    while left:
        fact = ledger.facts[left.pop(0)]
        trace.append(fact.text)
        left = fact.operands + left
    lines = [f"{step.said} << {step.expression} = {step.value} >> {step.x} {step.value}" for step in steps]
    return "\n ".join([" ".join(trace), *lines]) + f"\n#### {steps[-1].value}"


# --- splits ----------------------------------------------------------------------------------------

def split_of(question: str) -> str:
    """Tell which split a question may appear in, by the hash of its text."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big") % 100
    return next(name for name, (low, high) in SPLITS.items() if low <= bucket < high)


def ledgers(split: str, size: int, steps: tuple[int, ...], seed: int) -> dict[str, Ledger]:
    """Draw `size` different questions of a split, each with a number of steps drawn from `steps`."""
    if not 1 <= min(steps) <= max(steps) <= MAX_STEPS:
        raise InputError(f"--toy_steps {steps}: a question of the toy world takes 1 to {MAX_STEPS} steps")
    rng, found = random.Random(f"{split} {seed}"), {}
    while len(found) < size:
        ledger = draw_ledger(rng, rng.choice(steps))
        question = ledger.question
        if split_of(question) == split:
            found[question] = ledger
    return found


def problems(split: str, steps: tuple[int, ...] = DEPTHS, merged: float = 0.0) -> list[dict]:
    """Write the questions of train, dev or test and their gold solutions, as fields of `data.Problem`.

    merged: the granularity of gold: 0 has a line per step, 1 one line for all, such as (4+3)+7.
    """
    rng, rows = random.Random(f"gold {split}"), []
    for i, (question, ledger) in enumerate(ledgers(split, SIZES[split], steps, seed=0).items()):
        solved = solve(ledger, rng, merged=merged)
        rows.append({"id": f"toy-{split}-{i}", "question": question, "answer": str(solved[-1].value),
                     "solution": write(ledger, solved)})
    return rows


def drill(rng: random.Random) -> tuple[str, str, int]:
    """Draw facts without relations, and six equations about them: (question, solution, the last value)."""
    values = dict(zip(rng.sample(NAMES, 6), rng.sample(sorted(VALUES), 6)))
    lines, asked = [], []
    while len(lines) < 6:
        (x, a), (y, b), sign = *rng.sample([*values.items()], 2), rng.choice("++--*/")
        value = read(f"a{sign}b", a, b, 0)
        if value:
            asked.append(f"{x} {sign} {y}")
            lines.append(f"{x} {a} {sign} {y} {b} << {a} {sign} {b} = {value} >>")
    facts = " ".join(f"{x} {value}." for x, value in values.items())
    return f"{facts} How many is {', '.join(asked)}?", "\n ".join(lines) + f"\n#### {value}", value


def corpus(seed: int, size: int = 40000, steps: tuple[int, ...] = DEPTHS) -> list[dict]:
    """Write the base model's training data: solutions with mistakes, half of them of one step, and drills."""
    rng, rows = random.Random(f"corpus {seed}"), []
    for i, (question, ledger) in enumerate(ledgers("base", size, (*[1] * len(steps), *steps), seed).items()):
        solved = solve(ledger, rng, mistakes=True, merged=MERGED)
        answer, solution = solved[-1].value, write(ledger, solved)
        if rng.random() < DRILLS:
            question, solution, answer = drill(rng)
        rows.append({"id": f"toy-base-{i}", "question": question, "answer": str(answer), "solution": solution})
    return rows


# --- what a solution gets wrong --------------------------------------------------------------------

LINE = re.compile(r"(?P<x>\S+) [^<>]*<< (?P<expression>[^=<>]+) = (?P<value>\d{1,9}) >> "
                  r"(?P<again>\S+) (?P<stated>\d+)")


def judge(question: str, text: str) -> list[tuple[str, str]]:
    """Judge each line of a solution by the lines before it, as (kind of its fact, verdict).

    Verdicts: right; misread, as the corpus misreads this kind; slip, any other expression; sum, one that does not have
    the value stated; lost, neither a step nor an answer. A line that goes on from a mistake is right. The trace is not
    judged. The last line is of the kind "answer", and a slip unless it repeats what the target was found to be.
    """
    ledger = parse(question)
    known = {fact.x: [str(fact.k)] for fact in ledger.facts.values() if not fact.kind}
    found, lines = [], text.strip().split("\n")
    for line in lines[1:-1]:
        match = LINE.fullmatch(line.strip())
        fact = ledger.facts.get(match["x"]) if match else None
        if not fact or not fact.kind or match["again"] != fact.x:
            found.append(("step", "lost"))
            continue
        value, expression = match["stated"], match["expression"]
        if match["value"] != value or arithmetic(expression) != int(value):
            verdict = "sum"
        else:
            inside = dict(known)
            for x in ledger.needed(fact.x)[:-1]:  # what has no line of its own, rightly, in all ways
                right = ledger.facts[x].forms(KINDS[ledger.facts[x].kind].right, inside)
                inside.setdefault(x, [f"( {form} )" for form in right])
            readings = {"right": KINDS[fact.kind].right, "misread": KINDS[fact.kind].wrong}
            verdict = next((name for name, reading in readings.items() if expression in fact.forms(reading, inside)),
                           "slip")
        found.append((fact.kind, verdict))
        known[fact.x] = [value]
    if not lines[-1].startswith("#### "):
        return [*found, ("answer", "lost")]
    return [*found, ("answer", "right" if [lines[-1][5:]] == known.get(ledger.target) else "slip")]


def tags(question: str, text: str) -> dict[str, str]:
    """Say how many steps a question takes, and what is the first thing that a response gets wrong."""
    wrong = next((" ".join(step) for step in judge(question, text) if step[1] != "right"), "nothing")
    return {"depth": str(len(parse(question).needed())), "first wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the toy world.", allow_abbrev=False)
    parser.add_argument("--steps", type=int, nargs="+", default=list(DEPTHS), choices=range(1, MAX_STEPS + 1),
                        help="steps that a question takes, drawn from these")
    rng, rows = random.Random(0), corpus(0, 2000, tuple(parser.parse_args().steps))
    for row in rng.sample(rows, 3):
        print(f"{row['question']}\n{row['solution']}\n")
    solutions = [row for row in rows if "How many is" not in row["question"]]  # a drill
    first = Counter(tags(row["question"], row["solution"])["first wrong"] for row in solutions)
    for name, count in first.most_common():
        print(f"first wrong: {name}: {count / len(solutions):.1%}")


if __name__ == "__main__":
    main()
