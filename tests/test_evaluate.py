"""Intervals, pass@k, votes and summaries against published values and brute force."""
import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluate import (Answered, Sample, SampleOptions, load_answered, majority, pass_at_k,
                      read_answered, save_answered, summarize, summarize_samples, wilson)


@pytest.mark.parametrize("successes, n, low, high", [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718)])
def test_wilson_against_newcombe(successes, n, low, high):
    """The score interval in the examples of Newcombe (1998); the textbook interval is far off at
    0."""
    assert wilson(successes, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(1, 400), st.data())
def test_wilson_stays_in_range_and_is_symmetric(n, data):
    """0 of n and n of n are results too: no negative bound, and right and wrong mirror each
    other."""
    successes = data.draw(st.integers(0, n))
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n + 1e-12
    assert successes / n - 1e-12 <= high <= 1
    mirrored = wilson(n - successes, n)
    assert mirrored == (pytest.approx(1 - high, abs=1e-12), pytest.approx(1 - low, abs=1e-12))
    # its ends are where a hypothesis p is just rejected: |share - p| = z * sqrt(p(1 - p) / n)
    for p in (low, high):
        gap = abs(successes / n - p)
        assert gap == pytest.approx(1.959964 * math.sqrt(max(0, p * (1 - p)) / n), abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one(n):
    """1 - (1 - c/n)^k is biased: it draws with replacement."""
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(samples, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("k", [0, 6, -1])
def test_pass_at_k_refuses_more_than_there_are(k):
    """Five samples cannot tell pass@6."""
    with pytest.raises(ValueError, match=f"pass@{k}"):
        pass_at_k(5, 2, k)


def slow_majority(answers: list[tuple[str | None, bool]]) -> float:
    """Mean over all ways to break a tie of whether the winner is right."""
    names = sorted({answer for answer, _ in answers if answer is not None})
    votes = [sum(answer == name for answer, _ in answers) for name in names]
    winners = [name for name, count in zip(names, votes) if count == max(votes)]
    right = [any(r for answer, r in answers if answer == name) for name in winners]
    return sum(right) / len(right) if right else 0.0


def test_majority_by_hand():
    """No answer is no vote, however many there are; a tie is shared; nobody voting is not right."""
    right, wrong, none = ("18", True), ("7", False), (None, False)
    assert majority([right, right, wrong]) == 1.0
    assert majority([right, wrong, wrong]) == 0.0
    assert majority([right, wrong]) == 0.5
    assert majority([none, none, none, right]) == 1.0
    assert majority([right, wrong, ("3", False)]) == pytest.approx(1 / 3)
    assert majority([none, none]) == majority([]) == 0.0


@given(st.lists(st.sampled_from([("18", True), ("7", False), ("3", False), (None, False)]),
                max_size=9),
       st.randoms(use_true_random=False))
def test_majority_does_not_know_the_order_of_samples(answers, rng):
    """The first most common answer of a Counter is that of the first sample."""
    shuffled = list(answers)
    rng.shuffle(shuffled)
    assert majority(shuffled) == majority(answers) == pytest.approx(slow_majority(answers))


CAREFUL, HASTY = "a=<<2+3=5>>5 b=<<5-1=4>>4\n#### 4", "So 4=<<5-1=4>>4\n#### 4"


def sample(verdict: str, answer: str | None, text: str, length: int,
           finished: bool = True) -> Sample:
    return Sample([5] * length, finished, text, verdict, answer)


def hand_made() -> list[Answered]:
    """Three questions, four samples each; their first samples are right, wrong, unparsed."""
    return [
        Answered("t-0-left", "p", [1, 5], "4", [sample("correct", "4", CAREFUL, 10),
                                      sample("correct", "4", HASTY, 4),
                                      sample("wrong", "9", HASTY, 4),
                                      sample("unparsed", None, "", 1)]),
        Answered("t-1-left", "p", [1, 6], "3", [sample("wrong", "8", HASTY, 5),
                                      sample("wrong", "8", HASTY, 5),
                                      sample("correct", "3", CAREFUL, 9),
                                      sample("wrong", "7", HASTY, 5)]),
        Answered("t-2-pairs", "p", [1, 7], "0", [sample("unparsed", None, "um", 12, finished=False)]
                 + [sample("wrong", "0", CAREFUL, 9)] * 3),
    ]


def test_summary_of_a_hand_made_set():
    """Greedy numbers are those of each question's first sample, and of no other."""
    summary = summarize(hand_made(), "toy")
    assert summary["n"] == 3
    assert summary["accuracy"] == pytest.approx(1 / 3)
    assert summary["ci95"] == wilson(1, 3)
    third = pytest.approx(1 / 3)
    assert summary["verdicts"] == {"correct": third, "unparsed": third, "wrong": third}
    assert summary["finished"] == pytest.approx(2 / 3)
    assert summary["length"] == pytest.approx(9)
    assert summary["tags"] == {
        "skill": {"left": {"share": pytest.approx(2 / 3), "accuracy": 0.5},
                  "pairs": {"share": third, "accuracy": 0.0}},
        "style": {"careful": {"share": third, "accuracy": 1.0},
                  "hasty": {"share": third, "accuracy": 0.0},
                  "other": {"share": third, "accuracy": 0.0}}}


def test_summary_of_all_samples_of_a_hand_made_set():
    """pass@1 is the mean accuracy of a sample, pass@4 the share of questions with any right one,
    maj@4 the vote of each question; style shares are over all samples."""
    summary = summarize_samples(hand_made(), "toy")
    assert summary["pass@1"] == pytest.approx((2 + 1 + 0) / 12)
    assert summary["pass@2"] == pytest.approx((5 / 6 + 3 / 6 + 0) / 3)
    assert summary["pass@4"] == pytest.approx(2 / 3)
    assert "pass@3" not in summary and "pass@8" not in summary
    assert summary["maj@4"] == pytest.approx(1 / 3)
    assert summary["num_samples"] == 4
    half = 1.959964 * 0.25 / math.sqrt(3)  # shares 1/2, 1/4, 0: standard deviation 1/4
    assert summary["pass@1_ci95"] == [0.0, pytest.approx(0.25 + half)]
    careful = summary["sampled_tags"]["style"]["careful"]
    assert careful == {"share": pytest.approx(5 / 12), "accuracy": pytest.approx(2 / 5)}


def test_summaries_do_not_know_the_order_of_questions():
    """A mean over batches would."""
    questions = hand_made()
    random.Random(1).shuffle(questions)
    assert summarize(questions, "toy") == summarize(hand_made(), "toy")
    shuffled, straight = summarize_samples(questions, "toy"), summarize_samples(hand_made(), "toy")
    assert shuffled.pop("pass@1_ci95") == pytest.approx(straight.pop("pass@1_ci95"))
    assert shuffled.keys() == straight.keys()
    for name in ("pass@1", "pass@2", "maj@4"):
        assert shuffled[name] == pytest.approx(straight[name])


def test_answered_questions_survive_the_file(tmp_path):
    """Stored ids are what is trained on: no field may change type, and no character may split a
    line."""
    odd = Sample([3, 2], True, 'line\nbreak, quote ", é, 数, \u2028 and \x85', "unparsed", None)
    questions = [*hand_made(), Answered("odd\u2029id", "p\u2028", [1], "5", [odd])]
    save_answered(tmp_path / "samples.jsonl", questions, SampleOptions(), seed=3)
    assert load_answered(tmp_path / "samples.jsonl") == questions
    assert [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]


def test_a_changed_file_of_samples_is_refused(tmp_path):
    """The hash in the first line covers the settings and every response."""
    path = tmp_path / "samples.jsonl"
    save_answered(path, hand_made(), SampleOptions(), seed=3)
    settings, _ = read_answered(path)
    assert settings["seed"] == 3 and settings["marks"] == "hash" and settings["task"] == "toy"
    whole = path.read_text()
    for old, new in [('"seed": 3', '"seed": 4'), ('"wrong"', '"correct"'), ('"9"', '"4"')]:
        assert old in whole
        path.write_text(whole.replace(old, new, 1))
        with pytest.raises(SystemExit, match="SHA-256"):
            load_answered(path)
    for broken in (whole[:-5], whole.split("\n", 1)[1], ""):
        path.write_text(broken)
        with pytest.raises(SystemExit, match="samples.jsonl"):
            load_answered(path)
