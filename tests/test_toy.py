"""The toy world is what its docstring says: right gold, hopeless heads, stated rates, disjoint splits."""
import collections
import dataclasses
import hashlib
import json
import math
import random
import re
from fractions import Fraction

import pytest

from data import load_problems, tags, toy
from rewards import grade

EQUATION = re.compile(r"(\S+)=<<([^=<>]+)=(-?\d+)>>(-?\d+)")
SIGMAS = 5  # binomial bounds: each check of a rate fails by chance once in two million


@pytest.fixture(scope="module")
def corpus() -> list[dict]:
    return toy.corpus(7, size=3000, practice=600, drills=400)


@pytest.fixture(scope="module")
def problems() -> dict[str, list]:
    return {split: load_problems("toy", split) for split in toy.SIZES}


def some_stories(skill: str, count: int = 100) -> list[toy.Story]:
    rng, found = random.Random(5), []
    while len(found) < count:
        story = toy.draw_story(rng, rng.choice((1, 2, 3, 4)))
        found += [story] if story.skill == skill else []
    return found


def value_of(expression: str) -> Fraction:
    """A sum, product or quotient of two whole numbers, as a reader computes it."""
    a, sign, b = re.fullmatch(r"(-?\d+)([-+*/])(\d+)", expression).groups()
    a, b = Fraction(a), Fraction(b)
    return {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[sign]


def sum_of(expression: str) -> Fraction:
    """value_of, or the value of a chain of + and -."""
    if len(numbers := re.findall(r"[+-]?\d+", expression)) > 2:
        return Fraction(sum(map(int, numbers)))
    return value_of(expression)


def within_bound(hits: int, n: int, p: float) -> bool:
    return abs(hits - n * p) < SIGMAS * math.sqrt(n * p * (1 - p)) + 1e-9


def story_values(question: str) -> list[int]:
    """Everybody's number, read from the question's text alone."""
    values, rules = [], [(r"has (\d+) more than", lambda v, k: v + k),
                         (r"has (\d+) fewer than", lambda v, k: v - k),
                         (r"has (\d+) times as many as", lambda v, k: v * k),
                         (r"has half as many as", lambda v, k: {0: v // 2}[v % 2])]
    for sentence in question.split(". "):
        for pattern, rule in rules:
            if match := re.search(pattern, sentence):
                values.append(rule(values[-1], *(int(g) for g in match.groups() or ("0",))))
        if not values:
            values.append(int(re.search(r"has (\d+) ", sentence).group(1)))
    return values


def answer_of(question: str) -> int:
    """The right answer, read from the question's text alone."""
    last = story_values(question)[-1]
    for pattern, rule in [(r"bags of (\d+)\. How many are left over", lambda v, k: v % k),
                          (r"for (\d+) each\. How much is that", lambda v, k: v * k),
                          (r"loses (\d+)\. How many are left", lambda v, k: v - k)]:
        if match := re.search(pattern, question):
            return rule(last, int(match.group(1)))
    raise AssertionError(question)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_gold_is_right_by_the_question_and_by_its_own_text(problems, split):
    """A wrong gold answer punishes right responses; a gold text that is graded wrong teaches another answer."""
    for problem in problems[split]:
        assert str(answer_of(problem.question)) == problem.answer, problem
        assert problem.solution.endswith(f"#### {problem.answer}")
        assert grade(problem.solution, problem.answer, "toy").verdict == "correct"


def test_splits_are_disjoint_and_have_their_sizes(problems):
    """A test question seen in training, or in the corpus of the base model, measures memory."""
    questions = {split: [p.question for p in rows] for split, rows in problems.items()}
    for split, size in toy.SIZES.items():
        assert len(questions[split]) == len(set(questions[split])) == size
        assert len({p.id for p in problems[split]}) == size
    base = {toy.question_text(story) for seed in (0, 1)
            for story in toy.stories("base", 800, (2, 3), seed)}
    groups = [set(group) for group in questions.values()] + [base]
    assert len(set().union(*groups)) == sum(map(len, groups))


def test_the_corpus_holds_base_questions_only(corpus, problems):
    """Practice questions end otherwise, but their facts must not be those of a test question either."""
    for row in corpus:
        if row["kind"] not in ("practice", "drill"):
            assert toy.split_of(row["question"]) == "base"
    facts = {p.question.rsplit(". ", 2)[0] for rows in problems.values() for p in rows}
    practice = {row["question"].rsplit(". ", 1)[0] for row in corpus if row["kind"] == "practice"}
    assert len(facts) > 2900 and len(practice) > 580
    assert len(facts & practice) <= 2  # of millions of stories: 0.1 expected


@pytest.mark.parametrize("world, digest", [
    ("ways", "415d1c9e1789a0fb37aee9674d7891bc10d5b75352721ccff8ebec176ee1163a"),
    ("paths", "9f8bab1e8143ca2f44cb9f4c3b322978d83c47891843e0d43ccb6e56734867cf")])
def test_the_world_is_pinned(world, digest):
    """M_0 and all that follows is a function of the seed, in every process: no global generator, no order of a set.
    With another digest, the numbers in results/ are another world's."""
    random.seed(3)
    rows = [toy.corpus(0, 100, 100, 50, world=world), [toy.problems(split, world=world) for split in toy.SIZES]]
    assert hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest() == digest
    assert toy.corpus(1, 100, 100, 50, world=world) != rows[0]


def test_every_path_is_right_and_all_forms_occur():
    """The world "paths": sums, products either way round, repeated sums, and two relations in one equation; each number
    follows from the story, and the equations use up its relations in order."""
    forms, merged, neighbours = set(), 0, 0
    for i, story in enumerate(some_stories("price", 300)):
        question, text = toy.question_text(story), toy.varied(random.Random(i), story)
        values, equations = story_values(question), EQUATION.findall(text)
        assert text.endswith(f"#### {answer_of(question)}") and int(equations[-1][3]) == answer_of(question)
        signs, place = [sign for sign, _ in story.relations], 0
        for shown, inner, value, result in equations[:-1]:
            assert shown == inner and value == result and sum_of(inner) == int(value)
            two = bool(re.fullmatch(r"\d+[+-]\d+[+-]\d+", inner)) and values[place + 1] != int(value)
            neighbours += len(signs[place:place + 2]) == 2 and {*signs[place:place + 2]} <= {"+", "-"}
            merged += two
            place += 1 + two
            assert int(value) == values[place]
            forms.add("two" if two else re.sub(r"\d+", "n", inner))
        assert place == len(story.relations)
    assert forms == {"n+n", "n-n", "n*n", "n+n+n", "n/n", "two"}
    assert neighbours > 100 and within_bound(merged, neighbours, toy.MERGED_SHARE)
    facts = toy.varied(random.Random(0), story, ask=False)
    assert "makes" not in facts and facts.endswith(f"#### {values[-1]}")


def test_the_corpus_of_paths_asks_no_final_question():
    rows = toy.corpus(0, 100, 100, 50, (2, 3), "paths")
    assert collections.Counter(row["kind"] for row in rows) == {"practice": 50, "drill": 50}
    assert {row["question"].count(" than ") + row["question"].count(" as many as") for row in rows[:50]} == {1, 2}
    for row in rows[:50]:
        assert row["solution"].endswith(f"#### {story_values(row['question'])[-1]}")


def test_every_equation_is_true_and_written_twice_alike(corpus):
    """Errors come from the head or from a misread relation, never from arithmetic: the base model would learn them."""
    texts = [row["solution"] for row in corpus] + [row["solution"] for row in toy.problems("dev")]
    count = 0
    for text in texts:
        found = EQUATION.findall(text)
        assert len(found) == text.count("<<") == text.count(">>")
        for shown, inner, value, result in found:
            assert shown == inner and value == result
            assert value_of(inner) == int(value), text
        assert not found or text.splitlines()[-1] == f"#### {found[-1][3]}"  # the last one answers
        count += len(found)
    assert count > 5000


@pytest.mark.parametrize("skill", toy.SKILLS)
def test_careful_rationales_write_every_step(skill):
    """One equation per relation and one for the question; each number follows from the story."""
    for story in some_stories(skill):
        question, text = toy.question_text(story), toy.careful(story)
        values = story_values(question)
        equations = EQUATION.findall(text)
        assert len(equations) == len(story.relations) + 1 == len(values)
        assert [int(result) for *_, result in equations] == [*values[1:], answer_of(question)]
        assert text.endswith(f"#### {answer_of(question)}")


@pytest.mark.parametrize("skill", toy.SKILLS)
def test_numbers_stay_in_range(skill):
    """Numbers up to 99 are single tokens and the base model has practised up to MAX_VALUE; the last
    number leaves room for every error of the head, so that none is clipped and changes its odds."""
    for story in some_stories(skill):
        values = story_values(toy.question_text(story))
        assert all(value == int(value) and 1 <= value <= toy.MAX_VALUE for value in values)
        assert 0 <= answer_of(toy.question_text(story)) <= 99
        for error in toy.HEAD_ERRORS:
            stated = int(re.search(r" has (-?\d+)\.", toy.hasty(story, error)).group(1))
            assert stated == values[-1] + error >= 1


@pytest.mark.parametrize("skill, amount, chance", [
    ("pairs", 2, Fraction(1, 2)), ("threes", 3, Fraction(1, 3)), ("price", 2, Fraction(1, 6)),
    ("price", 3, Fraction(1, 6)), ("left", 1, Fraction(1, 6)), ("left", 3, Fraction(1, 6))])
def test_hasty_answers_are_right_by_design(skill, amount, chance):
    """Exactly, for every story: no training can make the head better, so any gain is the careful
    way's. Errors that are not spread evenly over remainders would reward some numbers."""
    stories = [story for story in some_stories(skill, 200) if story.amount == amount]
    assert len(stories) > 20
    for story in stories:
        gold = str(answer_of(toy.question_text(story)))
        right = sum(toy.hasty(story, error).endswith(f"#### {gold}") for error in toy.HEAD_ERRORS)
        assert Fraction(right, len(toy.HEAD_ERRORS)) == chance


def test_corpus_rates_match_the_skills_table(corpus):
    """Shares of skills, of careful rationales per skill, of misread ones, and the hasty success rate."""
    stories = [row for row in corpus if row["kind"] not in ("practice", "drill")]
    by_skill = collections.defaultdict(list)
    for row in stories:
        by_skill[row["id"].split("-")[-1]].append(row)
    assert by_skill.keys() == toy.SKILLS.keys()
    total_share = sum(share for share, _, _ in toy.SKILLS.values())
    for skill, (share, careful, _) in toy.SKILLS.items():
        rows = by_skill[skill]
        assert within_bound(len(rows), len(stories), share / total_share), skill
        assert within_bound(sum(row["kind"] != "hasty" for row in rows), len(rows), careful), skill
        hasty = [row for row in rows if row["kind"] == "hasty"]
        right = sum(row["solution"].endswith(f"#### {row['answer']}") for row in hasty)
        chance = {"pairs": 1 / 2, "threes": 1 / 3}.get(skill, 1 / 6)
        assert within_bound(right, len(hasty), chance), skill
    written = [row for row in stories if row["kind"] != "hasty"]
    wrong = sum(row["kind"] == "wrong operation" for row in written)
    assert within_bound(wrong, len(written), toy.WRONG_OPERATION_SHARE)
    counts = collections.Counter(row["kind"] for row in corpus)
    assert counts["practice"] == 600 and counts["drill"] == 400 and len(stories) == 3000


def test_careful_practice_and_drills_are_right(corpus):
    """What the base model should be able to do is shown to it without error."""
    for row in corpus:
        if row["kind"] == "careful":
            assert answer_of(row["question"]) == int(row["answer"])
        if row["kind"] == "practice":
            assert story_values(row["question"].rsplit(". How", 1)[0])[-1] == int(row["answer"])
        if row["kind"] == "drill":
            expression = re.fullmatch(r"How much is (.+)\?", row["question"]).group(1)
            assert value_of(expression) == int(row["answer"]) >= 0
        if row["kind"] in ("careful", "practice", "drill"):
            assert row["solution"].endswith(f"#### {row['answer']}")


def test_terse_share_of_gold():
    """Stated in the docstring of `problems`: SFT on gold copies a way that the model cannot follow."""
    rows = toy.problems("train")
    terse = sum(row["solution"].count("<<") == 1 for row in rows)
    assert within_bound(terse, len(rows), toy.TERSE_GOLD_SHARE)


def test_misread_stories_are_other_stories():
    """A `wrong operation` must change one relation, and its numbers must still fit."""
    rng, changed = random.Random(0), 0
    for story in some_stories("left"):
        misread = toy.wrong_operation(rng, story)
        differing = sum(a != b for a, b in zip(story.relations, misread.relations, strict=True))
        assert differing <= 1
        changed += differing
        assert all(0 <= value <= 99 for _, value in misread.steps)
        assert dataclasses.replace(misread, relations=story.relations) == story
    assert changed > 50


def test_tags_know_skill_and_style():
    """The report shows accuracy by skill and by style: a style that is miscounted is a false claim."""
    for skill in toy.SKILLS:
        for i, story in enumerate(some_stories(skill, 20)):
            id = f"test-{i}-{skill}"
            assert toy.tags(id, toy.careful(story)) == {"skill": skill, "style": "careful"}
            assert toy.tags(id, toy.hasty(story, 1)) == {"skill": skill, "style": "hasty"}
            assert tags("toy", id, "So what. #### 3") == {"skill": skill, "style": "other"}
    assert tags("gsm8k", "train-1", "So what.") == {}


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_number_of_relations_is_as_asked(steps):
    """--steps 4 is a harder world, not the same one."""
    for story in toy.stories("dev", 30, (steps,), 0):
        assert len(story.relations) == steps
        assert len(story.names) == len(set(story.names)) == steps + 1
