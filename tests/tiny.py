"""Small random models, a tokenizer, and slow references written from the formulas, that several tests share."""
import json
import math

import pytest
import torch
from torch import Tensor

from model import Llama, ModelConfig

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}


def tiny_model(seed: int = 0, sharpness: float = 1.5, **overrides) -> Llama:
    """Weights large enough that attention and positions matter: errors show in the logits."""
    shape = dict(vocab_size=24, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, max_position_embeddings=128, rope_theta=100.0)
    model = Llama(ModelConfig(**{**shape, **overrides}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.3 * noise)
            elif weight.dim() == 1:
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(noise * sharpness / math.sqrt(weight.shape[1]))
    return model


def random_tokens(seed: int, *shape: int, vocab: int = 24) -> Tensor:
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))


def random_prompts(seed: int, lengths: list[int], vocab: int = 24) -> list[list[int]]:
    return [random_tokens(seed + i, n, vocab=vocab).tolist() for i, n in enumerate(lengths)]


def json_dir(folder, template: str, config: dict):
    """A byte-level tokenizer.json as Llama 3 (whose template begins with BOS) or Qwen2 (without one) ship it."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    names = ["<|begin|>", "<|end|>"]
    letters = [*names, *tokenizers.pre_tokenizers.ByteLevel.alphabet()]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.add_special_tokens(names)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.enable_truncation(12)  # as some files on the Hub have it
    tokenizer.enable_padding(length=99)
    if template:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[(name, i) for i, name in enumerate(names)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


LLAMA3_JSON = ("<|begin|> $A", {"eos_token": "<|end|>"})


def slow_angle(config: ModelConfig, i: int, position: int) -> float:
    """Rotary angle of pair i, with Llama 3's scaling as its three cases are published."""
    frequency = config.rope_theta ** (-2 * i / config.head_dim)
    if config.rope_scaling:
        s = config.rope_scaling
        wavelength = 2 * math.pi / frequency
        if wavelength > s["original_max_position_embeddings"] / s["low_freq_factor"]:
            frequency /= s["factor"]
        elif wavelength >= s["original_max_position_embeddings"] / s["high_freq_factor"]:
            smooth = ((s["original_max_position_embeddings"] / wavelength - s["low_freq_factor"])
                      / (s["high_freq_factor"] - s["low_freq_factor"]))
            frequency = (1 - smooth) * frequency / s["factor"] + smooth * frequency
    return position * frequency


def slow_rotate(config: ModelConfig, x: list[float], position: int) -> list[float]:
    """The pair (x[i], x[i + h/2]) as a complex number, turned by its angle."""
    half = config.head_dim // 2
    turned = [complex(x[i], x[i + half]) * complex(math.cos(angle), math.sin(angle))
              for i in range(half) for angle in [slow_angle(config, i, position)]]
    return [z.real for z in turned] + [z.imag for z in turned]


@torch.no_grad()
def slow_logits(model: Llama, tokens: list[int]) -> Tensor:
    """Compute logits (T, V) in float64: Llama position by position and head by head, from the published equations."""
    config, half = model.config, model.config.head_dim
    w = {name: weight.double() for name, weight in model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).sum() / len(x) + config.rms_norm_eps) * w[name + ".weight"]

    def heads(x: Tensor, name: str, position: int | None) -> list[Tensor]:
        y = w[name + ".weight"] @ x + w.get(name + ".bias", 0)
        parts = [y[i:i + half] for i in range(0, len(y), half)]
        if position is None:
            return parts
        if config.qk_norm:
            parts = [norm(part, name.replace("_proj", "_norm")) for part in parts]
        return [torch.tensor(slow_rotate(config, p.tolist(), position)).double() for p in parts]

    xs = [w["model.embed_tokens.weight"][token] for token in tokens]
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        normed = [norm(x, at + "input_layernorm") for x in xs]
        q, k = ([heads(x, f"{at}self_attn.{name}_proj", t) for t, x in enumerate(normed)] for name in "qk")
        v = [heads(x, at + "self_attn.v_proj", None) for x in normed]
        for t in range(len(xs)):
            mixed = []
            for j in range(config.num_attention_heads):
                scores = [float(q[t][j] @ k[s][j // group]) / math.sqrt(half) for s in range(t + 1)]
                total = sum(math.exp(score) for score in scores)
                mixed.append(sum(math.exp(score) / total * v[s][j // group] for s, score in enumerate(scores)))
            x = xs[t] + w[at + "self_attn.o_proj.weight"] @ torch.cat(mixed)
            y = norm(x, at + "post_attention_layernorm")
            gate = w[at + "mlp.gate_proj.weight"] @ y
            inner = gate / (1 + torch.exp(-gate)) * (w[at + "mlp.up_proj.weight"] @ y)
            xs[t] = x + w[at + "mlp.down_proj.weight"] @ inner
    return torch.stack([w["lm_head.weight"] @ norm(x, "model.norm") for x in xs])


@torch.no_grad()
def slow_logps(model: Llama, prompt: list[int], response: list[int]) -> list[float]:
    """Log-probability of each response token, one sequence at a time, without padding or shift."""
    logits = model(torch.tensor([prompt + response]))[0].double()
    logps = []
    for t, token in enumerate(response):
        row = logits[len(prompt) + t - 1]  # the place before scores the token
        logps.append(float(row[token] - torch.log(torch.exp(row - row.max()).sum()) - row.max()))
    return logps


def chi_square_p(observed: list[int], expected: list[float]) -> float:
    """Chance that counts drawn from `expected` are at least this far off; cells below 5 are pooled."""
    cells, rest = [], [0.0, 0.0]
    for o, e in zip(observed, expected, strict=True):
        if e >= 5:
            cells.append((o, e))
        else:
            rest = [rest[0] + o, rest[1] + e]
    if rest[1] >= 5:
        cells.append(tuple(rest))
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
