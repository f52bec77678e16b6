"""What tools.memory says is compared with the tensors themselves."""
import re
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_file
from checkpoint import save_model
from model import KVCache, Llama, ModelConfig
from runs import call, refusal
from tiny import tiny_model
from tools import memory
from tools.memory import Config, model_config

PUBLISHED = {  # parameters, as the files on Hugging Face have them
    "smollm2-135m": 134_515_008, "llama-3.2-1b": 1_235_814_400, "llama-2-7b": 6_738_415_616,
    "mistral-7b": 7_241_732_096, "qwen2-7b": 7_615_616_512, "llama-3-8b": 8_030_261_248, "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192, "llama-3-70b": 70_553_706_496}
DEEP = ModelConfig(vocab_size=100, hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=8,
                   num_key_value_heads=2, head_dim=32)
WORDY = replace(DEEP, vocab_size=8000, num_hidden_layers=1)


@pytest.mark.parametrize("gpus", [1, 4])
def test_a_training_state_is_measured(gpus):
    """Parameters, gradients and AdamW's moments after a real step, in equal shares."""
    model = tiny_model(tie_word_embeddings=True)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    held = sum(x.nbytes for p in model.parameters() for x in (p, p.grad)) + sum(x.nbytes for x in moments)
    assert memory.memory(model.config, Config(gpus=gpus))["training state"] * 1e9 == pytest.approx(held / gpus)


def test_a_sampler_is_measured():
    model = tiny_model().to(torch.bfloat16)
    needed = memory.memory(model.config, Config(reserve_gb=0))
    assert needed["to sample"] * 1e9 == pytest.approx(sum(p.nbytes for p in model.parameters()))
    cache = KVCache(model.config, 10, 100, "cpu", torch.bfloat16)
    assert needed["cache of 1,000 tokens"] * 1e9 == pytest.approx(sum(x.nbytes for x in cache.keys + cache.values))
    halves = memory.memory(model.config, Config(tensor_parallel=2, reserve_gb=0))
    blocks = sum(p.nbytes for layer in model.model.layers for p in layer.parameters() if p.dim() == 2)
    assert (needed["to sample"] - halves["to sample"]) * 1e9 == pytest.approx(blocks / 2)
    assert halves["cache of 1,000 tokens"] == needed["cache of 1,000 tokens"] / 2


@pytest.mark.parametrize("num_samples", [1, 30])
def test_responses_fit_and_one_question_more_does_not(num_samples):
    config = Config(num_samples=num_samples)
    needed = memory.memory(model_config("llama-3-8b"), config)
    question = num_samples * 512 + min(2, num_samples) * 256  # tokens
    free, fit = 0.6 * (80 - needed["to sample"]), memory.responses(needed, config) / num_samples
    assert fit * question * needed["cache of 1,000 tokens"] <= 1000 * free
    assert 1000 * free < (fit + 1) * question * needed["cache of 1,000 tokens"]
    assert memory.responses(needed, replace(config, gpu_gb=20.0)) == 0


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and still alive, and their peak."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.live:
                self.live[key] = tensor.untyped_storage().nbytes()
                self.now += self.live[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self.free, key)
        return result

    def free(self, key: int) -> None:
        self.now -= self.live.pop(key)


@pytest.mark.parametrize("cpu", [False, True])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("shape", [DEEP, WORDY], ids=["deep", "wordy"])
def test_the_peak_of_a_step_is_below_the_bound(shape, again, cpu, monkeypatch):
    """And not far below."""
    def fused(q, k, v, *mask):  # in bfloat16, as on a GPU
        return F.scaled_dot_product_attention(q, *(x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)),
                                              is_causal=True)
    if not cpu:
        monkeypatch.setattr(model_file, "causal_attention", fused)
    model, tokens = Llama(shape), torch.ones(8, 129, dtype=torch.long)
    model.model.checkpoint_activations = again
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with Peak([x for p in model.parameters() for x in (p, p.grad)]) as measured:
        with torch.autocast("cpu", torch.bfloat16, enabled=not cpu):
            loss = model.logps(tokens, torch.ones(8, 128, dtype=torch.bool)).sum()
        loss.backward()
    config = Config(cpu=cpu, gpus=1, micro_batch_tokens=8 * 144, prompt_tokens=15, max_new_tokens=64, reserve_gb=0)
    needed = memory.memory(shape, config)
    bound = (needed["with --checkpoint_activations" if again else "to train"] - needed["training state"]) * 1e9
    norms = 2 * (1 if again else shape.num_hidden_layers)  # each keeps one more float32 tensor on a CPU than on CUDA
    bound += (not cpu) * norms * config.micro_batch_tokens * 4 * shape.hidden_size
    assert 0.5 * bound < measured.peak < bound


def test_the_table_has_all_shapes_or_the_one_asked_for(capsys, tmp_path):
    def shown(*flags) -> str:
        call(memory, *flags)
        return capsys.readouterr().out
    table = shown()
    assert all(re.search(rf"^\| {name} +\| +{total:,} ", table, re.M) for name, total in PUBLISHED.items())
    one = shown("--model", "llama-2-70b", "--gpus", 24)
    assert "of 24 GPUs" in one and "llama-2-70b" in one and "llama-2-7b" not in one
    save_model(tiny_model(), tmp_path / "m")
    assert f" {memory.parameters(tiny_model().config)[0]:,} " in shown("--model", tmp_path / "m")


@pytest.mark.parametrize("flags, said", [(["--gpus", "0"], "--gpus"), (["--cpu"], "--cpu"),
                                         (["--gpu_gb", "nan"], "--gpu_gb"), (["--model", "huge"], "huge/config.json")])
def test_what_makes_no_sense_is_refused(flags, said, capsys):
    assert said in refusal(capsys, memory, *flags)
