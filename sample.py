"""Prompts in, N responses each out: prefill, decode, sample the next token, generate.

A prompt is computed once and its keys and values are shared by its N samples (model.KVCache). All
responses in the making advance by one token per step; where some have ended, the next questions take
their rows, so that no step is spent on padding. Every random number is a pure function of (seed, prompt,
sample, token position), so neither the order nor the company of prompts changes a response beyond
rounding, and the same seed gives the same responses again. Left out: beam search, repetition penalties,
stop strings.

    python sample.py --model runs/base-s0/model     # type a question, read the response
"""
import argparse
import functools
import hashlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import load_sampler
from data.prompts import CHATS, PROMPTS, encode_prompt, prompt_text
from data.tokenizer import load_tokenizer, pieces
from infra.experiment import run_script
from model import KVCache, Llama, pad

BLOCK = 64  # tokens of the vocabulary that are drawn together first
LOGITS = 2 ** 20  # so many at once, but at least those of 256 rows: more leave the processor's cache
PREFILL_TOKENS = 2048  # so many of several prompts at once


@dataclass(frozen=True)
class Response:
    """Sampled token ids; they end with EOS if and only if the model produced it (`finished`)."""
    ids: list[int]
    finished: bool


def mix(x: Tensor) -> Tensor:
    """Scramble int64 counters (the finaliser of splitmix64; products wrap modulo 2**64)."""
    def shift(x: Tensor, bits: int) -> Tensor:  # logical, where >> of int64 drags the sign along
        return (x >> bits) & ((1 << (64 - bits)) - 1)
    x = (x ^ shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ shift(x, 31)


def prompt_key(prompt: list[int]) -> int:
    """A prompt's 64-bit name: made of its ids, not of its place in a list, so company cannot matter."""
    return int.from_bytes(hashlib.sha256(repr(prompt).encode()).digest()[:8], "big", signed=True)


def sample_keys(seed: int, questions: Tensor, samples: Tensor) -> Tensor:
    """One int64 key for each (seed, prompt's key, sample)."""
    key = mix(torch.full_like(questions, seed) + 1)
    for counter in (questions, samples):
        key = mix(key * 0x5851F42D4C957F2D + counter + 1)
    return key


def uniforms(keys: Tensor, step: int | Tensor) -> Tensor:
    """(R,) float64 in [0, 1): the number that draws token `step`, of all or (R,) of each sample."""
    counters = (torch.ones_like(keys) + step) * 0x1E3779B97F4A7C15
    return ((mix(keys + counters) >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


def pick(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF: (R, n) weights, (R,) uniforms -> (R,) indices, never of a weight that is zero, and what
    is left of the uniforms: (R,) new ones that may draw within what was picked."""
    cdf = weights.double().cumsum(-1)
    target = uniform[:, None] * cdf[:, -1:]  # below the last, since uniform < 1
    index = torch.searchsorted(cdf, target, right=True)  # the first whose cdf exceeds the target
    weight = weights.gather(-1, index).double()
    rest = (target - cdf.gather(-1, index) + weight) / weight
    return index[:, 0], rest[:, 0].clamp(0, 1 - 2 ** -53)


def sample_next_token(logits: Tensor, uniform: Tensor, temperature: float, top_p: float,
                      top_k: int) -> Tensor:
    """(R, V) logits, (R,) uniforms -> (R,) token ids by inverse CDF; temperature 0 takes the best."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:
        kth_best = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth_best, -torch.inf)
    weights = logits - logits.amax(-1, keepdim=True)
    weights.mul_(math.log2(math.e) / temperature).exp2_()  # softmax but for its sum; powers of 2 as in model.attend
    if top_p < 1:
        ordered, order = (weights / weights.sum(-1, keepdim=True)).sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays inside
        weights = weights.masked_fill(outside.scatter(-1, order, outside), 0)
    # first a block of tokens, then a token of the block: sums are cheaper than cumulative sums
    if weights.shape[-1] % BLOCK:
        weights = F.pad(weights, (0, -weights.shape[-1] % BLOCK))
    blocks = weights.unflatten(-1, (-1, BLOCK))  # (R, V/BLOCK, BLOCK)
    block, uniform = pick(blocks.sum(-1), uniform)
    token, _ = pick(blocks[torch.arange(len(block), device=block.device), block], uniform)
    return block * BLOCK + token


@dataclass(frozen=True)
class Settings:
    """How tokens are drawn, and when a response ends."""
    samples: range  # their numbers, 0 to N - 1
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    eos_id: int
    seed: int


class Rows:
    """R responses in the making. What a decoding step changes, it changes in place."""

    def __init__(self, cache: KVCache, max_prompts: int, max_new_tokens: int) -> None:
        R, device = len(cache.lengths), cache.lengths.device
        self.cache = cache
        self.keys = torch.zeros(R, dtype=torch.long, device=device)  # of the random numbers
        self.tokens = torch.zeros_like(self.keys)  # the newest, which is not in the cache yet
        self.drawn = self.keys.new_zeros(R, max_new_tokens + 1)  # all of them; ended rows write to the last column
        self.live = torch.zeros(R, dtype=torch.bool, device=device)
        self.owners: list[tuple[int, int] | None] = [None] * R  # (question, sample); None: free
        self.slots: dict[int, int] = {}  # which of the cache's prompts is a question's
        self.max_prompts = max_prompts

    def room(self) -> list[int]:
        """Places for the prompts of questions that may begin now: each needs one, and N free rows."""
        taken = {self.slots[owner[0]] for owner in self.owners if owner}
        free = [slot for slot in range(self.max_prompts) if slot not in taken]
        return free[:self.owners.count(None) // self.cache.num_samples]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only (R',)."""
        self.cache.keep(rows)
        self.keys, self.tokens, self.drawn, self.live = (
            x[rows] for x in (self.keys, self.tokens, self.drawn, self.live))
        self.owners = [self.owners[row] for row in rows.tolist()]


def round_up(tokens: int, device: torch.device) -> int:
    """Columns of a cache for so many tokens."""
    columns = HABITS[device.type].columns
    return -(-tokens // columns) * columns


def prefill(model: Llama, prompts: list[list[int]]) -> tuple[KVCache, Tensor, Tensor]:
    """Run the prompts once: their cache, lengths (Q,) and next-token logits (Q, V)."""
    weight = model.lm_head.weight
    tokens, lengths = pad(prompts, weight.device)
    cache = KVCache(model.config, len(prompts), round_up(tokens.shape[1], weight.device), weight.device,
                    weight.dtype)
    last = model.hidden(tokens, cache)[torch.arange(len(prompts), device=weight.device), lengths - 1]  # (Q, D)
    return cache, lengths, model.lm_head(last).float()


def decode(model: Llama, rows: Rows, settings: Settings) -> None:
    """One token more for every row. No result is waited for, so that a GPU may run ahead."""
    hidden = model.hidden(rows.tokens[:, None], rows.cache)[:, -1]  # (R, D)
    for at, part in in_parts(model, torch.arange(len(hidden), device=hidden.device), hidden):
        draw(rows, at, model.lm_head(part).float(), settings)


def in_parts(model: Llama, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts (n, ...) of rows (R, ...), so small that next tokens may be drawn for a part at once."""
    return zip(*(x.split(max(256, LOGITS // model.config.vocab_size)) for x in rows))


def draw(rows: Rows, at: Tensor, logits: Tensor, settings: Settings) -> None:
    """The next token of the rows `at` (n,) from logits (n, V); they end with EOS or when they are full."""
    step = rows.cache.lengths[at]  # the first token comes before anything of the row is in the cache
    new = sample_next_token(logits, uniforms(rows.keys[at], step), settings.temperature, settings.top_p,
                            settings.top_k)
    rows.tokens[at] = new
    rows.drawn[at, step.masked_fill(~rows.live[at], settings.max_new_tokens)] = new
    rows.live[at] &= (new != settings.eos_id) & (step + 1 < settings.max_new_tokens)
    rows.cache.lengths *= rows.live  # what has ended stays in column 0 until another response begins


def admit(model: Llama, rows: Rows, prompts: dict[int, list[int]], slots: list[int], settings: Settings) -> None:
    """Let questions (their numbers and prompts) begin, in free rows behind their prompts at `slots`."""
    N, device = len(settings.samples), rows.keys.device
    cache, lengths, logits = prefill(model, list(prompts.values()))
    free = [row for row, owner in enumerate(rows.owners) if owner is None][:len(prompts) * N]
    for row, owner in zip(free, itertools.product(prompts, settings.samples)):
        rows.owners[row] = owner
    rows.slots.update(zip(prompts, slots))
    at = torch.tensor(free, device=device)
    rows.cache.enter(cache, lengths, torch.tensor(slots, device=device), at)
    names = torch.tensor([prompt_key(prompt) for prompt in prompts.values()], device=device)
    samples = torch.tensor(settings.samples, device=device).repeat(len(prompts))
    of = torch.arange(len(prompts), device=device).repeat_interleave(N)  # (n*N,) the prompt of each row
    rows.keys[at] = sample_keys(settings.seed, names[of], samples)
    rows.live[at] = True
    for some, part in in_parts(model, at, of):
        draw(rows, some, logits[part], settings)


def recorded(step: Callable[[], None], cache: KVCache) -> Callable[[], None]:
    """The step as a CUDA graph: recorded where the cache has moved since, replayed otherwise."""
    graph, layout = None, None

    def run() -> None:
        nonlocal graph, layout
        if layout == cache.layout():
            return graph.replay()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # a step like any other, and the warm-up that recording needs
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # records without running
            step()
        layout = cache.layout()
    return run


@dataclass(frozen=True)
class Habits:
    """What pays on a kind of device; nothing here changes a response."""
    check_every: int  # decoding steps between two looks at what has ended: each makes a GPU wait
    leave: float  # share of the rows that must have ended for the others to be moved together
    columns: int  # by which caches grow, or the part of them that is looked at
    whole: bool  # allocate caches for the longest sequences at once, where a copy would not fit beside them
    prepare: Callable[[Callable[[], None], KVCache], Callable[[], None]]  # the decoding step and its cache


HABITS = {"cpu": Habits(1, 1 / 8, 16, False, lambda step, cache: step),
          "cuda": Habits(8, 1 / 2, 128, True, recorded)}


def decode_until(rows: Rows, step: Callable[[], None], share: float) -> None:
    """Decoding steps until this share of the rows has ended, or all that were at work have."""
    device = rows.keys.device
    check_every = HABITS[device.type].check_every
    busy = len(rows.owners) - rows.owners.count(None)
    while True:
        live, longest = torch.stack([rows.live.sum(), rows.cache.lengths.max()]).tolist()
        if live == 0 or busy - live >= share * len(rows.owners):
            return
        rows.cache.grow(0, round_up(min(longest + check_every, rows.drawn.shape[1] - 1), device))
        for _ in range(check_every):
            step()


def take_ended(rows: Rows, eos_id: int) -> Iterator[tuple[int, int, Response]]:
    """Question, sample and response of the rows that have ended; they are free from now on."""
    ended = [row for row, live in enumerate(rows.live.tolist()) if not live and rows.owners[row]]
    for row, ids in zip(ended, rows.drawn[ended, :-1].tolist()):
        yield *rows.owners[row], trim(ids, eos_id)
        rows.owners[row] = None


def trim(ids: list[int], eos_id: int) -> Response:
    """Cut a row of tokens after its first EOS."""
    finished = eos_id in ids
    return Response(ids[:ids.index(eos_id) + 1] if finished else ids, finished)


def cache_budget(model: Llama) -> int:
    """Tokens whose keys and values fit into 60 % of a GPU's free memory, or 1 GiB on a CPU."""
    config, weight = model.config, model.lm_head.weight
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * weight.element_size()
    if not weight.is_cuda:
        return 2 ** 30 // token
    held = torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
    return int(0.6 * (torch.cuda.mem_get_info(weight.device)[0] + held) / token)


def empty_rows(model: Llama, longest: int, settings: Settings, questions: int, batch_rows: int,
               cache_tokens: int | None) -> Rows:
    """Rows for as many questions at once as batch_rows and the tokens of cache allow, but at least one."""
    config, weight, N = model.config, model.lm_head.weight, len(settings.samples)
    if cache_tokens is None:
        cache_tokens = cache_budget(model)
    spare = 1 if N == 1 else 2  # prompts are still needed when most of their samples have ended
    longest, capacity = (round_up(n, weight.device) for n in (longest, settings.max_new_tokens))
    at_once = max(1, min(questions, batch_rows // N, cache_tokens // (N * capacity + spare * longest)))
    max_prompts = min(questions, spare * at_once)
    habits = HABITS[weight.device.type]
    slots, longest, capacity = (max_prompts, longest, capacity) if habits.whole else (at_once, 0, 0)
    prompts = KVCache(config, slots, longest, weight.device, weight.dtype)
    cache = KVCache(config, at_once * N, capacity, weight.device, weight.dtype, prompts, N)
    prompts.window = cache.window = 0  # of the capacity, nothing is looked at yet
    return Rows(cache, max_prompts, settings.max_new_tokens)


@torch.inference_mode()
def generate(model: Llama, prompts: list[list[int]], *, num_samples: int, max_new_tokens: int,
             temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, eos_id: int, seed: int,
             batch_rows: int = 1024, cache_tokens: int | None = None,
             progress: Callable[[int, int], None] = lambda responses, tokens: None,
             ) -> list[list[Response]]:
    """num_samples responses to each prompt, in the order of the prompts.

    At most batch_rows responses are in the making, and their cache, prompts included, has room for at
    most cache_tokens tokens (default: 60 % of a GPU's free memory, 1 GiB on a CPU), unless one question
    needs more. Where responses have ended the next questions begin, prompts of like length together.
    `progress` is told numbers of responses and of sampled tokens as they come. Raises ValueError where
    a prompt is empty or leaves no room for max_new_tokens.
    """
    limit = model.config.max_length
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= limit - max_new_tokens:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens: 1 to {limit - max_new_tokens} fit "
                             f"this model ({limit} positions) with max_new_tokens={max_new_tokens}")
    responses: list[list[Response]] = [[None] * num_samples for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the last one is next
    if not waiting:
        return responses
    settings = Settings(range(num_samples), max_new_tokens, temperature, top_p, top_k, eos_id, seed)
    rows = empty_rows(model, len(prompts[waiting[0]]), settings, len(prompts), batch_rows, cache_tokens)
    habits = HABITS[rows.keys.device.type]
    step = habits.prepare(functools.partial(decode, model, rows, settings), rows.cache)
    while waiting or any(rows.owners):
        while waiting and (room := rows.room()):
            begin = [waiting.pop()]  # the next one is never shorter, and all are padded to the last one's length
            while (waiting and len(begin) < len(room)
                   and (len(begin) + 1) * len(prompts[waiting[-1]]) <= PREFILL_TOKENS):
                begin.append(waiting.pop())
            admit(model, rows, {i: prompts[i] for i in begin}, room[:len(begin)], settings)
        decode_until(rows, step, 1 / 8 if waiting else habits.leave)
        ended = list(take_ended(rows, eos_id))
        for question, sample, response in ended:
            responses[question][sample] = response
        progress(len(ended), sum(len(response.ids) for _, _, response in ended))
        if not waiting and any(rows.owners):
            rows.keep(rows.live.nonzero()[:, 0])
    return responses


@torch.inference_mode()
def stream(model: Llama, prompt: list[int], *, max_new_tokens: int, temperature: float, top_p: float,
           top_k: int, eos_id: int, seed: int, sample: int = 0) -> Iterator[int]:
    """The token ids of generate's response number `sample` to one prompt, each as soon as it is drawn."""
    settings = Settings(range(sample, sample + 1), max_new_tokens, temperature, top_p, top_k, eos_id, seed)
    rows = empty_rows(model, len(prompt), settings, 1, 1, None)
    rows.cache.grow(1, max_new_tokens)
    admit(model, rows, {0: prompt}, [0], settings)
    yield int(rows.tokens)
    while rows.live.any():
        decode(model, rows, settings)
        yield int(rows.tokens)


def print_stream(tokenizer, ids: Iterator[int]) -> list[int]:
    """Print text as its tokens come; a character that is not complete waits for the rest of its bytes."""
    drawn = []
    for token, piece in pieces(tokenizer, ids):
        drawn.append(token)
        print(piece, end="", flush=True)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--prompt", default="plain", choices=PROMPTS, help="prompt template")
    parser.add_argument("--chat", default="", choices=CHATS, help="wrap prompts for this chat model")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top_p", type=float, default=1.0, help="the likeliest tokens of this total "
                        "probability only")
    parser.add_argument("--top_k", type=int, default=0, help="the so many likeliest tokens only; 0: all")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest response")
    parser.add_argument("--num_samples", type=int, default=1, help="responses to each question")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same responses")
    args = parser.parse_args()
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.top_k < 0:
        parser.error("--temperature and --top_k must not be below 0, and --top_p in (0, 1]")
    if args.max_new_tokens < 1 or args.num_samples < 1:
        parser.error("--max_new_tokens and --num_samples must be at least 1")
    model, tokenizer = load_sampler(args.model), load_tokenizer(args.model)
    sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        print("Type a question; an empty line ends.")
    while question := read_question():
        prompt = encode_prompt(tokenizer, prompt_text(args.prompt, "", question, chat=args.chat))
        room = min(args.max_new_tokens, model.config.max_length - len(prompt))
        if room < 1:
            print(f"[{len(prompt)} tokens are too long for this model's {model.config.max_length}]")
            continue
        for sample in range(args.num_samples):
            ids = stream(model, prompt, max_new_tokens=room, temperature=args.temperature,
                         top_p=args.top_p, top_k=args.top_k, eos_id=tokenizer.eos_id, seed=args.seed,
                         sample=sample)
            finished = print_stream(tokenizer, ids)[-1] == tokenizer.eos_id
            print("" if finished else " [cut]")


def read_question() -> str:
    """A line that the user types; from a pipe, the next line that is not empty; "" at the end."""
    if sys.stdin.isatty():
        try:
            return input("> ").strip()
        except EOFError:
            return ""
    return next((line.strip() for line in sys.stdin if line.strip()), "")


if __name__ == "__main__":
    run_script(main)
