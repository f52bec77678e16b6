"""Generate the toy world: grade-school stories in GSM8K's format, and a corpus that reasons both well and badly.

A story hands a number from person to person and ends in a question about the last one:

    Ben has 4 apples. Ivy has 2 more than Ben. Tom has twice as many as Ivy.
    Tom packs them in bags of 3. How many are left over?

There are two ways to answer. The *careful* way writes every step as an equation. The *hasty* way does the chain in
its head, states the last person's number, and writes only the final step. A head is unreliable here by design: the
number it states is off by a uniform draw from HEAD_ERRORS, so a hasty answer is right with a probability that the
question fixes (1/2 for bags of two, 1/3 for bags of three, 1/6 for the rest) and that no training on this corpus can
raise. The corpus of the base model is mostly hasty for some skills and mostly careful for others, with a few careful
rationales that use a wrong operation, plus arithmetic drills. So the base model knows both ways, and preference
learning only has to discover which one to trust.

That is the world "ways". In the world "paths", made for RFT, all rationales are careful and right, and each is
written in one of several ways: 2+4 or 4+2, 2*3, 3*2 or 3+3, two relations in one equation or in two. There the base
model learns to follow one or two relations, in all of these ways, and never sees a story's final question: it learns
that from gold solutions and from its own.

Splits never share a question: the hash of a question's text decides which split it may appear in.

    python -m data.toy              # one example of each kind of document, with its share of the corpus
    python -m data.toy --steps 4    # the same with four relations in every story
    python -m data.toy --world paths
"""
import argparse
import hashlib
import random
import re
from dataclasses import dataclass, replace
from statistics import fmean

NAMES = "Ann Ben Cat Dan Eve Gus Ivy Kim Leo Mia Ned Tom".split()
ITEMS = "apples books coins nuts pens shells".split()
WORLDS = ("ways", "paths", "ledger")  # the last one is that of data/ledger.py
MAX_VALUE = 20  # every number along the chain stays in 1..MAX_VALUE
HEAD_ERRORS = (-3, -2, -1, 0, 1, 2)  # six consecutive numbers: uniform modulo 2 and modulo 3
WRONG_OPERATION_SHARE = 0.02  # of careful rationales in the corpus
MERGED_SHARE = 0.3  # of neighbouring + and - relations in the world "paths": one equation for both
TERSE_GOLD_SHARE = 0.5  # of gold solutions: the chain is done in the head, without error

# skill: share of questions, share of careful rationales in the corpus, values of the last number
SKILLS = {
    "pairs": (0.40, 0.05, (2,)),
    "threes": (0.20, 0.05, (3,)),
    "price": (0.20, 0.30, (2, 3)),
    "left": (0.20, 0.70, (1, 2, 3)),
}
SPLITS = {"base": (0, 80), "train": (80, 90), "dev": (90, 93), "test": (93, 100)}  # percent of hashes
SIZES = {"train": 1500, "dev": 500, "test": 1000}
WRONG_OPERATION = {"+": "-", "-": "+", "*": "+", "/": "*"}


@dataclass(frozen=True)
class Story:
    """A chain of people: names[i + 1] has names[i]'s number, changed by relations[i]. Then comes the question."""
    names: tuple[str, ...]
    item: str
    start: int
    relations: tuple[tuple[str, int], ...]  # ("+", 2): 2 more; "-": fewer; "*": times; "/": half
    skill: str
    amount: int  # bag size, price, or how many are lost

    @property
    def steps(self) -> list[tuple[str, int]]:
        """List every equation of the careful way as (left side, value); the last one answers the question."""
        steps, value = [], self.start
        for sign, k in self.relations:
            steps.append((f"{value}{sign}{k}", apply(value, sign, k)))
            value = steps[-1][1]
        return [*steps, self.last_step(value)]

    def last_step(self, value: int) -> tuple[str, int]:
        """Write the equation that answers the question if the last person has `value`."""
        if self.skill in ("pairs", "threes"):
            packed = value - value % self.amount
            return f"{value}-{packed}", value % self.amount
        sign = "*" if self.skill == "price" else "-"
        return f"{value}{sign}{self.amount}", apply(value, sign, self.amount)


def apply(value: int, sign: str, k: int) -> int:
    """Compute `value sign k`, or -1, which no story may contain, where that is not an integer."""
    if sign == "/":
        return value // k if value % k == 0 else -1
    return {"+": value + k, "-": value - k, "*": value * k}[sign]


def draw_story(rng: random.Random, steps: int) -> Story:
    """Draw a story with `steps` relations whose numbers all stay in range."""
    skills, (shares, _, amounts) = list(SKILLS), zip(*SKILLS.values())
    index = rng.choices(range(len(skills)), shares)[0]
    names, item = tuple(rng.sample(NAMES, steps + 1)), rng.choice(ITEMS)
    while True:
        signs = [rng.choice("+-*/") for _ in range(steps)]
        amounts_of = {"+": rng.randint(1, 6), "-": rng.randint(1, 6), "*": rng.randint(2, 3), "/": 2}
        relations = tuple((sign, amounts_of[sign]) for sign in signs)
        story = Story(names, item, rng.randint(2, 12), relations, skills[index], rng.choice(amounts[index]))
        values = [value for _, value in story.steps[:-1]]
        # the last number leaves room for every head error, so that none of them has to be clipped
        if all(1 <= v <= MAX_VALUE for v in values) and values[-1] > -min(HEAD_ERRORS):
            return story


def facts_text(story: Story) -> str:
    """Tell what everybody has."""
    sentences = [f"{story.names[0]} has {story.start} {story.item}."]
    for (sign, k), name, other in zip(story.relations, story.names[1:], story.names):
        how = {"+": f"{k} more than", "-": f"{k} fewer than", "*": f"{k} times as many as",
               "/": "half as many as"}[sign]
        sentences.append(f"{name} has {how} {other}.")
    return " ".join(sentences)


def question_text(story: Story) -> str:
    """Tell the complete story, with the question that its skill asks."""
    name, amount = story.names[-1], story.amount
    question = {"price": f"{name} sells them for {amount} each. How much is that?",
                "left": f"{name} loses {amount}. How many are left?"}
    packs = f"{name} packs them in bags of {amount}. How many are left over?"
    return f"{facts_text(story)} {question.get(story.skill, packs)}"


def equation(step: tuple[str, int]) -> str:
    left, value = step
    return f"{left}=<<{left}={value}>>{value}"


def careful(story: Story) -> str:
    """Write the rationale that shows every step."""
    last = story.steps[-1]
    return f"{chain(story)} That makes {equation(last)}.\n#### {last[1]}"


def chain(story: Story) -> str:
    """Write everybody's number in turn, each with its equation."""
    steps = zip(story.names[1:], story.steps)
    return " ".join([f"{story.names[0]} has {story.start}.",
                     *(f"{name} has {equation(step)}." for name, step in steps)])


def hasty(story: Story, error: int) -> str:
    """Write the rationale that does the chain in its head, is off by `error`, and shows only the last step."""
    value = story.steps[-2][1] + error
    last = story.last_step(value)
    return f"So {story.names[-1]} has {value}. That makes {equation(last)}.\n#### {last[1]}"


def varied(rng: random.Random, story: Story, ask: bool = True) -> str:
    """Write a careful rationale in one of its ways; without the final question if not `ask`."""
    sentences, value, i = [f"{story.names[0]} has {story.start}."], story.start, 0
    while i < len(story.relations):
        together = [story.relations[i]]
        together += [r for r in story.relations[i + 1:i + 2]
                     if {r[0], together[0][0]} <= {"+", "-"} and rng.random() < MERGED_SHARE]
        left = one_of_its_forms(rng, value, together)
        for relation in together:
            value = apply(value, *relation)
        i += len(together)
        sentences.append(f"{story.names[i]} has {equation((left, value))}.")
    if ask:
        left, value = story.last_step(value)
        if story.skill == "price":
            left = one_of_its_forms(rng, story.steps[-2][1], [("*", story.amount)])
        sentences.append(f"That makes {equation((left, value))}.")
    return " ".join(sentences) + f"\n#### {value}"


def one_of_its_forms(rng: random.Random, value: int, relations: list[tuple[str, int]]) -> str:
    """Draw the left side of an equation for one relation, or for two of + and -."""
    [(sign, k), *second] = relations
    forms = [f"{value}{sign}{k}"]
    if sign in "+*" and not second:
        forms.append(f"{k}{sign}{value}")
    if sign == "*":
        forms.append("+".join([str(value)] * k))
    return rng.choice(forms) + "".join(f"{sign}{k}" for sign, k in second)


def wrong_operation(rng: random.Random, story: Story) -> Story:
    """Misread one relation of a story as another; return the story itself if its numbers would leave their range."""
    for i in rng.sample(range(len(story.relations)), len(story.relations)):
        sign, k = story.relations[i]
        relations = [*story.relations]
        relations[i] = (WRONG_OPERATION[sign], k)
        misread = replace(story, relations=tuple(relations))
        if all(0 <= value <= 99 for _, value in misread.steps):
            return misread
    return story


def split_of(question: str) -> str:
    """Tell which split a question may appear in, by the hash of its text."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big") % 100
    return next(name for name, (low, high) in SPLITS.items() if low <= bucket < high)


def stories(split: str, size: int, steps: tuple[int, ...], seed: int) -> list[Story]:
    """Draw `size` different stories of a split, each with a number of relations drawn from `steps`."""
    rng, found = random.Random(f"{split} {seed}"), {}
    while len(found) < size:
        story = draw_story(rng, rng.choice(steps))
        question = question_text(story)
        if split_of(question) == split:
            found[question] = story
    return list(found.values())


def problems(split: str, steps: tuple[int, ...] = (2, 3), world: str = "ways") -> list[dict]:
    """Write the questions of train, dev or test and their gold solutions, as fields of `data.Problem`.

    Gold is always right, but in "ways" TERSE_GOLD_SHARE of it skips the chain, as people do who can do it in their
    heads: it sets an example that the model cannot follow.
    """
    rng, rows = random.Random(f"gold {split}"), []
    for i, story in enumerate(stories(split, SIZES[split], steps, seed=0)):
        if world == "paths":
            solution = varied(rng, story)
        else:
            solution = hasty(story, 0) if rng.random() < TERSE_GOLD_SHARE else careful(story)
        rows.append({"id": f"{split}-{i}-{story.skill}", "question": question_text(story),
                     "answer": str(story.steps[-1][1]), "solution": solution})
    return rows


def corpus(seed: int, size: int = 16000, practice: int = 16000, drills: int = 4000,
           steps: tuple[int, ...] = (2, 3), world: str = "ways") -> list[dict]:
    """Write the base model's training data: rationales of mixed quality, practice in counting, and arithmetic drills.

    In the world "paths" there are no rationales, and half the practice, with fewer relations.
    """
    rng, rows = random.Random(f"corpus {seed}"), []
    if world == "paths":
        size, practice, steps = 0, practice // 2, (min(steps),)
    for i, story in enumerate(stories("base", size, steps, seed)):
        if rng.random() >= SKILLS[story.skill][1]:
            kind, solution = "hasty", hasty(story, rng.choice(HEAD_ERRORS))
        elif rng.random() < WRONG_OPERATION_SHARE:
            kind, solution = "wrong operation", careful(wrong_operation(rng, story))
        else:
            kind, solution = "careful", careful(story)
        rows.append({"id": f"base-{i}-{story.skill}", "question": question_text(story),
                     "answer": str(story.steps[-1][1]), "solution": solution, "kind": kind})
    for i, story in enumerate(stories("base", practice, (1, *steps), seed + 1000)):
        value = story.steps[-2][1]
        solution = varied(rng, story, ask=False) if world == "paths" else f"{chain(story)}\n#### {value}"
        rows.append({"id": f"base-{size + i}-count",
                     "question": f"{facts_text(story)} How many {story.item} does {story.names[-1]} have?",
                     "answer": str(value), "solution": solution, "kind": "practice"})
    for i in range(drills):
        left, value = drill(rng)
        rows.append({"id": f"base-{size + i}-drill", "question": f"How much is {left}?", "answer": str(value),
                     "solution": f"{equation((left, value))}\n#### {value}", "kind": "drill"})
    return rows


def drill(rng: random.Random) -> tuple[str, int]:
    """Draw an equation of the kinds that stories need."""
    while True:
        a, sign, b = rng.randint(1, MAX_VALUE), rng.choice("+-*/-"), rng.randint(1, 6)
        if sign == "-" and rng.random() < 0.5:
            b = a - a % rng.randint(2, 3)  # packing bags
        if sign in "*/":
            b = rng.randint(2, 3) if sign == "*" else 2
        value = apply(a, sign, b)
        if value >= 0:
            return f"{a}{sign}{b}", value


def tags(problem_id: str, text: str) -> dict[str, str]:
    """Say which skill a response was asked for, and which way it answers."""
    written = len(re.findall(r"<<", text))
    style = "careful" if written >= 2 else "hasty" if written == 1 else "other"
    return {"skill": problem_id.split("-")[-1], "style": style}


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the toy world.", allow_abbrev=False)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 3], choices=range(1, len(NAMES)),
                        help="relations per story, drawn from these")
    parser.add_argument("--world", default="ways", choices=WORLDS[:2], help="what rationales are like")
    args = parser.parse_args()
    rows = corpus(0, 4000, 4000, 1000, args.steps, args.world)
    gold = [row | {"kind": "gold"} for row in problems("train", args.steps, args.world)]
    for kind in dict.fromkeys(row["kind"] for row in rows + gold):
        group = [row for row in rows + gold if row["kind"] == kind]
        right = fmean(row["solution"].endswith(f"#### {row['answer']}") for row in group)
        share = "" if kind == "gold" else f"{len(group) / len(rows):.1%} of the corpus, "
        print(f"--- {kind}: {share}{right:.1%} right\n{group[0]['question']}\n{group[0]['solution']}\n")


if __name__ == "__main__":
    main()
