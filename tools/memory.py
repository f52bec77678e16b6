"""Tell what fits into a GPU before one is rented: bytes from formulas, for training (IRPO, SFT) and for sampling.

    python -m tools.memory                                                      # the published shapes
    python -m tools.memory --model llama-2-70b --gpus 24 --tensor_parallel 4    # one of them
    python -m tools.memory --model DIR
    python -m tools.memory --preset cpu --model smollm2-135m                    # on a CPU, in float32

P parameters are trained on n = --gpus GPUs that share one training state (with --shard_within_node: those of a node).
GB are 10^9 bytes. Activations and gradients on their way are upper bounds, under CUDA's fused attention. Assumed:
FSDP2 holds two blocks at a time, and --reserve_gb. ReFT holds 2 P / n bytes more, its reference.
"""
from dataclasses import dataclass

from checkpoint import load_config, without_weights
from infra.config import Options, option, parse_config
from infra.run import run_script
from model import LOGITS_AT_ONCE, ModelConfig
from tools.page import make_table

SHAPES = {  # as in their config.json: vocabulary, width, inner, layers, heads, kv heads, tied, bias
    "toy": (288, 128, 336, 3, 8, 8, False, False),
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, True, False),
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8, True, False),
    "llama-2-7b": (32000, 4096, 11008, 32, 32, 32, False, False),
    "mistral-7b": (32000, 4096, 14336, 32, 32, 8, False, False),
    "qwen2-7b": (152064, 3584, 18944, 28, 28, 4, False, True),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, False, False),
    "llama-2-13b": (32000, 5120, 13824, 40, 40, 40, False, False),
    "llama-2-70b": (32000, 8192, 28672, 80, 64, 8, False, False),
    "llama-3-70b": (128256, 8192, 28672, 80, 64, 8, False, False)}


@dataclass(frozen=True)
class Config(Options):
    model: str = option("", f"one alone: {', '.join(SHAPES)}, or a model directory")
    cpu: bool = option(False, "a CPU that computes in float32, in place of GPUs")
    gpus: int = option(8, "GPUs that share one training state", low=1)
    gpu_gb: float = option(80.0, "memory of a GPU", above=0)
    reserve_gb: float = option(4.0, "of it for the CUDA context, NCCL, workspaces and fragmentation (assumed; on a CPU "
                               "Python, and what the allocator keeps)", low=0)
    micro_batch_tokens: int = option(4096, "padded tokens of one forward pass on a GPU", low=1)
    prompt_tokens: int = option(256, "length of a prompt", low=1)
    max_new_tokens: int = option(512, "length of a response", low=1)
    num_samples: int = option(30, "responses to a prompt, which share its keys and values", low=1)
    tensor_parallel: int = option(1, "GPUs that hold one sampling model together", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cpu and (self.gpus > 1 or self.tensor_parallel > 1):
            raise ValueError("--cpu is one machine: give --gpus 1 and no --tensor_parallel, or --preset cpu")


PRESETS = {"cpu": dict(cpu=True, gpus=1, gpu_gb=16.0, reserve_gb=1.2, micro_batch_tokens=1024, prompt_tokens=223,
                       max_new_tokens=400)}


def model_config(name: str) -> ModelConfig:
    *sizes, tied, bias = SHAPES[name]
    return ModelConfig(*sizes, head_dim=sizes[1] // sizes[4], tie_word_embeddings=tied, attention_bias=bias)


def parameters(model: ModelConfig) -> tuple[int, int]:
    """Count the parameters of the model and those of one block."""
    llama = without_weights(model)
    return tuple(sum(p.numel() for p in module.parameters()) for module in (llama, llama.model.layers[0]))


def activation_bytes(model: ModelConfig, config: Config, again: bool) -> int:
    """Bound what backward needs of one micro-batch of pairs; again: blocks are computed again.

    Per token of a block, both norms keep their float32 input and a bfloat16 copy of the output; attention q, k, v (k
    and v repeated for the mask of pairs), the output and H float32 sums; the MLP gate, silu(gate), up and their
    product. A CPU keeps float32 only, and a norm also its input divided by the mean square. Of the logits that exist at
    a time: float32 log-softmax, its gradient and that of the logits.
    """
    D, inner, H, V = model.hidden_size, model.intermediate_size, model.num_attention_heads, model.vocab_size
    pair = config.prompt_tokens + 2 * config.max_new_tokens + 1  # one row, which has the prompt once
    tokens, size = max(config.micro_batch_tokens, pair), bytes_of(config)
    block = 2 * (4 * D + 4 + size * D) + 4 * size * H * model.head_dim + 4 * H + 4 * size * inner
    block += 2 * 4 * D * config.cpu
    kept = model.num_hidden_layers * (4 * D if again else block) + 2 * 4 * D + size * pair  # and last norm, head, mask
    logits = min(tokens, max(512, LOGITS_AT_ONCE // V)) * V
    return tokens * kept + max(3 * 4 * logits, tokens * (again * block + 4 * D + 4 * inner))


def bytes_of(config: Config) -> int:
    """Bytes of a number in matrix products: float32 on a CPU, bfloat16 on GPUs."""
    return 4 if config.cpu else 2


def memory(model: ModelConfig, config: Config) -> dict[str, float]:
    """List what one GPU holds, in GB: parts, and sums with the reserve."""
    (P, block), n, head = parameters(model), config.gpus, model.vocab_size * model.hidden_size
    ends = head if model.tie_word_embeddings else 2 * head  # embedding and head, which FSDP2 gathers in float32
    split = model.num_hidden_layers * (block - 2 * model.hidden_size)  # norms, embedding and head stay complete
    size = bytes_of(config)
    cache = 2 * size * model.num_hidden_layers * model.num_key_value_heads * model.head_dim  # keys and values
    gb = {name: value / 1e9 for name, value in {
        "training state": 16 * P / n,  # float32 parameters, gradients and both moments of AdamW
        "gathered copies": 4 * block + 4 * ends if n > 1 else 0 if config.cpu else 2 * P,  # of one GPU: bfloat16
        "gradients on their way": 6 * max(block, head) + 4 * ends,
        "activations": activation_bytes(model, config, again=False),
        "checkpointed": activation_bytes(model, config, again=True),
        "sampler": size * (P - split + split / config.tensor_parallel),  # bfloat16
        "cache of 1,000 tokens": 1000 * cache / config.tensor_parallel}.items()}
    state = gb["training state"] + gb["gathered copies"] + gb["gradients on their way"] + config.reserve_gb
    return gb | {"to train": state + gb["activations"],
                 "with --checkpoint_activations": state + gb["checkpointed"],
                 "to sample": gb["sampler"] + config.reserve_gb}


def responses(needed: dict[str, float], config: Config) -> int:
    """Count the responses, in complete questions, that fit at once into 60 % of what is left, or on a CPU into 1 GiB
    (infra/hardware.py:cache_budget).

    A question has room for two prompts, since one is still needed when most of its samples have ended and the next
    begin. Caches grow by 128 columns.
    """
    prompt, own = (-(-tokens // 128) * 128 for tokens in (config.prompt_tokens, config.max_new_tokens))
    question = config.num_samples * own + min(2, config.num_samples) * prompt
    free = 2**30 / 1e9 if config.cpu else 0.6 * (config.gpu_gb - needed["to sample"])
    return max(0, int(free / needed["cache of 1,000 tokens"] * 1000 / question)) * config.num_samples


def main() -> None:
    config = parse_config(Config, PRESETS, __doc__)
    models = {name: model_config(name) if name in SHAPES else load_config(name)
              for name in ([config.model] if config.model else SHAPES)}
    needed = {name: memory(model, config) for name, model in models.items()}
    rows = [([name, f"{parameters(model)[0]:,}", f"{responses(needed[name], config):,}"], needed[name])
            for name, model in models.items()]
    where = "a CPU" if config.cpu else f"each of {config.gpus} GPUs"
    note = f"GB of {where}; responses at once with {config.gpu_gb:g} GB."
    print(make_table(["What fits", note, ".*:,.2f"], ["model", "parameters", "responses at once"], rows))


if __name__ == "__main__":
    run_script(main)
