"""Tell what fits into a GPU before one is rented: bytes from formulas, for training (IRPO, SFT) and for sampling.

    python -m tools.memory                                                       # a table over the published shapes
    python -m tools.memory --model_shape llama-2-70b --gpus 24 --tensor_parallel 4    # one of them, line by line
    python -m tools.memory --model DIR --gpu_gb 24

P parameters are trained on n = --gpus GPUs that share one training state (with --shard_within_node: those of a node).
GB are 10^9 bytes. Activations and gradients on their way are upper bounds, under CUDA's fused attention. Assumed:
FSDP2 holds two blocks at a time, and --reserve_gb. ReFT holds 2 P / n bytes more, its reference.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoint import load_config
from infra.config import Options, option, parse_config
from infra.run import run_script
from model import LOGITS_AT_ONCE, Llama, ModelConfig


def shape(vocab, width, inner, layers, heads, kv_heads, tied=False, bias=False) -> ModelConfig:
    return ModelConfig(vocab, width, inner, layers, heads, kv_heads, width // heads, tie_word_embeddings=tied,
                       attention_bias=bias)


SHAPES = {  # as in their config.json; positions do not matter here
    "toy": shape(288, 128, 336, 4, 4, 2),
    "smollm2-135m": shape(49152, 576, 1536, 30, 9, 3, tied=True),
    "qwen2-0.5b": shape(151936, 896, 4864, 24, 14, 2, tied=True, bias=True),
    "tinyllama-1.1b": shape(32000, 2048, 5632, 22, 32, 4),
    "llama-3.2-1b": shape(128256, 2048, 8192, 16, 32, 8, tied=True),
    "qwen2-1.5b": shape(151936, 1536, 8960, 28, 12, 2, tied=True, bias=True),
    "llama-3.2-3b": shape(128256, 3072, 8192, 28, 24, 8, tied=True),
    "llama-2-7b": shape(32000, 4096, 11008, 32, 32, 32),
    "mistral-7b": shape(32000, 4096, 14336, 32, 32, 8),
    "qwen2-7b": shape(152064, 3584, 18944, 28, 28, 4, bias=True),
    "llama-3-8b": shape(128256, 4096, 14336, 32, 32, 8),
    "llama-2-13b": shape(32000, 5120, 13824, 40, 40, 40),
    "llama-2-70b": shape(32000, 8192, 28672, 80, 64, 8),
    "llama-3-70b": shape(128256, 8192, 28672, 80, 64, 8)}
CHECKPOINTED = "with --checkpoint_activations"
COLUMNS = ["training state", "to train", CHECKPOINTED, "to sample", "cache of 1,000 tokens"]  # of the table


@dataclass(frozen=True)
class Config(Options):
    model_shape: str = option("", "one of the published shapes, line by line", choices=("", *SHAPES))
    model: str = option("", "the same for the shape in a model directory's config.json")
    gpus: int = option(8, "GPUs that share one training state", low=1)
    gpu_gb: float = option(80.0, "memory of a GPU", above=0)
    reserve_gb: float = option(4.0, "of it for the CUDA context, NCCL, workspaces and fragmentation (assumed)", low=0)
    micro_batch_tokens: int = option(4096, "padded tokens of one forward pass on a GPU", low=1)
    prompt_tokens: int = option(256, "length of a prompt", low=1)
    max_new_tokens: int = option(512, "length of a response", low=1)
    num_samples: int = option(30, "responses to a prompt, which share its keys and values", low=1)
    tensor_parallel: int = option(1, "GPUs that hold one sampling model together", low=1)


def parameters(model: ModelConfig) -> tuple[int, int]:
    """Count the parameters of the model and those of one block."""
    with torch.device("meta"):
        llama = Llama(model)
    return tuple(sum(p.numel() for p in module.parameters()) for module in (llama, llama.model.layers[0]))


def activation_bytes(model: ModelConfig, config: Config, again: bool) -> int:
    """Bound what backward needs of one micro-batch of pairs; again: blocks are computed again.

    Per token of a block, both norms keep their float32 input and a bfloat16 copy of the output; attention q, k, v (k
    and v repeated for the mask of pairs), the output and H float32 sums; the MLP gate, silu(gate), up and their
    product. Of the logits that exist at a time: float32 log-softmax, its gradient and that of the logits.
    """
    D, inner, H, V = model.hidden_size, model.intermediate_size, model.num_attention_heads, model.vocab_size
    pair = config.prompt_tokens + 2 * config.max_new_tokens + 1  # one row, which has the prompt once
    tokens = max(config.micro_batch_tokens, pair)
    block = 2 * (4 * D + 4 + 2 * D) + 4 * 2 * H * model.head_dim + 4 * H + 4 * 2 * inner
    kept = model.num_hidden_layers * (4 * D if again else block) + 2 * 4 * D + 2 * pair  # and last norm, head, mask
    logits = min(tokens, max(512, LOGITS_AT_ONCE // V)) * V
    return tokens * kept + max(3 * 4 * logits, tokens * (again * block + 4 * D + 4 * inner))


def cache_bytes(model: ModelConfig) -> int:
    """Count the bytes of one token's keys and values in bfloat16."""
    return 2 * 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim


def memory(model: ModelConfig, config: Config) -> dict[str, float]:
    """List what one GPU holds, in GB."""
    (P, block), n, head = parameters(model), config.gpus, model.vocab_size * model.hidden_size
    ends = head if model.tie_word_embeddings else 2 * head  # embedding and head, which FSDP2 gathers in float32
    split = model.num_hidden_layers * (block - 2 * model.hidden_size)  # norms, embedding and head stay complete
    bytes_of = {
        "parameters (float32, 4 P / n)": 4 * P / n, "gradients (float32, 4 P / n)": 4 * P / n,
        "moments of AdamW (float32, 8 P / n)": 8 * P / n, "training state": 16 * P / n,
        "gathered or bfloat16 copies": 4 * block + 4 * ends if n > 1 else 2 * P,
        "gradients on their way": 6 * max(block, head) + 4 * ends,
        "activations": activation_bytes(model, config, again=False),
        f"activations {CHECKPOINTED}": activation_bytes(model, config, again=True),
        "sampler's weights (bfloat16)": 2 * (P - split + split / config.tensor_parallel),
        "cache of 1,000 tokens": 1000 * cache_bytes(model) / config.tensor_parallel}
    gb = {name: value / 1e9 for name, value in bytes_of.items()}
    state = (gb["training state"] + gb["gathered or bfloat16 copies"] + gb["gradients on their way"]
             + config.reserve_gb)
    return gb | {"to train": state + gb["activations"], CHECKPOINTED: state + gb[f"activations {CHECKPOINTED}"],
                 "to sample": gb["sampler's weights (bfloat16)"] + config.reserve_gb}


def responses(model: ModelConfig, config: Config) -> int:
    """Count the responses, in complete questions, that fit at once into 60 % of what is left (sample.cache_budget).

    A question has room for two prompts, since one is still needed when most of its samples have ended and the next
    begin. Caches grow by 128 columns.
    """
    prompt, own = (-(-tokens // 128) * 128 for tokens in (config.prompt_tokens, config.max_new_tokens))
    question = config.num_samples * own + (1 if config.num_samples == 1 else 2) * prompt
    needed = memory(model, config)
    budget = 0.6 * (config.gpu_gb - needed["to sample"]) / needed["cache of 1,000 tokens"] * 1000  # tokens
    return max(0, int(budget / question)) * config.num_samples


def fewest_gpus(model: ModelConfig, config: Config) -> str:
    """Say on how many GPUs, of 1, 2, 4 ... 1,024, training fits with --checkpoint_activations."""
    fits = (n for n in (2 ** i for i in range(11))
            if memory(model, replace(config, gpus=n))[CHECKPOINTED] <= config.gpu_gb)
    return str(next(fits, "none"))


def page(name: str, model: ModelConfig, config: Config) -> str:
    lines = [f"{name}: P = {parameters(model)[0]:,} parameters, n = {config.gpus}. GB of one GPU:"]
    for what, gb in memory(model, config).items():
        total = what in ("to train", CHECKPOINTED, "to sample")
        verdict = f": {'fits' if gb <= config.gpu_gb else 'does not fit'} into {config.gpu_gb:g} GB" if total else ""
        lines.append(f"{gb:10,.2f}  {what}{verdict}")
    lines.append(f"{responses(model, config):10,}  responses fit at once, {config.num_samples} to a prompt")
    return "\n".join(lines)


def table(config: Config) -> str:
    rows = [["model", "parameters", *COLUMNS, "GPUs needed", "responses at once"], ["---", *["---:"] * 8]]
    for name, model in SHAPES.items():
        needed = memory(model, config)
        rows.append([name, f"{parameters(model)[0]:,}", *(f"{needed[column]:,.2f}" for column in COLUMNS),
                     fewest_gpus(model, config), f"{responses(model, config):,}"])
    return (f"GB of each of {config.gpus} GPUs; GPUs needed: of {config.gpu_gb:g} GB {CHECKPOINTED}\n\n"
            + "\n".join(f"| {' | '.join(row)} |" for row in rows))


def main() -> None:
    config = parse_config(Config, {}, __doc__)
    if config.model:
        print(page(config.model, load_config(Path(config.model)), config))
    else:
        name = config.model_shape
        print(page(name, SHAPES[name], config) if name else table(config))


if __name__ == "__main__":
    run_script(main)
