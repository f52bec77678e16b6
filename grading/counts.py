"""What can be counted on verdicts: shares with their intervals, pass@k, and the vote of several samples."""
import math
from collections import Counter
from statistics import fmean

Z = 1.959964  # 97.5 % of a normal distribution is below this many standard deviations


def wilson(successes: float, n: float) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927): it never leaves [0, 1] and is sound near its ends."""
    p = successes / n
    center = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def wilson_of_mean(shares: list[float]) -> tuple[float, float]:
    """95 % interval of the mean of values in [0, 1]: Wilson's, with the number of zeros and ones that tells as much.

    The variance of zeros and ones with mean p is p (1 - p); values that vary less count as more of them. Equal values
    would count as infinitely many, so Z^2 / 2 zeros and Z^2 / 2 ones are added first (as Agresti and Coull do, 1998).
    """
    n = len(shares) + Z * Z
    p = (sum(shares) + Z * Z / 2) / n
    variance = (sum(share * share for share in shares) + Z * Z / 2) / n - p * p
    count = len(shares) * p * (1 - p) / variance
    return wilson(fmean(shares) * count, count)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, include one of the c right ones (unbiased)."""
    if not 0 < k <= n:
        raise ValueError(f"pass@{k} needs 1 to {n} samples")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers: list[tuple[str | None, bool]]) -> float:
    """Share of the most frequent answers that is right, from (answer, is right); no answer has no vote.

    A tie is shared rather than broken, and so is an answer with several verdicts: any sample that gives it could be the
    one to hand in. So the order of samples cannot matter.
    """
    votes = Counter(answer for answer, _ in answers if answer is not None)
    most = max(votes.values(), default=0)
    return fmean(right for answer, right in answers if votes[answer] == most) if most else 0.0
