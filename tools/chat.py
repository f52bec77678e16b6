"""Chat with a checkpoint: type a question, read the response as it is generated.

    python sample.py --model runs/base-s0/model              # the same as python -m tools.chat
    echo "How many?" | python sample.py --model DIR --num_samples 4 --temperature 0.7
"""
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from checkpoint import load_sampler
from data.chat import CHATS
from data.check import check_tokens, note_unused_chat
from data.prompts import encode_prompt, end_ids, prompt_text, template_of
from data.task import check_system, prompt_option
from data.tokenizer import load_tokenizer, pieces
from infra.config import option, parse_config
from infra.hardware import ComputeOptions
from infra.progress import printable
from infra.run import run_script
from model import Llama
from sample import Batch, cache_budget, require_finite


@dataclass(frozen=True)
class Config(ComputeOptions):
    model: str = option("", "model directory", required=True)
    prompt: str = prompt_option("plain")
    chat: str = option("", f"template of a chat model, {', '.join(filter(None, CHATS))}", CHATS)
    system: str = option("", "system message of the chat; empty: none, or the template's own")
    temperature: float = option(0.0, "0 takes the most likely token", low=0)
    top_p: float = option(1.0, "draw only from the most likely tokens of this total probability", above=0, high=1)
    top_k: int = option(0, "draw only from this many most likely tokens; 0: from all", low=0)
    max_new_tokens: int = option(256, "longest response", low=1)
    num_samples: int = option(1, "responses to each question", low=1)
    seed: int = option(0, "same seed, same responses", low=0, high=2**64 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        template_of(self.prompt)
        check_system(self.chat, self.system)


@torch.inference_mode()
def stream(model: Llama, prompt: list[int], sample: int, eos_ids: Collection[int], config: Config) -> Iterator[int]:
    """Yield the tokens of generate's response number `sample` to one prompt, each as soon as it is drawn."""
    N, room = sample + 1, min(config.max_new_tokens, model.config.max_length - len(prompt))
    batch = Batch(model, len(prompt), 1, N, room, N, cache_budget(model), temperature=config.temperature,
                  top_p=config.top_p, top_k=config.top_k, eos_ids=eos_ids, seed=config.seed)
    batch.begin({0: prompt}, [0])
    while True:
        token = int(batch.newest[sample])
        require_finite(token)
        yield token
        if not batch.live[sample]:
            return
        batch.cache.look_at(room)
        batch.step()


def read_question() -> str:
    """Read a line: the next one that the user types, or that is not empty in a pipe; "" at the end."""
    if sys.stdin.isatty():
        try:
            return input("> ").strip()
        except EOFError:
            return ""
    return next((line.strip() for line in sys.stdin if line.strip()), "")


def main() -> None:
    config = parse_config(Config, {}, __doc__)
    model, tokenizer = load_sampler(config.model, config.precision), load_tokenizer(config.model)
    ends = end_ids(tokenizer, config.chat, config.system)
    note_unused_chat(config, tokenizer)
    sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        print("Type a question; an empty line ends.")
    while question := read_question():
        prompt = encode_prompt(tokenizer, prompt_text(config.prompt, "", question), config.chat, config.system)
        check_tokens(config.model, model.config.vocab_size, [prompt])
        if len(prompt) >= model.config.max_length:
            print(f"[{len(prompt)} tokens are too long for this model's {model.config.max_length} positions]")
            continue
        for sample in range(config.num_samples):
            for token, text in pieces(tokenizer, stream(model, prompt, sample, ends, config)):
                print(printable(text), end="", flush=True)
                finished = token in ends
            print("" if finished else " [truncated]")


if __name__ == "__main__":
    run_script(main)
