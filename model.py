"""Llama, written out: RMSNorm, rotary positions, grouped-query attention, SwiGLU, explicit cache.

Attribute names are those of Hugging Face's Llama, so weight files need no name map. One forward
serves training and cached decoding: the cache is an argument, never module state. Left out on
purpose: dropout (no paper here trains with it, and without it train and eval are one function) and
left padding (sequences are padded on the right, where causal attention cannot see the padding).

Shapes: B sequences, R rows being decoded, T tokens, S cached tokens, V vocabulary, D width,
H heads, K key-value heads, G = H / K, h head width.
"""
import math
from collections.abc import Callable
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
    """Keys and values of R rows, each with a length of its own, if wanted behind prompts stored only once.

    A prefill fills a plain cache with Q prompts. N rows of another one may `enter` behind each: attention to
    a prompt is one matrix product for all its rows (the idea of bifurcated attention, arXiv 2403.08845),
    and only the rows' own tokens are stored per row. Column c of a row holds its c-th own token. Of the columns
    allocated, attention looks at the first `window`, and masks those beyond a row's length: so a decoding
    step has the same shapes while rows grow, end, and begin anew behind another prompt.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, device, dtype,
                 prompts: "KVCache | None" = None, num_samples: int = 1) -> None:
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        self.config = config
        self.keys, self.values = ([torch.zeros(shape, device=device, dtype=dtype)
                                   for _ in range(config.num_hidden_layers)] for _ in range(2))
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # (R,) own tokens
        self.window = capacity
        self.empty = True  # until the first forward
        self.prompts, self.num_samples = prompts, num_samples
        if prompts is not None:
            self.places = torch.zeros_like(self.lengths)  # (R,) place in the (Q, N) grid of prompts and samples
            self.row_at = torch.zeros(len(prompts.lengths) * num_samples, dtype=torch.long, device=device)

    def enter(self, prompts: "KVCache", lengths: Tensor, slots: Tensor, rows: Tensor) -> None:
        """Give rows (n*N,) to N samples of each of n prompts just computed, whose true lengths are given;
        they are stored at slots (n,), in place of prompts that no row needs any more, or as further ones."""
        N, shared = self.num_samples, self.prompts
        shared.grow(int(slots.max()) + 1, prompts.window)
        for store, new in zip(shared.keys + shared.values, prompts.keys + prompts.values):
            store[slots, :, :prompts.window] = new
        shared.lengths[slots] = lengths
        places = (slots[:, None] * N + torch.arange(N, device=slots.device)).flatten()
        if len(self.row_at) < len(shared.lengths) * N:
            self.row_at = F.pad(self.row_at, (0, len(shared.lengths) * N - len(self.row_at)))
        self.row_at[places] = rows  # (Q*N,) the row at a place; any row where there is none
        self.places[rows] = places
        self.lengths[rows] = 0

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only (R',), in this order; a prompt that none of them has is dropped."""
        self.change(lambda x: x[rows])
        self.lengths = self.lengths[rows]
        if self.prompts is not None:
            places = self.places[rows]
            used, questions = (places // self.num_samples).unique(return_inverse=True)
            self.prompts.keep(used)
            self.places = questions * self.num_samples + places % self.num_samples
            self.row_at = torch.zeros(len(used) * self.num_samples, dtype=torch.long, device=rows.device)
            self.row_at[self.places] = torch.arange(len(places), device=rows.device)

    def grow(self, rows: int, window: int) -> None:
        """Have at least so many rows, and look at so many columns; new ones are empty."""
        self.window = max(window, self.window)
        more_rows = max(0, rows - len(self.lengths))
        more_columns = max(0, window - self.keys[0].shape[2])
        if more_rows or more_columns:
            self.change(lambda x: F.pad(x, (0, 0, 0, more_columns, 0, 0, 0, more_rows)))
            self.lengths = F.pad(self.lengths, (0, more_rows))

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace keys and values (R, K, capacity, h), one tensor at a time, so that few exist twice."""
        for tensors in (self.keys, self.values):
            for layer, x in enumerate(tensors):
                tensors[layer] = function(x)

    def layout(self) -> tuple:
        """What a recorded step depends on: the memory that it works in and how much of it it looks at."""
        return tuple((*(x.data_ptr() for x in cache.keys + cache.values), cache.keys[0].shape, cache.window)
                     for cache in (self, self.prompts))

    def advance(self, num_tokens: int) -> Tensor:
        """Make room for the next T tokens of every row: which columns they take, what they may look at,
        and their rotary positions (R, T), which are returned. ValueError where they are too many."""
        columns = self.lengths[:, None] + torch.arange(num_tokens, device=self.lengths.device)  # (R, T)
        positions = columns
        if self.prompts is not None:
            positions = columns + self.prompts.lengths[self.places // self.num_samples][:, None]
            # a prompt of no tokens counts as one: nobody asks it, but its softmax must not be NaN
            self.prompts.mask = beyond(self.prompts.lengths.clamp(min=1)[:, None] - 1, self.prompts.window)
        if columns.device.type == "cpu":  # one would have to wait for a GPU; generate knows beforehand
            check_length(int(positions.max()) + 1, self.config)
            if int(columns.max()) >= self.window:
                raise ValueError(f"the cache has room for {self.window} tokens of a row, and this would be token "
                                 f"{int(columns.max()) + 1}: grow it first")
        R, K, capacity, _ = self.keys[0].shape
        starts = torch.arange(R * K, device=columns.device).view(R, K, 1) * capacity
        self.columns = (starts + columns[:, None]).flatten()  # (R*K*T,) where keys are a list of R*K*capacity
        self.mask = beyond(columns, self.window)
        self.lengths += num_tokens
        self.first, self.empty = self.empty and self.prompts is None, False
        return positions

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the new k, v (R, K, T, h)."""
        for store, new in ((self.keys[layer], k), (self.values[layer], v)):
            store.view(-1, new.shape[-1]).index_copy_(0, self.columns, new.reshape(-1, new.shape[-1]))

    def seen(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values looked at (R, K, S, h)."""
        return self.keys[layer][:, :, :self.window], self.values[layer][:, :, :self.window]

    def to_grid(self, x: Tensor) -> Tensor:
        """(R, K, G, w) -> (Q, K, N*G, w)."""
        grid = x.index_select(0, self.row_at).unflatten(0, (-1, self.num_samples))
        return grid.transpose(1, 2).flatten(2, 3)

    def from_grid(self, grid: Tensor) -> Tensor:
        """Inverse of to_grid."""
        grid = grid.unflatten(2, (self.num_samples, -1)).transpose(1, 2)
        return grid.flatten(0, 1).index_select(0, self.places)


def beyond(last: Tensor, window: int) -> Tensor:
    """What is added to scores: (B, 1, T, window) of 0 up to column last (B, T) and -inf beyond it."""
    hidden = torch.arange(window, device=last.device) > last[..., None]
    return torch.zeros(hidden.shape, device=last.device).masked_fill(hidden, -math.inf)[:, None]


def check_length(total: int, config: ModelConfig) -> None:
    if total > config.max_length:
        raise ValueError(f"{total} tokens are more than the {config.max_length} that this model takes "
                         f"(max_position_embeddings {config.max_position_embeddings}, "
                         f"sliding_window {config.sliding_window})")


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int) -> Tensor:
    """Attention of new tokens (q: (R, H, T, h); k, v: (R, K, T, h)) to everything before them."""
    R, H, T, h = q.shape
    K = k.shape[1]
    cache.append(layer, k, v)
    if cache.first:
        return causal_attention(q, k, v)
    q = q.reshape(R, K, H // K * T, h)
    out, size = attend(q, *cache.seen(layer), cache.mask if T == 1 else cache.mask.repeat(1, 1, H // K, 1))
    if cache.prompts is not None:
        shared = attend(cache.to_grid(q), *cache.prompts.seen(layer), cache.prompts.mask)
        shared_out, shared_size = (cache.from_grid(x) for x in shared)
        out = out.lerp(shared_out, 1 / (1 + (size - shared_size).exp2()))  # each by its sum of exponentials
    return out.to(v.dtype).view(R, H, T, h)


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, K, M, h) on keys, values (B, K, S, h) -> float32 outputs (B, K, M, h) and the log2 of the sums
    of exponentiated scores (B, K, M, 1), by which outputs over two sets of keys can be merged."""
    # powers of 2, not of e: five times faster on the CPU that this was measured on
    scores = torch.add(mask, q @ keys.mT, alpha=math.log2(math.e) / math.sqrt(q.shape[-1]))  # (B, K, M, S) float32
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp2_()
    total = weights.sum(-1, keepdim=True)
    return (weights.to(values.dtype) @ values) / total, top + total.log2()


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
    return (since + (branch > 1) * (branch == 1).sum(-1, keepdim=True)) * (branch > 0)  # padding stays at 0


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
    """Cosines and signed sines (B or 1, 1, T, h), as `rotate` needs them, for positions (B or 1, T)."""
    angles = positions[:, None, :, None].float() * rope_frequencies(config, positions.device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (a, b) = (x[i], x[i + h/2]) of each head to (a cos - b sin, b cos + a sin), in float32.

    The layout is Hugging Face's; Meta's pairs are i, i + 1.
    """
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([b, a], -1), sin).to(x.dtype)


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
        if cache is None:
            positions = torch.arange(T, device=tokens.device)[None] if branch is None else branch_positions(branch)
            check_length(int(positions.max()) + 1, config)
            x = self.without_cache(tokens, positions, branch)
        else:
            rope, x = rope_tables(config, cache.advance(T)), self.embed_tokens(tokens)
            for i, layer in enumerate(self.layers):
                x = layer(x, rope, cache, i)
        return self.norm(x)

    def without_cache(self, tokens: Tensor, positions: Tensor, branch: Tensor | None) -> Tensor:
        """Training's way through the blocks: (B, T) -> (B, T, D).

        T is rounded up: products run faster on such widths, and kernels are made for few of them. On the
        CPU every new shape costs milliseconds; of a toy step on ragged batches that was a fourth.
        """
        T = tokens.shape[1]
        tokens, positions = (F.pad(x, (0, -T % WIDTHS)) for x in (tokens, positions))
        bias = None if branch is None else for_products(branch_bias(F.pad(branch, (0, -T % WIDTHS))))
        rope, x = rope_tables(self.config, positions), self.embed_tokens(tokens)
        for layer in self.layers:
            x = self.run_block(layer, x, rope, bias)
        return x[:, :T]


def logits_at_once(config: ModelConfig) -> int:
    """Tokens whose logits are in memory at the same time; at least a good size for a matrix product."""
    return max(512, LOGITS_AT_ONCE // config.vocab_size)


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
        return logits_at_once(self.config)

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
