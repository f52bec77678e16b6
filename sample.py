"""Prompts in, N responses each out: prefill, decode, sample the next token, generate.

A prompt is computed once and its keys and values are shared by its N samples (model.KVCache). Rows
that have finished leave the batch. Every random number is a pure function of (seed, prompt, sample,
token position), so neither the order nor the company of prompts changes a response beyond rounding,
and the same seed gives the same responses again. Left out: beam search, repetition penalties, stop
strings.

    python sample.py --model runs/base-s0/model     # type a question, read the response
"""
import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint import load_sampler
from data.prompts import CHATS, PROMPTS, encode_prompt, prompt_text
from data.tokenizer import load_tokenizer, pieces
from experiment import run_script
from model import KVCache, Llama, pad


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


def uniforms(keys: Tensor, step: int) -> Tensor:
    """(R,) float64 in [0, 1): the number that draws token `step` of each sample."""
    counters = torch.full_like(keys, step + 1) * 0x1E3779B97F4A7C15
    return ((mix(keys + counters) >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


def sample_next_token(logits: Tensor, uniform: Tensor, temperature: float, top_p: float,
                      top_k: int) -> Tensor:
    """(R, V) logits, (R,) uniforms -> (R,) token ids by inverse CDF; temperature 0 takes the best."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth_best = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth_best, -torch.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays inside
        probs = probs.masked_fill(outside.scatter(-1, order, outside), 0)
    cdf = probs.double().cumsum(-1)
    # the first token whose cdf exceeds the target: never one of probability zero
    return torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).squeeze(-1)


def prefill(model: Llama, prompts: list[list[int]], num_samples: int,
            capacity: int) -> tuple[KVCache, Tensor]:
    """Run the prompts once; a cache of Q * num_samples rows behind them and their next-token logits."""
    weight = model.lm_head.weight
    tokens, lengths = pad(prompts, weight.device)
    cache = KVCache(model.config, *tokens.shape, weight.device, weight.dtype)
    last = model.hidden(tokens, cache)[torch.arange(len(prompts)), lengths - 1]  # (Q, D)
    logits = model.lm_head(last).float().repeat_interleave(num_samples, 0)  # (Q*N, V)
    return cache.fork(model.config, lengths, num_samples, capacity), logits


def decode(model: Llama, prompts: list[list[int]], keys: Tensor, max_new_tokens: int,
           temperature: float, top_p: float, top_k: int, eos_id: int) -> list[Response]:
    """One batch: len(keys) / len(prompts) responses to each prompt, flat, in order."""
    cache, logits = prefill(model, prompts, len(keys) // len(prompts), max_new_tokens)
    tokens = torch.full((len(keys), max_new_tokens), eos_id, device=keys.device)
    active = torch.ones_like(cache.slots, dtype=torch.bool)  # (R,) rows of the cache not yet finished
    for step in range(max_new_tokens):
        uniform = uniforms(keys[cache.slots], step)
        new = sample_next_token(logits, uniform, temperature, top_p, top_k)
        tokens[cache.slots[active], step] = new[active]
        active &= new != eos_id
        count = int(active.sum())
        if count == 0 or step + 1 == max_new_tokens:
            break
        if count < 0.9 * len(active):  # moving the cache costs, so rows leave several at a time
            cache.keep(active)
            new, active = new[active], active[active]
        logits = model(new[:, None], cache)[:, -1]  # (R, V)
    return [trim(row, eos_id) for row in tokens.tolist()]


def trim(ids: list[int], eos_id: int) -> Response:
    """Cut a row of tokens after its first EOS."""
    finished = eos_id in ids
    return Response(ids[:ids.index(eos_id) + 1] if finished else ids, finished)


@torch.no_grad()
def generate(model: Llama, prompts: list[list[int]], *, num_samples: int, max_new_tokens: int,
             temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, eos_id: int, seed: int,
             batch_rows: int = 1024,
             progress: Callable[[int, int], None] = lambda responses, tokens: None,
             ) -> list[list[Response]]:
    """num_samples responses to each prompt, in the order of the prompts.

    Prompts of like length go together, about batch_rows samples at a time; `progress` is told the
    number of responses and of sampled tokens after each batch. Raises ValueError where a prompt is
    empty or leaves no room for max_new_tokens.
    """
    limit = model.config.max_length
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= limit - max_new_tokens:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens: 1 to {limit - max_new_tokens} fit "
                             f"this model ({limit} positions) with max_new_tokens={max_new_tokens}")
    device = model.lm_head.weight.device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_batch = max(1, batch_rows // num_samples)
    responses: list[list[Response]] = [[] for _ in prompts]
    for start in range(0, len(order), per_batch):
        batch = order[start:start + per_batch]
        questions = torch.tensor([prompt_key(prompts[i]) for i in batch], device=device)
        samples = torch.arange(num_samples, device=device).repeat(len(batch))
        keys = sample_keys(seed, questions.repeat_interleave(num_samples), samples)
        flat = decode(model, [prompts[i] for i in batch], keys, max_new_tokens, temperature, top_p,
                      top_k, eos_id)
        for j, i in enumerate(batch):
            responses[i] = flat[j * num_samples:(j + 1) * num_samples]
        progress(len(flat), sum(len(response.ids) for response in flat))
    return responses


@torch.no_grad()
def stream(model: Llama, prompt: list[int], *, max_new_tokens: int, temperature: float, top_p: float,
           top_k: int, eos_id: int, seed: int, sample: int = 0) -> Iterator[int]:
    """The token ids of generate's response number `sample` to one prompt, each as soon as it is drawn."""
    device = model.lm_head.weight.device
    keys = sample_keys(seed, *(torch.tensor([n], device=device) for n in (prompt_key(prompt), sample)))
    cache, logits = prefill(model, [prompt], 1, max_new_tokens)
    for step in range(max_new_tokens):
        new = sample_next_token(logits, uniforms(keys, step), temperature, top_p, top_k)
        yield int(new)
        if int(new) == eos_id or step + 1 == max_new_tokens:
            return
        logits = model(new[:, None], cache)[:, -1]


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
