"""The rule of evidence: intervals and verdicts that are wrong as rarely as they say, and right where much is to see."""
import math

import numpy
import pytest

from tools.evidence import difference, half_width, judge, mcnemar, quantile


@pytest.mark.parametrize("first, second, p", [
    (0, 0, 1.0), (0, 1, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (0, 6, 0.03125), (2, 8, 0.109375), (9, 1, 0.021484375),
    (6, 16, 110056 / 2 ** 21), (400, 600, pytest.approx(2.728e-10, rel=1e-3))])
def test_mcnemar(first, second, p):
    """Tails of fair coins, added up by hand; ratios of large integers must not overflow."""
    assert mcnemar(first, second) == mcnemar(second, first) == p


@pytest.mark.parametrize("freedom, t", [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (999, 1.9623)])
def test_quantiles_are_those_of_student(freedom, t):
    """The table of textbooks, 97.5 %."""
    assert quantile(0.05, freedom) == pytest.approx(t, abs=6e-4)


def test_differences_are_of_the_same_seeds_and_questions():
    """Seeds differ by 0.5, 0, 1 and questions by 1, 0: errors 0.5 / sqrt(3) and sqrt(1/2) / sqrt(2); t is 4.303 with
    2 degrees of freedom, 12.706 with 1."""
    first = {0: {"a": 1.0, "b": 0.0, "c": 1.0}, 1: {"b": 0.0, "a": 1.0}, 2: {"a": 1.0, "b": 1.0}, 7: {"a": 1.0}}
    second = {0: {"b": 0.0, "a": 0.0}, 1: {"a": 0.0, "b": 1.0, "d": 1.0}, 2: {"a": 0.0, "b": 0.0}}
    found = difference(first, second, "points")
    assert (found["mean"], found["questions"], found["values"]) == (50, 2, {0: 50, 1: 0, 2: 100})
    assert half_width(found, 0.05) == pytest.approx(math.hypot(4.3027 * 50 / 3 ** 0.5, 12.7062 * 50), abs=1e-2)
    judge([found])
    assert found["ci95"] == [-100, 100] and found["verdict"] == "not shown", "no difference is above 100 points"
    for other in ({0: {"b": 1.0}}, {1: {"a": 1.0}}):
        assert difference({0: {"a": 1.0}}, other, "points") is None


def test_a_measure_without_questions_is_compared_seed_by_seed():
    first, second = {0: {"": 2.0}, 1: {"": 3.0}, 2: {"": 3.5}}, {seed: {"a": 1.0, "b": 0.0} for seed in range(3)}
    found = difference(first, second, "nats")
    assert found["values"] == {0: 1.5, 1: 2.5, 2: 3.0} and found["questions"] == 1
    assert half_width(found, 0.05) == pytest.approx(4.303 * numpy.std([1.5, 2.5, 3.0], ddof=1) / 3 ** 0.5, abs=1e-3)


def test_one_seed_shows_nothing_about_a_method():
    """Its interval is about the draw of questions; of a number without questions there is none."""
    many, none = (difference({0: dict.fromkeys(second, 1.0)}, {0: second}, "nats")
                  for second in ({f"q{i}": float(i % 2) for i in range(50)}, {"": 0.0}))
    judge([many, none])
    assert many["half_width"] == pytest.approx(quantile(0.05, 49) * 0.5 / 7)
    assert none["ci95"] is None and many["verdict"] == none["verdict"] == "not shown (one seed)"


def test_standard_errors_are_those_of_a_bootstrap():
    """Over seeds, and over questions that all seeds share, times sqrt(n / (n - 1)): a bootstrap sample's mean varies by
    so much less than that of new draws."""
    random = numpy.random.default_rng(0)
    table = random.normal(0, 1, (4, 1)) + random.normal(0, 1, 30) + random.normal(0, 1, (4, 30))
    sides = [{seed: dict(enumerate(row)) for seed, row in enumerate(rows)} for rows in (table, 0 * table)]
    found = difference(*sides, "nats")
    for draw, means in (("seeds", table.mean(1)), ("questions", table.mean(0))):
        n = len(means)
        again = random.choice(means, (20_000, n)).mean(1).std() * math.sqrt(n / (n - 1))
        assert found[f"error_of_{draw}"] == pytest.approx(again, rel=0.02)


def estimates(*means: float) -> list[dict]:
    return [{"mean": mean, "error_of_seeds": 1.0, "error_of_questions": 0.0, "questions": 1, "bound": math.inf,
             "values": dict.fromkeys(range(10 ** 4), mean)} for mean in means]


@pytest.mark.parametrize("means, verdicts", [
    ((2.2, -5.0, 4.0, 2.5), ["shown", "shown the other way", "shown", "shown"]),
    ((2.2,), ["shown"]), ((2.2, 2.1), ["not shown"] * 2), ((2.2, 2.1, 3.0), ["not shown", "not shown", "shown"]),
    ((1.0, 2.3), ["not shown", "shown"]), ((2.2, 1.0, 1.0), ["not shown"] * 3),
    ((math.nan, -3.0), ["not shown", "shown the other way"])])
def test_verdicts_after_holm(means, verdicts):
    """|t| above 1.96, 2.24, 2.39, 2.50 for a claim, the first of 2, 3, 4; after one that fails, none is shown. An
    interval leaves out 0 exactly where a claim is decided: a table called +13 "not shown" and +11 ± 13 "yes"."""
    found = estimates(*means)
    judge(found)
    assert [one["verdict"] for one in found] == verdicts
    assert all((one["ci95"][0] <= 0 <= one["ci95"][1]) == (one["verdict"] == "not shown") for one in found
               if not math.isnan(one["mean"]))


@pytest.mark.parametrize("unrun, one_seed, verdict", [(0, 0, "shown"), (1, 0, "not shown"), (0, 1, "not shown")])
def test_claims_that_cannot_be_judged_count_all_the_same(unrun, one_seed, verdict):
    """Else a table would show more by leaving cells out."""
    found = estimates(2.1, *[5.0] * one_seed)
    for one in found[1:]:
        one["values"] = {0: 5.0}
    judge(found, unrun)
    assert found[0]["verdict"] == verdict and found[0]["level"] == 0.05 / (1 + unrun + one_seed)


def simulated(random, effect: float) -> list[dict]:
    """Three claims about two methods, five runs each, on 100 questions; how good a run is, which questions are hard,
    and which suit one method all vary, as logits. effect: of the methods."""
    found = []
    for _ in range(3):
        hard, sides = random.normal(0, 1.5, 100), []
        for method in (effect / 2, -effect / 2):
            chance = 1 / (1 + numpy.exp(hard - method - random.normal(0, 0.5, 100) - random.normal(0, 1, (5, 1))))
            right = random.random((5, 100)) < chance
            sides.append({seed: dict(enumerate(map(float, right[seed]))) for seed in range(5)})
        found.append(difference(*sides, "points"))
    judge(found)
    return found


def test_how_often_the_rule_is_wrong_and_how_much_it_sees():
    """Of 200 papers without a true claim, about 5 % may have one that is decided; percentiles of the same bootstrap
    decided each of the claims in more than 10 %. A large effect is seen."""
    random = numpy.random.default_rng(0)
    wrong = [any(one["verdict"] != "not shown" for one in simulated(random, 0.0)) for _ in range(200)]
    assert 0.005 <= numpy.mean(wrong) <= 0.08
    seen = [one["verdict"] for _ in range(30) for one in simulated(random, 6.0)]
    assert seen.count("shown") >= 0.9 * len(seen) and "shown the other way" not in seen


@pytest.mark.parametrize("effect, low, high", [(0, 0, 0.01), (6, 0.06, 0.14), (13, 0.58, 0.74)])
def test_what_five_seeds_can_show_among_eighteen_claims(effect, low, high):
    """What results/compare/plan.md says: where runs differ by 3 points, 6 are found in one of ten cases, 13 in two of
    three."""
    random, shown = numpy.random.default_rng(0), 0
    for _ in range(500):
        runs = random.normal(0, 3, (2, 5)) + [[effect], [0]]
        found = difference(*({seed: {"": value} for seed, value in enumerate(side)} for side in runs), "nats")
        judge([found], unrun=17)
        shown += found["verdict"] == "shown"
    assert low <= shown / 500 <= high


def test_a_collapse_that_no_seed_shows():
    """The limit of the rule: one method loses 50 points in 30 % of its runs, but in one of six tables with five seeds
    no run has."""
    random, held = numpy.random.default_rng(0), []
    for _ in range(1000):
        gap = random.normal(0, 4, 5) - 50 * (random.random(5) < 0.3)
        sides = [{seed: {"": value} for seed, value in enumerate(values)} for values in (gap, 0 * gap)]
        found = difference(*sides, "nats")
        held.append(abs(found["mean"] + 15) <= half_width(found, 0.05))
    assert 0.75 <= numpy.mean(held) <= 0.85


def test_the_same_number_of_every_seed_decides_nothing():
    """Two runs with +1 gave "+1 ± 0, shown"."""
    found = difference({0: {"": 2.0}, 1: {"": 2.0}}, {0: {"": 1.0}, 1: {"": 1.0}}, "nats")
    judge([found])
    assert (found["mean"], found["ci95"], found["verdict"]) == (1.0, None, "not shown")


def test_a_difference_of_differences_may_be_200_points():
    both = {seed: {str(i): 2.0 - (i == seed) for i in range(9)} for seed in range(3)}, {s: dict.fromkeys(
        map(str, range(9)), 0.0) for s in range(3)}
    found = [difference(*both, "points", bound) for bound in (100, 200)]
    judge(found)
    assert found[1]["ci95"][0] < found[1]["mean"] < found[1]["ci95"][1] == 200 and found[0]["ci95"][1] == 100


def test_twenty_equal_answers_do_not_prove_equality():
    """"+0 +- 0" was the interval of two models that answer the same 20 questions right; of 1,000 it is nearly that."""
    for n, low, high in ((20, 10, 20), (1000, 0.1, 0.5)):
        same = {0: {str(i): float(i % 2) for i in range(n)}}
        found = [difference(same, same, "points")]
        judge(found)
        assert found[0]["mean"] == 0 and low < found[0]["half_width"] < high
