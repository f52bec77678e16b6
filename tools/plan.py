"""What fits and how long it takes, before a GPU is rented: bytes and seconds from formulas and stated rates.

    python -m tools.plan                                         # a table over the published shapes
    python -m tools.plan --model_shape llama-2-70b --gpus 64 --tensor_parallel 8    # one of them, line by line
    python -m tools.plan --model_shape llama-3-8b --measure      # with the rates of this machine

Flags that drivers have, too, mean the same and have the defaults of irpo.py and reft.py; --precision is bf16.
GB are 10^9 bytes. P is the number of trained parameters, n the number of GPUs that share one training state.

Formulas, which tests hold against the code itself: parameters; activations, logits and gradients at the peak of
a step, on one GPU under autocast and as parallel.shard splits a model; the weights and the cache of a sampler;
FLOPs. They suppose CUDA's fused attention and RMSNorm. No GPU was measured. Assumed, about FSDP2: two blocks are
whole at a time; transfers overlap with computing. Assumed, about machines, each with a flag: --tflops,
--memory_gb_s, --link_gb_s, --reserve_gb. The first three are about 40, 60 and 45 % of what NVIDIA's data sheet of
the H100 SXM states: 989 TFLOP/s of dense bfloat16, 3,350 GB/s of memory, 450 GB/s of NVLink in each direction.
Several nodes come near that if every GPU has a 400 Gbit/s adapter of its own; give a lower --link_gb_s if not.
Not counted: kernel launches (with few rows most of the time of sampling), copies to and from the host under
--cpu_offload and --offload_reference, gathering a copy to sample from, evaluation, reading and saving.
"""
import dataclasses
import math
import timeit
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import load_config
from infra.experiment import at_least, one_of, option, parse_config, run_script
from losses import ROWS
from model import WIDTHS, ModelConfig, logits_at_once


def shape(vocab, width, inner, layers, heads, kv_heads, positions, **more) -> ModelConfig:
    return ModelConfig(vocab, width, inner, layers, heads, kv_heads, width // heads, positions, **more)


QWEN2, TIED = dict(attention_bias=True), dict(tie_word_embeddings=True)
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
COLUMNS, CACHE_SHARE = 128, 0.6  # of sample.HABITS["cuda"] and sample.empty_rows, which tests compare


@dataclass(frozen=True)
class Config:
    model_shape: str = option("", f"{', '.join(SHAPES)}, or a model directory; empty: a table over all but toy")
    # machines
    gpus: int = option(8, "GPUs in all")
    gpus_per_node: int = option(8, "GPUs of one machine")
    gpu_gb: float = option(80.0, "memory of a GPU")
    reserve_gb: float = option(4.0, "of it for the CUDA context, NCCL, workspaces and fragmentation (assumed)")
    tflops: float = option(400.0, "10^12 operations per second that a GPU reaches in bfloat16 (assumed)")
    memory_gb_s: float = option(2000.0, "GB of its memory that a GPU reads per second (assumed)")
    link_gb_s: float = option(200.0, "GB that reach a GPU per second in an all-gather (assumed)")
    measure: bool = option(False, "measure --tflops and --memory_gb_s on this machine, by a product and a copy")
    # training
    method: str = option("irpo", "sft, irpo (an item is a pair), or reft, which has a reference and a value head")
    critic: str = option("shared", "of reft: shared, or separate, a second trained decoder")
    offload_reference: bool = option(False, "of reft: the reference is in the host's memory between its uses")
    checkpoint_activations: bool = option(False, "keep only the input of each block, and compute the rest again")
    shard_within_node: bool = option(False, "one training state in each node, replicated across nodes")
    cpu_offload: bool = option(False, "with several GPUs: weights, gradients and moments in the host's memory")
    batch_size: int = option(16, "items (sequences or pairs) of one optimizer step, over all GPUs")
    micro_batch_tokens: int = option(4096, "padded tokens of one forward pass on a GPU")
    # sampling, and the length of what is trained on
    prompt_tokens: int = option(256, "length of a prompt")
    max_new_tokens: int = option(512, "length of a response")
    num_samples: int = option(30, "responses to a prompt, which share its keys and values")
    batch_rows: int = option(1024, "responses sampled together, where they fit")
    tensor_parallel: int = option(1, "GPUs that hold one sampling model together")

    def __post_init__(self) -> None:
        one_of(self, method=("sft", "irpo", "reft"), critic=("shared", "separate"))
        at_least(self, 1, "gpus", "gpus_per_node", "batch_size", "micro_batch_tokens", "prompt_tokens",
                 "max_new_tokens", "num_samples", "batch_rows", "tensor_parallel")
        for name in ("gpu_gb", "tflops", "memory_gb_s", "link_gb_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} {getattr(self, name)}: must be above 0")
        if not 0 <= self.reserve_gb < math.inf:
            raise ValueError(f"--reserve_gb {self.reserve_gb}: must not be below 0")
        if self.model_shape and self.model_shape not in SHAPES and not Path(self.model_shape).is_dir():
            raise ValueError(f"--model_shape {self.model_shape}: no directory, nor one of {', '.join(SHAPES)}")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(f"--gpus {self.gpus}: must be a multiple of --gpus_per_node {self.gpus_per_node}")
        if self.gpus % self.tensor_parallel:
            raise ValueError(f"--tensor_parallel {self.tensor_parallel}: must divide --gpus {self.gpus}")
        if self.critic == "separate" and self.method != "reft":
            raise ValueError("--critic separate: only --method reft has a critic")

    @property
    def shards(self) -> int:
        """n, the GPUs that share one training state."""
        return min(self.gpus, self.gpus_per_node) if self.shard_within_node else self.gpus

    @property
    def length(self) -> int:
        """Positions of a prompt and a response."""
        return self.prompt_tokens + self.max_new_tokens

    @property
    def responses(self) -> int:
        """Response tokens of an item."""
        return self.max_new_tokens * (2 if self.method == "irpo" else 1)

    @property
    def tokens(self) -> int:
        """Of the row that holds an item. A pair is one: the prompt once, then its last token and a response twice."""
        return self.prompt_tokens + self.responses + (self.method == "irpo")

    @property
    def items(self) -> int:
        """Of an optimizer step on the busiest GPU."""
        return math.ceil(self.batch_size / self.gpus)

    @property
    def micro_batch(self) -> int:
        """Items of one forward pass; one is always possible."""
        return min(self.items, max(1, self.micro_batch_tokens // self.tokens))

    @property
    def scored(self) -> int:
        """Rows that the head sees in one forward pass: its response tokens, rounded up by losses.in_chunks."""
        return ROWS * math.ceil(self.micro_batch * self.responses / ROWS)


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
    block, embedding = matrices + biases + 2 * D, model.vocab_size * D
    head = 0 if model.tie_word_embeddings else embedding
    return Parameters(block, matrices, embedding, head, model.num_hidden_layers * block + embedding + head + D)


def block_bytes(model: ModelConfig, pairs: bool = False) -> int:
    """Bytes per token that backward needs of one block; pairs: whether rows hold two responses.

    Both norms keep their input in float32, which is the residual stream, and one number; their outputs are
    read as bfloat16 copies. Attention keeps q, k, v (of pairs k and v repeated), the output and H float32 sums;
    the MLP gate, silu(gate), up, and their product.
    """
    D, h = model.hidden_size, model.head_dim
    H, K = model.num_attention_heads, model.num_attention_heads if pairs else model.num_key_value_heads
    norms = 2 * (4 * D + 4 + 2 * D)
    attention = 2 * 2 * H * h + 2 * 2 * K * h + 4 * H
    return norms + attention + 4 * 2 * model.intermediate_size


def activation_bytes(model: ModelConfig, config: Config, decoders: int) -> tuple[int, int, int]:
    """Activations of a micro-batch at three moments of backward, one of which is the peak.

    At its start: all that blocks, the last norm and its readers keep, the bias of pairs, and of the tokens
    whose logits exist at a time the float32 log-softmax, its gradient and that of the logits. At the gradient
    of the head's weight: of those three the last, in bfloat16. In the last block: the gradients of the stream
    and of two bfloat16 activations of the MLP, and with --checkpoint_activations the block, computed again.
    """
    D, width = model.hidden_size, WIDTHS * math.ceil(config.tokens / WIDTHS)
    tokens, scored = config.micro_batch * width, config.scored
    bias, again = width if config.method == "irpo" else 0, config.checkpoint_activations
    block = block_bytes(model, bias > 0)
    kept = tokens * (decoders * model.num_hidden_layers * (4 * D if again else block) + 2 * bias)
    last = tokens * decoders * (4 * D + 4) + scored * 4 * D + (tokens * 4 * D if config.method == "reft" else 0)
    logits = min(scored, logits_at_once(model)) * model.vocab_size
    in_block = tokens * (again * block + 4 * D + 2 * 2 * model.intermediate_size)
    return kept + last + 3 * 4 * logits, kept + last + 2 * logits, kept + in_block


def cache_bytes(model: ModelConfig) -> int:
    """Bytes of the keys and values of one token in bfloat16."""
    return 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * 2


def block_flops(model: ModelConfig, tokens: int, length: int) -> int:
    """Operations of a forward pass of all blocks on `tokens` tokens in sequences of this length: 2 for each weight
    of a matrix and token; and 4 T H h in attention, which counts the half that the causal mask throws away."""
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
    rate: float  # sampled tokens per second of one sampler; 0 where nothing fits
    seconds: dict[str, float]  # of an optimizer step


def plan(model: ModelConfig, config: Config) -> Plan:
    """Raises ValueError where the sequences are longer than the model takes, or it cannot be split."""
    if config.length > model.max_length:
        raise ValueError(f"--prompt_tokens {config.prompt_tokens} and --max_new_tokens {config.max_new_tokens} are "
                         f"more than the {model.max_length} tokens that this model takes")
    if model.num_key_value_heads % config.tensor_parallel or model.intermediate_size % config.tensor_parallel:
        raise ValueError(f"--tensor_parallel {config.tensor_parallel} must divide {model.num_key_value_heads} "
                         f"key-value heads and {model.intermediate_size} hidden units")
    counts, decoders = parameters(model), 2 if config.critic == "separate" else 1
    trained = counts.total
    if config.method == "reft":  # with a value head; the separate critic has no other head
        trained += model.hidden_size + 1 + (decoders - 1) * (counts.total - counts.head)
    training = training_bytes(model, config, trained, decoders)
    split = model.num_hidden_layers * (counts.block - 2 * model.hidden_size)  # norms, embedding, head are whole
    sampling = {"weights": 2 * (counts.total - split + split / config.tensor_parallel),
                "reserve": config.reserve_gb * GB}
    if config.method == "reft":  # which samples between two steps
        sampling["training state"] = sum(training[name] for name in ("parameters", "moments", "reference"))
    row = row_bytes(model, config)
    free = CACHE_SHARE * (config.gpu_gb * GB - sum(sampling.values()))
    rows = max(0, math.floor(free / row / config.num_samples)) * config.num_samples
    return Plan(trained, training, sampling, row, rows, sampling_rate(model, config, rows),
                training_seconds(model, config, trained, decoders))


def training_bytes(model: ModelConfig, config: Config, trained: int, decoders: int) -> dict[str, float]:
    """By name, of one GPU, at the peak of a step."""
    counts, n, sharded = parameters(model), config.shards, config.gpus > 1
    state = 0 if config.cpu_offload and sharded else trained / n
    at_start, at_head, in_block = activation_bytes(model, config, decoders)
    head = model.vocab_size * model.hidden_size
    so_far = 2 * head * (config.scored > logits_at_once(model))  # gradient of earlier chunks
    # moments of backward, each with its activations and the gradients on their way: bfloat16, float32, reduced
    tied = 4 * head if model.tie_word_embeddings else 0  # waits for the embedding's to be added to
    if sharded:  # the outermost group is whole in float32, and its gradients are reduced last
        root = counts.head + decoders * counts.embedding
        whole = 2 * 2 * counts.block + 4 * root + 2 * head
        peaks = [(at_start, so_far), (at_head, so_far + 6 * head), (in_block, 6 * counts.block + 4 * head),
                 (0, 4 * root + 1.5 * tied)]
    else:  # autocast copies all matrices
        whole = 2 * (decoders * model.num_hidden_layers * counts.block_matrices + head)
        peaks = [(at_start, so_far), (at_head, so_far + 6 * head),
                 (in_block, 6 * model.hidden_size * model.intermediate_size + tied), (0, 4 * head + 2 * tied)]
    has_reference = config.method == "reft" and not (config.offload_reference or config.cpu_offload and sharded)
    return {
        "parameters": 4 * state,
        "gradients": 4 * state,
        "moments": 8 * state,
        "whole parameters": whole,
        "activations": at_start,
        "rest of backward": max(map(sum, peaks)) - at_start,
        "reference": has_reference * 2 * counts.total / n,
        "reserve": config.reserve_gb * GB}


def training_seconds(model: ModelConfig, config: Config, trained: int, decoders: int) -> dict[str, float]:
    """By name, of one optimizer step, and of scoring its batch without gradients."""
    counts, n, sharded = parameters(model), config.shards, config.gpus > 1
    width, scored = WIDTHS * math.ceil(config.tokens / WIDTHS), config.items * config.responses
    blocks = decoders * block_flops(model, config.items * width, width)
    head = head_flops(model, scored)
    chunks = config.scored > logits_at_once(model)
    flops = 3 * (blocks + head) + config.checkpoint_activations * blocks + chunks * head
    in_blocks = decoders * model.num_hidden_layers * counts.block  # bfloat16, the others float32
    gathered = (2 * in_blocks + 4 * (trained - in_blocks)) * (n - 1) / n
    nodes = config.gpus // n
    reduced = 4 * trained * (n - 1) / n + 2 * 4 * trained / n * (nodes - 1) / nodes  # also over the nodes
    passes = math.ceil(config.items / config.micro_batch)
    byte, operation = passes / config.link_gb_s / GB, 1 / config.tflops / 1e12  # seconds
    step = {"computing": flops * operation, "communicating": (2 * gathered + reduced) * byte,
            "AdamW": 0 if config.cpu_offload and sharded else 28 * trained / n / config.memory_gb_s / GB}
    step["optimizer step"] = max(step["computing"], step["communicating"]) + step["AdamW"]
    if config.method == "irpo":  # of the model itself, once
        step["scoring"] = max((blocks + head) * operation, gathered * byte)
    elif config.method == "reft":  # of policy, with entropies, and reference
        step["scoring"] = max(((1 + 1 / decoders) * blocks + 3 * head) * operation, 2 * gathered * byte)
    return step


def row_bytes(model: ModelConfig, config: Config) -> float:
    """Of the cache on each GPU for one response and its share of prompts, of which there is room for two per
    question: a prompt is still needed when most of its samples have ended, and the next begin."""
    prompt, own = (COLUMNS * math.ceil(n / COLUMNS) for n in (config.prompt_tokens, config.max_new_tokens))
    prompts = (1 if config.num_samples == 1 else 2) * prompt / config.num_samples
    return (own + prompts) * cache_bytes(model) / config.tensor_parallel


def sampling_rate(model: ModelConfig, config: Config, rows: int) -> float:
    """Tokens per second of one sampler while all rows go on: one step reads all weights and half-full caches,
    or, with many rows, takes as long as its products; then come two sums per block over the GPUs that share it."""
    rows, t = min(rows, max(1, config.batch_rows // config.num_samples) * config.num_samples), config.tensor_parallel
    weights = model.num_hidden_layers * parameters(model).block_matrices / t + model.vocab_size * model.hidden_size
    context = config.prompt_tokens / config.num_samples + config.max_new_tokens / 2  # to be read per row
    read = (2 * weights + rows * context * cache_bytes(model) / t) / config.memory_gb_s / GB
    flops = block_flops(model, rows, config.length) / t + head_flops(model, rows)
    summed = 2 * model.num_hidden_layers * rows * model.hidden_size * 2 * 2 * (t - 1) / t
    return rows / (max(read, flops / config.tflops / 1e12) + summed / config.link_gb_s / GB)


def fewest_gpus(model: ModelConfig, config: Config) -> int | None:
    """On how many GPUs training fits: 1, 2, 4, ... of a node, or up to 128 nodes. None: more do not help."""
    node = config.gpus_per_node
    for gpus in (*(2 ** i for i in range(node) if 2 ** i < node), *range(node, 129 * node, node)):
        fewer = dataclasses.replace(config, gpus=gpus, tensor_parallel=1)
        if sum(plan(model, fewer).training.values()) <= config.gpu_gb * GB:
            return gpus
    return None


def measured_rates() -> dict[str, float]:
    """TFLOP/s of a bfloat16 matrix product and GB/s of a copy (read and written) on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    block = torch.ones(64, size, size, device=device, dtype=torch.uint8)

    def fastest(work) -> float:
        wait = torch.cuda.synchronize if device == "cuda" else int
        return min(timeit.repeat(lambda: (work(), wait()), number=1, repeat=5))

    return {"tflops": 2 * size ** 3 / fastest(lambda: matrix @ matrix) / 1e12,
            "memory_gb_s": 2 * block.nbytes / fastest(block.clone) / GB}


# ---- printing ------------------------------------------------------------------------------------

HOW = {
    "parameters": "float32: 4 P / n",
    "gradients": "float32: 4 P / n",
    "moments": "AdamW's two, float32: 8 P / n",
    "whole parameters": "two blocks in bfloat16, embedding and head in float32; on one GPU a bfloat16 copy of all",
    "activations": "of one micro-batch, with the logits, when backward starts",
    "rest of backward": "what its peak takes beyond: a block computed again, whole gradients that are summed",
    "reference": "bfloat16: 2 bytes per parameter / n",
    "reserve": "assumed: CUDA context, NCCL, workspaces, fragmentation",
    "weights": "bfloat16: 2 bytes per parameter; --tensor_parallel splits the blocks",
    "training state": "reft: parameters, moments and reference stay",
    "computing": "6 FLOPs per matrix weight and token, 8 if blocks are computed again, and attention",
    "communicating": "per micro-batch 8 bytes per parameter of a block, 12 of others, over --link_gb_s",
    "AdamW": "28 P / n bytes of parameters, gradients, moments, over --memory_gb_s",
    "optimizer step": "the longer one of computing and communicating, and AdamW",
    "scoring": "log-probabilities of the batch without gradients: irpo once, reft of policy and reference",
}


def show(config: Config) -> None:
    """Print one plan, or the table of all."""
    if config.measure:
        config = dataclasses.replace(config, **measured_rates())
    if not config.model_shape:
        return print(table(config))
    model = SHAPES.get(config.model_shape) or load_config(Path(config.model_shape))
    try:
        print(page(model, config))
    except ValueError as error:
        raise SystemExit(f"{config.model_shape}: {error}") from None


def lines(values: dict[str, float], unit: float = 1.0) -> list[str]:
    return [f"  {name:<18}{value / unit:>12,.2f}  {HOW[name]}" for name, value in values.items()]


def memory(needed: dict[str, float], config: Config) -> list[str]:
    """Lines of GB, and whether they fit."""
    total = sum(needed.values()) / GB
    word = "fits" if total <= config.gpu_gb else "does not fit"
    return [*lines(needed, GB), f"  {'sum':<18}{total:>12,.2f}  {word} into {config.gpu_gb:g} GB"]


def page(model: ModelConfig, config: Config) -> str:
    """One plan as text."""
    result, counts = plan(model, config), parameters(model)
    out = [f"{config.model_shape}: {counts.total:,} parameters, {model.num_hidden_layers} blocks of {counts.block:,}; "
           f"P = {result.trained:,} are trained",
           f"GPUs: {config.gpus}, n = {config.shards}; {config.method}; items of {config.tokens:,} tokens: "
           f"{config.items} per step and GPU, {config.micro_batch} at a time",
           f"{config.tflops:.3g} TFLOP/s and {config.memory_gb_s:.4g} GB/s of memory "
           f"({'measured here' if config.measure else 'assumed'}), {config.link_gb_s:.4g} GB/s of network (assumed)",
           "", "training, GB per GPU", *memory(result.training, config)]
    if config.cpu_offload and config.gpus > 1:
        per_node = 16 * result.trained / config.shards * min(config.gpus, config.gpus_per_node)
        out.append(f"  {'on the host':<18}{per_node / GB:>12,.2f}  16 P / n for each GPU of a node")
    none = "none, more do not help; see --checkpoint_activations, --micro_batch_tokens, --shard_within_node"
    out.append(f"fewest GPUs that fit: {fewest_gpus(model, config) or none}")
    out += ["", "sampling, GB per GPU", *memory(result.sampling, config),
            f"  {'a response':<18}{result.row / GB:>12.6f}  its cache and its share of the prompts', with room to grow",
            f"responses that fit at once: {result.rows:,} ({config.num_samples} to a prompt) into {CACHE_SHARE:.0%} of "
            "what is left", "", "seconds", *lines(result.seconds)]
    if result.rows:
        out.append(f"sampled tokens per second, at most: {result.rate:,.0f} of a sampler, "
                   f"{result.rate * config.gpus / config.tensor_parallel:,.0f} of all")
    if config.batch_size < config.gpus:
        out.append(f"warning: --batch_size {config.batch_size} leaves {config.gpus - config.batch_size} GPUs idle")
    return "\n".join(out)


def table(config: Config) -> str:
    """All published shapes, in Markdown."""
    head = ["model", "parameters", "training state, GB", f"on each of {config.gpus} GPUs", "again",
            f"fewest GPUs of {config.gpu_gb:g} GB", "again", "s per step", "to sample, GB",
            "cache, MB per 1,000 tokens", "responses at once"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    ways = [dataclasses.replace(config, checkpoint_activations=again) for again in (False, True)]
    for name, model in list(SHAPES.items())[1:]:  # the first is the toy world's
        try:
            result = plan(model, config)
        except ValueError as error:
            rows.append([name, str(error), *[""] * (len(head) - 2)])
            continue
        rows.append([name, f"{parameters(model).total:,}", f"{16 * result.trained / GB:,.1f}",
                     *(f"{sum(plan(model, way).training.values()) / GB:,.1f}" for way in ways),
                     *(str(fewest_gpus(model, way) or "none") for way in ways),
                     f"{result.seconds['optimizer step']:.2f}", f"{sum(result.sampling.values()) / GB:,.1f}",
                     f"{cache_bytes(model) / 1e3:,.0f}", f"{result.rows:,}" if result.rows else "none"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)



def main() -> None:
    show(parse_config(Config, {}, __doc__))


if __name__ == "__main__":
    run_script(main)
