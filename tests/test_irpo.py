"""Pairs, references and the loss of IRPO; and a small run, whose files must be what the algorithm says."""
import math
import random
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data
import irpo
from checkpoint import flops, load_model, load_sampler, model_hash, save_model
from data.tokenizer import load_tokenizer
from evaluate import Answered, Sample, SampleOptions
from infra import InputError
from infra.run import derive_seed, read_json, read_records, write_jsonl
from irpo import (TOY, Config, Pair, check_start, kept_pairs, make_pairs, minimise, preference_loss,
                  preference_pairs, probe, right_and_wrong, training_items, training_row, with_reference)
from runs import SMALL, call, narrower, read_lines, settings
from sample import generate
from tiny import random_tokens, slow_logps, tiny_model
from train import Example, batch_at

LN2 = math.log(2)
FP32 = dict(precision="fp32", model="somewhere")


def sample(ids: list[int], right: bool, finished: bool = True) -> Sample:
    return Sample(ids, finished, "text", "correct" if right else "wrong", "1" if right else "2")


def answered(id: str, *samples: Sample) -> Answered:
    return Answered(id, "prompt", [1, 9], "1", list(samples))


def some_pairs(count: int = 6) -> list[Pair]:
    """Make ragged pairs of random tokens."""
    return [Pair(f"q{i}", random_tokens(i, 1 + i % 4).tolist(), random_tokens(50 + i, 2 + 3 * i % 7).tolist(),
                 random_tokens(90 + i, 1 + 5 * i % 8).tolist()) for i in range(count)]


@pytest.fixture(scope="module")
def tiny_dirs(tmp_path_factory) -> list[Path]:
    """The directories of two tiny models with other weights and 20 positions."""
    folders = [tmp_path_factory.mktemp("tiny") / str(seed) for seed in range(2)]
    for seed, folder in enumerate(folders):
        save_model(tiny_model(seed, max_position_embeddings=20), folder)
    return folders


# --- steps 2 and 3: pairs --------------------------------------------------------------------------

@given(st.lists(st.integers(), max_size=7), st.lists(st.integers(), max_size=7), st.integers(0, 20))
def test_pairs_walk_both_lists_and_start_over(right, wrong, num_pairs):
    """Footnote 2: both sets are walked at once, and each starts over at its own end. A product of the two, or a zip
    that stops at the shorter one, is another data set."""
    expected, i, j = [], 0, 0
    while right and wrong and len(expected) < num_pairs:
        expected.append((right[i], wrong[j]))
        i = 0 if i + 1 == len(right) else i + 1
        j = 0 if j + 1 == len(wrong) else j + 1
    assert make_pairs(right, wrong, num_pairs) == expected


@pytest.mark.parametrize("samples, gold, dedupe, right, wrong", [
    # gold keeps a hard question in the data, and is never among the losers
    ([([5, 2], False), ([6, 2], False)], [7, 7, 2], True, [[7, 7, 2]], [[5, 2], [6, 2]]),
    ([([5, 2], False), ([6, 2], False)], None, True, [], [[5, 2], [6, 2]]),
    ([([5, 2], True)], [7, 2], True, [[5, 2], [7, 2]], []),
    # a common response would fill most pairs; the first of each stays, in order
    ([([9, 2], True), ([4, 2], False), ([3, 2], True), ([9, 2], True), ([8, 2], False), ([4, 2], False)],
     [3, 2], True, [[9, 2], [3, 2]], [[4, 2], [8, 2]]),
    ([([9, 2], True), ([4, 2], False), ([9, 2], True), ([4, 2], False)],
     [3, 2], False, [[9, 2], [9, 2], [3, 2]], [[4, 2], [4, 2]]),
    # truncated after a right answer: as a winner it would teach never to stop
    ([([5, 5], True, False), ([6, 2], True)], None, True, [[6, 2]], [[5, 5]])])
def test_right_and_wrong(samples, gold, dedupe, right, wrong):
    question = answered("q", *(sample(*one) for one in samples))
    assert right_and_wrong(question, gold, dedupe) == (right, wrong)


@pytest.mark.parametrize("verdict, finished, losers", [
    ("wrong", True, [[5, 2]]), ("unparsed", True, [[5, 2]]), ("timeout", True, []), ("copied", True, []),
    ("timeout", False, [[5, 2]])])
def test_losers_are_wrong_or_without_an_answer(verdict, finished, losers):
    """Without the unparsed, the model would get no signal for the answer format. A right answer whose check ran out of
    time was once trained against."""
    question = answered("q", replace(sample([5, 2], False, finished), verdict=verdict), sample([8, 2], True))
    assert right_and_wrong(question, None, True) == ([[8, 2]], losers)


GOLD = [10, 11, 2]
QUESTIONS = [  # one mixed, one all right, one all wrong, and one mixed with a very long loser
    answered("mixed", sample([5, 2], True), sample([6, 2], False), sample([7, 2], False), sample([5, 2], True)),
    answered("easy", *[sample([i, 2], True) for i in range(5, 9)]),
    answered("hard", *[sample([i, 2], False) for i in range(5, 9)]),
    answered("long", sample([8, 2], True), sample([5] * 40 + [2], False), sample([9, 2], False),
             sample([3, 3], True, finished=False))]


def test_pairs_of_all_questions_and_what_the_row_counts(tiny_dirs, tmp_path):
    """What is counted must be what was done: made = kept + too long + capped."""
    golds = dict.fromkeys(("mixed", "easy", "hard", "long"), GOLD)
    config = Config(num_samples=4, pairs_per_question=3, precision="fp32", model=str(tiny_dirs[0]))
    made = preference_pairs(QUESTIONS, golds, config)
    pairs = kept_pairs(made, config.model, config, 1)
    by_id = {name: [(p.chosen, p.rejected) for p in pairs if p.id == name] for name in golds}
    assert by_id == {"mixed": [([5, 2], [6, 2]), (GOLD, [7, 2]), ([5, 2], [6, 2])], "easy": [],
                     "hard": [(GOLD, [5, 2]), (GOLD, [6, 2]), (GOLD, [7, 2])],
                     "long": [(GOLD, [9, 2]), ([8, 2], [3, 3])]}  # the pair that is too long is gone, not cut
    assert all(pair.prompt == [1, 9] for pair in pairs)

    write_jsonl(tmp_path / "train.jsonl", [{"loss": 1.0, "tokens": 50}, {"loss": 3.0, "tokens": 7}])
    write_jsonl(tmp_path / "probe.jsonl", [{"step": 0, "chosen": -1.0}])
    row = training_row(2, tmp_path, QUESTIONS, made, pairs[:7], config.model, config)
    sampled = sum(len(s.ids) for question in QUESTIONS for s in question.samples)
    prompts, scored = 4 * 2, sum(3 + len(p.chosen + p.rejected) for p in pairs[:7])
    parameters = sum(weight.numel() for weight in load_model(tiny_dirs[0]).parameters())
    expected = {"name": "M2", "iteration": 2, "split": "train", "questions": 4, "all_right": 0.25, "all_wrong": 0.25,
                "mixed": 0.5, "sample_accuracy": 7 / 16, "unfinished": 1, "pairs_made": 9, "pairs_overlong": 1,
                "pairs_capped": 1, "pairs": 7, "steps": 2, "loss": 3.0, "tokens_sampled": sampled,
                "tokens_trained": 57, "flops": parameters * (2 * (sampled + prompts + scored) + 6 * 57),
                "probe": [{"step": 0, "chosen": -1.0}]}
    assert {name: row[name] for name in expected} == expected
    for method, forward in (("sft_chosen", sampled + prompts), ("sft_gold", 0)):
        row = training_row(2, tmp_path, QUESTIONS, made, pairs[:7], config.model, replace(config, method=method))
        assert row["flops"] == parameters * (2 * forward + 6 * 57), "it needs no reference, and gold no samples"

    without = preference_pairs(QUESTIONS, golds, replace(config, gold=False))  # as for ARC
    assert [pair.id for pair in without] == ["mixed"] * 3 + ["long"] * 3
    assert not any(pair.chosen == GOLD for pair in without)
    twice = answered("twice", *[sample([i, 2], i > 5) for i in (7, 7, 8, 5)])
    for dedupe, chosen in ((True, [[7, 2], [8, 2], [7, 2]]), (False, [[7, 2], [7, 2], [8, 2]])):
        assert [pair.chosen for pair in preference_pairs([twice], {}, replace(config, dedupe=dedupe))] == chosen


@pytest.mark.parametrize("chosen, rejected", [(18, 1), (1, 18), (19, 1), (1, 19)])
def test_a_pair_fits_if_both_of_its_sequences_do(chosen, rejected, tiny_dirs):
    """The limit is the model's 20 positions, which the longer sequence may fill, and not the tokens of the pair's row:
    the prompt, its last token again, and both responses. No pairs at all is an error with a remedy: training on nothing
    would give the last model again, and a table that says so."""
    config, pair = Config(model=str(tiny_dirs[0])), Pair("q", [1, 9], [5] * chosen, [6] * rejected)
    assert pair.tokens == 3 + chosen + rejected
    if chosen + rejected == 19:
        assert kept_pairs([pair], config.model, config, 3) == [pair]
    else:
        with pytest.raises(InputError, match="iteration 3 has no pairs: all 1 .* 20 positions.*--temperature"):
            kept_pairs([pair], config.model, config, 3)


def test_the_cap_is_a_random_subsample_given_by_seed_and_iteration(tiny_dirs):
    """The first pairs would be those of the first questions; a draw from a shared generator would change when a run is
    resumed."""
    pairs = [Pair(f"q{i // 2}", [1], [5, 2], [6, 2]) for i in range(400)]

    def capped(iteration: int = 1, seed: int = 0) -> list[int]:
        config = Config(max_pairs=50, seed=seed, precision="fp32", model=str(tiny_dirs[0]))
        return [int(pair.id[1:]) for pair in kept_pairs(pairs, config.model, config, iteration)]

    kept = capped()
    assert len(kept) == 50 and max(map(kept.count, kept)) <= 2  # without replacement
    assert sum(i >= 100 for i in kept) > 5  # from all questions; 5 or fewer has p < 1e-8
    random.seed(0)
    assert capped() == kept
    assert capped(seed=1) != kept and capped(iteration=2) != kept


def test_what_each_method_trains_on(tiny_dirs):
    """The pairs; their winners; or the gold solutions of all questions once, also of those without a pair. One that
    does not fit the model is left out, not cut."""
    questions = [answered("a", sample([5, 2], True)), answered("b", sample([6, 2], False)), answered("c")]
    golds, pairs = {"a": [10, 2], "b": [11, 12, 2], "c": [12] * 19}, [Pair("b", [1, 9], [11, 12, 2], [6, 2])]
    items = {method: training_items(pairs, questions, golds, str(tiny_dirs[0]), Config(method=method, model="m"))
             for method in ("irpo", "sft_chosen", "sft_gold")}
    assert items == {"irpo": pairs, "sft_chosen": [Example("b", [1, 9], [11, 12, 2])],
                     "sft_gold": [Example("a", [1, 9], [10, 2]), Example("b", [1, 9], [11, 12, 2])]}


# --- steps 4 and 5: reference and loss -------------------------------------------------------------

@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_the_stored_reference_is_what_the_model_gives_each_response(budget, tiny_dirs):
    """Micro-batches are sorted by length: numbers stored in that order would belong to other pairs. Sums, not means,
    over response tokens only."""
    stored = with_reference(some_pairs(), str(tiny_dirs[1]), Config(micro_batch_tokens=budget, **FP32))
    model = load_model(tiny_dirs[1])
    for pair, before in zip(stored, some_pairs(), strict=True):
        assert replace(pair, ref_chosen=0, ref_rejected=0) == replace(before, ref_chosen=0, ref_rejected=0)
        live = [sum(slow_logps(model, pair.prompt, ids)) for ids in (pair.chosen, pair.rejected)]
        assert [pair.ref_chosen, pair.ref_rejected] == pytest.approx(live, abs=1e-3)


def test_what_the_reference_scored_before_a_kill_is_not_scored_again(tiny_dirs, tmp_path, monkeypatch):
    """It is half an hour for 1,000 pairs of a model with 135 M parameters, and began again at 0. Of another reference,
    or in other micro-batches, nothing counts."""
    config, real, path, scored = Config(micro_batch_tokens=30, **FP32), irpo.pair_logps, tmp_path / "x.jsonl", []

    def run(limit: int, directory: Path = tiny_dirs[0], config: Config = config) -> list[Pair]:
        def some(model, pairs):
            if len(scored) == limit:
                raise KeyboardInterrupt
            scored.append(pairs)
            return real(model, pairs)

        scored.clear()
        monkeypatch.setattr(irpo, "pair_logps", some)
        return with_reference(some_pairs(), str(directory), config, path)

    whole = with_reference(some_pairs(), str(tiny_dirs[0]), config)
    with pytest.raises(KeyboardInterrupt):
        run(2)
    assert run(99) == whole and len(scored) == len(irpo.micro_batches(some_pairs(), 30)) - 2 > 0
    assert run(99) == whole and not scored
    assert run(99, tiny_dirs[1]) != whole and run(99, config=replace(config, micro_batch_tokens=60)) and scored


def test_a_reference_that_is_not_finite_is_refused(tmp_path):
    """ln 2 minus NaN is not above any bound, so that training began."""
    model = tiny_model()
    model.lm_head.weight.data[5] = math.nan
    save_model(model, tmp_path / "model")
    with pytest.raises(InputError, match="model gives log-probabilities that are not finite"):
        with_reference(some_pairs(), str(tmp_path / "model"), Config(**FP32))


def test_before_the_first_step_the_policy_is_the_reference(tiny_dirs, capsys):
    """DPO loss ln 2, no reward, and nobody ahead (ties do not count). A reference of other weights is refused, where
    the loss itself would show nothing odd."""
    config, pairs = Config(beta=0.5, alpha=0.7, **FP32), with_reference(some_pairs(), str(tiny_dirs[0]), Config(**FP32))
    got = preference_loss(load_model(tiny_dirs[0]), pairs, config)
    assert got["dpo"].tolist() == pytest.approx([LN2] * 6, abs=1e-4)
    assert got["rewards/margins"].tolist() == pytest.approx([0] * 6, abs=1e-4)
    live = zip(pairs, got["logps/chosen"].tolist(), got["logps/rejected"].tolist())
    same = [replace(pair, ref_chosen=chosen, ref_rejected=rejected) for pair, chosen, rejected in live]
    assert preference_loss(load_model(tiny_dirs[0]), same, config)["rewards/accuracies"].tolist() == [0] * 6

    check_start(load_model(tiny_dirs[0]), pairs, config)
    assert "margins before the first step are 0.0000 nats" in capsys.readouterr().out
    off = [replace(pair, ref_chosen=pair.ref_chosen + (-1) ** i) for i, pair in enumerate(pairs)]  # 0 on average
    for model, compared in ((1, pairs), (0, [replace(pair, ref_chosen=math.nan) for pair in pairs]), (0, off)):
        for precision in ("fp32", "bf16"):
            with pytest.raises(InputError, match="reference"):  # NaN is not above any threshold
                check_start(load_model(tiny_dirs[model]), compared, replace(config, precision=precision))


@pytest.mark.parametrize("norm", ["response", "token"])
def test_preference_loss_is_equation_1_on_pairs_of_ids(norm, tiny_dirs):
    """From ids to the loss with a policy that is not the reference: every entry, from single sequences. The NLL is a
    mean over each winner's tokens, or divided by the mean length of all winners, and alpha weighs it, not the DPO
    term."""
    model, config = tiny_model(1), Config(beta=0.3, alpha=0.7, nll_norm=norm, **FP32)
    pairs = with_reference(some_pairs(), str(tiny_dirs[0]), config)
    mean = 5 if norm == "token" else 0
    got = {name: values.tolist() for name, values in preference_loss(model, pairs, config, mean).items()}
    for i, pair in enumerate(pairs):
        chosen, rejected = (slow_logps(model, pair.prompt, ids) for ids in (pair.chosen, pair.rejected))
        ratio_chosen, ratio_rejected = sum(chosen) - pair.ref_chosen, sum(rejected) - pair.ref_rejected
        dpo, nll = math.log(1 + math.exp(-0.3 * (ratio_chosen - ratio_rejected))), -sum(chosen) / len(chosen)
        weighed = nll if norm == "response" else -sum(chosen) / 5
        expected = {"loss": dpo + 0.7 * weighed, "dpo": dpo, "nll": nll, "logps/chosen": sum(chosen),
                    "logps/rejected": sum(rejected), "rewards/chosen": 0.3 * ratio_chosen,
                    "rewards/rejected": 0.3 * ratio_rejected, "rewards/margins": 0.3 * (ratio_chosen - ratio_rejected),
                    "rewards/accuracies": float(ratio_chosen > ratio_rejected),
                    "length/chosen": len(chosen), "length/rejected": len(rejected)}
        assert expected.keys() <= got.keys(), "more may be recorded"
        for name, value in expected.items():
            assert got[name][i] == pytest.approx(value, abs=2e-3), name


def test_the_nll_by_token_is_divided_by_the_mean_length_of_the_winners(tiny_dirs, tmp_path):
    """Of all pairs of the iteration, and not of the losers: the first step has the DPO loss of ln 2 and that NLL."""
    config = Config(nll_norm="token", lr=1e-9, batch_size=16, epochs=1, **FP32)
    pairs = with_reference(some_pairs(), str(tiny_dirs[0]), config)
    minimise(str(tiny_dirs[0]), pairs, pairs, {}, config, 0, tmp_path)
    [record] = read_lines(tmp_path / "train.jsonl")
    length = sum(len(pair.chosen) for pair in pairs) / len(pairs)
    assert record["loss"] == pytest.approx(LN2 - record["logps/chosen"] / length, abs=1e-4)


@pytest.mark.parametrize("norm", ["response", "token"])
def test_sft_on_chosen_is_the_nll_of_the_winners(norm, tmp_path):
    """The baseline's loss: each winner's mean over its tokens, or that of all tokens; lengths are those of the winners,
    not of the pairs that are only probed."""
    model, pairs = tiny_model(), some_pairs()
    save_model(model, tmp_path / "start")
    options = Config(method="sft_chosen", nll_norm=norm, lr=1e-9, batch_size=16, epochs=1, **FP32)
    pairs = with_reference(pairs, str(tmp_path / "start"), options)
    items = [Example(pair.id, pair.prompt, pair.chosen) for pair in pairs[:4]]
    minimise(str(tmp_path / "start"), items, pairs, {}, options, 0, tmp_path)
    [record] = read_lines(tmp_path / "train.jsonl")
    logps = [slow_logps(model, item.prompt, item.response) for item in items]
    tokens = sum(map(len, logps))
    nll = -sum(map(sum, logps)) / tokens if norm == "token" else sum(-sum(x) / len(x) for x in logps) / 4
    assert record["loss"] == pytest.approx(nll, abs=1e-4)
    assert record["logps/chosen"] == pytest.approx(sum(map(sum, logps)) / 4, abs=1e-3)


@pytest.mark.parametrize("budget", [1, 10_000])
def test_the_probe_is_the_mean_of_each_response(budget, tiny_dirs):
    """Chosen, rejected and gold for themselves: a curve of gold that shows the winners says that gold is learned. Gold
    that does not fit the model, or is not there, does not count: with its own micro-batches, since ranks whose parts
    differ in what they compute would wait for each other."""
    model, pairs = load_model(tiny_dirs[0]), some_pairs()
    golds = {pair.id: random_tokens(i, 3 + i).tolist() for i, pair in enumerate(pairs[1:])} | {"q5": [5] * 40}
    config = Config(micro_batch_tokens=budget, **FP32)

    def mean(responses: list[list[int]]) -> float:
        return sum(sum(slow_logps(model, p.prompt, ids)) for p, ids in zip(pairs, responses)) / len(pairs)

    expected = {"chosen": mean([p.chosen for p in pairs]), "rejected": mean([p.rejected for p in pairs]),
                "gold": mean([[], *(golds[p.id] for p in pairs[1:5])]) * len(pairs) / 4}
    assert probe(model, pairs, golds, config) == pytest.approx(expected, abs=1e-3)
    assert probe(model, pairs, {}, config) == pytest.approx({"chosen": expected["chosen"],
                                                             "rejected": expected["rejected"]}, abs=1e-3)


def test_the_probe_sees_few_pairs_from_all_over(tiny_dirs, tmp_path, monkeypatch):
    """The first pairs would be those of a few questions, and all of them would cost as much as the training."""
    probed = []
    monkeypatch.setattr(irpo, "probe", lambda model, pairs, *rest: probed.append([int(p.id) for p in pairs]) or {})
    config = Config(max_steps=1, **FP32)
    pairs = with_reference([Pair(str(i), [1], [5, 2], [6, 2]) for i in range(1000)], str(tiny_dirs[0]), config)
    minimise(str(tiny_dirs[0]), pairs, pairs, {}, config, 0, tmp_path)
    assert len(probed) == 2 and probed[0] == probed[1]  # before and after the step
    assert 32 <= len(set(probed[0])) == len(probed[0]) <= 64
    edges = [0, *sorted(probed[0]), 1000]
    assert max(b - a for a, b in zip(edges, edges[1:])) <= 100


# --- a run, from its files -------------------------------------------------------------------------

FLAGS = [*SMALL, "--seed", "3", "--iterations", "3", "--temperature", "0.9", "1.2", "--alpha", "0.5", "--beta", "0.2",
         "--precision", "fp32", "--save_every", "2"]
TEMPERATURES = {1: 0.9, 2: 1.2, 3: 1.2}  # the last one repeats


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    """A finished run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    call(irpo, *FLAGS, "--model", base, "--run_dir", folder)
    return folder


def model_of(run: Path, base: Path, t: int) -> Path:
    """Name the directory of M_t."""
    return run / f"iter{t}" / "model" if t else base


# file, iterations, iteration of its model relative to its own, split, questions, temperature, samples, seed
@pytest.mark.parametrize("name, iterations, back, split, questions, temperature, num_samples, seed", [
    ("eval_dev.jsonl", (0, 1, 2, 3), 0, "dev", 6, lambda t: 0.0, 1, lambda t: 3),
    ("eval_samples.jsonl", (0, 1, 2, 3), 0, "test", 6, lambda t: 0.0, 1, lambda t: 3),
    ("eval_sampled.jsonl", (0, 1, 2, 3), 0, "test", 6, lambda t: 1.0, 2, lambda t: 3),
    ("samples.jsonl", (1, 2, 3), -1, "train", 10, TEMPERATURES.get, 3, lambda t: derive_seed(3, t, "sample"))],
    ids=["dev", "test", "sampled", "train"])
def test_every_file_of_samples_is_made_as_it_must(name, iterations, back, split, questions, temperature, num_samples,
                                                  seed, run, base):
    """Which model answers which questions, at which temperature, with which seed: as the first line says, and as the
    same call gives again. A setting that the first line leaves out could change unnoticed when a run is resumed."""
    problems, tokenizer = data.load_problems("toy", split)[:questions], load_tokenizer(base)
    options = {field.name for field in fields(SampleOptions) if not field.metadata["free"]}
    for t in iterations:
        path, directory = run / f"iter{t}" / name, model_of(run, base, t + back)
        said, questions_answered = read_records(path, Answered)
        wanted = dict(weights=model_hash(directory), split=split, temperature=temperature(t), num_samples=num_samples,
                      seed=seed(t), max_new_tokens=24, task="toy", prompt="plain")
        assert {key: said[key] for key in wanted} == wanted and options < said.keys(), path

        assert [q.id for q in questions_answered] == [problem.id for problem in problems]
        assert [q.prompt for q in questions_answered] == [f"{problem.question}\n" for problem in problems]
        again = generate(load_sampler(directory, "fp32"), [q.prompt_ids for q in questions_answered],
                         num_samples=num_samples, max_new_tokens=24, temperature=temperature(t),
                         eos_ids=tokenizer.eos_ids, seed=seed(t))
        assert [[s.ids for s in q.samples] for q in questions_answered] == [[r.ids for r in group] for group in again]


def config_of(run: Path) -> Config:
    values = read_json(run / "config.json")
    return Config(**{field.name: values[field.name] for field in fields(Config)})


def golds_of(base: Path) -> dict[str, list[int]]:
    tokenizer, config = load_tokenizer(base), Config(**TOY)
    return {problem.id: config.gold_ids(tokenizer, problem) for problem in config.problems("train", 10)}


def slow_means(model, pairs: list[Pair], golds: dict[str, list[int]]) -> dict[str, float]:
    """Average the log-probability of the chosen, the rejected and the gold responses, from single sequences."""
    sides = {"chosen": [p.chosen for p in pairs], "rejected": [p.rejected for p in pairs],
             "gold": [golds[p.id] for p in pairs]}
    return {name: fmean(sum(slow_logps(model, pair.prompt, ids)) for pair, ids in zip(pairs, responses))
            for name, responses in sides.items()}


@pytest.mark.parametrize("t", [1, 2, 3])
def test_pairs_come_from_the_samples_and_their_reference_is_the_last_model(t, run, base):
    """Token in, token out: what is trained on was sampled or is gold, id by id."""
    folder, before, tokenizer = run / f"iter{t}", model_of(run, base, t - 1), load_tokenizer(base)
    assert settings(folder / "pairs.jsonl") == {"reference": model_hash(before)}
    pairs, model = read_records(folder / "pairs.jsonl", Pair)[1], load_model(before)
    made = preference_pairs(read_records(folder / "samples.jsonl", Answered)[1], golds_of(base), config_of(run))
    assert [(p.id, p.prompt, p.chosen, p.rejected) for p in pairs] == [
        (p.id, p.prompt, p.chosen, p.rejected) for p in made]
    for pair in pairs[::5]:
        live = [sum(slow_logps(model, pair.prompt, ids)) for ids in (pair.chosen, pair.rejected)]
        assert [pair.ref_chosen, pair.ref_rejected] == pytest.approx(live, abs=1e-2)
        assert pair.prompt.count(tokenizer.bos_id) == pair.chosen.count(tokenizer.eos_id) == 1


@pytest.mark.parametrize("t", [1, 2, 3])
def test_each_iteration_trains_the_last_model_on_its_pairs(t, run, base):
    """From the first record, the weights are M_{t-1}'s, and at the last they are those that were saved. Batches follow
    from the seed; learning rate, alpha and beta are the run's."""
    folder, golds = run / f"iter{t}", golds_of(base)
    pairs, steps = read_records(folder / "pairs.jsonl", Pair)[1], read_lines(folder / "train.jsonl")
    batches = [batch_at(step, pairs, 8, derive_seed(3, t)) for step in range(math.ceil(len(pairs) / 8))]
    assert [step["tokens"] for step in steps] == [sum(pair.tokens for pair in batch) for batch in batches]
    assert [step["lr"] for step in steps] == pytest.approx([1e-4 * (i + 1) for i in range(len(steps))])  # of 10 warm-up
    assert steps[0]["dpo"] == pytest.approx(LN2, abs=1e-3)
    for step, batch in zip(steps, batches):
        assert step["loss"] == pytest.approx(step["dpo"] + 0.5 * step["nll"], rel=1e-4)
        ahead = fmean(pair.ref_chosen - pair.ref_rejected for pair in batch)
        assert step["rewards/margins"] == pytest.approx(
            0.2 * (step["logps/chosen"] - step["logps/rejected"] - ahead), abs=1e-3)

    first, *_, last = read_lines(folder / "probe.jsonl")
    for record, step, iteration in ((first, 0, t - 1), (last, len(steps), t)):
        expected = slow_means(load_model(model_of(run, base, iteration)), pairs, golds)
        assert record == pytest.approx({"step": step, **expected}, abs=1e-2)
    assert model_hash(model_of(run, base, t)) != model_hash(model_of(run, base, t - 1))


def right_samples(path: Path) -> list[bool]:
    return [sample.right for question in read_records(path, Answered)[1] for sample in question.samples]


def test_results_are_those_of_the_files(run):
    """M0 to M3 on dev and test, training rows between, and numbers that the files bear out."""
    rows = read_json(run / "results.json")
    assert [(row["name"], row["iteration"], row["split"]) for row in rows] == [
        ("M0", 0, "dev"), ("M0", 0, "test"),
        *((f"M{t}", t, split) for t in (1, 2, 3) for split in ("train", "dev", "test"))]
    for row in rows:
        folder = run / f"iter{row['iteration']}"
        if row["split"] == "train":
            pairs = read_records(folder / "pairs.jsonl", Pair)[1]
            assert (row["pairs"], row["steps"]) == (len(pairs), math.ceil(len(pairs) / 8))
            assert row["tokens_trained"] == sum(pair.tokens for pair in pairs)
            solved = [{question.id for question in read_records(run / f"iter{t}" / "samples.jsonl", Answered)[1]
                       if any(sample.right and sample.finished for sample in question.samples)}
                      for t in range(1, row["iteration"] + 1)]
            assert row["newly_solved"] == len(solved[-1].difference(*solved[:-1]))
            continue
        right = right_samples(folder / ("eval_dev.jsonl" if row["split"] == "dev" else "eval_samples.jsonl"))
        assert row["n"] == len(right) == 6 and row["accuracy"] == pytest.approx(fmean(right))
        assert row["ci95"][0] - 1e-9 <= row["accuracy"] <= row["ci95"][1] + 1e-9
        assert "dev_was_trained_on" not in row
        if row["split"] == "test":
            right = right_samples(folder / "eval_sampled.jsonl")
            assert row["num_samples"] * 6 == len(right) == 12 and row["pass@1"] == pytest.approx(fmean(right))
    assert all(read_json(run / f"iter{t}" / "eval.json") == [
        row for row in rows if row["iteration"] == t and row["split"] != "train"] for t in range(4))


# --- rows of the paper's table ---------------------------------------------------------------------

def short_run(base, folder: Path, *flags) -> list[dict]:
    call(irpo, *SMALL, "--iterations", "1", "--precision", "fp32", *flags, "--model", base, "--run_dir", folder)
    return read_json(folder / "results.json")


@pytest.mark.parametrize("method", ["irpo", "sft_chosen", "sft_gold"])
def test_start_from_another_model(method, base, run, tmp_path):
    """IRPO from a fine-tuned model: pairs from M_0, reference and first weights from the other one; in iteration 2 all
    is M_1's. Fine-tuning on winners takes the pairs that IRPO would train on, and on gold every question once."""
    other, M1 = run / "iter3" / "model", tmp_path / "run" / "iter1" / "model"
    rows = short_run(base, tmp_path / "run", "--method", method, "--start_from", other, "--iterations", "2",
                     "--pairs_per_question", "8", "--max_pairs", "20", "--eval_samples", "0")
    assert "num_samples" not in rows[-1]
    for t, sampler, start in ((1, base, other), (2, M1, M1)):
        folder = tmp_path / "run" / f"iter{t}"
        assert settings(folder / "samples.jsonl")["weights"] == model_hash(sampler)
        assert settings(folder / "pairs.jsonl") == {"reference": model_hash(start)}
        pairs = read_records(folder / "pairs.jsonl", Pair)[1]
        expected = {"step": 0, **slow_means(load_model(start), pairs, golds_of(base))}
        assert read_lines(folder / "probe.jsonl")[0] == pytest.approx(expected, abs=1e-2)
        steps, items = read_lines(folder / "train.jsonl"), 10 if method == "sft_gold" else 20
        assert len(pairs) == 20 and len(steps) == math.ceil(items / 8)
        assert ("dpo" in steps[0]) == (method == "irpo") and steps[0]["loss"] > 0
        if method == "sft_chosen":
            batches = [batch_at(step, pairs, 8, derive_seed(0, t)) for step in range(3)]
            assert [step["tokens"] for step in steps] == [
                sum(len(pair.prompt + pair.chosen) for pair in batch) for batch in batches]


def test_pairs_are_limited_by_the_model_that_trains_on_them(base, run, tmp_path):
    """That of --start_from: pairs past its positions were trained on without a word."""
    files = [run / "iter1" / "samples.jsonl", *(run / "iter0" / f"eval_{name}.jsonl" for name in ("dev", "samples"))]
    longest = 24 + max(len(question.prompt_ids) for file in files for question in read_records(file, Answered)[1])
    other = narrower(base, tmp_path / "narrow", longest)
    [row] = [row for row in short_run(base, tmp_path / "run", "--start_from", other, "--eval_samples", "0")
             if row["split"] == "train"]
    pairs = read_records(tmp_path / "run" / "iter1" / "pairs.jsonl", Pair)[1]
    assert max(pair.longest for pair in pairs) <= longest and row["pairs_overlong"] > 0


def test_selection_trains_without_dev_questions_and_again_on_all(base, tmp_path, monkeypatch):
    """The paper's way: a trial run that has not seen the dev questions is measured on them. Were they in it, later
    steps would always look better. The first of the best numbers of steps counts, with the dev questions' pairs."""
    trials, measured, accuracy = [], [], {2: 0.3, 4: 0.8, 6: 0.5, 8: 0.8}
    fit, answer = irpo.fit, irpo.answer

    def fitted(model, items, *rest):
        trials.append([item.id for item in items])
        return fit(model, items, *rest)

    def answering(model, tokenizer, problems, config, **options):
        assert options.keys() == {"label"}  # greedy, one sample
        measured.append((model.lm_head.weight.double().sum().item(), [problem.id for problem in problems]))
        return answer(model, tokenizer, problems, config, **options)

    monkeypatch.setattr(irpo, "fit", fitted)
    monkeypatch.setattr(irpo, "answer", answering)
    monkeypatch.setattr(irpo, "summarize", lambda *args: {"accuracy": accuracy.get(2 * len(measured), 0.1)})
    rows = short_run(base, tmp_path / "run", "--select_every", "2", "--epochs", "2", "--lr_schedule", "constant")

    folder, dev = tmp_path / "run" / "iter1", {problem.id for problem in data.load_problems("toy", "dev")}
    trial, last = trials
    assert len(dev) == 8 and not dev & set(trial) and dev & set(last)
    assert trial == [id for id in last if id not in dev]
    assert last == [pair["id"] for pair in read_lines(folder / "pairs.jsonl")]
    curve = read_json(folder / "select.json")
    assert curve == [{"step": step, "accuracy": accuracy.get(step, 0.1)}
                     for step in range(2, 2 * math.ceil(len(trial) / 8) + 1, 2)]
    assert len({weights for weights, _ in measured}) == len(curve) == len(measured)  # of the model as it is then
    assert all(set(ids) == dev for _, ids in measured)
    steps = read_lines(folder / "train.jsonl")
    tokens = sum(row["tokens"] for row in [*steps, *read_lines(folder / "select" / "train.jsonl")])
    prompts = sum(len(question["prompt_ids"]) for question in read_lines(folder / "samples.jsonl"))
    scored = sum(1 + sum(len(pair[key]) for key in ("prompt", "chosen", "rejected"))
                 for pair in read_lines(folder / "pairs.jsonl"))
    forward = rows[2]["tokens_sampled"] + prompts + scored
    assert rows[2]["flops"] == flops(base, forward, tokens), "the trial run is paid for, too"
    assert len(steps) == rows[2]["steps"] == 4 and steps[0]["dpo"] == pytest.approx(LN2, abs=1e-3)
    assert [row.get("dev_was_trained_on", False) for row in rows] == [False, False, False, True, True]


def test_a_run_that_is_asked_for_more_iterations_is_unfinished_until_they_are_there(base, tmp_path, monkeypatch):
    """Its results of fewer iterations were reported as all of it."""
    short_run(base, tmp_path / "run")
    monkeypatch.setattr(irpo, "kept_pairs", lambda *args: {}["killed here"])
    with pytest.raises(KeyError):
        short_run(base, tmp_path / "run")
    assert (tmp_path / "run" / "results.json").exists(), "nothing is lost before there is more"
    monkeypatch.setattr(irpo, "kept_pairs", lambda *args: {}["killed here"] if args[-1] == 2 else kept_pairs(*args))
    with pytest.raises(KeyError):
        short_run(base, tmp_path / "run", "--iterations", "2")
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_run_that_finds_no_pairs_is_finished_with_fewer_iterations(base, tmp_path, monkeypatch):
    """That was the advice, but its directory then held "a run with another config", and hours of work with it."""
    made, pairs = irpo.preference_pairs, iter([True, False])
    monkeypatch.setattr(irpo, "preference_pairs", lambda *args: made(*args) if next(pairs, True) else [])
    with pytest.raises(InputError, match="iteration 2 has no pairs: every question has only right or only wrong"):
        short_run(base, tmp_path / "run", "--iterations", "2")
    before = model_hash(tmp_path / "run" / "iter1" / "model")
    assert [row["name"] for row in short_run(base, tmp_path / "run")] == ["M0"] * 2 + ["M1"] * 3
    assert model_hash(tmp_path / "run" / "iter1" / "model") == before


def test_selection_with_too_few_steps_is_refused_before_training(base, tmp_path, monkeypatch):
    """A measurement every 50 steps would never happen; and a schedule would differ in the second training run."""
    with pytest.raises(InputError, match="--select_every 50 is more than the"):
        short_run(base, tmp_path / "run", "--select_every", "50", "--lr_schedule", "constant")
    assert not (tmp_path / "run" / "iter1" / "select").exists()
    with pytest.raises(ValueError, match="--lr_schedule constant"):
        Config(select_every=2, lr_schedule="linear")
    flags = ["--select_every", "2", "--lr_schedule", "constant", "--max_pairs", "8"]  # in batches of 8
    with pytest.raises(InputError, match="--select_every 2 is more than the 1 steps"):
        short_run(base, tmp_path / "run", *flags)
    monkeypatch.setattr(irpo, "open_run", lambda *args, **inputs: 1 / 0)  # SFT on gold has ten solutions all the same
    with pytest.raises(ZeroDivisionError):
        short_run(base, tmp_path / "run", *flags, "--method", "sft_gold")


def test_defaults_are_the_papers():
    """Table of hyperparameters for GSM8K, section 3.1 and appendix."""
    paper = dict(iterations=4, num_samples=30, pairs_per_question=10, max_pairs=60000, alpha=1.0, beta=0.1,
                 temperature=(0.8, 0.8, 1.3, 1.3), lr=7e-7, batch_size=16, max_steps=5000, gold=True,
                 lr_schedule="constant", warmup_steps=0, weight_decay=0.0, method="irpo")
    assert {name: getattr(Config(), name) for name in paper} == paper
