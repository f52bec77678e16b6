"""Llama, written out: RMSNorm, rotary positions, grouped-query attention, SwiGLU, explicit cache.

Attribute names are those of Hugging Face's Llama, so weight files need no name map. One forward
serves training and cached decoding: the cache is an argument, never module state. Left out on
purpose: dropout (no paper here trains with it, and without it train and eval are one function) and
left padding (sequences are padded on the right, where causal attention cannot see the padding).

Shapes: B sequences, R rows being decoded, T tokens, S cached tokens, V vocabulary, D width,
H heads, K key-value heads, G = H / K, h head width.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses import entropies, in_chunks, target_logps

LOGITS_AT_ONCE = 2**24  # 64 MB in float32
WIDTHS = 16  # sequences without a cache are computed at multiples of this


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
    sliding_window: int | None = None  # Mistral's: tokens that a token sees, itself included

    @property
    def max_length(self) -> int:
        """Most tokens of one sequence. Attention here has no window: it is right as long as all fits into one."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)


class KVCache:
    """Keys and values of R rows that decode in step, behind prompts that are stored only once.

    A prefill fills a plain cache with Q prompts. `fork` then opens N rows per prompt that share its
    keys and values: attention to the prompt is one matrix product for all rows of a question (the
    idea of bifurcated attention, arXiv 2403.08845), and only the rows' own tokens are stored per row.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, device, dtype) -> None:
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads)
        # keys lie transposed, as the product with one query row per step reads them
        self.keys = torch.zeros(*shape, config.head_dim, capacity, device=device, dtype=dtype)
        self.values = torch.zeros(*shape, capacity, config.head_dim, device=device, dtype=dtype)
        self.length = 0  # own tokens so far, the same for every row
        self.prompt: KVCache | None = None
        self.prompt_lengths: Tensor | None = None  # (R,)
        self.slots: Tensor | None = None  # (R,) place of each row in the (Q, N) grid
        self.num_samples = 1

    def fork(self, config: ModelConfig, lengths: Tensor, num_samples: int, capacity: int) -> "KVCache":
        """num_samples empty rows for each of this cache's Q prompts, whose true lengths are given."""
        rows = lengths.numel() * num_samples
        child = KVCache(config, rows, capacity, self.keys.device, self.keys.dtype)
        child.prompt, child.num_samples = self, num_samples
        child.prompt_lengths = lengths.repeat_interleave(num_samples)
        child.slots = torch.arange(rows, device=lengths.device)
        return child

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only; the others have finished."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.prompt_lengths, self.slots = self.prompt_lengths[rows], self.slots[rows]

    def positions(self, num_tokens: int) -> Tensor:
        """(R or 1, T): rotary positions of the next tokens."""
        new = torch.arange(self.length, self.length + num_tokens, device=self.keys.device)[None]
        return new if self.prompt is None else new + self.prompt_lengths[:, None]

    def total(self, num_tokens: int) -> int:
        """Length of the longest sequence, its prompt included, once the next tokens are in."""
        return self.length + num_tokens + (0 if self.prompt is None else self.prompt.length)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (R, K, T, h); return all own keys (R, K, h, S) and values (R, K, S, h)."""
        end = self.length + k.shape[2]
        self.keys[layer, ..., self.length:end] = k.mT
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, ..., :end], self.values[layer, :, :, :end]

    def to_grid(self, x: Tensor) -> Tensor:
        """(R, K, G, w) of the rows that are left -> (Q, K, N*G, w), finished rows as zeros."""
        rows, K, G, width = x.shape
        N = self.num_samples
        Q = self.prompt.keys.shape[1]
        grid = x.new_zeros(Q * N, K, G, width)
        grid[self.slots] = x
        return grid.view(Q, N, K, G, width).transpose(1, 2).reshape(Q, K, N * G, width)

    def from_grid(self, grid: Tensor) -> Tensor:
        """Inverse of to_grid."""
        Q, K, NG, width = grid.shape
        N = self.num_samples
        return grid.view(Q, K, N, NG // N, width).transpose(1, 2).flatten(0, 1)[self.slots]


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int) -> Tensor:
    """Attention of new tokens (q: (R, H, T, h); k, v: (R, K, T, h)) to everything before them."""
    R, H, T, h = q.shape
    K = k.shape[1]
    first = cache.length == 0 and cache.prompt is None
    keys, values = cache.append(layer, k, v)
    if first:
        return causal_attention(q, k, v)
    q = q.view(R, K, H // K * T, h) / math.sqrt(h)
    scores = (q @ keys).float()  # (R, K, G*T, S)
    S = keys.shape[-1]
    if T > 1:  # token i of the chunk sees the cache and the chunk up to itself
        hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        scores = scores.masked_fill(hidden.repeat(H // K, 1), -math.inf)
    if cache.prompt is None:
        return (scores.softmax(-1).to(v.dtype) @ values).view(R, H, T, h)
    prompt_keys, prompt_values = cache.prompt.keys[layer], cache.prompt.values[layer]
    P = prompt_keys.shape[-1]
    prompt_scores = cache.from_grid(cache.to_grid(q) @ prompt_keys).float()  # (R, K, G*T, P)
    padding = torch.arange(P, device=q.device) >= cache.prompt_lengths[:, None]  # (R, P)
    prompt_scores = prompt_scores.masked_fill(padding[:, None, None], -math.inf)
    weights = torch.cat([prompt_scores, scores], -1).softmax(-1).to(v.dtype)
    out = weights[..., P:] @ values
    out = out + cache.from_grid(cache.to_grid(weights[..., :P]) @ prompt_values)
    return out.view(R, H, T, h)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each token attends to itself and those before it. q: (B, H, T, h), k, v: (B, K, T, h).

    bias ((B, 1, T, T), added to the scores: 0 or -inf) says in place of that who sees whom, if given.
    """
    B, H, T, h = q.shape
    K = k.shape[1]
    if q.is_cuda and bias is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
    if q.is_cuda:  # the kernels that take a bias know no groups
        k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
    # On the CPU plain products are faster: of a training step on 100 tokens, the backward pass of
    # scaled_dot_product_attention alone took 44 %. In bfloat16, too, softmax computes in float32.
    if bias is None:
        bias = torch.full((T, T), -math.inf, device=q.device).triu(1)
    q = q.reshape(B, K, H // K * T, h) / math.sqrt(h)
    scores = (q @ k.mT).view(B, H, T, T)
    weights = (scores + bias.to(scores.dtype)).softmax(-1).view(B, K, H // K * T, T)
    return (weights @ v).view(B, H, T, h)


def branch_positions(branch: Tensor) -> Tensor:
    """(B, T): positions in rows that hold a prompt and its responses; see Llama.logps for `branch`."""
    places = torch.arange(branch.shape[1], device=branch.device)
    first = F.pad(branch[:, 1:] != branch[:, :-1], (1, 0))  # of a branch; place 0 needs no mark
    since = places - (places * first).cummax(-1).values  # tokens since the branch began
    return since + (branch > 1) * (branch == 1).sum(-1, keepdim=True)


def branch_bias(branch: Tensor) -> Tensor:
    """(B, 1, T, T): 0 where token i may see token j <= i of the prompt or of its own branch, else -inf."""
    B, T = branch.shape
    visible = (branch[:, None] == 1) | (branch[:, None] == branch[:, :, None])  # (B, i, j)
    return torch.zeros(B, T, T, device=branch.device).masked_fill(~visible.tril(), -math.inf)[:, None]


def rope_frequencies(config: ModelConfig, device) -> Tensor:
    """(h/2,) radians per position, slowed for long wavelengths under Llama 3's scaling."""
    h = config.head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, h, 2, device=device).float() / h)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    factor, low, high = (scaling[f] for f in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow everything by factor; 1: as it is
    return frequencies * ((1 - smooth) / factor + smooth)


def rope_tables(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B or 1, 1, T, h/2) for positions (B or 1, T)."""
    angles = positions[:, None, :, None].float() * rope_frequencies(config, positions.device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + h/2]) of each head (Hugging Face's layout; Meta's is i, i + 1)."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # sums in float32; one kernel on a GPU


def for_products(x: Tensor) -> Tensor:
    """x in the dtype that autocast wants for products: cast once where several matrices take it, not by each."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, h = config.hidden_size, config.head_dim
        H, K, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        self.q_proj = nn.Linear(D, H * h, bias=bias)
        self.k_proj = nn.Linear(D, K * h, bias=bias)
        self.v_proj = nn.Linear(D, K * h, bias=bias)
        self.o_proj = nn.Linear(H * h, D, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None,
                layer: int, bias: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        x = for_products(x)
        q, k, v = (proj(x).view(B, T, -1, self.config.head_dim).transpose(1, 2)  # (B, heads, T, h)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        out = causal_attention(q, k, v, bias) if cache is None else cached_attention(q, k, v, cache, layer)
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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None = None,
                layer: int = 0, bias: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, layer, bias)
        return x + self.mlp(self.post_attention_layernorm(x))


def run_block(block: Block, x: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
    """The plain way through a block without a cache; train.prepare may put another in its place."""
    return block(x, rope, bias=bias)


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.run_block = run_block

    def forward(self, tokens: Tensor, cache: KVCache | None = None, branch: Tensor | None = None) -> Tensor:
        T, config = tokens.shape[1], self.config
        if cache is not None:
            positions, total = cache.positions(T), cache.total(T)
        elif branch is not None:
            positions = branch_positions(branch)
            total = int(positions.max()) + 1
        else:
            positions, total = torch.arange(T, device=tokens.device)[None], T
        if total > config.max_length:
            raise ValueError(f"{total} tokens are more than the {config.max_length} that this model takes "
                             f"(max_position_embeddings {config.max_position_embeddings}, "
                             f"sliding_window {config.sliding_window})")
        if cache is None:
            x = self.without_cache(tokens, positions, branch)
        else:
            rope, x = rope_tables(config, positions), self.embed_tokens(tokens)
            for i, layer in enumerate(self.layers):
                x = layer(x, rope, cache, i)
            cache.length += T
        return self.norm(x)

    def without_cache(self, tokens: Tensor, positions: Tensor, branch: Tensor | None) -> Tensor:
        """Training's way through the blocks: (B, T) -> (B, T, D).

        T is rounded up: products run faster on such widths, and kernels are made for few of them. On the
        CPU every new shape costs milliseconds; of a toy step on ragged batches that was a fourth.
        """
        T = tokens.shape[1]
        tokens, positions = (F.pad(x, (0, -T % WIDTHS)) for x in (tokens, positions))
        bias = None if branch is None else branch_bias(F.pad(branch, (0, -T % WIDTHS)))
        rope, x = rope_tables(self.config, positions), self.embed_tokens(tokens)
        for layer in self.layers:
            x = self.run_block(layer, x, rope, bias)
        return x[:, :T]


class Llama(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) -> last hidden states (B, T, D); adds the tokens to the cache if one is given."""
        return self.model(tokens, cache)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) -> float32 logits (B, T, V) of the token that follows each."""
        return self.lm_head(self.hidden(tokens, cache)).float()

    def logps(self, tokens: Tensor, mask: Tensor, branch: Tensor | None = None) -> Tensor:
        """tokens (B, T), mask (B, T-1) -> float32 log-probs (B, T-1) of tokens[:, 1:], 0 where mask is off.

        Column t belongs to token t + 1, as in losses.token_logps. The head sees only places under the
        mask, and not all of them at a time: logits (B, T, V) are never built. All of it is one call,
        since weights that are sharded over ranks are whole only inside one.

        branch (B, T) is for rows that hold a prompt and several responses to it: 1 for the prompt, 2, 3,
        ... for the first, second, ... response, 0 for padding on the right. A response sees the prompt
        and itself, at the positions that it would have without the others.
        """
        return self.score(self.model(tokens, branch=branch), tokens, mask)

    def score(self, hidden: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The same from the last hidden states (B, T, D)."""
        logps = in_chunks(lambda x, target: target_logps(self.lm_head(x), target),
                          self.rows_at_once, hidden[:, :-1][mask], tokens[:, 1:][mask])  # (N,)
        return logps.new_zeros(mask.shape).masked_scatter(mask, logps)

    @torch.no_grad()
    def entropy(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(B, T-1): of the distributions that `score` looks tokens up in, in nats; 0 where mask is off."""
        found = in_chunks(lambda x: entropies(self.lm_head(x)), self.rows_at_once, hidden[:, :-1][mask])
        return found.new_zeros(mask.shape).masked_scatter(mask, found)

    @property
    def rows_at_once(self) -> int:
        """Places whose logits are in memory at the same time; at least a good size for a matrix product."""
        return max(512, LOGITS_AT_ONCE // self.config.vocab_size)

    def initialize(self, seed: int) -> "Llama":
        """Fresh weights: normal, std 0.02, divided by sqrt(2 * layers) where a block writes its output."""
        generator = torch.Generator().manual_seed(seed)
        residual = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.dim() == 2:
                    std = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                    weight.normal_(0, std, generator=generator)
                elif name.endswith("bias"):
                    weight.zero_()
        return self


def pad(sequences: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """Sequences as tokens padded on the right (B, T), and their lengths (B,)."""
    lengths = torch.tensor([len(s) for s in sequences], device=device)
    tokens = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    for row, sequence in zip(tokens, sequences):
        row[:len(sequence)] = torch.tensor(sequence)
    return tokens.to(device), lengths
