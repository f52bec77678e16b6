"""One rule of evidence for every claim that one group of runs does better than another.

The difference is paired: runs of the same seed, answers to the same questions. Its standard error is that of a
bootstrap that draws the seeds anew and the questions anew (the same ones for all seeds, as all take the same test).
Student's t with one degree of freedom less than there are seeds turns it into an interval: the percentiles of three
seeds are too narrow (with runs that truly do not differ, they left out 0 in 24 % of 400 simulations). Where the draw of
questions matters more than that of seeds, the interval is too wide, so the rule errs towards "not shown".
"""
import math
from functools import cache
from statistics import fmean

import numpy

LEVEL = 0.05  # chance that any claim of a family is called shown, in either direction, when none is true
DRAWS = 4_000


def interval(mean: float, half: float | None, low: float = -math.inf, high: float = math.inf) -> dict:
    """Return an estimate: its ends do not leave the value's bounds; half_width is None where one was cut off."""
    if half is None:
        return {"mean": mean, "half_width": None, "ci95": None}
    ends = [max(low, mean - half), min(high, mean + half)]
    return {"mean": mean, "half_width": half if ends == [mean - half, mean + half] else None, "ci95": ends}


@cache
def student(freedom: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Angles and P(|T| < sqrt(freedom) tan(angle)): with t so written, Student's density is a power of the cosine."""
    angles = numpy.linspace(0, math.pi / 2, 200_001)
    areas = numpy.cumsum(numpy.cos((angles[1:] + angles[:-1]) / 2) ** (freedom - 1))
    return angles, numpy.concatenate([[0.0], areas / areas[-1]])


def quantile(level: float, freedom: int) -> float:
    """The t that |T| exceeds with this probability."""
    angles, inside = student(freedom)
    return math.sqrt(freedom) * math.tan(numpy.interp(1 - level, inside, angles))


def two_sided(t: float, freedom: int) -> float:
    """P(|T| > |t|); 1 for NaN, which shows nothing."""
    return 1.0 if math.isnan(t) else float(1 - numpy.interp(math.atan(abs(t) / math.sqrt(freedom)), *student(freedom)))


@cache
def weights(n: int) -> numpy.ndarray:
    """(DRAWS, n): by how much the share of each of n in a bootstrap sample differs from 1 / n; times sqrt(n / (n - 1)),
    since means of such samples vary less than means of n new ones do."""
    drawn = numpy.random.default_rng(n).multinomial(n, [1 / n] * n, size=DRAWS) / n
    return (drawn - 1 / n) * math.sqrt(n / max(1, n - 1))


def difference(first: dict[int, dict[str, float]], second: dict[int, dict[str, float]],
               bound: float = math.inf) -> dict | None:
    """seed -> question -> value, of two groups -> the mean difference first - second, with its standard error. It
    cannot be above `bound`, nor below -bound.

    Seeds and questions that one side lacks do not count; None where nothing is left. A value without a question ("") is
    compared with the other side's mean. With one seed, the error is about the draw of questions alone.
    """
    if any("" in values for side in (first, second) for values in side.values()):
        first, second = ({seed: {"": fmean(values.values())} for seed, values in side.items()}
                         for side in (first, second))
    seeds = sorted(first.keys() & second.keys())
    sides = [side[seed] for seed in seeds for side in (first, second)]
    if not (questions := [q for q in (sides or [{}])[0] if all(q in side for side in sides)]):
        return None
    table = numpy.array([[first[seed][q] - second[seed][q] for q in questions] for seed in seeds])
    deviations = weights(len(seeds)) @ table.mean(1) + weights(len(questions)) @ table.mean(0)
    mean, error = round(float(table.mean()), 9), round(float(deviations.std()), 9)  # 9: where all values are the same
    freedom = len(seeds) - 1 or max(1, len(questions) - 1)
    t = mean / error if error else math.copysign(math.inf, mean) if mean else math.nan
    return {"mean": mean, "error": error, "freedom": freedom, "p": two_sided(t, freedom), "questions": len(questions),
            "bound": bound, "values": dict(zip(seeds, table.mean(1).tolist()))}


def judge(found: list[dict]) -> None:
    """Give the differences of one family their intervals and verdicts, after Holm (1979).

    The i-th smallest p of m is held against LEVEL / (m - i), until one fails; its level is that of all the others, too.
    An interval is shown at its claim's level, so that it leaves out 0 exactly where the claim is decided.
    """
    family = sorted((d for d in found if len(d["values"]) > 1), key=lambda d: d["p"])
    level, failed = LEVEL, False
    for i, one in enumerate(family):
        level = level if failed else LEVEL / (len(family) - i)
        failed = failed or not one["p"] <= level
        one["level"] = level
    for one in found:
        half, bound = quantile(one.get("level", LEVEL), one["freedom"]) * one["error"], one.pop("bound")
        one |= interval(one["mean"], half, -bound, bound)
        least, most = one["ci95"]
        one["verdict"] = "shown" if least > 0 else "shown the other way" if most < 0 else "not shown"
        if one not in family:
            one |= {"verdict": "not shown (one seed)"} | ({} if one["questions"] > 1 else interval(one["mean"], None))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test: had neither model an edge, each question that one alone answers right would
    be a toss of a coin."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2 ** n)
