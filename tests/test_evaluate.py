"""Intervals, pass@k, votes and summaries against published values and brute force; answers and how they are asked."""
import contextlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import evaluate
from checkpoint import load_model, model_hash
from data.tokenizer import load_tokenizer
from evaluate import Answered, Sample, SampleOptions, answer, majority, pass_at_k, summarize, wilson, wilson_of_mean
from infra import InputError
from infra.run import Pieces, read_json, read_records, write_records
from sample import Response, generate



@given(st.integers(1, 400), st.data())
def test_wilson_stays_in_range_and_is_symmetric(n, data):
    """0 of n and n of n are results too: no negative bound, and right and wrong mirror each other."""
    successes = data.draw(st.integers(0, n))
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n + 1e-12 and successes / n - 1e-12 <= high <= 1
    assert wilson(n - successes, n) == (pytest.approx(1 - high, abs=1e-12), pytest.approx(1 - low, abs=1e-12))
    for p in (low, high):  # where a hypothesis p is just rejected
        assert abs(successes / n - p) == pytest.approx(1.959964 * math.sqrt(max(0, p * (1 - p)) / n), abs=1e-6)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200))
def test_the_interval_of_a_mean(rights):
    """Of zeros and ones it is Wilson's, of values between them no wider; it is always inside [0, 1], holds the mean and
    has a width. 20 questions of 4 right samples each gave [1, 1], and 2 questions left [0, 1] but for a clip."""
    shares, n = [right / 4 for right in rights], len(rights)
    low, high = wilson_of_mean(shares)
    assert 0 <= low <= fmean(shares) + 1e-12 and fmean(shares) - 1e-12 <= high <= 1 and low < high
    outer = wilson(sum(shares), n)
    assert outer[0] <= low + 1e-9 and high <= outer[1] + 1e-9
    assert wilson_of_mean([float(right > 2) for right in rights]) == pytest.approx(
        wilson(sum(right > 2 for right in rights), n))


@pytest.mark.parametrize("shares, low, high", [
    ([1.0] * 20, 0.8389, 1.0), ([0.0] * 20, 0.0, 0.1611), ([1.0], 0.2065, 1.0), ([0.5] * 20, 0.4134, 0.5866),
    ([0.25, 0.75] * 500, 0.4844, 0.5156)])
def test_the_interval_of_a_mean_in_examples(shares, low, high):
    """Where values vary as in the last row, 1.96 standard errors of 1,000 questions are 0.0155."""
    assert wilson_of_mean(shares) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one(n):
    """1 - (1 - c/n)^k is biased: it draws with replacement."""
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(samples, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
        for k in (0, n + 1, -1):  # five samples cannot tell pass@6
            with pytest.raises(ValueError, match=f"pass@{k}"):
                pass_at_k(n, c, k)


@given(st.lists(st.tuples(st.sampled_from(["18", "7", "3", None]), st.booleans()), max_size=9),
       st.randoms(use_true_random=False))
def test_majority_does_not_know_the_order_of_samples(answers, rng):
    """The first most common answer of a Counter is that of the first sample."""
    votes = [answer for answer, _ in answers if answer]
    winners = {answer for answer in votes if votes.count(answer) == max(map(votes.count, votes))}
    rights = [fmean(right for answer, right in answers if answer == winner) for winner in winners]
    share = fmean(rights) if winners else 0.0  # mean over all ways to break a tie
    shuffled = rng.sample(answers, len(answers))
    assert majority(shuffled) == majority(answers) == pytest.approx(share)


SHORT = "Ben 4. Ann beats Ben by 3. How many has Ann?"
LONGER = "Ben 4. Ann halves Ben. Cat halves Ann. How many has Cat?"
SOUND, MISREAD = (f"Ann beats Ben by 3. Ben 4.\n Ann beats Ben 4 by 3 << 4 {sign} 3 = {end} >> Ann {end}\n#### {end}"
                  for sign, end in ("+7", "-1"))


def sample(verdict: str, answer: str | None, text: str, length: int, finished: bool = True) -> Sample:
    return Sample([5] * length, finished, text, verdict, answer)


def hand_made() -> list[Answered]:
    """Make three questions of four samples; the first samples are right, wrong, unparsed."""
    return [Answered("t-0", "p", [1, 5], "4", [
                sample("correct", "4", SOUND, 10), sample("correct", "4", MISREAD, 4), sample("wrong", "9", MISREAD, 4),
                sample("unparsed", None, "", 1)], SHORT),
            Answered("t-1", "p", [1, 6], "3", [
                sample("wrong", "8", MISREAD, 5), sample("wrong", "8", MISREAD, 5), sample("correct", "3", SOUND, 9),
                sample("wrong", "7", MISREAD, 5)], SHORT),
            Answered("t-2", "p", [1, 7], "0", [
                sample("unparsed", None, "um", 12, finished=False), *[sample("wrong", "0", "#### 0", 9)] * 3], LONGER)]


def test_summary_of_a_hand_made_set():
    """Greedy numbers are those of each question's first sample, and of no other."""
    summary, third = summarize(hand_made(), "toy"), pytest.approx(1 / 3)
    assert (summary["n"], summary["accuracy"], summary["ci95"]) == (3, third, wilson(1, 3))
    assert summary["verdicts"] == {"correct": third, "unparsed": third, "wrong": third}
    assert summary["finished"] == pytest.approx(2 / 3) and summary["length"] == pytest.approx(9)
    assert summary["tags"] == {
        "depth": {"1": {"share": pytest.approx(2 / 3), "accuracy": 0.5}, "2": {"share": third, "accuracy": 0.0}},
        "first wrong": {"answer lost": {"share": third, "accuracy": 0.0},
                        "more misread": {"share": third, "accuracy": 0.0},
                        "nothing": {"share": third, "accuracy": 1.0}}}


def test_counts_over_all_samples_of_a_hand_made_set():
    """pass@1 is the mean accuracy of a sample, pass@4 the share of questions with any right one, maj@4 the vote of each
    question; shares of tags are over all samples. One sample has no such counts."""
    summary = summarize(hand_made(), "toy")
    assert summary["pass@1"] == pytest.approx((2 + 1 + 0) / 12)
    assert summary["pass@2"] == pytest.approx((5 / 6 + 3 / 6 + 0) / 3)
    assert summary["pass@4"] == pytest.approx(2 / 3)
    assert "pass@3" not in summary and "pass@8" not in summary
    assert summary["maj@4"] == pytest.approx(1 / 3) and summary["num_samples"] == 4
    assert summary["pass@1_ci95"] == wilson_of_mean([1 / 2, 1 / 4, 0])
    misread = summary["sampled_tags"]["first wrong"]["more misread"]
    assert misread == {"share": pytest.approx(5 / 12), "accuracy": pytest.approx(1 / 5)}
    backwards = summarize([replace(q, samples=q.samples[::-1]) for q in hand_made()], "toy")
    assert all(backwards[name] == summary[name] for name in ("pass@1", "pass@1_ci95", "maj@4", "sampled_tags"))
    with pytest.raises(InputError, match="no question"):
        summarize([], "toy")
    greedy = [replace(question, samples=question.samples[:1]) for question in hand_made()]
    assert not {"num_samples", "pass@1", "maj@1"} & summarize(greedy, "toy").keys()


def test_answered_questions_survive_the_file(tmp_path):
    """Stored ids are what is trained on: no field may change type, and no character may split a line."""
    odd = Sample([3, 2], True, 'line\nbreak, quote ", é, 数, \u2028 and \x85', "unparsed", None)
    questions = [*hand_made(), Answered("odd\u2029id", "p\u2028", [1], "5", [odd])]
    write_records(tmp_path / "samples.jsonl", questions, dict(seed=3))
    assert read_records(tmp_path / "samples.jsonl", Answered) == ({"seed": 3}, questions)


# --- questions in, graded responses out ------------------------------------------------------------

def test_groups_do_not_change_which_question_a_response_belongs_to(base):
    """Prompts are sorted and sampled in groups for speed, and the responses must return to their questions."""
    model, tokenizer, options = load_model(base), load_tokenizer(base), SampleOptions(task="toy", max_new_tokens=8)
    problems = options.problems("train", 11)[::-1]  # groups of 3, 3, 3 and 2

    how = dict(num_samples=2, temperature=0.8, seed=1)
    found, *others = [answer(model, tokenizer, problems, replace(options, batch_rows=rows), **how)
                      for rows in (1024, 6, 2)]
    assert others == [found, found]
    for question in found:
        [alone] = generate(model, [question.prompt_ids], max_new_tokens=8, eos_ids=tokenizer.eos_ids, **how)
        assert [(s.ids, s.finished) for s in question.samples] == [(r.ids, r.finished) for r in alone]
    assert [(q.id, q.prompt, q.prompt_ids, q.gold) for q in found] == [
        (p.id, f"{p.question}\n", options.prompt_ids(tokenizer, p), p.answer) for p in problems]
    assert all(tokenizer.decode(sample.ids) == sample.text for q in found for sample in q.samples)


@pytest.fixture
def killed(base, tmp_path, monkeypatch):
    """Ask 11 questions for 2 samples each, 3 questions at a time, as far as `pieces` finished pieces; return the file
    and the questions that were sampled."""
    how = dict(split="dev", num_samples=2, temperature=0.8, label="")

    def ask(name: str, pieces: int = 9, batch_rows: int = 6, seed: int = 1) -> tuple[Path, list[int]]:
        options, sampled = SampleOptions(task="toy", max_new_tokens=8, batch_rows=batch_rows, precision="fp32"), []

        def some(model, prompts, **asked):
            if len(sampled) == pieces:
                raise KeyboardInterrupt
            sampled.append(len(prompts))
            return generate(model, prompts, **asked)

        monkeypatch.setattr(evaluate, "generate", some)
        with contextlib.suppress(KeyboardInterrupt):
            evaluate.answer_once(tmp_path / name / "x.jsonl", evaluate.Sampler(str(base), options),
                                 options.problems("train", 11), seed=seed, **how)
        return tmp_path / name / "x.jsonl", sampled

    return ask


def test_what_was_sampled_before_a_kill_is_not_sampled_again(killed):
    """A kill at 97 % of 7 minutes began again at 0. The file exists only once it is complete, with the bytes that it
    would have had; a piece that was cut short or damaged is sampled again, and the rest in whichever groups."""
    whole, sampled = killed("whole")
    assert sampled == [3, 3, 3, 2] and [*whole.parent.iterdir()] == [whole]
    for damage, left in ((lambda text: text, [3, 2]), (lambda text: text[:-1], [3, 2]), (lambda text: text[:-9],
                         [3, 3, 2]), (lambda text: text.replace("[[[", "[[[7, ", 1), [3, 3, 2])):
        path, sampled = killed("resumed", pieces=2)
        assert sampled == [3, 3] and not path.exists()
        [part] = path.parent.iterdir()
        part.write_text(damage(part.read_text()))
        path, sampled = killed("resumed")
        assert sampled == left and path.read_bytes() == whole.read_bytes() and [*path.parent.iterdir()] == [path]
        path.unlink()
    path, _ = killed("other", pieces=1)
    assert killed("other", batch_rows=4)[1] == [1, 2, 2, 2, 1] and path.read_bytes() == whole.read_bytes()


def test_pieces_of_other_settings_are_not_used(killed):
    """Of another seed, or another model under the same name; killed twice, all that was finished counts."""
    path, _ = killed("x", pieces=3, seed=2)
    assert killed("x", pieces=1)[1] == [3] and killed("x", pieces=2)[1] == [3, 3] and killed("x")[1] == [2]
    assert path.read_bytes() == killed("whole")[0].read_bytes()


def test_a_large_model_is_sampled_in_pieces_that_do_not_take_hours(monkeypatch):
    """1,024 responses of 135 M parameters at once take a quarter of an hour on a CPU; of a small model, seconds."""
    asked = []
    monkeypatch.setattr(evaluate, "cache_budget", lambda model: 1)
    monkeypatch.setattr(evaluate, "generate", lambda model, prompts, **how: asked.append(len(prompts)) or [
        [Response([2], True)] * 8 for _ in prompts])
    for parameters in (135_000_000, 800_000):
        weight = SimpleNamespace(numel=lambda n=parameters: n, device=SimpleNamespace(type="cpu"))
        model = SimpleNamespace(parameters=lambda w=weight: [w], lm_head=SimpleNamespace(weight=weight))
        evaluate.sample_all(model, [[1]] * 256, SampleOptions(), (2,), 8, 1.0, 0, "", Pieces())
    assert asked == [18] * 14 + [4] + [128, 128]


def test_an_answer_is_graded_with_its_own_right_answer(base, monkeypatch):
    """In the answer format that the prompt asks for; a truncated one as it stands."""
    options, own = SampleOptions(task="toy", prompt="irpo"), load_tokenizer(base)
    problems = [replace(p, answer=str(i)) for i, p in enumerate(options.problems("train", 3))]
    tokenizer = SimpleNamespace(bos_id=own.bos_id, eos_ids=own.eos_ids, encode=own.encode,
                                decode=lambda ids: f"Final answer: {ids[0]}")
    monkeypatch.setattr(evaluate, "sample_all", lambda *args: [
        [Response([i], False), Response([2 - i], True)] for i in range(3)])
    found = answer(None, tokenizer, problems, options)
    assert [[(s.verdict, s.answer, s.finished) for s in q.samples] for q in found] == [
        [("correct", "0", False), ("wrong", "2", True)], [("correct", "1", False), ("correct", "1", True)],
        [("correct", "2", False), ("wrong", "0", True)]]


def test_a_file_of_answers_says_how_they_were_asked(base, tmp_path, monkeypatch):
    """Whatever changes a response is in its first line, so that no other is taken for it; speed and memory are not."""
    calls, path = [], tmp_path / "samples.jsonl"
    monkeypatch.setattr(evaluate, "answer", lambda *args, **how: calls.append((args, how)) or hand_made())
    monkeypatch.setattr(evaluate, "load_sampler", lambda *args: args)
    how = dict(split="dev", num_samples=4, temperature=0.7, seed=3)

    def ask(speed: dict, **changes) -> list[Answered]:
        options = SampleOptions(task="toy", prompt="irpo", **speed)
        sampler = evaluate.Sampler(str(base), options)
        return evaluate.answer_once(path, sampler, ["problem"], label="x", **how | changes)

    assert ask(dict(batch_rows=7, tensor_parallel=2)) == ask({}) == hand_made()
    [((model, _, problems, options), asked)] = calls
    assert (model, problems, options.prompt, options.batch_rows) == ((str(base), "auto", 2), ["problem"], "irpo", 7)
    assert asked.pop("pieces") and asked == dict(num_samples=4, temperature=0.7, seed=3, label="x", reward=False)
    said, _ = read_records(path, Answered)
    assert said == how | dict(weights=model_hash(base), task="toy", answer="", path="", source="publisher",
                              toy_steps=[2, 3, 4, 5], toy_gold=0.0, prompt="irpo", chat="", system="",
                              answer_format="", marks="final_answer", max_new_tokens=512, precision="auto", reward="",
                              right_at=1.0, reward_hash="")
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    with pytest.raises(InputError, match="other settings:\n  weights: "):
        ask({})
    (base / "generation_config.json").unlink()
    for name, value in dict(split="test", num_samples=1, temperature=1.0, seed=4).items():
        with pytest.raises(InputError, match=f"other settings:\n  {name}: "):
            ask({}, **{name: value})
    before = {name: value for name, value in said.items() if name not in ("toy_steps", "max_new_tokens")}
    write_records(path, hand_made(), before)  # by code that did not have these flags yet
    assert ask({}) == hand_made()
    with pytest.raises(InputError, match="other settings:\n  max_new_tokens: 512 there, 9 now"):
        ask(dict(max_new_tokens=9))


def test_samples_of_which_none_has_finished(tmp_path, monkeypatch, base, capsys):
    """A model whose end token was not known ran to the length limit each time: 24 right answers of 80 became losers,
    with exit status 0. Where nothing is trained it is a warning, as are other shares that say something is amiss."""
    endless = [replace(q, samples=[replace(s, finished=False, text=" ") for s in q.samples]) for q in hand_made()]
    monkeypatch.setattr(evaluate, "answer", lambda *args, **how: endless)
    sampler = SimpleNamespace(weights="", loaded=(), options=SampleOptions(task="toy"))
    how = dict(num_samples=4, temperature=1.0, seed=0, label="")
    with pytest.raises(InputError, match="none of 12 responses ended within --max_new_tokens 512: .*eos_token_id"):
        evaluate.answer_once(tmp_path / "samples.jsonl", sampler, [], split="train", **how)
    assert evaluate.answer_once(tmp_path / "eval.jsonl", sampler, [], split="test", **how) == endless

    evaluate.print_summary("M0", summarize(endless, "toy"))
    said, *warnings = capsys.readouterr().out.splitlines()
    assert said == ("M0: accuracy 33.3%, 95 % interval 6.1% to 79.2%, 3 questions; 33.3% unparsed, 100.0% unfinished, "
                    "100.0% empty")
    assert [line.split(": ")[:2] for line in warnings] == [
        ["warning", f"{share} of the responses are {kind}"] for share, kind in (
            ("33%", "unparsed"), ("100%", "unfinished"), ("100%", "empty"))]
    evaluate.print_summary("M0", summarize([replace(q, samples=q.samples[:1]) for q in hand_made()[:2]], "toy"))
    assert capsys.readouterr().out.count("\n") == 1
    for share, warned in (0.1, False), (0.11, True):
        evaluate.print_summary("M0", dict(n=100, accuracy=0.5, ci95=(0.4, 0.6), finished=1.0, empty=share, verdicts={}))
        assert ("--chat own" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("eval_samples", [0, 4])
def test_the_record_of_a_model(tmp_path, monkeypatch, capsys, eval_samples):
    """Greedy on dev and test; accuracy stays the greedy one where several samples are drawn as well."""
    calls, samplers = [], set()

    def answer_once(path, sampler, problems, **how) -> list[Answered]:
        samplers.add(sampler)
        calls.append((path.name, problems, how))
        return [replace(q, samples=q.samples[-how["num_samples"]:]) for q in hand_made()]

    monkeypatch.setattr(evaluate, "answer_once", answer_once)
    config = SimpleNamespace(task="toy", eval_questions=2, eval_samples=eval_samples, seed=5,
                             problems=lambda split, limit: [f"{limit} of {split}"])
    rows = evaluate.evaluate_model("M1", 1, "directory", config, tmp_path, 0.7, note="n")
    asked = [("eval_dev", "dev", 1, 0.0), ("eval_samples", "test", 1, 0.0), ("eval_sampled", "test", 4, 0.7)]
    assert calls == [(f"{file}.jsonl", [f"2 of {split}"], dict(
        split=split, num_samples=num_samples, temperature=temperature, seed=5, label=f"M1 {split}"))
        for file, split, num_samples, temperature in asked[:3 if eval_samples else 2]]
    assert [sampler.directory for sampler in samplers] == ["directory"]  # one, that is hashed and loaded once
    assert [(r["name"], r["iteration"], r["split"], r["note"], r["accuracy"], r.get("pass@4")) for r in rows] == [
        ("M1", 1, "dev", "n", 0.0, None), ("M1", 1, "test", "n", 0.0, pytest.approx(2 / 3) if eval_samples else None)]
    assert json.loads(json.dumps(rows)) == read_json(tmp_path / "eval.json")
    said = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if "accuracy" in line]
    sampled = ["M1 test, the first of 4 samples at temperature 0.7"] if eval_samples else []
    if eval_samples:  # measured again without the flag, it keeps what was sampled
        write_records(tmp_path / "eval_sampled.jsonl", [], {"num_samples": 4})
        config.eval_samples = 0
        assert evaluate.evaluate_model("M1", 1, "directory", config, tmp_path, 0.7, note="n") == rows
    assert said == ["M1 dev", "M1 test", *sampled]
