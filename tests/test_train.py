"""Micro-batches change speed and nothing else; batches are a pure function of seed and step; losses reach the weights
as the optimizer's formulas say."""
import dataclasses
import itertools
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch._dynamo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import train
from checkpoint import load_config, load_model, save_model
from infra import InputError
from infra.progress import summary
from infra.run import read_jsonl
from losses import nll_loss
from model import Llama
from tiny import LLAMA3, random_tokens, slow_logps, tiny_model
from train import (Example, TrainOptions, autocast, batch_at, descend, fit, fit_sft, learning_rate, load_for_training,
                   micro_batches, new_optimizer, num_steps, packed_logps, response_logps, train_once)

FP32 = TrainOptions(lr=1.0, batch_size=7, clip_norm=1e9, precision="fp32")


def examples(count: int = 7, seed: int = 0) -> list[Example]:
    """Make ragged prompts and responses."""
    lengths = [(1 + 5 * i % 7, 1 + 3 * i % 11) for i in range(count)]
    return [Example(f"item-{i}", random_tokens(seed + i, p).tolist(), random_tokens(99 + i, r).tolist())
            for i, (p, r) in enumerate(lengths)]


def nll(model, batch) -> dict:
    logps, mask = response_logps(model, batch)
    return {"loss": nll_loss(logps, mask), "tokens_counted": mask.sum(-1).float()}


def weights_of(model) -> dict:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


@dataclass
class Item:
    id: str
    value: float = 1.0
    tokens: int = 1


def slope(model, batch: list[Item]) -> dict:
    """A loss whose gradient is an item's value, on one weight of a norm and on one of a matrix."""
    return {"loss": torch.stack([item.value * (model.model.norm.weight[0] + model.lm_head.weight[0, 0])
                                 for item in batch])}


def step_taken(folder: Path, items: list[Example], **options) -> tuple[dict, list[dict]]:
    """Weights before minus weights after training, and the records."""
    model = tiny_model()
    before = weights_of(model)
    records = fit(model, items, nll, dataclasses.replace(FP32, **options), 0, folder)
    return {name: before[name] - weight for name, weight in weights_of(model).items()}, records


# --- the step --------------------------------------------------------------------------------------

@pytest.fixture
def plain_steps(monkeypatch):
    """An optimizer whose step is -lr times the gradient, so that gradients can be read off weights."""
    monkeypatch.setattr(train, "new_optimizer", lambda model, options: torch.optim.SGD(model.parameters(), lr=1.0))


@pytest.mark.parametrize("budget", [1, 33, 90, 10_000])
def test_steps_and_records_are_means_over_the_batch_for_any_budget(plain_steps, tmp_path, budget):
    """A mean of micro-batch means weighs items of a small micro-batch more; a division that is left out or done twice
    scales the step. Compared with one backward pass per item, divided by 7. Recorded are all items, too."""
    items, reference = examples(), tiny_model()
    for item in items:
        (nll(reference, [item])["loss"].sum() / 7).backward()
    step, [record] = step_taken(tmp_path, items, micro_batch_tokens=budget)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(step[name], parameter.grad, rtol=1e-3, atol=2e-6)

    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in reference.parameters()))
    logps = [slow_logps(reference, e.prompt, e.response) for e in items]
    assert record == {"step": 0, "lr": 1.0, "tokens": sum(len(e.prompt) + len(e.response) for e in items),
                      "loss": pytest.approx(sum(-sum(x) / len(x) for x in logps) / 7, rel=1e-4),
                      "grad_norm": pytest.approx(norm, rel=1e-4),
                      "tokens_counted": pytest.approx(sum(map(len, logps)) / 7)}


def test_the_gradient_of_the_step_is_clipped(plain_steps, tmp_path):
    """Once per step to clip_norm, not per micro-batch, and not when it is smaller."""
    _, [record] = step_taken(tmp_path, examples())
    assert record["grad_norm"] > 0.05
    for clip in (0.01, 1e3):
        step, [clipped] = step_taken(tmp_path, examples(), clip_norm=clip, micro_batch_tokens=20)
        norm = math.sqrt(sum(float(change.square().sum()) for change in step.values()))
        assert norm == pytest.approx(min(clip, record["grad_norm"]), rel=1e-3)
        assert clipped["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-4)


def test_steps_of_adamw_by_hand(tmp_path):
    """Betas 0.9 and 0.95, decay of matrices only, the rate of the schedule, and a gradient that does not pile up: each
    step's is another. (The first step is the same for all betas.)"""
    model, items = tiny_model(), [Item(str(i), value) for i, value in enumerate([1.0, 3.0, -2.0, 0.5])]
    start = weights_of(model)
    options = TrainOptions(lr=0.1, lr_schedule="linear", warmup_steps=1, batch_size=1, clip_norm=1e9, weight_decay=0.5)
    records = fit(model, items, slope, options, 0, tmp_path)

    rates = [0.1, 0.1, 0.1 * 2 / 3, 0.1 / 3]
    assert [record["lr"] for record in records] == pytest.approx(rates)
    for name, index, decay in (("model.norm.weight", (0,), 0.0), ("lm_head.weight", (0, 0), 0.5)):
        weight, m, v = float(start[name][index]), 0.0, 0.0
        for step, rate in enumerate(rates):
            gradient = batch_at(step, items, 1, 0)[0].value
            m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient ** 2
            weight -= rate * decay * weight
            weight -= rate * m / (1 - 0.9 ** (step + 1)) / (math.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-8)
        assert float(model.state_dict()[name][index]) == pytest.approx(weight, abs=1e-5)


def test_every_parameter_is_optimized_once():
    """Two groups of parameters must together be all of them, with shared ones only once; decay is on matrices."""
    for tied in (False, True):
        model = tiny_model(tie_word_embeddings=tied, attention_bias=True)
        groups = new_optimizer(model, dataclasses.replace(FP32, weight_decay=0.5)).param_groups
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, model.parameters()))
        assert all(g["weight_decay"] == (0.5 if p.dim() == 2 else 0.0) for g in groups for p in g["params"])


def test_training_lowers_the_loss_in_both_precisions(tmp_path):
    """Weights stay in float32. The first losses differ a little, since bf16 was asked for, and only a little."""
    first = []
    for precision in ("fp32", "bf16"):
        model = tiny_model()
        options = TrainOptions(lr=1e-2, batch_size=7, epochs=12, precision=precision)
        records = fit(model, examples(), nll, options, 0, tmp_path)
        assert len(records) == 12 and records[-1]["loss"] < 0.5 * records[0]["loss"]
        assert all(weight.dtype == torch.float32 for weight in model.parameters())
        first.append(records[0]["loss"])
    assert 0 < abs(first[0] - first[1]) < 0.02 * first[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_or_is_skipped(tmp_path, bad):
    """Trained on, one NaN makes all weights NaN, and the table shows 0 % hours later. Its batch is named. Or else the
    step is skipped and counted, and weights are those of a run without it."""
    items, model = [Item(f"question-{i}") for i in range(12)], tiny_model()
    items[5].value = bad
    options = TrainOptions(lr=1e-3, batch_size=4, micro_batch_tokens=2, precision="fp32")
    with pytest.raises(InputError) as stop:
        fit(model, items, slope, options, 0, tmp_path)
    batches = [batch_at(step, items, 4, 0) for step in range(3)]
    [worst] = [step for step, batch in enumerate(batches) if items[5] in batch]
    message = str(stop.value)
    assert str(bad) in message and "--lr" in message and "--skip_nonfinite" in message
    assert all((f"'{item.id}'" in message) == (item in batches[worst]) for item in items)
    assert all(weight.isfinite().all() for weight in model.parameters())

    model, kept = tiny_model(), tiny_model()
    records = fit(model, items, slope, dataclasses.replace(options, skip_nonfinite=True), 0, tmp_path)
    assert [record["skipped"] for record in records] == [float(step == worst) for step in range(3)]
    fit(kept, [item for item in items if item not in batches[worst]], slope, options, 0, tmp_path)  # all slopes are 1
    assert all(map(torch.equal, model.parameters(), kept.parameters()))


@pytest.mark.parametrize("bad, after", [(4, 4), (3, 3), (2, 0)])
def test_a_run_whose_steps_are_mostly_skipped_is_no_training(tmp_path, bad, after):
    """With --skip_nonfinite 3 of 3 steps were skipped, and the model was saved as if trained. It stops as soon as more
    than half of all steps are lost, and not where half of them count."""
    items = [Item(str(i)) for i in range(4)]
    order = [item for step in range(4) for item in batch_at(step, items, 1, 0)]
    for item in order[:bad]:
        item.value = math.nan
    options, taken = TrainOptions(batch_size=1, precision="fp32", skip_nonfinite=True, save_every=1), []

    def train():
        fit(model, items, slope, options, 0, tmp_path, lambda step: taken.append(step) or {})
        return model

    model = tiny_model()
    save_model(model, tmp_path / "source")
    if after:
        with pytest.raises(InputError, match="3 of 4 steps were skipped.*no model is saved.*--lr"):
            train_once(tmp_path, str(tmp_path / "source"), train)
        assert taken == [1, 2, 3] and not (tmp_path / "model").exists()
    else:
        train_once(tmp_path, str(tmp_path / "source"), train)
        assert summary(read_jsonl(tmp_path / "train.jsonl"))["skipped"] == 2


@pytest.mark.parametrize("skip", [False, True])
def test_weights_that_are_not_finite_are_no_model(tmp_path, skip):
    """A damaged model to begin with, where a smaller --lr would not help; or the last step of a run, after which no
    loss would show it."""
    options = TrainOptions(lr=1e30, batch_size=1, precision="fp32", skip_nonfinite=skip)
    damaged, last = tiny_model(), tiny_model()
    with torch.no_grad():
        damaged.model.norm.weight[3] = math.nan
    for model, rate in ((damaged, 1e-3), (last, 3.4e38)):
        with pytest.raises(InputError, match="the weights .* are not finite.*No model is saved"):
            fit(model, examples(1), nll, dataclasses.replace(options, lr=rate, weight_decay=3.0), 0, tmp_path)


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path):
    """A finite loss may have a gradient that is not (sqrt at 0 here): its step makes every weight NaN, and the stop
    comes one step later and names the wrong batch, or, after the last step, never."""
    def root(model, batch):
        weight = model.model.norm.weight[0]
        return {"loss": torch.stack([torch.sqrt((weight - weight.detach()).abs()) for _ in batch])}

    model = tiny_model()
    with pytest.raises(InputError, match="only the gradient.*question-0"):
        fit(model, [Item("question-0")], root, TrainOptions(batch_size=1, precision="fp32"), 0, tmp_path)
    assert all(weight.isfinite().all() for weight in model.parameters())


# --- which items, when, how fast -------------------------------------------------------------------

@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5))
def test_every_epoch_covers_every_item_once(num_items, batch_size, seed):
    """A last batch that is dropped or filled up, or an order drawn per step, repeats and omits items."""
    steps = math.ceil(num_items / batch_size)
    for epoch in (0, 1):
        batches = [batch_at(epoch * steps + i, list(range(num_items)), batch_size, seed) for i in range(steps)]
        assert sorted(sum(batches, [])) == list(range(num_items))
        assert all(len(batch) == batch_size for batch in batches[:-1])


def test_batches_are_a_pure_function_of_seed_and_step():
    """Data order must survive a restart in the middle: no generator that remembers earlier steps."""
    steps, items = range(24), list(range(50))
    forward = [batch_at(s, items, 7, 3) for s in steps]
    torch.manual_seed(9)
    assert [batch_at(s, items, 7, 3) for s in reversed(steps)] == forward[::-1]
    assert forward[:8] != forward[8:16]  # every epoch its own order
    assert forward[:8] != [batch_at(s, items, 7, 4) for s in range(8)]
    assert forward[0] != items[:7]


@pytest.mark.parametrize("items, batch, epochs, cap, expected", [
    (10, 4, 1, 0, 3), (10, 4, 2, 0, 6), (10, 4, 2, 5, 5), (10, 4, 1, 99, 3), (1, 16, 3, 0, 3)])
def test_number_of_steps(tmp_path, items, batch, epochs, cap, expected):
    """max_steps is a cap, 0 is no cap, and a smaller last batch counts as a step. after_step is told how many steps
    are done, since checkpoint selection counts with it."""
    options, told = dataclasses.replace(FP32, lr=1e-6, batch_size=batch, epochs=epochs, max_steps=cap), []
    records = fit(tiny_model(), [Item(str(i)) for i in range(items)], slope, options, 0, tmp_path,
                  lambda step: told.append(step) or {"told": step})
    assert num_steps(items, options) == len(records) == expected
    assert told == [record["told"] for record in records] == list(range(1, expected + 1))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 100))
def test_micro_batches_keep_to_the_budget_and_are_few_and_the_largest_is_small(lengths, budget):
    """One per item would respect any budget and waste the machine; full ones and a rest waste memory. Here is every way
    to cut the sorted items: none takes fewer, or as many with a smaller largest. An item over the budget goes alone."""
    lengths.sort()
    ways = []
    for cuts in itertools.product((False, True), repeat=len(lengths) - 1):
        sizes = [1]
        for cut in cuts:
            sizes = [*sizes, 1] if cut else [*sizes[:-1], sizes[-1] + 1]
        ends = list(itertools.accumulate(sizes))
        padded = [size * lengths[end - 1] for size, end in zip(sizes, ends)]
        if all(size == 1 or tokens <= budget for size, tokens in zip(sizes, padded)):
            ways.append((len(sizes), max(padded)))

    items = [Item(str(i), tokens=length) for i, length in enumerate(lengths[::-1])]
    found = micro_batches(items, budget)
    assert sorted(sum(found, []), key=lambda item: int(item.id)) == items
    padded = [len(batch) * max(item.tokens for item in batch) for batch in found]
    assert all(len(batch) == 1 or tokens <= budget for batch, tokens in zip(found, padded))
    assert (len(found), max(padded)) == min(ways)


@pytest.mark.parametrize("device, items", [("cpu", 10), ("cuda", 40)])
def test_a_micro_batch_is_larger_on_a_gpu(device, items, monkeypatch):
    """Small passes waste its time."""
    monkeypatch.setattr("infra.steps.device", lambda: device)
    found = micro_batches([Item(str(i), tokens=100) for i in range(80)], 0)
    assert [len(part) for part in found] == [items] * (80 // items)


@pytest.mark.parametrize("schedule, middle, last", [
    ("constant", 2.0, 2.0), ("linear", 1.0, 2.0 / 20), ("cosine", 1.0, 1 - math.cos(math.pi / 20))])
def test_learning_rates(schedule, middle, last):
    """Warm-up that starts at 0 wastes a step, and one that never reaches the peak trains at less."""
    options = TrainOptions(lr=2.0, lr_schedule=schedule, warmup_steps=4)
    rates = [learning_rate(step, 24, options) for step in range(24)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert (rates[14], rates[23]) == pytest.approx((middle, last))
    assert all(a >= b for a, b in zip(rates[4:], rates[5:]))
    assert learning_rate(0, 1, TrainOptions(lr=2.0, lr_schedule=schedule)) == 2.0
    # the longer of the two warm-ups counts
    for share, steps in ((4 / 24, 2), (1 / 24, 4)):
        other = TrainOptions(lr=2.0, lr_schedule=schedule, warmup_share=share, warmup_steps=steps)
        assert [learning_rate(step, 24, other) for step in range(24)] == rates


# --- log-probabilities of responses ----------------------------------------------------------------

def test_response_masks_start_at_the_last_prompt_token_and_include_eos(monkeypatch):
    """One column late, the first token is never learned; one early, the last prompt token is; cut short at the end, the
    model never learns to stop. Tokens with the id of padding, or EOS in the middle, count like any other. The head
    sees nothing else: logits of prompt tokens cost as much as a response's."""
    monkeypatch.setattr("losses.ROWS", 1)
    model, seen = tiny_model(), []
    batch = [Example("", prompt, response) for prompt, response in (
        ([1, 5, 6], [7, 8, 2]), ([1], [9, 2]), ([1, 4, 4, 4, 4], [2]), ([1, 0, 0], [0, 2, 0]),
        ([1, 3], [4, 0, 0, 0, 2, 2, 5]))]
    handle = model.lm_head.register_forward_hook(lambda head, inputs, logits: seen.append(len(logits)))
    logps, mask = response_logps(model, batch)
    handle.remove()
    assert logps.shape == mask.shape and sum(seen) == sum(len(example.response) for example in batch)
    for example, row, columns in zip(batch, logps, mask):
        start = len(example.prompt) - 1
        assert columns.nonzero().flatten().tolist() == list(range(start, start + len(example.response)))
        assert row[columns].tolist() == pytest.approx(slow_logps(model, example.prompt, example.response), abs=1e-4)
        assert not row[~columns].any()


@pytest.mark.parametrize("shape", [{}, dict(num_key_value_heads=4), dict(head_dim=32, rope_scaling=LLAMA3)],
                         ids=["gqa", "mha", "llama3"])
@pytest.mark.parametrize("prompts, groups", [
    ([[1, 5, 6], [4], [1, 4, 4, 4]], [[[7, 8, 2], [9, 2]], [[3, 2], [3, 2]], [[2], [5, 6, 7, 8, 2]]]),
    ([[1, 5], [0, 0, 0]], [[[7, 8, 2], [9, 2], [2]], [[0, 0], [0], [0, 0, 0]]])], ids=["pairs", "triples"])
def test_packed_responses_have_the_log_probabilities_and_gradients_that_each_has_alone(prompts, groups, shape):
    """A prompt computed once for all its responses: prompts of one token, equal responses, ragged rows, the id of
    padding. Wrong positions, a response that sees another, or the repeated prompt token scored would each show."""
    packed, alone = tiny_model(sharpness=0.7, **shape), tiny_model(sharpness=0.7, **shape)
    packed.model.checkpoint_activations = len(groups[0]) == 2  # recomputed with the same masks and positions
    sums, lengths = packed_logps(packed, prompts, groups)
    assert lengths.tolist() == [[len(group[n]) for group in groups] for n in range(len(groups[0]))]
    for row, (prompt, responses) in enumerate(zip(prompts, groups)):
        assert sums[:, row].tolist() == pytest.approx([sum(slow_logps(alone, prompt, r)) for r in responses], abs=2e-4)

    sums.sum().backward()
    batch = [Example("", prompt, response) for prompt, group in zip(prompts, groups) for response in group]
    response_logps(alone, batch)[0].sum().backward()
    for one, other in zip(packed.parameters(), alone.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [{}, dict(num_key_value_heads=4)], ids=str)
def test_packed_responses_do_not_see_each_other_in_bfloat16(shape):
    """There attention has code of its own on a CPU. A response that sees the other is off by more than a nat."""
    model, prompts = tiny_model(sharpness=0.7, **shape), [[1, 5, 6], [4]]
    groups = [[[7, 8, 2], [9, 2]], [[3, 2], [5, 6, 7, 2]]]
    exact = packed_logps(model, prompts, groups)[0]
    with autocast("bf16"):
        rounded = packed_logps(model, prompts, groups)[0]
    assert 0 < (rounded - exact).abs().max() < 0.2


# --- how blocks are run ----------------------------------------------------------------------------

def gradients_of(folder: Path, **options) -> tuple[Tensor, dict, int]:
    """Losses and gradients of ragged examples, and how often a block was run."""
    runs = []
    model = load_for_training(folder, dataclasses.replace(FP32, **options))
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda *args: runs.append(1))
    loss = nll(model, examples())["loss"]
    loss.sum().backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, len(runs)


def test_checkpointed_activations_and_compiled_blocks_change_no_gradient(tmp_path):
    """Checkpointed activations: equal to the bit, the same operations once more. And the flags must do something."""
    save_model(tiny_model(sharpness=0.7), tmp_path / "m")
    loss, gradients, runs = gradients_of(tmp_path / "m")
    again, same, twice = gradients_of(tmp_path / "m", checkpoint_activations=True)
    assert (runs, twice) == (2, 4) and torch.equal(loss, again), "every block runs again, or no memory is saved"
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs g++ on the CPU")

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    got, close, _ = gradients_of(tmp_path / "m", compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    torch.testing.assert_close(got, loss, rtol=1e-5, atol=1e-6)
    for name in gradients:
        torch.testing.assert_close(close[name], gradients[name], rtol=1e-3, atol=1e-5)


# --- stages ----------------------------------------------------------------------------------------

def test_a_finished_model_is_never_trained_again(tmp_path):
    """And one that is missing is made; only then are the states removed. (Folders of that
    name that are not its own, anywhere below, once went with them.)"""
    source, folder = tmp_path / "source", tmp_path / "run"
    save_model(tiny_model(1), source)
    (source / "generation_config.json").write_text("{}")
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": [2, 9]}
    (source / "config.json").write_text(json.dumps(config))
    for state in ("state", "select/state", "mine/state"):
        (folder / state).mkdir(parents=True)
    (folder / "model").symlink_to(tmp_path / "gone")  # to a disk that was cleaned

    def train() -> Llama:
        assert (folder / "state").exists()
        return tiny_model(2)

    made = train_once(folder, str(source), train)
    assert made == str(folder / "model") and list(folder.rglob("state")) == [folder / "mine" / "state"]
    assert all(map(torch.equal, load_model(made).parameters(), tiny_model(2).parameters()))
    assert load_config(made) == load_config(source) and (folder / "model" / "generation_config.json").exists()
    assert json.loads((folder / "model" / "config.json").read_text())["eos_token_id"] == [2, 9]

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert train_once(folder, str(source), lambda: pytest.fail("trained again")) == made
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_a_summary_is_of_the_last_quarter_and_of_what_each_record_has():
    """A first batch without anything to train on, and so without a loss, once ended a run in a KeyError."""
    records = [{"step": i, "tokens": 10, "kl": float(i), **({"loss": float(i), "ratio_max": float(-i)} if i else {})}
               for i in range(8)]
    assert summary(records) == {"kl": 6.5, "loss": 6.5, "ratio_max": -6.0, "steps": 8, "skipped": 0,
                                "tokens_trained": 80}
    assert "loss" not in summary(records[:1]) and summary([*records[1:], records[0]])["loss"] == 7.0
    skipped = [record | {"skipped": float(record["step"] == 7)} for record in records]
    assert summary(skipped)["loss"] == 6.0 and summary(skipped)["skipped"] == 1


@pytest.mark.parametrize("norm", ["response", "token"])
@pytest.mark.parametrize("prompt_weight", [0.0, 0.1, 1.0])
def test_sft_weighs_responses_or_tokens_alike_and_prompts_as_told(tmp_path, prompt_weight, norm, capsys):
    """With "token" all response tokens of the data weigh 1 / mean length, those of short responses no more than those
    of long ones; with "response" 1 / their own length; prompt tokens weigh prompt_weight times that. The methods once
    differed in this, so that their SFT rows could not be compared. What is too long is left out, of the mean, too."""
    model, kept = tiny_model(max_position_embeddings=17), examples(5)
    batch = batch_at(0, kept, 3, 1)  # the mean is that of all examples, not of the batch
    mean_length, expected, nlls = sum(len(e.response) for e in kept) / 5, [], []
    for example in batch:
        response = slow_logps(model, example.prompt, example.response)
        prompt = slow_logps(model, example.prompt[:1], example.prompt[1:])
        length = mean_length if norm == "token" else len(response)
        expected.append(-(sum(response) + prompt_weight * sum(prompt)) / length)
        nlls.append(-sum(response) / len(response))

    options = dataclasses.replace(FP32, lr=1e-9, batch_size=3, max_steps=1, nll_norm=norm)
    long = Example("long", [1] * 10, [2] * 8)
    [record] = fit_sft(model, [*kept, long], options, 1, tmp_path, prompt_weight)
    assert "1 of 6 examples exceed the model's 17 positions" in capsys.readouterr().out
    assert record["loss"] == pytest.approx(sum(expected) / 3, rel=1e-4)
    assert record["nll"] == pytest.approx(sum(nlls) / 3, rel=1e-4)
    with pytest.raises(InputError, match="none of 1 .* 17 positions"):
        fit_sft(model, [long], FP32, 0, tmp_path)


def test_weights_that_the_optimizer_lacks_do_not_gather_gradients():
    """A fork that gave AdamW the head alone trained with steps that shrank: the other weights' gradients were never
    cleared, added up, and all gradients are clipped by their joint norm."""
    model = tiny_model()
    optimizer = torch.optim.AdamW([model.lm_head.weight], lr=1e-9)
    norms = [descend(model, optimizer, [examples(4)], nll, FP32)["grad_norm"][0] for _ in range(3)]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-3)
