"""What tools.memory says is compared with the tensors themselves."""
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
from tiny import tiny_model
from tools import memory
from tools.memory import CHECKPOINTED, SHAPES, Config

PUBLISHED = {  # parameters, as the files on Hugging Face have them
    "smollm2-135m": 134_515_008, "qwen2-0.5b": 494_032_768, "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400, "qwen2-1.5b": 1_543_714_304, "llama-3.2-3b": 3_212_749_824,
    "llama-2-7b": 6_738_415_616, "mistral-7b": 7_241_732_096, "qwen2-7b": 7_615_616_512, "llama-3-8b": 8_030_261_248,
    "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192, "llama-3-70b": 70_553_706_496}
DEEP = ModelConfig(vocab_size=100, hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=8,
                   num_key_value_heads=2, head_dim=32)
WORDY = replace(DEEP, vocab_size=8000, num_hidden_layers=1)


def call(capsys, monkeypatch, *flags) -> str:
    monkeypatch.setattr("sys.argv", ["memory.py", *map(str, flags)])
    memory.main()
    return capsys.readouterr().out


def test_parameters_are_the_published_ones():
    assert {name: memory.parameters(model)[0] for name, model in SHAPES.items() if name != "toy"} == PUBLISHED
    assert memory.parameters(SHAPES["toy"])[0] == sum(p.numel() for p in Llama(SHAPES["toy"]).parameters())


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
    model, config = SHAPES["llama-3-8b"], Config(num_samples=num_samples)
    question = num_samples * 512 + min(2, num_samples) * 256  # tokens
    free = 0.6 * (80 - memory.memory(model, config)["to sample"]) * 1e9
    fit = memory.responses(model, config) / num_samples
    assert fit * question * memory.cache_bytes(model) <= free < (fit + 1) * question * memory.cache_bytes(model)
    assert memory.responses(model, replace(config, gpu_gb=20.0)) == 0


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


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("shape", [DEEP, WORDY], ids=["deep", "wordy"])
def test_the_peak_of_a_step_is_below_the_bound(shape, again, monkeypatch):
    """And not far below."""
    def fused(q, k, v, *mask):
        return F.scaled_dot_product_attention(q, *(x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)),
                                              is_causal=True)
    monkeypatch.setattr(model_file, "causal_attention", fused)
    model, tokens = Llama(shape), torch.ones(8, 129, dtype=torch.long)
    model.model.checkpoint_activations = again
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with Peak([x for p in model.parameters() for x in (p, p.grad)]) as measured:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.logps(tokens, torch.ones(8, 128, dtype=torch.bool)).sum()
        loss.backward()
    config = Config(gpus=1, micro_batch_tokens=8 * 144, prompt_tokens=64, max_new_tokens=64, reserve_gb=0)
    needed = memory.memory(shape, config)
    bound = (needed[CHECKPOINTED if again else "to train"] - needed["training state"]) * 1e9
    norms = 2 * (1 if again else shape.num_hidden_layers)  # each keeps one more float32 tensor on a CPU than on CUDA
    bound += norms * config.micro_batch_tokens * 4 * shape.hidden_size
    assert 0.5 * bound < measured.peak < bound


def test_table_and_page_are_printed(monkeypatch, capsys, tmp_path):
    table = call(capsys, monkeypatch)
    assert all(f"| {name} | {total:,} |" in table for name, total in PUBLISHED.items())
    assert table.count("\n| llama-2-70b ") == 1 and table.rstrip().endswith("| 0 |")
    text = call(capsys, monkeypatch, "--model_shape", "llama-2-70b", "--gpus", 24)
    assert "to train: does not fit into 80 GB" in text and f"{CHECKPOINTED}: fits into 80 GB" in text
    save_model(tiny_model(), tmp_path / "m")
    assert f"P = {memory.parameters(tiny_model().config)[0]:,} " in call(capsys, monkeypatch, "--model", tmp_path / "m")


@pytest.mark.parametrize("flags", [["--gpus", "0"], ["--gpu_gb", "nan"], ["--model_shape", "huge"]], ids=str)
def test_what_makes_no_sense_is_refused(flags, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(capsys, monkeypatch, *flags)
    assert flags[0] in capsys.readouterr().err
