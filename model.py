"""Llama, Mistral, Qwen: RMSNorm, rotary positions, grouped-query attention, SwiGLU, and a key-value cache.

Attribute names are Hugging Face's, so weight files load without a name map. One forward pass serves training
and sampling; the cache is an argument. Sequences are padded on the right, where causal attention cannot see
the padding. There is no dropout, so training and evaluation compute the same function.

Shapes: B sequences (R rows while sampling), T tokens, S cached tokens, V vocabulary, D width, H heads,
K key-value heads, G = H / K, h head width.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from losses import ROWS, entropies, in_chunks, target_logps

LOGITS_AT_ONCE = 2**24  # 64 MB in float32


@dataclass(frozen=True)
class ModelConfig:
    """The fields of a Hugging Face config.json that the forward pass needs, under their own names."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # only rope_type "llama3"
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on q, k and v (Qwen2)
    qk_norm: bool = field(default=False, repr=False)  # RMSNorm of each head of q and k (Qwen3); not in a model's hash
    sliding_window: int | None = None  # Mistral: how many tokens a token sees, itself included

    @property
    def max_length(self) -> int:
        """Longest sequence: attention here is full, so it must fit into sliding_window."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)


# --- rotary positions ------------------------------------------------------------------------------

def rope_frequencies(config: ModelConfig, device) -> Tensor:
    """Return radians per position (h/2,); Llama 3's scaling slows the long wavelengths down."""
    h = config.head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, h, 2, device=device).float() / h)
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, length = (config.rope_scaling[name] for name in (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    turns = length * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divide by factor; 1: leave as it is
    return frequencies * ((1 - smooth) / factor + smooth)


def rope_tables(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Turn positions (B or 1, T) into cosines and signed sines (B or 1, 1, T, h), as `rotate` needs them."""
    angles = positions[:, None, :, None].float() * rope_frequencies(config, positions.device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (a, b) = (x[i], x[i + h/2]) of each head to (a cos - b sin, b cos + a sin), in float32.

    This pairing is Hugging Face's; Meta's pairs are i, i + 1.
    """
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([b, a], -1), sin).to(x.dtype)


# --- attention -------------------------------------------------------------------------------------

def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (B, H, T, h), k and v (B, K, T, h) -> (B, H, T, h). Each token sees itself and those before it.

    mask (B, 1, T, T), 0 where a token may look and -inf elsewhere, replaces the causal mask.
    """
    B, H, T, h = q.shape
    K = k.shape[1]
    if q.is_cuda or q.dtype == torch.float32:
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
        k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))  # kernels that take a mask do not support groups
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
    # On a CPU in bfloat16 the fused backward pass takes two to ten times as long as plain products, up to some 300
    # tokens. Softmax of bfloat16 computes in float32 inside.
    if mask is None:
        mask = torch.full((T, T), -math.inf, device=q.device).triu(1)
    q = q.reshape(B, K, H // K * T, h) / math.sqrt(h)
    scores = (q @ k.mT).view(B, H, T, T)
    weights = (scores + mask.to(scores.dtype)).softmax(-1).view(B, K, H // K * T, T)
    return (weights @ v).view(B, H, T, h)


class KVCache:
    """Keys and values of R rows of different lengths. Optionally, N rows at a time continue a prompt that they share.

    A shared prompt is stored once. Decoding attends to it with one matrix product for all of its rows (bifurcated
    attention, arXiv 2403.08845), and to each row's own tokens separately; `cached_attention` merges the two. Attention
    looks at the first `window` columns and masks those beyond a row's length, so shapes stay the same while rows grow,
    end, and begin again with another prompt.
    """

    def __init__(self, config: ModelConfig, rows: int, columns: int, device, dtype,
                 prompts: "KVCache | None" = None, num_samples: int = 1) -> None:
        shape = (rows, config.num_key_value_heads, columns, config.head_dim)
        self.keys, self.values = ([torch.zeros(shape, device=device, dtype=dtype)
                                   for _ in range(config.num_hidden_layers)] for _ in range(2))
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # (R,) own tokens
        self.config, self.window, self.empty = config, columns, True
        self.prompts, self.num_samples = prompts, num_samples
        if prompts is not None:  # each row has a place in the grid of prompts (Q) times samples (N)
            self.place = torch.zeros_like(self.lengths)  # (R,): row -> place
            self.row_at = torch.zeros(len(prompts.lengths) * num_samples, dtype=torch.long, device=device)

    def begin(self, prefilled: "KVCache", lengths: Tensor, slots: Tensor, rows: Tensor) -> None:
        """Store n prefilled prompts of these lengths at slots (n,), and let N of the rows (n*N,) begin after each."""
        self.prompts.look_at(max(self.prompts.window, prefilled.window))
        for store, new in zip(self.prompts.keys + self.prompts.values, prefilled.keys + prefilled.values):
            store[slots, :, :prefilled.window] = new
        self.prompts.lengths[slots] = lengths
        places = (slots[:, None] * self.num_samples + torch.arange(self.num_samples, device=slots.device)).flatten()
        self.place[rows], self.row_at[places], self.lengths[rows] = places, rows, 0

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows (R',), and the prompts that they need."""
        self.change(lambda x: x[rows])
        self.lengths = self.lengths[rows]
        if self.prompts is not None:
            N, place = self.num_samples, self.place[rows]
            used, prompts = (place // N).unique(return_inverse=True)
            self.prompts.keep(used)
            self.place, self.row_at = prompts * N + place % N, self.row_at[:len(used) * N].zero_()
            self.row_at[self.place] = torch.arange(len(rows), device=rows.device)

    def look_at(self, columns: int) -> None:
        """Set the window, and allocate the columns that are missing.

        A CPU's cache grows as needed: attention to a part of a larger one would copy that part first (17 % slower).
        """
        if (more := columns - self.keys[0].shape[2]) > 0:
            self.change(lambda x: F.pad(x, (0, 0, 0, more)))
        self.window = columns

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace keys and values one tensor at a time, so that only one exists twice."""
        for tensors in (self.keys, self.values):
            for layer, x in enumerate(tensors):
                tensors[layer] = function(x)

    def advance(self, num_tokens: int) -> Tensor:
        """Reserve columns for the next T tokens of every row and build the masks; return their positions (R, T)."""
        columns = self.lengths[:, None] + torch.arange(num_tokens, device=self.lengths.device)  # (R, T)
        positions = columns
        if self.prompts is not None:
            positions = columns + self.prompts.lengths[self.place // self.num_samples][:, None]
            # an empty slot counts as one token long: its output is never used, but softmax over nothing would be NaN
            self.prompts.mask = beyond(self.prompts.lengths.clamp(min=1)[:, None] - 1, self.prompts.window)
        if columns.device.type == "cpu":  # reading a value would stall a GPU; `generate` checks before it begins
            check_length(int(positions.max()) + 1, self.config)
            if int(columns.max()) >= self.window:
                raise ValueError(f"the cache has {self.window} columns, and token {int(columns.max()) + 1} of a row "
                                 "does not fit: call look_at first")
        R, K, capacity, _ = self.keys[0].shape
        starts = torch.arange(R * K, device=columns.device).view(R, K, 1) * capacity
        self.cells = (starts + columns[:, None]).flatten()  # (R*K*T,): indices into R*K*capacity
        self.mask = beyond(columns, self.window)
        self.lengths += num_tokens
        self.prefill, self.empty = self.empty and self.prompts is None, False
        return positions

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new k, v (R, K, T, h); return all keys and values that attention looks at (R, K, window, h)."""
        for store, new in ((self.keys[layer], k), (self.values[layer], v)):
            store.view(-1, new.shape[-1]).index_copy_(0, self.cells, new.reshape(-1, new.shape[-1]))
        return self.seen(layer)

    def seen(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer][:, :, :self.window], self.values[layer][:, :, :self.window]

    def to_grid(self, x: Tensor) -> Tensor:
        """(R, K, G, w) -> (Q, K, N*G, w): put the rows of each prompt side by side."""
        return x.index_select(0, self.row_at).unflatten(0, (-1, self.num_samples)).transpose(1, 2).flatten(2, 3)

    def from_grid(self, grid: Tensor) -> Tensor:
        """Invert to_grid."""
        rows = grid.unflatten(2, (self.num_samples, -1)).transpose(1, 2).flatten(0, 1)
        return rows.index_select(0, self.place)


def beyond(last: Tensor, window: int) -> Tensor:
    """last (B, T) -> mask (B, 1, T, window) to add to scores: 0 up to column `last`, -inf beyond it."""
    hidden = torch.arange(window, device=last.device) > last[..., None]
    return torch.zeros(hidden.shape, device=last.device).masked_fill(hidden, -math.inf)[:, None]


def check_length(tokens: int, config: ModelConfig) -> None:
    if tokens > config.max_length:
        raise ValueError(f"{tokens} tokens exceed the {config.max_length} positions of this model "
                         f"(max_position_embeddings {config.max_position_embeddings}, sliding_window "
                         f"{config.sliding_window})")


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int) -> Tensor:
    """Let new tokens (q: (R, H, T, h); k, v: (R, K, T, h)) attend to everything before them."""
    R, H, T, h = q.shape
    K = k.shape[1]
    keys, values = cache.append(layer, k, v)
    if cache.prefill:
        return causal_attention(q, k, v)
    q = q.reshape(R, K, H // K * T, h)
    out, size = attend(q, keys, values, cache.mask.repeat(1, 1, H // K, 1) if T > 1 else cache.mask)
    if cache.prompts is not None:
        to_prompts = attend(cache.to_grid(q), *cache.prompts.seen(layer), cache.prompts.mask)
        prompt_out, prompt_size = map(cache.from_grid, to_prompts)
        out = out.lerp(prompt_out, 1 / (1 + (size - prompt_size).exp2()))  # weighted by their sums of exponentials
    return out.to(v.dtype).view(R, H, T, h)


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, K, M, h), keys and values (B, K, S, h) -> float32 outputs (B, K, M, h), and the log2 of the sums of
    exponentiated scores (B, K, M, 1), which tell how to merge outputs over two sets of keys."""
    # exp2, not exp: five times as fast on the CPU measured
    scores = torch.add(mask, q @ keys.mT, alpha=math.log2(math.e) / math.sqrt(q.shape[-1]))  # (B, K, M, S)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp2_()
    total = weights.sum(-1, keepdim=True)
    return (weights.to(values.dtype) @ values) / total, top + total.log2()


# --- the network -----------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # sums in float32; one kernel on a GPU, where both dtypes agree (FSDP gathers weights in bfloat16)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def for_products(x: Tensor) -> Tensor:
    """Cast x to autocast's dtype once, instead of once per projection."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = h = config.head_dim
        D, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(D, H * h, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, K * h, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, K * h, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * h, D, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(h, config.rms_norm_eps) if config.qk_norm else nn.Identity()
                                    for _ in range(2))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None,
                layer: int) -> Tensor:
        B, T, _ = x.shape
        x = for_products(x)
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, heads, T, h)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        out = causal_attention(q, k, v, mask) if cache is None else cached_attention(q, k, v, cache, layer)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = for_products(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None = None,
                cache: KVCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    checkpoint_activations = False  # keep only the input of each block and recompute the rest in the backward pass

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, cache: KVCache | None = None, positions: Tensor | None = None,
                segments: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> last hidden states (B, T, D). For positions and segments (B, T) see Llama.logps."""
        if cache is not None:
            positions = cache.advance(tokens.shape[1])
        elif positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        rope, x = rope_tables(self.config, positions), self.embed_tokens(tokens)
        mask = None if segments is None else for_products(segment_mask(segments))
        for i, layer in enumerate(self.layers):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rope, mask, cache, i)
        return self.norm(x)


def segment_mask(segments: Tensor) -> Tensor:
    """segments (B, T) -> (B, 1, T, T): 0 where j <= i and token j is in the prompt (segment 0) or in token i's segment,
    -inf elsewhere."""
    visible = (segments[:, None] == 0) | (segments[:, None] == segments[:, :, None])  # (B, i, j)
    return torch.zeros(visible.shape, device=segments.device).masked_fill(~visible.tril(), -math.inf)[:, None]


class Llama(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) -> float32 logits (B, T, V) of the token that follows each; ValueError if T is too long."""
        check_length(tokens.shape[1], self.config)
        return self.lm_head(self.model(tokens, cache)).float()

    def logps(self, tokens: Tensor, mask: Tensor, positions: Tensor | None = None,
              segments: Tensor | None = None) -> Tensor:
        """tokens (B, T), mask (B, T-1) -> float32 log-probs (B, T-1) of tokens[:, 1:], 0 where the mask is off.

        Column t belongs to token t + 1. The head sees only places under the mask, a chunk at a time: logits (B, T, V)
        are never built. All happens inside one call, since sharded weights are gathered only while a call runs.

        A row may be packed with a prompt and several responses to it: segments (B, T) are 0 for the prompt and 1, 2,
        ... for the responses, which see the prompt and themselves; positions (B, T) are those each would have alone.
        """
        return self.score(self.model(tokens, None, positions, segments), tokens, mask)

    def score(self, hidden: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """logps, where the last hidden states (B, T, D) are known already."""
        logps = in_chunks(lambda x, target: target_logps(self.lm_head(x), target), self.rows_at_once,
                          hidden[:, :-1][mask], tokens[:, 1:][mask])  # (tokens under the mask,)
        return logps.new_zeros(mask.shape).masked_scatter(mask, logps)

    @torch.no_grad()
    def entropy(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Entropy (B, T-1) in nats of each distribution of the next token; 0 where the mask is off."""
        found = in_chunks(lambda x: entropies(self.lm_head(x)), self.rows_at_once, hidden[:, :-1][mask])
        return found.new_zeros(mask.shape).masked_scatter(mask, found)

    @property
    def rows_at_once(self) -> int:
        """Tokens whose logits are in memory at the same time; at least a good size for a matrix product."""
        return max(512, LOGITS_AT_ONCE // self.config.vocab_size // ROWS * ROWS)


def pad(sequences: list[list[int]], device, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Pad sequences on the right into one tensor (B, T), T a multiple of `multiple`; also return their lengths (B,)."""
    lengths = [len(sequence) for sequence in sequences]
    width = -(-max(lengths) // multiple) * multiple
    rows = [sequence + [0] * (width - len(sequence)) for sequence in sequences]
    return torch.tensor(rows, device=device), torch.tensor(lengths, device=device)
