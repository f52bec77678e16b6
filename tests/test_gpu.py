"""A GPU computes what a CPU computes: attention, gradients, sampling with recorded steps; and small runs on it.

    CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu.py    # without the variable, tests do not see a GPU
"""
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import irpo
import reft
import sample
import train
from checkpoint import model_hash
from infra import parallel
from infra.run import read_json
from irpo import Config, Pair, preference_loss
from model import Llama
from runs import SMALL, call
from sample import generate
from tiny import random_prompts, random_tokens, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
EOS = 2
REFT = ["--preset", "smoke", "--num_questions", "8", "--max_new_tokens", "24", "--eval_questions", "6"]


def on_gpu(dtype: torch.dtype = torch.float32, **overrides) -> Llama:
    return tiny_model(**overrides).to("cuda", dtype)


def some_pairs() -> list[Pair]:
    """Ragged pairs, with reference log-probs near those of the model."""
    return [Pair(f"q{i}", random_tokens(i, 1 + 3 * i).tolist(), random_tokens(50 + i, 2 + 3 * i % 7).tolist(),
                 random_tokens(90 + i, 1 + 5 * i % 8).tolist(), -9.0 - i, -11.0 + i) for i in range(6)]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_logits_are_those_of_the_cpu(kv_heads):
    """Fused attention groups heads as the products on a CPU do."""
    tokens = random_tokens(1, 3, 50)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):
        model = on_gpu(dtype, num_key_value_heads=kv_heads)
        expected = tiny_model(num_key_value_heads=kv_heads)(tokens)
        torch.testing.assert_close(model(tokens.to("cuda")).cpu(), expected, atol=tolerance, rtol=tolerance)


def test_loss_and_gradients_are_those_of_the_cpu(monkeypatch):
    """Of packed rows, whose mask fused attention is given."""
    config = Config(model="somewhere", precision="fp32")
    found = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(train, "device", lambda device=device: device)
        model = tiny_model().to(device)
        values = preference_loss(model, some_pairs(), config)
        values["loss"].sum().backward()
        found[device] = values["loss"].detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters()}
    torch.testing.assert_close(found["cuda"][0], found["cpu"][0], atol=1e-4, rtol=1e-4)
    for name, gradient in found["cpu"][1].items():
        torch.testing.assert_close(found["cuda"][1][name], gradient, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, dict(batch_rows=12), dict(batch_rows=12, temperature=0),
                                     dict(batch_rows=9, top_p=0.9, top_k=12), dict(num_samples=1)], ids=str)
def test_recorded_steps_give_the_same_responses(changes, monkeypatch):
    """As steps that are not recorded, to the bit, and nearly always as a CPU."""
    prompts = random_prompts(50, [5, 3, 7, 30, 4, 20, 6, 2, 9, 17, 8, 2, 12, 3] * 3)
    options = dict(num_samples=3, max_new_tokens=60, temperature=1.5, eos_ids=(EOS,), seed=3) | changes
    got = generate(on_gpu(), prompts, **options)
    on_cpu = generate(tiny_model(), prompts, **options)
    monkeypatch.setattr(sample, "recorded", lambda batch: batch.step)
    assert got == generate(on_gpu(), prompts, **options)
    same = [a == b for ours, theirs in zip(got, on_cpu) for a, b in zip(ours, theirs)]
    assert sum(same) >= 0.95 * len(same)


def test_windows_grow_past_a_block_of_columns():
    """More than 128 new tokens and prompts of different hundreds: the graph is recorded anew for each window."""
    model, prompts = on_gpu(max_position_embeddings=1024), random_prompts(7, [300, 10, 140, 520])
    options = dict(num_samples=2, max_new_tokens=300, temperature=0, eos_ids=(), seed=0)
    got = generate(model, prompts, **options)
    for prompt, responses in zip(prompts, got):
        ids = prompt + responses[0].ids
        logits = model(torch.tensor([ids], device="cuda"))[0, len(prompt) - 1:-1]
        chosen = logits[torch.arange(300), torch.tensor(responses[0].ids)]
        assert (logits.amax(-1) - chosen).max() < 1e-3  # the most likely token, or one as likely
        assert responses[0] == responses[1]


def test_a_step_in_bfloat16_goes_down():
    """Autocast, fused AdamW and clipping on a GPU."""
    model, config = on_gpu(), Config(model="somewhere", lr=1e-3, batch_size=6)
    pairs = [replace(pair, ref_chosen=chosen, ref_rejected=rejected) for pair, chosen, rejected in zip(
        some_pairs(), *irpo.pair_logps(model, some_pairs())[0].tolist())]
    optimizer = train.new_optimizer(model, config)
    losses = [train.descend(model, optimizer, [pairs], lambda model, part: preference_loss(model, part, config),
                            config)["loss"] for _ in range(8)]
    assert sum(losses[-1]) < 0.8 * sum(losses[0])


@pytest.mark.parametrize("offload", [False, True])
def test_sharding_over_nccl_changes_no_step(offload):
    """Of one rank: its collectives reach nobody, but calls, data types and divisors are those of several."""
    config = Config(model="somewhere", precision="fp32")
    alone, sharded = on_gpu(), on_gpu()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel.shard(sharded, list(sharded.model.layers), torch.float32, within_node=False, cpu_offload=offload)
        values, gradients, weights = [], [], []
        for model in (alone, sharded):
            optimizer = train.new_optimizer(model, config)
            values.append(train.accumulate(model, [some_pairs()[:4], some_pairs()[4:]],
                                           lambda model, part: preference_loss(model, part, config), "fp32"))
            gradients.append([parallel.full_weight(p.grad).to("cpu", copy=True) for p in model.parameters()])
            values[-1]["norm"] = [float(parallel.full_weight(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))]
            optimizer.step()
            weights.append([parallel.full_weight(p.detach()).to("cpu", copy=True) for p in model.parameters()])
        where = "cpu" if offload else "cuda"
        assert all(isinstance(p, DTensor) and p.device.type == where for p in sharded.parameters())
        for ours, theirs in (values, gradients, weights):
            torch.testing.assert_close(theirs, ours)
        del sharded, model, optimizer
    finally:
        parallel.finish()
        parallel.mesh.cache_clear()


def test_the_cache_holds_what_is_free():
    free, _ = torch.cuda.mem_get_info()
    model = on_gpu()
    token = 2 * 2 * 2 * 8 * 4  # keys and values, blocks, key-value heads, width of a head, bytes
    assert 0.5 * free / token < sample.cache_budget(model) < 0.7 * free / token


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_runs(precision, base, tmp_path):
    """IRPO, and ReFT with both of its critics, from the base model to results.json."""
    for module, name, flags in ((irpo, "irpo", SMALL), (reft, "shared", REFT),
                                (reft, "separate", [*REFT, "--critic", "separate"])):
        run = tmp_path / name
        call(module, *flags, "--model", base, "--precision", precision, "--run_dir", run)
        assert len([row["accuracy"] for row in read_json(run / "results.json") if row["split"] == "test"]) >= 2
        first, *_, last = sorted(run.glob("iter*/model"))
        assert len({model_hash(base), model_hash(first), model_hash(last)}) == 3
