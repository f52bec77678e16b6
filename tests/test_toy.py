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
from data.tokenizer import load_tokenizer
from rewards import grade
from runs import call
from tools import sft

EQUATION = re.compile(r"(\S+)=<<([^=<>]+)=(-?\d+)>>(-?\d+)")
SIZES = {"train": 800, "dev": 150, "test": 350}  # of the splits, which are drawn in turn: fewer take less time
SIGMAS = 5  # binomial bounds: each check of a rate fails by chance once in two million


@pytest.fixture(scope="module")
def corpus() -> list[dict]:
    return toy.corpus(7, size=3000, practice=600, drills=400)


@pytest.fixture(scope="module")
def problems() -> dict[str, list]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "SIZES", SIZES)
        return {split: load_problems("toy", split) for split in SIZES}


def some_stories(skill: str, count: int = 100) -> list[toy.Story]:
    rng, found = random.Random(5), []
    while len(found) < count:
        story = toy.draw_story(rng, rng.choice((1, 2, 3, 4)))
        found += [story] if story.skill == skill else []
    return found


def value_of(expression: str) -> Fraction:
    """A chain of + and -, or a product or quotient of two whole numbers, as a reader computes it."""
    if match := re.fullmatch(r"(-?\d+)([*/])(\d+)", expression):
        a, b = Fraction(match[1]), Fraction(match[3])
        return a * b if match[2] == "*" else a / b
    assert re.fullmatch(r"-?\d+([+-]\d+)+", expression), expression
    return Fraction(sum(map(int, re.findall(r"[+-]?\d+", expression))))


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


def test_gold_is_right_by_the_question_and_by_its_own_text(problems):
    """A wrong gold answer punishes right responses; a gold text that is graded wrong teaches another answer. The terse
    share, stated in the docstring of `problems`, shows a way that the model cannot follow."""
    for problem in (problem for rows in problems.values() for problem in rows):
        assert str(answer_of(problem.question)) == problem.answer, problem
        assert grade(problem.solution, problem.answer, "toy").verdict == "correct"
    terse = sum(problem.solution.count("<<") == 1 for problem in problems["train"])
    assert within_bound(terse, len(problems["train"]), toy.TERSE_GOLD_SHARE)


def test_splits_are_disjoint_and_the_corpus_is_of_another(corpus, problems):
    """A test question seen in training, or in the corpus of the base model, measures memory. Practice questions end
    otherwise, but their facts must not be those of a test question either."""
    questions = {split: [p.question for p in rows] for split, rows in problems.items()}
    for split, size in SIZES.items():
        assert len(questions[split]) == len({*questions[split]}) == len({p.id for p in problems[split]}) == size
    base = {row["question"] for row in corpus if row["kind"] not in ("practice", "drill")}
    assert {*map(toy.split_of, base)} == {"base"}
    groups = [{*group} for group in questions.values()] + [base]
    assert len(set().union(*groups)) == sum(map(len, groups))

    facts = {question.rsplit(". ", 2)[0] for rows in questions.values() for question in rows}
    practice = {row["question"].rsplit(". ", 1)[0] for row in corpus if row["kind"] == "practice"}
    assert len(facts) > 1250 and len(practice) > 580
    assert len(facts & practice) <= 2  # of millions of stories: 0.1 expected


@pytest.mark.parametrize("world, digest", [
    ("ways", "2b368d8da8ef61c38b14ac2f4a9a6f48f2ce625e1ecb01a4b4cf460608ad4dd7"),
    ("paths", "383cd812893b7307b4c052d000fa17f583d84c70ffc03499b8bf9370765b9e69")])
def test_the_world_is_pinned(world, digest, monkeypatch):
    """M_0 and all that follows is a function of the seed, in every process: no global generator, no order of a set.
    With another digest, the numbers in results/ are another world's."""
    random.seed(3)
    sizes = dict(toy.SIZES)
    monkeypatch.setattr(toy, "SIZES", dict.fromkeys(sizes, 50))
    rows = [toy.corpus(0, 100, 100, 50, world=world), [toy.problems(split, world=world) for split in sizes], sizes]
    assert hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest() == digest
    assert toy.corpus(1, 100, 100, 50, world=world) != rows[0]
    assert {len(story.relations) for story in toy.stories("dev", 30, (4,), 0)} == {4}


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
            assert shown == inner and value == result and value_of(inner) == int(value)
            two = bool(re.fullmatch(r"\d+[+-]\d+[+-]\d+", inner)) and values[place + 1] != int(value)
            neighbours += len(signs[place:place + 2]) == 2 and {*signs[place:place + 2]} <= {"+", "-"}
            merged += two
            place += 1 + two
            assert int(value) == values[place]
            forms.add("two" if two else re.sub(r"\d+", "n", inner))
        assert place == len(story.relations)
    assert forms == {"n+n", "n-n", "n*n", "n+n+n", "n/n", "two"}
    assert neighbours > 100 and within_bound(merged, neighbours, toy.MERGED_SHARE)


def test_every_equation_is_true_and_written_twice_alike(corpus, problems):
    """Errors come from the head or from a misread relation, never from arithmetic: the base model would learn them.
    What it should be able to do (follow a story, practice, drills) is shown to it without error."""
    texts = [row["solution"] for row in corpus] + [problem.solution for problem in problems["dev"]]
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

    reads = {"careful": answer_of, "practice": lambda question: story_values(question.rsplit(". How", 1)[0])[-1],
             "drill": lambda question: value_of(re.fullmatch(r"How much is (.+)\?", question)[1])}
    for row in corpus:
        if row["kind"] in reads:
            assert reads[row["kind"]](row["question"]) == int(row["answer"]) >= 0
            assert row["solution"].endswith(f"#### {row['answer']}")


@pytest.mark.parametrize("skill", toy.SKILLS)
def test_rationales_of_a_skill(skill):
    """The careful way: one equation per relation and one for the question, and each number follows from the story.
    Numbers up to 99 are single tokens, and the base model has practised up to MAX_VALUE. The last number leaves room
    for every error of the head, so that none is clipped and changes its odds. Tags, by which the report shows accuracy,
    tell the ways apart."""
    for story in some_stories(skill):
        question, text = toy.question_text(story), toy.careful(story)
        values, answer, equations = story_values(question), answer_of(question), EQUATION.findall(text)
        assert len(equations) == len(story.relations) + 1
        assert [int(result) for *_, result in equations] == [*values[1:], answer]
        assert text.endswith(f"#### {answer}")

        assert all(1 <= value <= toy.MAX_VALUE for value in values) and 0 <= answer <= 99
        for error in toy.HEAD_ERRORS:
            stated = int(re.search(r" has (-?\d+)\.", toy.hasty(story, error)).group(1))
            assert stated == values[-1] + error >= 1

        for style, response in (("careful", text), ("hasty", toy.hasty(story, 1)), ("other", "So what. #### 3")):
            assert tags("toy", f"test-7-{skill}", response) == {"skill": skill, "style": style}
    assert tags("gsm8k", "train-1", "So what.") == {}


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


def test_misread_stories_are_other_stories():
    """A `wrong operation` must change one relation, and its numbers must still fit."""
    rng, changed = random.Random(0), 0
    for story in some_stories("left"):
        misread = toy.wrong_operation(rng, story)
        differing = sum(a != b for a, b in zip(story.relations, misread.relations, strict=True))
        changed += differing
        assert differing <= 1 and all(0 <= value <= 99 for _, value in misread.steps)
        assert dataclasses.replace(misread, relations=story.relations) == story
    assert changed > 50


def test_the_corpus_is_learnt_as_it_is_written(corpus, tmp_path, monkeypatch):
    """Base models were taught the right answer after reasoning that leads to another: `#### 18` after 22-2=20, in a
    fifth of all texts, since a gold solution is written with the problem's right answer."""
    learnt = []
    monkeypatch.setattr(toy, "corpus", lambda *args, **options: corpus[:300])
    monkeypatch.setattr(sft, "fit_sft", lambda model, examples, config, *more: learnt.extend(examples))
    call(sft, "--preset", "base", "--hidden_size", "32", "--num_layers", "1", "--run_dir", tmp_path / "base")
    tokenizer = load_tokenizer(tmp_path / "base" / "model")
    assert [tokenizer.decode(example.response) for example in learnt] == [row["solution"] for row in corpus[:300]]
