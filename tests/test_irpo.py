"""Pairs, references and the loss of IRPO, and the config that every run is filed under."""
import dataclasses
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import irpo
from evaluate import Answered, Sample
from infra.experiment import derive_seed, open_run, parse_config
from irpo import (Config, Pair, add_reference, check_start, choose_steps, chosen_loss,
                  collect_pairs, gold_pairs, make_pairs, preference_loss, right_and_wrong)
from losses import dpo_nll_loss
from tiny import random_tokens, slow_logps, tiny_model

LN2 = math.log(2)
FP32 = dict(precision="fp32", model="somewhere", run_dir="somewhere")


def sample(ids: list[int], right: bool, finished: bool = True) -> Sample:
    return Sample(ids, finished, "text", "correct" if right else "wrong", "1" if right else "2")


def answered(id: str, *samples: Sample, prompt: list[int] | None = None) -> Answered:
    return Answered(id, "prompt", prompt or [1, 9], "1", list(samples))


def some_pairs(count: int = 6) -> list[Pair]:
    """Ragged pairs of random tokens."""
    return [Pair(f"q{i}", random_tokens(i, 1 + i % 4).tolist(),
                 random_tokens(50 + i, 2 + 3 * i % 7).tolist(),
                 random_tokens(90 + i, 1 + 5 * i % 8).tolist()) for i in range(count)]


# --- steps 2 and 3: pairs -------------------------------------------------------------------------

@given(st.lists(st.integers(), max_size=7), st.lists(st.integers(), max_size=7), st.integers(0, 20))
def test_pairs_walk_both_lists_and_start_over(right, wrong, num_pairs):
    """Footnote 2: both sets are walked at once, each starts over at its own end. A product of the
    two, or a zip that stops at the shorter one, is another data set."""
    expected, i, j = [], 0, 0
    while right and wrong and len(expected) < num_pairs:
        expected.append((right[i], wrong[j]))
        i = 0 if i + 1 == len(right) else i + 1
        j = 0 if j + 1 == len(wrong) else j + 1
    assert make_pairs(right, wrong, num_pairs) == expected


def test_pairs_by_hand():
    """Two right, three wrong, seven pairs: they meet again after six."""
    assert make_pairs("ab", "xyz", 7) == [("a", "x"), ("b", "y"), ("a", "z"), ("b", "x"),
                                          ("a", "y"), ("b", "z"), ("a", "x")]
    assert make_pairs([], "xyz", 4) == make_pairs("ab", [], 4) == []


def test_gold_is_among_the_winners_and_never_among_the_losers():
    """Gold keeps a hard question in the data; without it the question vanishes."""
    question = answered("q", sample([5, 2], False), sample([6, 2], False))
    assert right_and_wrong(question, [7, 7, 2], True) == ([[7, 7, 2]], [[5, 2], [6, 2]])
    assert right_and_wrong(question, None, True) == ([], [[5, 2], [6, 2]])
    easy = answered("q", sample([5, 2], True))
    assert right_and_wrong(easy, [7, 2], True) == ([[5, 2], [7, 2]], [])


def test_dedupe_keeps_the_first_of_each_in_order():
    """A common response would fill most pairs; a set would shuffle them from run to run."""
    question = answered("q", sample([9, 2], True), sample([4, 2], False), sample([3, 2], True),
                        sample([9, 2], True), sample([8, 2], False), sample([4, 2], False))
    assert right_and_wrong(question, [3, 2], True) == ([[9, 2], [3, 2]], [[4, 2], [8, 2]])
    assert right_and_wrong(question, [3, 2], False) == (
        [[9, 2], [3, 2], [9, 2], [3, 2]], [[4, 2], [8, 2], [4, 2]])


def test_a_response_without_eos_is_a_loser_whatever_it_says():
    """Cut at max_new_tokens behind a right answer: as a winner it teaches to talk on for ever."""
    question = answered("q", sample([5, 5], True, finished=False), sample([6, 2], True))
    assert right_and_wrong(question, None, True) == ([[6, 2]], [[5, 5]])


def test_unparsed_and_timed_out_responses_are_losers():
    """Left out, the model gets no signal for the answer format."""
    samples = [dataclasses.replace(sample([i, 2], False), verdict=verdict)
               for i, verdict in enumerate(["wrong", "unparsed", "timeout", "correct"], 5)]
    right, wrong = right_and_wrong(answered("q", *samples), None, True)
    assert (right, wrong) == ([[8, 2]], [[5, 2], [6, 2], [7, 2]])


def questions_for_pairs() -> list[Answered]:
    """One mixed, one all right, one all wrong, one mixed with a very long loser; four samples
    each."""
    return [answered("mixed", sample([5, 2], True), sample([6, 2], False), sample([7, 2], False),
                     sample([5, 2], True)),
            answered("easy", *[sample([i, 2], True) for i in range(5, 9)]),
            answered("hard", *[sample([i, 2], False) for i in range(5, 9)]),
            answered("long", sample([8, 2], True), sample([5] * 40 + [2], False),
                     sample([9, 2], False), sample([3, 3], True, finished=False))]


GOLDS = {name: [10, 11, 2] for name in ("mixed", "easy", "hard", "long")}


def test_collected_pairs_and_coverage():
    """What is counted must be what was done: made = kept + over-long + capped."""
    config = Config(num_samples=4, pairs_per_question=3, **FP32)
    pairs, coverage = collect_pairs(questions_for_pairs(), GOLDS, config, 1, max_tokens=20)
    by_id = {name: [(p.chosen, p.rejected) for p in pairs if p.id == name] for name in GOLDS}
    gold = [10, 11, 2]
    assert by_id["mixed"] == [([5, 2], [6, 2]), (gold, [7, 2]), ([5, 2], [6, 2])]
    assert by_id["easy"] == []
    assert by_id["hard"] == [(gold, [5, 2]), (gold, [6, 2]), (gold, [7, 2])]
    assert by_id["long"] == [(gold, [9, 2]), ([8, 2], [3, 3])]  # the over-long pair is gone, whole
    assert all(pair.prompt == [1, 9] for pair in pairs)
    expected = {"questions": 4, "all_right": 0.25, "all_wrong": 0.25, "mixed": 0.5,
                "sample_accuracy": 7 / 16, "unfinished": 1, "pairs_made": 9, "pairs_overlong": 1,
                "pairs_capped": 0, "pairs": 8}
    assert {name: coverage[name] for name in expected} == expected


def test_without_gold_only_mixed_questions_give_pairs():
    """--no-gold, as for ARC."""
    config = Config(num_samples=4, pairs_per_question=3, gold=False, **FP32)
    pairs, _ = collect_pairs(questions_for_pairs(), GOLDS, config, 1, max_tokens=100)
    assert [pair.id for pair in pairs] == ["mixed"] * 3 + ["long"] * 3
    assert not any(pair.chosen == [10, 11, 2] for pair in pairs)


def test_a_pair_fits_if_both_of_its_sequences_do():
    """The limit is the model's: exactly max_tokens fits, for the longer of the two."""
    question = answered("q", sample([5, 5, 5, 2], True), sample([6, 2], False))
    config = Config(num_samples=2, pairs_per_question=1, gold=False, **FP32)
    assert len(collect_pairs([question], {"q": []}, config, 1, max_tokens=6)[0]) == 1
    with pytest.raises(SystemExit, match="1 pairs exceed 5 tokens"):
        collect_pairs([question], {"q": []}, config, 1, max_tokens=5)


def test_the_cap_is_a_random_subsample_given_by_seed_and_iteration():
    """The first so many pairs would be those of the first questions; a draw from a shared generator
    would change after a restart."""
    questions = [answered(f"q{i}", sample([5, 2], True), sample([6, 2], False)) for i in range(200)]

    def capped(**changes):
        iteration = changes.pop("iteration", 1)
        config = Config(num_samples=2, pairs_per_question=2, gold=False, max_pairs=50, **FP32,
                        **changes)
        golds = {question.id: [] for question in questions}
        pairs, coverage = collect_pairs(questions, golds, config, iteration, max_tokens=99)
        return [pair.id for pair in pairs], coverage

    ids, coverage = capped()
    assert len(ids) == 50 and coverage["pairs"] == 50
    assert coverage["pairs_made"] == 400 and coverage["pairs_capped"] == 350
    assert max(ids.count(id) for id in ids) <= 2  # without replacement
    assert sum(int(id[1:]) >= 100 for id in ids) > 5  # from all over; 5 or fewer has p < 1e-8
    random.seed(0)
    assert capped()[0] == ids
    assert capped(seed=1)[0] != ids
    assert capped(iteration=2)[0] != ids


def test_no_pairs_is_an_error_with_numbers_and_remedy():
    """Training on nothing would end in a model equal to the last one, and a table that says so."""
    questions = [answered("a", sample([5, 2], True)), answered("b", sample([5, 2], True)),
                 answered("c", sample([6, 2], False)), answered("d", sample([7, 2], True))]
    config = Config(num_samples=1, gold=False, **FP32)
    with pytest.raises(SystemExit) as stop:
        collect_pairs(questions, dict.fromkeys("abcd"), config, 3, max_tokens=99)
    message = str(stop.value)
    assert "iteration 3" in message and "4 questions" in message
    assert "75%" in message and "25%" in message
    assert "--temperature" in message and "--num_samples" in message


# --- step 4: the reference ------------------------------------------------------------------------

@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_stored_reference_is_what_the_model_gives_each_response(budget):
    """Micro-batches are sorted by length: numbers stored in that order belong to other pairs. Sums,
    not means, over response tokens only."""
    model, pairs = tiny_model(), some_pairs()
    config = Config(micro_batch_tokens=budget, **FP32)
    stored = add_reference(model, pairs, config)
    for pair, before in zip(stored, pairs):
        assert (pair.id, pair.prompt, pair.chosen, pair.rejected) == dataclasses.astuple(before)[:4]
        live = [sum(slow_logps(model, pair.prompt, ids)) for ids in (pair.chosen, pair.rejected)]
        assert [pair.ref_chosen, pair.ref_rejected] == pytest.approx(live, abs=1e-3)


def test_the_first_dpo_loss_is_ln_2():
    """Policy = reference: loss ln 2, all rewards and margins 0, and nobody ahead (no ties
    counted)."""
    model = tiny_model()
    config = Config(beta=0.5, alpha=0.7, **FP32)
    got = preference_loss(model, add_reference(model, some_pairs(), config), config)
    assert got["dpo"].tolist() == pytest.approx([LN2] * 6, abs=1e-4)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert got[name].tolist() == pytest.approx([0] * 6, abs=1e-4)
    torch.testing.assert_close(got["loss"], got["dpo"] + 0.7 * got["nll"])
    live = zip(some_pairs(), got["logps/chosen"].tolist(), got["logps/rejected"].tolist())
    same = [dataclasses.replace(pair, ref_chosen=chosen, ref_rejected=rejected)
            for pair, chosen, rejected in live]
    assert preference_loss(model, same, config)["rewards/accuracies"].tolist() == [0] * 6


def test_a_reference_of_other_weights_is_refused(capsys):
    """Stale numbers on disk train against a model that was never there; the loss shows nothing
    odd."""
    config = Config(**FP32)
    pairs = add_reference(tiny_model(), some_pairs(), config)
    check_start(tiny_model(), pairs, config)
    assert "0.6931" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="reference"):
        check_start(tiny_model(seed=1), pairs, config)


# --- step 5: the loss -----------------------------------------------------------------------------

def test_preference_loss_is_equation_1_on_pairs_of_ids():
    """From ids to loss with a policy that is not the reference, every entry from single
    sequences."""
    model, config = tiny_model(1), Config(beta=0.3, alpha=0.7, **FP32)
    pairs = add_reference(tiny_model(0), some_pairs(), config)
    got = {name: values.tolist() for name, values in preference_loss(model, pairs, config).items()}
    for i, pair in enumerate(pairs):
        chosen = slow_logps(model, pair.prompt, pair.chosen)
        rejected = slow_logps(model, pair.prompt, pair.rejected)
        ratio_chosen = sum(chosen) - pair.ref_chosen
        ratio_rejected = sum(rejected) - pair.ref_rejected
        dpo = math.log(1 + math.exp(-0.3 * (ratio_chosen - ratio_rejected)))
        nll = -sum(chosen) / len(chosen)
        expected = {"loss": dpo + 0.7 * nll, "dpo": dpo, "nll": nll, "logps/chosen": sum(chosen),
                    "logps/rejected": sum(rejected), "rewards/chosen": 0.3 * ratio_chosen,
                    "rewards/rejected": 0.3 * ratio_rejected,
                    "rewards/margins": 0.3 * (ratio_chosen - ratio_rejected),
                    "rewards/accuracies": float(ratio_chosen > ratio_rejected),
                    "length/chosen": len(chosen), "length/rejected": len(rejected)}
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            assert got[name][i] == pytest.approx(value, abs=2e-3), name


def moved(alpha: float = 0.0, beta: float = 0.1, sft: bool = False) -> tuple[float, float]:
    """Change of the chosen and rejected log-probability per unit of one small gradient step."""
    model = tiny_model()
    config = Config(alpha=alpha, beta=beta, **FP32)
    [pair] = add_reference(model, [Pair("q", [1, 5], [6, 7, 8, 2], [9, 10, 2])], config)
    measured = chosen_loss(model, [pair]) if sft else preference_loss(model, [pair], config)
    measured["loss"].sum().backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 1e-4 * weight.grad
    after = [sum(slow_logps(model, pair.prompt, ids)) for ids in (pair.chosen, pair.rejected)]
    return (after[0] - pair.ref_chosen) / 1e-4, (after[1] - pair.ref_rejected) / 1e-4


def test_a_step_moves_chosen_up_and_rejected_down():
    """Swapped pairs or a lost sign train towards the wrong answers with a falling loss. Alpha lifts
    the chosen response further, beta pulls the two apart faster."""
    chosen, rejected = moved()
    assert chosen > 0 > rejected
    assert moved(alpha=1.0)[0] > chosen + 1
    assert moved(beta=0.5)[0] - moved(beta=0.5)[1] > 3 * (chosen - rejected)
    assert moved(sft=True)[0] > 0
    assert moved(sft=True) != pytest.approx(moved(alpha=1.0), rel=0.01)


def test_sft_on_chosen_is_the_nll_of_the_winners():
    """The baseline's loss: no reference, no rejected response, each winner's mean over its
    tokens."""
    model, pairs = tiny_model(), some_pairs()
    got = chosen_loss(model, pairs)
    for pair, loss, total in zip(pairs, got["loss"].tolist(), got["logps/chosen"].tolist()):
        logps = slow_logps(model, pair.prompt, pair.chosen)
        assert loss == pytest.approx(-sum(logps) / len(logps), abs=1e-4)
        assert total == pytest.approx(sum(logps), abs=1e-3)


def test_sft_on_gold_sees_each_question_once_with_its_gold():
    """The paper's baseline is gold solutions of all questions, those without a pair too, not K
    copies of some; and one that does not fit is dropped, not cut."""
    questions = [answered("a", sample([5, 2], True), sample([6, 2], True)),
                 answered("b", sample([6, 2], False)), answered("c", sample([7, 2], True))]
    golds = {"a": [10, 2], "b": [11, 12, 2], "c": [12] * 9}
    pairs = gold_pairs(questions, golds, max_tokens=5)
    assert [(pair.id, pair.prompt, pair.chosen) for pair in pairs] == [
        ("a", [1, 9], [10, 2]), ("b", [1, 9], [11, 12, 2])]


def test_lengths_that_budgets_count():
    """Micro-batches are cut by these: a pair's row, whose prompt is there once, or the winner's
    sequence. What must fit into the model is the longer sequence, not the row."""
    pair = Pair("q", [1, 5, 6], [7, 8, 9, 2], [7, 2])
    assert pair.tokens == 10 and pair.chosen_tokens == 7 and pair.longest == 7
    assert Pair("q", [1, 5, 6], [7, 2], [7, 8, 9, 2]).longest == 7


# One batch of two pairs, at the start of training: a chosen response of 50 tokens at 1.0 nat each
# and one of 400 tokens at 0.2. Each variant from its own formula.
def per_pair_mean(nats: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([sequence.sum() / len(sequence) for sequence in nats]).mean()


def token_mean(nats: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(nats).sum() / sum(len(sequence) for sequence in nats)


VARIANTS = {
    "paper v3": lambda nats, dpo, alpha: dpo + alpha * per_pair_mean(nats),
    "paper v1": lambda nats, dpo, alpha: alpha * dpo + per_pair_mean(nats),
    "token mean": lambda nats, dpo, alpha: dpo + alpha * token_mean(nats),  # TRL, fairseq2, RLHFlow
}
# loss at alpha 1, loss at alpha 0.5, share of the short and of the long pair in the NLL's gradient
TABLE = {"paper v3": (1.293, 0.993, 0.500, 0.500), "paper v1": (1.293, 0.947, 0.500, 0.500),
         "token mean": (0.982, 0.838, 0.111, 0.889)}


def nll_row(loss) -> tuple[float, float, float, float]:
    """A row of the table for loss(token nats of each pair, DPO loss, alpha)."""
    nats = [torch.full((50,), 1.0).requires_grad_(), torch.full((400,), 0.2).requires_grad_()]
    values = [loss(nats, torch.tensor(LN2), alpha) for alpha in (1.0, 0.5)]
    gradients = [g.sum() for g in torch.autograd.grad(values[0], nats)]
    return *(v.item() for v in values), *((g / sum(gradients)).item() for g in gradients)


def test_where_variants_of_the_loss_differ():
    """A token mean over the batch weighs the long solution eight times the short one, and alpha on
    the DPO term is another trade-off wherever it is not 1: three losses that all go by this paper's
    name. Ours is the last version's."""
    for name, variant in VARIANTS.items():
        assert nll_row(variant) == pytest.approx(TABLE[name], abs=5e-4), name

    def ours(nats, dpo, alpha):  # policy = reference, so that its DPO term is ln 2
        chosen = torch.stack([-sequence.sum() for sequence in nats])
        zeros, lengths = torch.zeros(2), torch.tensor([50, 400])
        return dpo_nll_loss(chosen, zeros, chosen.detach(), zeros, lengths, 0.0, alpha).mean()

    assert nll_row(ours) == pytest.approx(nll_row(VARIANTS["paper v3"]), abs=1e-5)
    assert nll_row(ours) != pytest.approx(nll_row(VARIANTS["paper v1"]), abs=1e-2)
    nats = [torch.full((50,), 1.0), torch.full((400,), 0.2)]
    assert float(per_pair_mean(nats)) == pytest.approx(0.600, abs=5e-4)
    assert float(token_mean(nats)) == pytest.approx(0.289, abs=5e-4)


# --- the loop's decisions -------------------------------------------------------------------------

def test_temperature_of_each_iteration(monkeypatch, tmp_path):
    """The list is per iteration from 1, its last entry repeats; every iteration draws anew."""
    asked = []
    monkeypatch.setattr(irpo, "load_sampler", lambda directory, ranks: tiny_model())
    monkeypatch.setattr(irpo, "answer_to", lambda *args, **options: asked.append(options) or [])
    for t in range(1, 7):
        irpo.sample_step(Config(**FP32), tmp_path / f"iter{t}", "", None, [], t)
    assert [options["temperature"] for options in asked] == [0.8, 0.8, 1.3, 1.3, 1.3, 1.3]
    assert len({options["seed"] for options in asked}) == 6
    assert {options["num_samples"] for options in asked} == {30}


def test_selection_trains_without_dev_questions_and_takes_the_best_step(monkeypatch, tmp_path):
    """The paper's way: a training that has not seen the held-out examples is measured on them. Were
    they in it, later steps would always look better."""
    accuracy = {2: 0.3, 4: 0.8, 6: 0.5, 8: 0.8}
    seen, now = [], {}

    def optimize(config, model, items, pairs, golds, iteration, label, folder, after_step):
        seen.extend(item.id for item in items)
        records = []
        for now["step"] in range(1, 10):
            records.append({"step": now["step"] - 1, **after_step(now["step"])})
        return records, []

    def answer(model, tokenizer, problems, config, **options):
        assert options["temperature"] == 0
        right = round(10 * accuracy[now["step"]])
        return [answered(f"d{i}-left", sample([5, 2], i < right)) for i in range(10)]

    monkeypatch.setattr(irpo, "load_trained", lambda *args: None)
    monkeypatch.setattr(irpo, "sampler_of", lambda *args: None)
    monkeypatch.setattr(irpo, "optimize", optimize)
    monkeypatch.setattr(irpo, "answer", answer)
    dev = [irpo.data.Problem(id, "", "", "") for id in ("q1", "q4")]
    pairs, config = some_pairs(), Config(select_every=2, **FP32)
    arguments = (config, "model", pairs, pairs, {}, dev, None, tmp_path, 1)
    assert choose_steps(*arguments) == 4
    assert seen == ["q0", "q2", "q3", "q5"]
    assert choose_steps(*arguments) == 4 and len(seen) == 4  # read again, not trained again


def test_selection_with_too_few_steps_is_refused_before_training(tmp_path):
    """Four items are two steps at most: a measurement every three would never happen."""
    config = Config(select_every=3, **FP32)
    with pytest.raises(SystemExit, match="--select_every 3"):
        choose_steps(config, "nowhere", some_pairs(4), [], {}, [], None, tmp_path, 1)


# --- config ---------------------------------------------------------------------------------------

def parsed(*argv: str) -> Config:
    return parse_config(Config, irpo.PRESETS, "", ["--model", "somewhere", *argv])


def test_defaults_are_the_papers():
    """Table of hyperparameters for GSM8K, section 3.1 and appendix."""
    config = parsed()
    paper = dict(iterations=4, num_samples=30, pairs_per_question=10, max_pairs=60000, alpha=1.0,
                 beta=0.1, temperature=(0.8, 0.8, 1.3, 1.3), lr=7e-7, batch_size=16,
                 max_steps=5000, gold=True, lr_schedule="constant", warmup_steps=0,
                 weight_decay=0.0, method="irpo")
    assert {name: getattr(config, name) for name in paper} == paper


def test_flags_win_over_presets_and_presets_over_defaults():
    """In whichever order they are given."""
    assert parsed("--preset", "toy").lr == irpo.TOY["lr"] != parsed().lr
    for argv in (["--preset", "toy", "--lr", "0.5"], ["--lr", "0.5", "--preset", "toy"]):
        config = parsed(*argv)
        assert config.lr == 0.5 and config.num_samples == irpo.TOY["num_samples"]
    asked_for = parsed("--preset", "toy", "--max_steps", "5000")  # the default, but asked for
    assert asked_for.max_steps == 5000


def test_kinds_of_flags():
    """Tuples take several values, switches their negation, zero and empty are values like
    others."""
    config = parsed("--temperature", "0.7", "1.1", "--no-gold", "--dedupe", "--max_pairs", "0",
                    "--alpha", "0")
    assert config.temperature == (0.7, 1.1)
    assert (config.gold, config.dedupe, config.max_pairs, config.alpha) == (False, True, 0, 0.0)


@pytest.mark.parametrize("argv, named", [
    (["--alhpa", "0"], "--alhpa"), (["--alph", "0"], "--alph"),
    (["--num_sample", "3"], "--num_sample"),
    (["--preset", "huge"], "huge"), (["--alpha", "much"], "much"), (["--pre", "toy"], "--pre"),
    (["--iterations", "2.5"], "2.5"), (["--method", "ppo"], "--method ppo"), (["stray"], "stray"),
    (["--iterations", "0"], "--iterations 0"), (["--prompt", "none"], "--prompt none"),
    (["--num_samples", "-1"], "--num_samples -1"), (["--beta", "0"], "--beta 0"),
    (["--lr", "0"], "--lr 0"), (["--temperature", "0.8", "-1"], "--temperature"),
    (["--model", ""], "--model"), (["--start_from", "nowhere"], "--start_from nowhere"),
    (["--answer_format", "loud"], "--answer_format loud"),
    (["--lr_schedule", "linear"], "--select_every 500")])
def test_unknown_abbreviated_or_impossible_flags_fail(argv, named, capsys):
    """A typo that is dropped runs the default for a day under the wrong name."""
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_a_run_directory_holds_one_config(tmp_path):
    """Files of two configs in one directory make a table of neither; the difference must be
    shown."""
    config = parsed("--alpha", "0.5")
    assert open_run(config, tmp_path / "run") == open_run(config, tmp_path / "run")
    other = dataclasses.replace(config, alpha=2.0, temperature=(1.0,))
    with pytest.raises(SystemExit) as stop:
        open_run(other, tmp_path / "run")
    message = str(stop.value)
    for part in (str(tmp_path / "run"), "alpha: 0.5 there, 2.0 now", "temperature", "--run_dir"):
        assert part in message
    assert "beta" not in message
    open_run(config, tmp_path / "run")  # the first config is still what it holds
    open_run(dataclasses.replace(config, batch_rows=7), tmp_path / "run")  # speed and memory only


def test_a_run_directory_holds_one_base_model(tmp_path):
    """The same path, but the weights under it were made anew: the old samples are not theirs."""
    open_run(parsed(), tmp_path / "run", weights="a1b2")
    with pytest.raises(SystemExit, match="weights: 'a1b2' there, 'c3d4' now"):
        open_run(parsed(), tmp_path / "run", weights="c3d4")


def test_run_directories_are_named_by_what_was_asked():
    """Two different runs under one name would refuse each other, and a name must suit a shell."""
    commands = ["", "--preset smoke", "--alpha 0", "--seed 3", "--temperature 0.8 1.3"]
    names = [parsed(*command.split()).run_dir for command in commands]
    assert len(set(names)) == 5
    for name in names:
        assert name.startswith("runs/") and not set(name) & set(" ()',")


def test_a_run_keeps_its_config_command_and_source(tmp_path):
    """What is recorded is what ran."""
    run = open_run(parsed("--alpha", "0.25"), tmp_path / "run")
    assert '"alpha": 0.25' in (run / "config.json").read_text()
    assert "torch" in (run / "command.txt").read_text()
    for name in ("irpo.py", "losses.py", "data/toy.py", "data/__init__.py"):
        source = Path(irpo.__file__).parent / name
        assert (run / "source" / name).read_text() == source.read_text()


def test_seeds_are_a_function_of_names():
    """Python's own hash of a string changes from process to process: hence the number written
    out."""
    seeds = {derive_seed(s, t, *purpose) for s in range(5) for t in range(5)
             for purpose in ([], ["sample"], ["dev"])}
    assert len(seeds) == 75
    assert all(0 <= seed < 2 ** 63 for seed in seeds)
    assert derive_seed(0, 1, "sample") == 66096330860555056
