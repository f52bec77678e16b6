"""What fits and how long it takes, before a GPU is rented: bytes and seconds from formulas and stated rates.

    python train.py --plan                                         # a table over the published shapes
    python train.py --plan --model_shape llama-2-70b --gpus 64     # one of them, line by line
    python train.py --plan --model_shape runs/base-s0/model --prompt_tokens 64 --max_new_tokens 96
    python train.py --plan --model_shape llama-3-8b --measure      # with the rates of this machine

GB are 10^9 bytes. P is the number of trained parameters, n the number of GPUs that share one training state.

Formulas, which tests hold against the model itself: parameters; activations, logits and gradients at the peak of
a step, on one GPU under autocast and under FSDP2; the cache of keys and values; FLOPs. They suppose CUDA's fused
attention. No GPU was measured.
Assumed, about FSDP2: each block is a group and is freed after use; two blocks are whole at a time, embedding
and head always, in bfloat16; gradients are reduced in float32 in every micro-batch; transfers overlap with
computing.
Assumed, about machines, each with a flag: --tflops, --memory_gb_s, --link_gb_s, --reserve_gb. The first three
are about 40, 60 and 45 % of what NVIDIA's data sheet of the H100 SXM states: 989 TFLOP/s of dense bfloat16, 3,350
GB/s of memory, 450 GB/s of NVLink in each direction. Several nodes come near that if every GPU has a 400 Gbit/s
adapter of its own; give a lower --link_gb_s if not.
Not counted: kernel launches (with few rows most of the time of sampling), copies to and from the host under
--offload, gathering a copy to sample from, evaluation, reading and saving.
"""
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import load_config
from experiment import at_least, one_of, option
from model import ModelConfig


def shape(vocab: int, width: int, inner: int, layers: int, heads: int, kv_heads: int, positions: int,
          **more) -> ModelConfig:
    return ModelConfig(vocab, width, inner, layers, heads, kv_heads, width // heads, positions, **more)


QWEN2 = dict(attention_bias=True)
TIED = dict(tie_word_embeddings=True)
SHAPES = {  # as in their config.json; the rotary embedding's settings do not matter here
    "toy": shape(288, 128, 336, 4, 4, 2, 256),
    "qwen2-0.5b": shape(151936, 896, 4864, 24, 14, 2, 131072, **TIED, **QWEN2),
    "tinyllama-1.1b": shape(32000, 2048, 5632, 22, 32, 4, 2048),
    "llama-3.2-1b": shape(128256, 2048, 8192, 16, 32, 8, 131072, **TIED),
    "qwen2-1.5b": shape(151936, 1536, 8960, 28, 12, 2, 131072, **TIED, **QWEN2),
    "llama-3.2-3b": shape(128256, 3072, 8192, 28, 24, 8, 131072, **TIED),
    "llama-2-7b": shape(32000, 4096, 11008, 32, 32, 32, 4096),
    "mistral-7b": shape(32000, 4096, 14336, 32, 32, 8, 32768, sliding_window=4096),
    "qwen2-7b": shape(152064, 3584, 18944, 28, 28, 4, 131072, **QWEN2),
    "llama-3-8b": shape(128256, 4096, 14336, 32, 32, 8, 8192),
    "llama-2-13b": shape(32000, 5120, 13824, 40, 40, 40, 4096),
    "llama-2-70b": shape(32000, 8192, 28672, 80, 64, 8, 4096),
    "llama-3-70b": shape(128256, 8192, 28672, 80, 64, 8, 8192),
}
GB = 1e9


@dataclass(frozen=True)
class Config:
    plan: bool = option(True, "print a plan; without this flag, train.py trains")
    model_shape: str = option("", f"{', '.join(SHAPES)}, or a model directory; empty: a table over all but toy")
    # machines
    gpus: int = option(8, "GPUs in all")
    gpus_per_node: int = option(8, "GPUs of one machine")
    gpu_gb: float = option(80.0, "memory of a GPU")
    reserve_gb: float = option(4.0, "of it for the CUDA context, NCCL, workspaces and fragmentation (assumed)")
    tflops: float = option(400.0, "10^12 operations per second that a GPU reaches in bfloat16 (assumed)")
    memory_gb_s: float = option(2000.0, "GB of its memory that a GPU reads per second (assumed)")
    link_gb_s: float = option(200.0, "GB that reach a GPU per second in an all-gather (assumed)")
    measure: bool = option(False, "measure a matrix product and a copy on this machine, in place of --tflops "
                           "and --memory_gb_s")
    # training
    method: str = option("irpo", "sft, irpo, or reft, which keeps a whole bfloat16 reference and has a value head")
    critic: str = option("shared", "of reft: shared, or separate, a second trained decoder")
    shard: str = option("all", "all: one training state over all GPUs; node: one in each node (hybrid sharding)")
    offload: bool = option(False, "parameters, gradients and moments on the host, as FSDP2's CPUOffloadPolicy")
    checkpointing: bool = option(True, "keep only the input of a block, and compute the block again in backward")
    head_tokens: int = option(0, "tokens whose logits exist at a time, computed again in backward; 0: all of a "
                              "micro-batch, once")
    batch_size: int = option(64, "sequences of an optimizer step over all GPUs; a pair of irpo is two")
    micro_batch_tokens: int = option(8192, "padded tokens of one forward pass on a GPU")
    # sampling, and the length of what is trained on
    prompt_tokens: int = option(256, "length of a prompt")
    max_new_tokens: int = option(256, "length of a response")
    num_samples: int = option(30, "responses to a prompt, which share its keys and values")
    batch_rows: int = option(1024, "responses sampled together on a GPU, where they fit")

    def __post_init__(self) -> None:
        one_of(self, method=("sft", "irpo", "reft"), critic=("shared", "separate"), shard=("all", "node"))
        at_least(self, 1, "gpus", "gpus_per_node", "batch_size", "micro_batch_tokens", "prompt_tokens",
                 "max_new_tokens", "num_samples", "batch_rows")
        at_least(self, 0, "head_tokens")
        for name in ("gpu_gb", "tflops", "memory_gb_s", "link_gb_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} {getattr(self, name)}: must be above 0")
        if not 0 <= self.reserve_gb < math.inf:
            raise ValueError(f"--reserve_gb {self.reserve_gb}: must not be below 0")
        if self.model_shape and self.model_shape not in SHAPES and not Path(self.model_shape).is_dir():
            raise ValueError(f"--model_shape {self.model_shape}: no such directory; known shapes are "
                             f"{', '.join(SHAPES)}")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(f"--gpus {self.gpus}: several nodes are whole nodes, a multiple of --gpus_per_node "
                             f"{self.gpus_per_node}")
        if self.critic == "separate" and self.method != "reft":
            raise ValueError("--critic separate: only --method reft has a critic")

    @property
    def shards(self) -> int:
        """n, the GPUs that share one training state."""
        return self.gpus if self.shard == "all" else min(self.gpus, self.gpus_per_node)

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.max_new_tokens

    @property
    def sequences(self) -> int:
        """Sequences of an optimizer step on the busiest GPU."""
        return math.ceil(self.batch_size / self.gpus)

    @property
    def micro_batch(self) -> int:
        """Sequences of one forward pass; one is always possible."""
        return min(self.sequences, max(1, self.micro_batch_tokens // self.length))


# ---- formulas of the model -----------------------------------------------------------------------

@dataclass(frozen=True)
class Parameters:
    """How many: all of a block, a block's matrices alone, the embedding, the head (0 if tied), everything."""
    block: int
    block_matrices: int
    embedding: int
    head: int
    total: int


def parameters(model: ModelConfig) -> Parameters:
    D, h = model.hidden_size, model.head_dim
    H, K = model.num_attention_heads, model.num_key_value_heads
    matrices = 2 * D * H * h + 2 * D * K * h + 3 * D * model.intermediate_size
    biases = (H + 2 * K) * h if model.attention_bias else 0
    block = matrices + biases + 2 * D
    embedding = model.vocab_size * D
    head = 0 if model.tie_word_embeddings else embedding
    return Parameters(block, matrices, embedding, head, model.num_hidden_layers * block + embedding + head + D)


def block_bytes(model: ModelConfig, stream: int) -> int:
    """Bytes per token that backward needs of one block; `stream` are those of a number in the residual stream.

    Under autocast the stream is float32 (4) and each of the five linear layers that read width D keeps
    a bfloat16 copy of its own. With FSDP2's bfloat16 parameters it is bfloat16 (2) and read as it is.
    Both norms keep their input in float32 and, to learn the weight, what they multiply by it. Attention
    keeps q, k, v, the output twice (once as o_proj's input) and H float32 sums; the MLP gate,
    silu(gate), up, and their product.
    """
    D, h = model.hidden_size, model.head_dim
    H, K = model.num_attention_heads, model.num_key_value_heads
    norms = 2 * (4 * D + 4 + stream * D)
    inputs = (5 if stream == 4 else 2) * 2 * D
    attention = 3 * 2 * H * h + 2 * 2 * K * h + 4 * H
    return norms + inputs + attention + 4 * 2 * model.intermediate_size


def activation_bytes(model: ModelConfig, tokens: int, head_tokens: int, checkpointing: bool, stream: int,
                     decoders: int = 1) -> tuple[int, int, int]:
    """Activations of a micro-batch at three moments of backward, one of which is the peak.

    At its start: all that blocks and the last norm keep, and of head_tokens tokens the float32
    log-softmax, its gradient and that of the logits. At the gradient of the head's weight: of those
    three the last, in bfloat16. In the last block: the gradients of the stream and of two bfloat16
    activations of the MLP, and with checkpointing the block itself, computed again.
    """
    D, block = model.hidden_size, block_bytes(model, stream)
    kept = tokens * decoders * model.num_hidden_layers * (stream * D if checkpointing else block)
    norm = tokens * decoders * (4 * D + 4 + stream * D + 2 * D)  # with the bfloat16 copy that the head reads
    logits = head_tokens * model.vocab_size
    in_block = tokens * (checkpointing * block + stream * D + 2 * 2 * model.intermediate_size)
    return kept + norm + 3 * 4 * logits, kept + norm + 2 * logits, kept + in_block


def cache_bytes(model: ModelConfig) -> int:
    """Bytes of the keys and values of one token in bfloat16."""
    return 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * 2


def block_flops(model: ModelConfig, tokens: int, length: int) -> int:
    """Operations of a forward pass of all blocks on `tokens` tokens in sequences of this length.

    2 for each weight of a matrix and token; and 4 T H h in attention, which counts the half that the
    causal mask throws away, as is usual.
    """
    attention = 4 * length * model.num_attention_heads * model.head_dim
    return tokens * model.num_hidden_layers * (2 * parameters(model).block_matrices + attention)


def head_flops(model: ModelConfig, tokens: int) -> int:
    return tokens * 2 * model.vocab_size * model.hidden_size


# ---- the plan ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Plan:
    """What one GPU needs: bytes by name, and seconds by name."""
    trained: int  # P
    training: dict[str, float]
    sampling: dict[str, float]  # beside the cache
    row: float  # bytes of one response that is sampled
    rows: int  # responses that fit at once, in whole questions
    rate: float  # sampled tokens per second; 0 where nothing fits
    seconds: dict[str, float]  # of an optimizer step


def plan(model: ModelConfig, config: Config) -> Plan:
    """Raises ValueError where the sequences are longer than the model takes."""
    if config.length > model.max_length:
        raise ValueError(f"--prompt_tokens {config.prompt_tokens} and --max_new_tokens {config.max_new_tokens} are "
                         f"more than the {model.max_length} tokens that this model takes")
    counts, decoders = parameters(model), 2 if config.critic == "separate" else 1
    trained = counts.total
    if config.method == "reft":  # with a value head; the separate critic has no other head
        trained += model.hidden_size + 1 + (decoders - 1) * (counts.total - counts.head)
    training = training_bytes(model, config, trained, decoders)
    sampling = {"weights": 2 * counts.total, "reserve": config.reserve_gb * GB}
    if config.method == "reft":  # which samples between two steps
        sampling["training state"] = sum(training[name] for name in ("parameters", "moments", "reference"))
    row = row_bytes(model, config)
    free = config.gpu_gb * GB - sum(sampling.values())
    rows = max(0, math.floor(free / row / config.num_samples)) * config.num_samples
    return Plan(trained, training, sampling, row, rows, sampling_rate(model, config, rows),
                training_seconds(model, config, trained, decoders))


def training_bytes(model: ModelConfig, config: Config, trained: int, decoders: int) -> dict[str, float]:
    """By name, of one GPU, at the peak of a step."""
    counts, n = parameters(model), config.shards
    state = 0 if config.offload else trained / n
    tokens, sharded = config.micro_batch * config.length, n > 1 or config.offload
    at_start, at_head, in_block = activation_bytes(model, tokens, min(tokens, config.head_tokens or tokens),
                                                   config.checkpointing, 2 if sharded else 4, decoders)
    head, root = model.vocab_size * model.hidden_size, counts.head + decoders * counts.embedding
    so_far = 2 * head if config.head_tokens else 0  # gradient of the head from the chunks before
    # moments of backward, each with its activations and the gradients that are on their way
    if sharded:  # these are bfloat16, with a float32 copy while a group is reduced, the root last
        whole = 2 * (2 * counts.block + root)
        peaks = [(at_start, so_far), (at_head, 2 * head), (in_block, 6 * counts.block + 2 * root), (0, 6 * root)]
    else:  # autocast copies all matrices, and a gradient is bfloat16, then float32, then added
        whole = 2 * (decoders * model.num_hidden_layers * counts.block_matrices + head)
        tied = 4 * head if model.tie_word_embeddings else 0  # waits for the embedding's to be added to
        peaks = [(at_start, so_far), (at_head, 6 * head),
                 (in_block, 6 * model.hidden_size * model.intermediate_size + tied), (0, 4 * head + 2 * tied)]
    return {
        "parameters": 4 * state,
        "gradients": 4 * state,
        "moments": 8 * state,
        "whole parameters": whole,
        "activations": at_start,
        "rest of backward": max(map(sum, peaks)) - at_start,
        "reference": 2 * counts.total if config.method == "reft" else 0,
        "reserve": config.reserve_gb * GB}


def training_seconds(model: ModelConfig, config: Config, trained: int, decoders: int) -> dict[str, float]:
    """By name, of one optimizer step, and of scoring its batch without gradients."""
    tokens, n = config.sequences * config.length, config.shards
    blocks = decoders * block_flops(model, tokens, config.length)
    head = head_flops(model, tokens)
    flops = 3 * (blocks + head) + config.checkpointing * blocks + bool(config.head_tokens) * head
    moved = (2 + 2 + 4) * trained * (n - 1) / n  # gathered in forward and backward, gradients reduced
    nodes = config.gpus // n
    moved += 2 * 4 * trained / n * (nodes - 1) / nodes  # and summed over the nodes
    moved *= math.ceil(config.sequences / config.micro_batch)
    seconds = {"computing": flops / config.tflops / 1e12, "communicating": moved / config.link_gb_s / GB,
               "AdamW": 0 if config.offload else 28 * trained / n / config.memory_gb_s / GB}
    seconds["optimizer step"] = max(seconds["computing"], seconds["communicating"]) + seconds["AdamW"]
    if config.method != "sft":  # irpo: of the model itself, once; reft: of policy, critic and reference
        scored = blocks + head if config.method == "irpo" else (1 + 1 / decoders) * blocks + 2 * head
        seconds["scoring"] = scored / config.tflops / 1e12
    return seconds


def row_bytes(model: ModelConfig, config: Config) -> float:
    """Of one response while it is sampled, with its share of the prompt.

    When rows have finished, the others (up to nine tenths) move to a new cache while the old one is
    there. Logits, the same by temperature, and probabilities are float32, their sums float64, twice.
    """
    own = 1.9 * config.max_new_tokens
    return (own + config.prompt_tokens / config.num_samples) * cache_bytes(model) + (3 * 4 + 2 * 8) * model.vocab_size


def sampling_rate(model: ModelConfig, config: Config, rows: int) -> float:
    """Tokens per second of one GPU while all rows go on: one step reads all weights and half-full caches,
    or, with many rows, takes as long as its products."""
    rows = min(rows, max(1, config.batch_rows // config.num_samples) * config.num_samples)
    weights = model.num_hidden_layers * parameters(model).block_matrices + model.vocab_size * model.hidden_size
    context = config.prompt_tokens / config.num_samples + config.max_new_tokens / 2  # to be read per row
    read = (2 * weights + rows * context * cache_bytes(model)) / config.memory_gb_s / GB
    flops = block_flops(model, rows, config.length) + head_flops(model, rows)
    return rows / max(read, flops / config.tflops / 1e12)


def fits(bytes_by_name: dict[str, float], config: Config) -> bool:
    return sum(bytes_by_name.values()) <= config.gpu_gb * GB


def fewest_gpus(model: ModelConfig, config: Config) -> int | None:
    """On how many GPUs training fits: 1, 2, 4, ... of a node, or up to 128 nodes. None: more do not help."""
    node = config.gpus_per_node
    within = [2 ** i for i in range(node.bit_length()) if 2 ** i < node]
    for gpus in (*within, *range(node, 129 * node, node)):
        if fits(plan(model, dataclasses.replace(config, gpus=gpus)).training, config):
            return gpus
    return None


def measured_rates() -> dict[str, float]:
    """TFLOP/s of a bfloat16 matrix product and GB/s of a copy (read and written) on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    block = torch.ones(64, size, size, device=device, dtype=torch.uint8)

    def fastest(work) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    return {"tflops": 2 * size ** 3 / fastest(lambda: matrix @ matrix) / 1e12,
            "memory_gb_s": 2 * block.nbytes / fastest(block.clone) / GB}


# ---- printing ------------------------------------------------------------------------------------

HOW = {
    "parameters": "float32: 4 P / n",
    "gradients": "float32: 4 P / n",
    "moments": "AdamW's two, float32: 8 P / n",
    "whole parameters": "bfloat16: two blocks, embedding and head; without FSDP (n = 1) a copy of all matrices",
    "activations": "of one micro-batch, with the logits, when backward starts",
    "rest of backward": "what its peak takes beyond: a block computed again, whole gradients that are summed",
    "reference": "bfloat16: 2 bytes per parameter, not sharded",
    "reserve": "assumed: CUDA context, NCCL, workspaces, fragmentation",
    "weights": "bfloat16: 2 bytes per parameter, a whole copy on each GPU",
    "training state": "reft: parameters, moments and reference stay",
    "computing": "6 FLOPs per matrix weight and token, 8 with checkpointing, and attention",
    "communicating": "8 P (n - 1) / n bytes per micro-batch, over --link_gb_s",
    "AdamW": "28 P / n bytes of parameters, gradients, moments, over --memory_gb_s",
    "optimizer step": "the longer one of computing and communicating, and AdamW",
    "scoring": "log-probabilities of the batch without gradients: irpo once, reft of policy and reference",
}


def show(config: Config) -> None:
    """Print one plan, or the table of all."""
    if config.measure:
        config = dataclasses.replace(config, **measured_rates())
    if not config.model_shape:
        print(table(config))
        return
    model = SHAPES.get(config.model_shape) or load_config(Path(config.model_shape))
    try:
        print(page(model, config))
    except ValueError as error:
        raise SystemExit(f"{config.model_shape}: {error}") from None


def lines(values: dict[str, float], unit: float = 1.0) -> list[str]:
    return [f"  {name:<18}{value / unit:>12,.2f}  {HOW[name]}" for name, value in values.items()]


def verdict(needed: dict[str, float], config: Config) -> str:
    total = sum(needed.values()) / GB
    word = "fits" if fits(needed, config) else "does not fit"
    return f"  {'sum':<18}{total:>12,.2f}  {word} into {config.gpu_gb:g} GB"


def page(model: ModelConfig, config: Config) -> str:
    """One plan as text."""
    result, counts = plan(model, config), parameters(model)
    fewest = fewest_gpus(model, config)
    measured = "measured here" if config.measure else "assumed"
    out = [f"{config.model_shape}: {counts.total:,} parameters, {model.num_hidden_layers} blocks of {counts.block:,}; "
           f"P = {result.trained:,} are trained",
           f"GPUs: {config.gpus}, n = {config.shards}; {config.method}; sequences of {config.length} tokens: "
           f"{config.sequences} per step and GPU, {config.micro_batch} at a time",
           f"{config.tflops:.3g} TFLOP/s and {config.memory_gb_s:.4g} GB/s of memory ({measured}), "
           f"{config.link_gb_s:.4g} GB/s of network (assumed)",
           "", "training, GB per GPU", *lines(result.training, GB), verdict(result.training, config)]
    if config.offload:
        per_node = 16 * result.trained / config.shards * min(config.gpus, config.gpus_per_node)
        out.append(f"  {'on the host':<18}{per_node / GB:>12,.2f}  16 P / n for each GPU of a node")
    out.append("fewest GPUs that fit: " + (str(fewest) if fewest else "none, more do not help; see --checkpointing, "
                                           "--offload, --micro_batch_tokens, --head_tokens, --shard"))
    out += ["", "sampling, GB per GPU", *lines(result.sampling, GB), verdict(result.sampling, config),
            f"  {'a token':<18}{cache_bytes(model) / GB:>12.6f}  keys and values: 4 L K h bytes",
            f"  {'a response':<18}{result.row / GB:>12.6f}  its cache, its share of the prompt's, and its logits",
            f"responses that fit at once: {result.rows:,} ({config.num_samples} to a prompt)"]
    out += ["", "seconds", *lines(result.seconds)]
    if result.rows:
        out.append(f"sampled tokens per second, at most: {result.rate:,.0f} of a GPU, "
                   f"{result.rate * config.gpus:,.0f} of all")
    if config.batch_size < config.gpus:
        out.append(f"warning: a step of {config.batch_size} sequences leaves {config.gpus - config.batch_size} GPUs "
                   "without any; raise --batch_size")
    return "\n".join(out)


def table(config: Config) -> str:
    """All published shapes, in Markdown."""
    head = ["model", "parameters", "training state, GB", f"on each of {config.gpus} GPUs", "with every activation",
            f"fewest GPUs of {config.gpu_gb:g} GB", "s per step", "to sample, GB", "cache, MB per 1,000 tokens",
            "responses at once"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, model in SHAPES.items():
        if name == "toy":
            continue
        try:
            result = plan(model, config)
        except ValueError:
            rows.append([name, f"takes {model.max_length:,} tokens", *[""] * (len(head) - 2)])
            continue
        every = plan(model, dataclasses.replace(config, checkpointing=False))
        each, more = (sum(p.training.values()) / GB for p in (result, every))
        rows.append([name, f"{parameters(model).total:,}", f"{16 * result.trained / GB:,.1f}", f"{each:,.1f}",
                     f"{more:,.1f}", str(fewest_gpus(model, config) or "none"),
                     f"{result.seconds['optimizer step']:.2f}", f"{sum(result.sampling.values()) / GB:,.1f}",
                     f"{cache_bytes(model) / 1e3:,.0f}", f"{result.rows:,}" if result.rows else "none"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
