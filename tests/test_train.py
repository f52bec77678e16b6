"""Micro-batches change speed and nothing else; batches are a pure function of seed and step."""
import dataclasses
import itertools
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch._dynamo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import train
from checkpoint import save_model
from infra.progress import summary
from losses import nll_loss
from tiny import random_tokens, slow_logps, tiny_model
from train import (Example, TrainOptions, batch_at, learning_rate, load_for_training, micro_batches, new_optimizer,
                   num_steps, packed_logps, response_logps, train_once)

FP32 = TrainOptions(lr=1.0, batch_size=7, clip_norm=1e9, precision="fp32")


def examples(count: int = 7, seed: int = 0) -> list[Example]:
    """Ragged prompts and responses."""
    lengths = [(1 + 5 * i % 7, 1 + 3 * i % 11) for i in range(count)]
    return [Example(f"item-{i}", random_tokens(seed + i, p).tolist(),
                    random_tokens(99 + i, r).tolist())
            for i, (p, r) in enumerate(lengths)]


def nll(model, batch) -> dict:
    logps, mask = response_logps(model, batch)
    return {"loss": nll_loss(logps, mask), "tokens_counted": mask.sum(-1).float()}


def fit(model, items, loss, options: TrainOptions, seed: int = 0, **more) -> list[dict]:
    """train.fit in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return train.fit(model, items, loss, options, seed, Path(folder), **more)


def weights_of(model) -> dict:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


@pytest.fixture
def plain_steps(monkeypatch):
    """An optimizer whose step is -lr times the gradient, so that gradients can be read off
    weights."""
    monkeypatch.setattr(train, "new_optimizer",
                        lambda model, options: torch.optim.SGD(model.parameters(), lr=1.0))


def step_taken(options: TrainOptions, items: list[Example]) -> tuple[dict, list[dict]]:
    """Weights before minus weights after one step, and the records."""
    model = tiny_model()
    before = weights_of(model)
    records = fit(model, items, nll, options)
    return {name: before[name] - weight for name, weight in weights_of(model).items()}, records


# --- the step ------------------------------------------------------------------------------------

@pytest.mark.parametrize("budget", [1, 20, 40, 90, 10_000])
def test_gradient_is_the_mean_over_the_batch_for_any_budget(plain_steps, budget):
    """A mean of micro-batch means weighs items of a small micro-batch more; a division that is left
    out or done twice scales the step. Compared with one backward pass per item, divided by 7."""
    items, reference = examples(), tiny_model()
    for item in items:
        (nll(reference, [item])["loss"].sum() / 7).backward()
    step, [record] = step_taken(dataclasses.replace(FP32, micro_batch_tokens=budget), items)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(step[name], parameter.grad, rtol=1e-3, atol=2e-6)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in reference.parameters()))
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("budget", [1, 33, 10_000])
def test_records_are_means_over_the_batch_for_any_budget(plain_steps, budget):
    """Logged: all items of the batch, not those of the last micro-batch; and under the names
    given."""
    items, model = examples(), tiny_model()
    _, [record] = step_taken(dataclasses.replace(FP32, micro_batch_tokens=budget), items)
    expected = sum(-sum(logps) / len(logps) for logps in
                   (slow_logps(model, e.prompt, e.response) for e in items)) / 7
    assert record["loss"] == pytest.approx(expected, rel=1e-4)
    assert record["tokens_counted"] == pytest.approx(sum(len(e.response) for e in items) / 7)
    assert record["tokens"] == sum(len(e.prompt) + len(e.response) for e in items)
    assert record["lr"] == 1.0 and record["step"] == 0


def test_the_whole_gradient_is_clipped(plain_steps):
    """Clipped once per step to clip_norm, not per micro-batch, and not when it is smaller."""
    items = examples()
    free, [record] = step_taken(FP32, items)
    assert record["grad_norm"] > 0.05
    for clip in (0.01, 1e3):
        options = dataclasses.replace(FP32, clip_norm=clip, micro_batch_tokens=20)
        step, [clipped] = step_taken(options, items)
        norm = math.sqrt(sum(float(change.square().sum()) for change in step.values()))
        assert norm == pytest.approx(min(clip, record["grad_norm"]), rel=1e-3)
        assert clipped["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-4)


def test_gradients_do_not_pile_up_over_steps(plain_steps):
    """Without zero_grad the second step holds the first one's gradient too."""
    items = examples(2)
    options = dataclasses.replace(FP32, lr=1e-4, batch_size=1)
    step, _ = step_taken(options, items)
    alone = [step_taken(dataclasses.replace(options, max_steps=1), [item])[0] for item in items]
    for name in step:
        torch.testing.assert_close(step[name], alone[0][name] + alone[1][name], rtol=0.05,
                                   atol=2e-6)


def test_same_seed_same_weights_to_the_bit():
    """Nothing but the seed may reach into a training; and another seed must."""
    options = TrainOptions(lr=1e-2, batch_size=3, epochs=2, micro_batch_tokens=30)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(results))
        model = tiny_model()
        fit(model, examples(8), nll, options, seed)
        results.append(weights_of(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not all(torch.equal(results[0][name], results[2][name]) for name in results[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_lowers_the_loss(precision):
    """The step goes downhill, and autocast leaves parameters and losses in float32."""
    model = tiny_model()
    options = TrainOptions(lr=1e-2, batch_size=7, epochs=12, precision=precision)
    records = fit(model, examples(), nll, options)
    assert len(records) == 12
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_precision_is_used():
    """bf16 must differ from fp32 a little (it was asked for) and only a little."""
    losses = [step_taken(dataclasses.replace(FP32, lr=1e-3, precision=p), examples())[1][0]["loss"]
              for p in ("fp32", "bf16")]
    assert 0 < abs(losses[0] - losses[1]) < 0.02 * losses[0]


def test_weight_decay_is_on_matrices_only():
    """Norm weights start at 1 and mean something there: decay must leave them alone."""
    model = tiny_model()
    before = weights_of(model)
    options = TrainOptions(lr=0.1, batch_size=7, weight_decay=0.5, precision="fp32")
    fit(model, examples(), lambda model, batch: {"loss": 0 * nll(model, batch)["loss"]},
        options)
    for name, weight in weights_of(model).items():
        expected = before[name] * (1 - 0.1 * 0.5) if weight.dim() == 2 else before[name]
        torch.testing.assert_close(weight, expected, msg=name)


def test_every_parameter_is_optimised_once():
    """Two groups of parameters must together be all of them, with shared ones only once."""
    for tied in (False, True):
        model = tiny_model(tie_word_embeddings=tied, attention_bias=True)
        groups = new_optimizer(model, FP32).param_groups
        ids = [id(p) for group in groups for p in group["params"]]
        assert sorted(ids) == sorted(map(id, model.parameters()))


@dataclass
class Item:
    id: str
    value: float
    tokens: int = 1


def quadratic(model, batch: list[Item]) -> dict:
    weight = model.model.norm.weight[0]
    return {"loss": torch.stack([item.value * weight for item in batch])}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_names_the_batch(bad):
    """Trained on, one NaN makes all weights NaN, and the table shows 0 % hours later."""
    items = [Item(f"question-{i}", 1.0) for i in range(12)]
    items[5].value = bad
    model = tiny_model()
    with pytest.raises(SystemExit) as stop:
        fit(model, items, quadratic, TrainOptions(lr=1e-3, batch_size=4, micro_batch_tokens=2, precision="fp32"))
    batch = next(b for b in (batch_at(s, items, 4, 0) for s in range(3)) if items[5] in b)
    message = str(stop.value)
    assert str(bad) in message and "--lr" in message
    for item in items:
        assert (f"'{item.id}'" in message) == (item in batch)
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights():
    """A finite loss may have a gradient that is not (sqrt at 0 here): its step makes every weight
    NaN, and the stop comes one step later and names the wrong batch, or, after the last step,
    never."""
    def root(model, batch):
        weight = model.model.norm.weight[0]
        return {"loss": torch.stack([torch.sqrt((weight - weight.detach()).abs()) for _ in batch])}
    model = tiny_model()
    with pytest.raises(SystemExit, match="question-0"):
        fit(model, [Item("question-0", 1.0)], root, TrainOptions(batch_size=1, precision="fp32"))
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


def test_after_step_is_told_how_many_steps_are_done():
    """Checkpoint selection counts with it: 1 after the first step."""
    told = []
    records = fit(tiny_model(), examples(), nll, dataclasses.replace(FP32, lr=1e-6, batch_size=3, epochs=2),
                  after_step=lambda step: told.append(step) or {"told": step})
    assert told == [record["told"] for record in records] == [1, 2, 3, 4, 5, 6]


# --- which items, when, how fast ------------------------------------------------------------------

@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5))
def test_every_epoch_covers_every_item_once(num_items, batch_size, seed):
    """A last batch that is dropped or filled up, or an order drawn per step, repeats and omits
    items."""
    steps = math.ceil(num_items / batch_size)
    for epoch in (0, 1):
        batches = [batch_at(epoch * steps + i, list(range(num_items)), batch_size, seed) for i in range(steps)]
        assert sorted(sum(batches, [])) == list(range(num_items))
        assert all(len(batch) == batch_size for batch in batches[:-1])


def test_batches_are_a_pure_function_of_seed_and_step():
    """Data order must survive a restart in the middle: no generator that remembers earlier
    steps."""
    steps = range(24)
    forward = [batch_at(s, list(range(50)), 7, 3) for s in steps]
    torch.manual_seed(9)
    assert [batch_at(s, list(range(50)), 7, 3) for s in reversed(steps)] == forward[::-1]
    assert forward[:8] != forward[8:16]  # every epoch its own order
    assert forward[:8] != [batch_at(s, list(range(50)), 7, 4) for s in range(8)]
    assert forward[0] != list(range(7))


@pytest.mark.parametrize("items, batch, epochs, cap, expected",
                         [(10, 4, 1, 0, 3), (10, 4, 2, 0, 6), (10, 4, 2, 5, 5), (10, 4, 1, 99, 3),
                          (1, 16, 3, 0, 3)])
def test_number_of_steps(items, batch, epochs, cap, expected):
    """max_steps is a cap, 0 is no cap, and a smaller last batch counts as a step."""
    options = TrainOptions(batch_size=batch, epochs=epochs, max_steps=cap)
    assert num_steps(items, options) == expected


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 100))
def test_micro_batches_partition_and_keep_to_the_budget(lengths, budget):
    """Padded tokens are rows times the longest row; an item over the budget goes alone, not
    away."""
    items = [Item(str(i), 0.0, length) for i, length in enumerate(lengths)]
    batches = micro_batches(items, budget)
    assert sorted(sum(batches, []), key=lambda item: int(item.id)) == items
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(item.tokens for item in batch) <= budget


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 100))
def test_micro_batches_are_few_and_the_largest_is_small(lengths, budget):
    """Forming one per item would respect any budget and waste the machine; full ones and a rest waste memory.
    Here is every way to cut the sorted items: none takes fewer, or as many with a smaller largest."""
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
    found = micro_batches([Item("", 0.0, length) for length in lengths[::-1]], budget)
    assert (len(found), max(len(batch) * batch[-1].tokens for batch in found)) == min(ways)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_at_its_ends(schedule):
    """Warm-up that starts at 0 wastes a step, and one that never reaches the peak trains at
    less."""
    options = TrainOptions(lr=2.0, lr_schedule=schedule, warmup_steps=4)
    rates = [learning_rate(step, 24, options) for step in range(24)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == pytest.approx(2.0)
    last = {"constant": 2.0, "linear": 2.0 / 20, "cosine": 1 - math.cos(math.pi / 20)}[schedule]
    middle = {"constant": 2.0, "linear": 1.0, "cosine": 1.0}[schedule]
    assert rates[14] == pytest.approx(middle)
    assert rates[23] == pytest.approx(last) and rates[23] > 0
    assert all(a >= b for a, b in zip(rates[4:], rates[5:]))
    no_warmup = TrainOptions(lr=2.0, lr_schedule=schedule)
    assert learning_rate(0, 1, no_warmup) == 2.0


def test_the_schedule_reaches_the_optimizer(plain_steps):
    """The rate that is logged is the rate that is used: the step shrinks with it."""
    model, norms = tiny_model(), []
    state = weights_of(model)

    def slope(model, batch):  # a loss whose gradient is 1 on one weight
        return {"loss": model.model.norm.weight[:1].expand(len(batch))}

    def measure(step):
        nonlocal state
        after = weights_of(model)
        norms.append(float((state["model.norm.weight"] - after["model.norm.weight"]).norm()))
        state = after
        return {}

    options = TrainOptions(lr=0.4, lr_schedule="linear", warmup_steps=2, batch_size=1,
                           clip_norm=1e9)
    records = fit(model, examples(6), slope, options, after_step=measure)
    assert norms == pytest.approx([record["lr"] for record in records], rel=1e-3)
    assert norms == pytest.approx([0.2, 0.4, 0.4, 0.3, 0.2, 0.1], rel=1e-3)


@pytest.mark.parametrize("field, value", [("lr_schedule", "step"), ("precision", "fp16"),
                                          ("batch_size", 0), ("epochs", 0),
                                          ("micro_batch_tokens", 0)])
def test_impossible_options_are_refused_by_name_and_value(field, value):
    """A typo in a schedule must not fail as a KeyError after an hour of sampling."""
    with pytest.raises(ValueError, match=rf"--{field} {value}"):
        TrainOptions(**{field: value})


# --- log-probabilities of responses ---------------------------------------------------------------

def test_response_masks_start_at_the_last_prompt_token_and_include_eos():
    """One column late, the first token is never learned; one early, the last prompt token is; cut short at the end, the
    model never learns to stop. Tokens with the id of padding, or EOS in the middle, count like any other."""
    model = tiny_model()
    batch = [Example("", prompt, response) for prompt, response in (
        ([1, 5, 6], [7, 8, 2]), ([1], [9, 2]), ([1, 4, 4, 4, 4], [2]), ([1, 0, 0], [0, 2, 0]),
        ([1, 3], [4, 0, 0, 0, 2, 2, 5]))]
    logps, mask = response_logps(model, batch)
    assert logps.shape == mask.shape and mask.shape[1] >= 8
    for example, row, columns in zip(batch, logps, mask):
        start = len(example.prompt) - 1
        assert columns.nonzero().flatten().tolist() == list(range(start, start + len(example.response)))
        assert row[columns].tolist() == pytest.approx(slow_logps(model, example.prompt, example.response), abs=1e-4)
        assert not row[~columns].any()


def test_only_responses_see_the_head(monkeypatch):
    """Logits of prompt tokens cost as much as a response's, and most losses have no use for them."""
    monkeypatch.setattr("losses.ROWS", 1)
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda head, inputs, logits: seen.append(len(logits)))
    response_logps(model, examples(5))
    assert sum(seen) == sum(len(example.response) for example in examples(5))


def test_packed_responses_have_the_log_probabilities_that_each_has_alone():
    """A prompt computed once for all its responses: prompts of one token, equal and unequal responses, ragged rows.
    Wrong positions, a response that sees another, or the repeated prompt token scored would each show."""
    model = tiny_model()
    prompts, groups = [[1, 5, 6], [4], [1, 4, 4, 4]], [[[7, 8, 2], [9, 2]], [[3, 2], [3, 2]], [[2], [5, 6, 7, 8, 2]]]
    with torch.no_grad():
        sums, lengths = packed_logps(model, prompts, groups)
    assert sums.shape == lengths.shape == (2, 3)
    for row, (prompt, responses) in enumerate(zip(prompts, groups)):
        for i, response in enumerate(responses):
            assert lengths[i, row] == len(response)
            assert float(sums[i, row]) == pytest.approx(sum(slow_logps(model, prompt, response)), abs=2e-4)


# --- how blocks are run ---------------------------------------------------------------------------

def gradients_of(folder: Path, **options) -> tuple[Tensor, dict, int]:
    """Losses and gradients of ragged examples, and how often a block was run."""
    runs = []
    save_model(tiny_model(sharpness=0.7), folder)
    model = load_for_training(folder, dataclasses.replace(FP32, **options))
    model.model.layers[1].input_layernorm.register_forward_hook(lambda *args: runs.append(1))
    loss = nll(model, examples())["loss"]
    loss.sum().backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, len(runs)


def test_checkpointing_activations_changes_no_gradient(tmp_path):
    """Equal to the bit: the same operations once more. And the flag must do something."""
    loss, gradients, runs = gradients_of(tmp_path / "a")
    again, the_same, twice = gradients_of(tmp_path / "b", checkpoint_activations=True)
    assert (runs, twice) == (1, 2)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], the_same[name]) for name in gradients)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on the CPU")
def test_compiled_blocks_give_the_same_loss_and_gradient(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loss, gradients, _ = gradients_of(tmp_path / "a")
    got, close, _ = gradients_of(tmp_path / "b", compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    torch.testing.assert_close(got, loss, rtol=1e-5, atol=1e-6)
    for name in gradients:
        torch.testing.assert_close(close[name], gradients[name], rtol=1e-3, atol=1e-5)


def test_a_step_of_adamw_by_hand():
    """betas 0.9 and 0.95: two steps on one weight, whose gradients are known, with the decay of matrices."""
    model = tiny_model()
    options = TrainOptions(lr=0.1, batch_size=1, clip_norm=1e9, weight_decay=0.5, precision="fp32")
    start = weights_of(model)

    def slope(model, batch):  # gradient 1 in the first step, 3 in the second
        scale = batch[0].value
        return {"loss": scale * (model.model.norm.weight[:1] + model.lm_head.weight[0, :1])}

    items = [Item("a", 1.0), Item("b", 3.0)]
    order = [batch_at(step, items, 1, 0)[0].value for step in range(2)]
    fit(model, items, slope, options)
    for name, index, decay in (("model.norm.weight", (0,), 0.0), ("lm_head.weight", (0, 0), 0.5)):
        weight, m, v = float(start[name][index]), 0.0, 0.0
        for t, gradient in enumerate(order, start=1):
            m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient ** 2
            weight -= 0.1 * decay * weight
            weight -= 0.1 * (m / (1 - 0.9 ** t)) / (math.sqrt(v / (1 - 0.95 ** t)) + 1e-8)
        assert float(weights_of(model)[name][index]) == pytest.approx(weight, abs=1e-5)


# --- stages ---------------------------------------------------------------------------------------

def test_a_finished_model_is_never_trained_again(tmp_path):
    """And one that is missing is made, with the record of its steps; the states go only then."""
    save_model(tiny_model(1), tmp_path / "source")
    (tmp_path / "run" / "state").mkdir(parents=True)
    record = {"step": 0, "loss": 1.0, "tokens": 3}
    made = train_once(tmp_path / "run", str(tmp_path / "source"), lambda: (tiny_model(2), [record]))
    assert made == str(tmp_path / "run" / "model") and not (tmp_path / "run" / "state").exists()
    assert (tmp_path / "run" / "train.jsonl").read_text() == '{"step": 0, "loss": 1.0, "tokens": 3}\n'
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    assert train_once(tmp_path / "run", str(tmp_path / "source"), lambda: pytest.fail("trained again")) == made
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before


def test_a_summary_is_of_the_last_quarter_and_of_what_each_record_has():
    """A first batch without anything to train on, and so without a loss, once ended a run in a KeyError."""
    records = [{"step": i, "tokens": 10, "kl": float(i), **({"loss": float(i), "ratio_max": float(-i)} if i else {})}
               for i in range(8)]
    assert summary(records) == {"kl": 6.5, "loss": 6.5, "ratio_max": -6.0, "steps": 8, "skipped": 0,
                                "tokens_trained": 80}
    assert "loss" not in summary(records[:1])
    skipped = [record | {"skipped": float(record["step"] == 7)} for record in records]
    assert summary(skipped)["loss"] == 6.0 and summary(skipped)["skipped"] == 1


@pytest.mark.parametrize("prompt_weight", [0.0, 0.1, 1.0])
def test_sft_weighs_tokens_alike_and_prompts_as_told(tmp_path, prompt_weight):
    """All response tokens of the data weigh 1 / mean length, those of short responses no more than those of long ones,
    and prompt tokens prompt_weight times that. What the model has no positions for is left out, of the mean, too."""
    model, batch = tiny_model(max_position_embeddings=17), examples(6)
    batch[5] = Example("long", [1] * 10, [2] * 8)
    expected, kept = [], batch[:5]
    mean_length = sum(len(example.response) for example in kept) / 5
    for example in kept:
        response = slow_logps(model, example.prompt, example.response)
        prompt = slow_logps(model, example.prompt[:1], example.prompt[1:])
        expected.append(-(sum(response) + prompt_weight * sum(prompt)) / mean_length)
    [record] = train.fit_sft(model, batch, dataclasses.replace(FP32, lr=1e-9), 0, tmp_path, prompt_weight)
    assert record["loss"] == pytest.approx(sum(expected) / 5, rel=1e-4)
    with pytest.raises(SystemExit, match="17 positions"):
        train.fit_sft(model, batch[5:], FP32, 0, tmp_path)
