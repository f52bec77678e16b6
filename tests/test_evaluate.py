"""Intervals, pass@k, votes and summaries against published values and brute force."""
import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint import load_model
from data.tokenizer import load_tokenizer
from evaluate import Answered, Sample, SampleOptions, answer, majority, pass_at_k, summarize, wilson
from infra.run import read_records, write_records
from runs import base, call, remembered_world  # noqa: F401 (two are fixtures)
from tools import evaluation


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


def test_counts_over_all_samples_of_a_hand_made_set():
    """pass@1 is the mean accuracy of a sample, pass@4 the share of questions with any right one,
    maj@4 the vote of each question; style shares are over all samples."""
    summary = summarize(hand_made(), "toy")
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
    shuffled, straight = summarize(questions, "toy"), summarize(hand_made(), "toy")
    assert shuffled.pop("pass@1_ci95") == pytest.approx(straight.pop("pass@1_ci95"))
    assert shuffled.keys() == straight.keys()
    for name in ("accuracy", "length", "pass@1", "pass@2", "maj@4"):
        assert shuffled[name] == pytest.approx(straight[name])
    assert shuffled["tags"] == straight["tags"]


def test_answered_questions_survive_the_file(tmp_path):
    """Stored ids are what is trained on: no field may change type, and no character may split a
    line."""
    odd = Sample([3, 2], True, 'line\nbreak, quote ", é, 数, \u2028 and \x85', "unparsed", None)
    questions = [*hand_made(), Answered("odd\u2029id", "p\u2028", [1], "5", [odd])]
    write_records(tmp_path / "samples.jsonl", questions, dict(seed=3))
    assert read_records(tmp_path / "samples.jsonl", Answered) == ({"seed": 3}, questions)
    assert [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]


# --- questions in, graded responses out -----------------------------------------------------------

def test_groups_do_not_change_which_question_a_response_belongs_to(base):  # noqa: F811
    """Prompts are sorted and grouped for speed, and the groups' responses were once put back in another order."""
    model, tokenizer = load_model(base), load_tokenizer(base)
    options = SampleOptions(max_new_tokens=8)
    problems = options.problems("train", 20)[::-1]
    found = [answer(model, tokenizer, problems, replace(options, batch_rows=rows), num_samples=2, temperature=1.0)
             for rows in (1024, 6, 2)]
    assert [q.id for q in found[0]] == [p.id for p in problems]
    assert found[0] == found[1] == found[2]
    assert all(q.gold == p.answer and tokenizer.encode(p.question)[:3] == q.prompt_ids[1:4]
               for q, p in zip(found[0], problems))
    texts = [tokenizer.decode(sample.ids) for q in found[0] for sample in q.samples]
    assert texts == [sample.text for q in found[0] for sample in q.samples]


def test_a_model_is_measured_once_and_its_texts_can_be_graded_again(base, tmp_path, capsys):  # noqa: F811
    run = tmp_path / "run"
    flags = ["--preset", "toy", "--model", base, "--limit", "6", "--num_samples", "2", "--temperature", "1",
             "--max_new_tokens", "8", "--run_dir", run]
    call(evaluation, *flags)
    said = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    settings, answered = read_records(run / "eval_samples.jsonl", Answered)
    assert (settings["split"], settings["num_samples"], settings["temperature"]) == ("test", 2, 1.0)
    before = (run / "eval_samples.jsonl").stat().st_mtime_ns
    call(evaluation, *flags)
    assert (run / "eval_samples.jsonl").stat().st_mtime_ns == before
    capsys.readouterr()
    call(evaluation, "--rescore", run / "eval_samples.jsonl")
    assert [line for line in capsys.readouterr().out.splitlines() if "%" in line] == said

    # a verdict by another grader: it is named, and the accuracy is that of today's
    wrong = replace(answered[0], samples=[replace(s, verdict="correct") for s in answered[0].samples])
    write_records(run / "other.jsonl", [wrong, *answered[1:]], settings)
    call(evaluation, "--rescore", run / "other.jsonl")
    again = capsys.readouterr().out
    changed = sum(s.verdict != "correct" for s in answered[0].samples)
    assert again.count("correct in the file") == changed > 0
    assert [line for line in again.splitlines() if "%" in line] == said
