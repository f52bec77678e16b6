"""Prompts in, N responses each out: prefill, decode, draw the next token.

A prompt is computed once for its N samples (model.KVCache). All unfinished responses advance by one token per step;
when some finish, waiting questions take over their rows, so little is spent on padding. The random numbers of a
response depend only on the seed, its prompt and its sample number, so neither the order of prompts nor the other rows
of a batch change a response beyond rounding. Left out: beam search, repetition penalties, stop strings.

    python sample.py --model runs/base-s0/model     # type a question, read the response
"""
import hashlib
import itertools
import math
import runpy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from infra import InputError
from infra.hardware import cache_budget, recorded
from model import KVCache, Llama, pad

BLOCK = 64  # tokens are drawn in two steps: first a block of the vocabulary, then a token of the block
PREFILL_TOKENS = 2048  # prompts of similar length are computed together, up to this many tokens


@dataclass(frozen=True)
class Response:
    """Sampled token ids; they end with an end token if and only if the model produced one (`finished`)."""
    ids: list[int]
    finished: bool


# --- drawing a token -------------------------------------------------------------------------------

def uniforms(seed: int, prompt: list[int], num_samples: int, count: int) -> Tensor:
    """(N, count) float64 in [0, 1): row n, a function of (seed, prompt, n) alone, draws the tokens of sample n."""
    # not torch.Generator, which keeps only 32 bits of a seed on a CPU: some prompts would share their numbers
    key = int.from_bytes(hashlib.sha256(repr((seed, prompt)).encode()).digest()[:8], "big")
    streams = (numpy.random.Generator(numpy.random.Philox(key=[key, sample])) for sample in range(num_samples))
    return torch.from_numpy(numpy.stack([stream.random(count) for stream in streams]))


def pick(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the CDF: weights (R, n), uniforms (R,) -> indices (R,), never of a weight that is 0.

    Also return the rescaled remainder of each uniform (R,), itself uniform, for a second draw inside what was picked.
    """
    cdf = weights.double().cumsum(-1)
    target = uniform[:, None] * cdf[:, -1:]  # below the last, since uniform < 1
    index = torch.searchsorted(cdf, target, right=True)  # the first whose cdf exceeds the target
    index.clamp_(max=cdf.shape[-1] - 1)  # NaN exceeds everything
    weight = weights.gather(-1, index).double()
    rest = (target - cdf.gather(-1, index) + weight) / weight
    return index[:, 0], rest[:, 0].clamp(0, 1 - 2**-53)


def sample_next_token(logits: Tensor, uniform: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """logits (R, V), uniforms (R,) -> token ids (R,); temperature 0 takes the most likely token.

    A row whose largest logit is not finite (NaN counts as the largest) gets -1: raising here would stall a GPU.
    """
    if temperature == 0:
        best, token = logits.max(-1)
        return token.masked_fill(~best.isfinite(), -1)
    if top_k:
        kth_best = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth_best, -torch.inf)
    best = logits.amax(-1, keepdim=True)
    weights = logits - best
    weights.mul_(math.log2(math.e) / temperature).exp2_()  # softmax up to its normalisation
    if top_p < 1:
        ordered, order = (weights / weights.sum(-1, keepdim=True)).sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays inside
        weights = weights.masked_fill(outside.scatter(-1, order, outside), 0)
    # sums are cheaper than cumulative sums: 3 to 4 times as fast as one pick from the entire vocabulary
    if missing := -weights.shape[-1] % BLOCK:  # F.pad would copy even if nothing is missing
        weights = F.pad(weights, (0, missing))
    blocks = weights.unflatten(-1, (-1, BLOCK))  # (R, V/BLOCK, BLOCK)
    block, uniform = pick(blocks.sum(-1), uniform)
    token, _ = pick(blocks[torch.arange(len(block), device=block.device), block], uniform)
    return (block * BLOCK + token).masked_fill(~best[:, 0].isfinite(), -1)


# --- many responses at once ------------------------------------------------------------------------

class Batch:
    """R rows, each free or with an unfinished response. Decoding modifies tensors in place, as CUDA graphs require."""

    def __init__(self, model: Llama, longest: int, questions: int, num_samples: int, max_new_tokens: int,
                 batch_rows: int, cache_tokens: int, *, temperature: float, top_p: float, top_k: int,
                 eos_ids: Collection[int], seed: int) -> None:
        """Allocate rows for as many questions as batch_rows and cache_tokens allow, but for at least one."""
        config, weight, N = model.config, model.lm_head.weight, num_samples
        self.model, self.max_new_tokens, self.seed = model, max_new_tokens, seed
        self.drawing = dict(temperature=temperature, top_p=top_p, top_k=top_k)
        self.device, on_gpu = weight.device, weight.is_cuda
        self.ends = {-1, *eos_ids}  # -1: see sample_next_token
        self.end_tokens = torch.tensor([*self.ends], device=self.device)
        # On a GPU, checking which rows have finished makes the CPU wait, and each window needs a graph of its own.
        self.check_every, self.columns = (8, 128) if on_gpu else (1, 16)

        # A prompt is needed until its last row has finished; with a spare slot the next question can begin before that.
        slots, longest, own = 2 if on_gpu and N > 1 else 1, self.rounded(longest), self.rounded(max_new_tokens)
        at_once = max(1, min(questions, batch_rows // N, cache_tokens // (N * own + slots * longest)))
        prompts = KVCache(config, min(questions, slots * at_once), longest * on_gpu, self.device, weight.dtype)
        self.cache = KVCache(config, at_once * N, own * on_gpu, self.device, weight.dtype, prompts, N)
        self.cache.window = prompts.window = 0  # a GPU's caches cannot move, but none of their columns is used yet

        R = at_once * N
        self.uniforms = torch.zeros(R, max_new_tokens, dtype=torch.float64, device=self.device)
        self.ids = torch.zeros(R, max_new_tokens + 1, dtype=torch.long, device=self.device)
        self.newest = torch.zeros_like(self.ids[:, 0])  # (R,): drawn, but not in the cache yet
        self.live = torch.zeros_like(self.newest, dtype=torch.bool)
        self.owner: list[tuple[int, int] | None] = [None] * R  # (question, sample); None: the row is free
        self.slot: dict[int, int] = {}  # question -> where the cache has its prompt

    def rounded(self, tokens: int) -> int:
        """Round a number of columns up, so that windows change seldom."""
        return -(-tokens // self.columns) * self.columns

    @property
    def layout(self) -> tuple[int, int, int]:
        """Rows and windows, on which the shapes of a step depend."""
        return len(self.owner), self.cache.window, self.cache.prompts.window

    def room(self) -> list[int]:
        """Slots for questions that can start now (each also needs N free rows)."""
        taken = {self.slot[owner[0]] for owner in self.owner if owner}
        free = [slot for slot in range(len(self.cache.prompts.lengths)) if slot not in taken]
        return free[:self.owner.count(None) // self.cache.num_samples]

    def begin(self, prompts: dict[int, list[int]], slots: list[int]) -> None:
        """Prefill the prompts of some questions (by number), and draw the first token of N responses to each."""
        N = self.cache.num_samples
        tokens, lengths = pad(list(prompts.values()), self.device)  # (n, T)
        cache = KVCache(self.model.config, len(tokens), self.rounded(tokens.shape[1]), self.device,
                        self.model.lm_head.weight.dtype)
        last = self.model.model(tokens, cache)[torch.arange(len(tokens), device=self.device), lengths - 1]  # (n, D)

        free = [row for row, owner in enumerate(self.owner) if owner is None][:len(slots) * N]
        for row, owner in zip(free, itertools.product(prompts, range(N))):
            self.owner[row] = owner
        self.slot.update(zip(prompts, slots))
        rows = torch.tensor(free, device=self.device)
        self.cache.begin(cache, lengths, torch.tensor(slots, device=self.device), rows)
        self.uniforms[rows] = torch.cat([uniforms(self.seed, prompt, N, self.max_new_tokens)
                                         for prompt in prompts.values()]).to(self.device)
        self.live[rows] = True
        self.draw(rows, self.model.lm_head(last).float().repeat_interleave(N, 0))

    def step(self) -> None:
        """Decode one more token for every row. No result is read, so that a GPU may run ahead."""
        hidden = self.model.model(self.newest[:, None].clamp(min=0), self.cache)[:, -1]  # (R, D)
        self.draw(torch.arange(len(hidden), device=self.device), self.model.lm_head(hidden).float())

    def draw(self, rows: Tensor, logits: Tensor) -> None:
        """Draw the next token of rows (n,) from logits (n, V). A row finishes with an end token or when it is full."""
        at = self.cache.lengths[rows]  # tokens of a row in the cache, and so the number of the token to draw
        self.newest[rows] = new = sample_next_token(logits, self.uniforms[rows, at], **self.drawing)
        self.ids[rows, at.masked_fill(~self.live[rows], self.max_new_tokens)] = new  # finished rows: the spare column
        self.live[rows] &= (new[:, None] != self.end_tokens).all(-1) & (at + 1 < self.max_new_tokens)
        self.cache.lengths *= self.live  # a finished row stays at column 0

    def decode(self, step: Callable[[], None], share: float) -> None:
        """Decode until this share of the rows has finished, or all that were busy have."""
        busy = len(self.owner) - self.owner.count(None)
        while True:
            live, longest = torch.stack([self.live.sum(), self.cache.lengths.max()]).tolist()
            if live == 0 or busy - live >= share * len(self.owner):
                return
            needed = self.rounded(min(longest + self.check_every, self.max_new_tokens))
            self.cache.look_at(max(self.cache.window, needed))
            for _ in range(self.check_every):
                step()

    def take_finished(self) -> Iterator[tuple[int, int, Response]]:
        """Yield question, sample and response of each row that has finished, and free the row."""
        ended = [row for row, live in enumerate(self.live.tolist()) if not live and self.owner[row]]
        for row, ids in zip(ended, self.ids[ended, :-1].tolist()):
            end = next((i for i, token in enumerate(ids) if token in self.ends), None)
            response = Response(ids if end is None else ids[:end + 1], end is not None)
            require_finite(response.ids[-1])
            yield *self.owner[row], response
            self.owner[row] = None

    def shrink(self) -> None:
        """Keep only the busy rows."""
        rows = self.live.nonzero()[:, 0]
        self.cache.keep(rows)
        self.uniforms, self.ids, self.newest, self.live = (
            x[rows] for x in (self.uniforms, self.ids, self.newest, self.live))
        self.owner = [self.owner[row] for row in rows.tolist()]


@torch.inference_mode()
def generate(model: Llama, prompts: list[list[int]], *, num_samples: int, max_new_tokens: int,
             temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, eos_ids: Collection[int], seed: int,
             batch_rows: int = 1024, cache_tokens: int | None = None,
             progress: Callable[[int, int], None] = lambda responses, tokens: None) -> list[list[Response]]:
    """Sample num_samples responses to each prompt, up to any of eos_ids; return them in the order of the prompts.

    At most batch_rows responses are generated at a time, and their cache holds at most cache_tokens tokens, prompts
    included (default: cache_budget), unless a single question needs more. `progress` receives numbers of responses and
    of tokens as they come. Raises ValueError for a prompt that is empty or leaves no room for max_new_tokens, and
    InputError where a model's logits are not finite.
    """
    if temperature < 0:
        raise ValueError(f"temperature {temperature}: must be at least 0")
    limit = model.config.max_length - max_new_tokens
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= limit:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens: 1 to {limit} fit this model "
                             f"({model.config.max_length} positions) with max_new_tokens={max_new_tokens}")
    responses: list[list[Response]] = [[None] * num_samples for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the shortest is last, and next
    if not waiting:
        return responses
    batch = Batch(model, len(prompts[waiting[0]]), len(prompts), num_samples, max_new_tokens, batch_rows,
                  cache_tokens or cache_budget(model), temperature=temperature, top_p=top_p, top_k=top_k,
                  eos_ids=eos_ids, seed=seed)
    on_gpu = batch.device.type == "cuda"
    step = recorded(batch) if on_gpu else batch.step
    while waiting or any(batch.owner):
        while waiting and (room := batch.room()):
            starting = [waiting.pop()]  # the next is never shorter, and all are padded to the length of the last
            while (waiting and len(starting) < len(room)
                   and (len(starting) + 1) * len(prompts[waiting[-1]]) <= PREFILL_TOKENS):
                starting.append(waiting.pop())
            batch.begin({i: prompts[i] for i in starting}, room[:len(starting)])
        batch.decode(step, 1 / 2 if on_gpu and not waiting else 1 / 8)
        finished = list(batch.take_finished())
        for question, sample, response in finished:
            responses[question][sample] = response
        progress(len(finished), sum(len(response.ids) for _, _, response in finished))
        if not waiting and any(batch.owner):
            batch.shrink()
    return responses


def require_finite(token: int) -> None:
    """Refuse the token that sample_next_token gives for logits that are not finite."""
    if token < 0:
        raise InputError("the model's logits are not finite (NaN or infinity), so nothing can be sampled: its weights "
                         "are damaged, or its training diverged. Fetch it again, or train it with a smaller --lr")


if __name__ == "__main__":
    runpy.run_module("tools.chat", run_name="__main__")  # a chat with a checkpoint, which also shows how to stream
