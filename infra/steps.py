"""What a training step is about: its options, its items, their micro-batches and its learning rate."""
import importlib.util
import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy

from infra.config import option
from infra.hardware import ComputeOptions
from infra.parallel import device
from infra.track import TRACKERS

SCHEDULES = {  # share of the steps done -> share of the learning rate
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done))}


@dataclass(frozen=True)
class TrainOptions(ComputeOptions):
    """How `fit` trains; methods inherit these fields and give the papers' values as defaults."""
    lr: float = option(2e-5, "peak learning rate of AdamW", above=0, group="training")
    lr_schedule: str = option("constant", "after warm-up: constant, linear (to 0) or cosine (to 0)", SCHEDULES)
    warmup_steps: int = option(0, "steps over which the learning rate rises to lr", low=0)
    warmup_share: float = option(0.0, "the same as a share of all steps; the longer one counts", low=0, high=1)
    batch_size: int = option(16, "items (sequences or pairs) per optimizer step, over all ranks", low=1)
    epochs: int = option(1, "passes over the items", low=1)
    max_steps: int = option(0, "stop after this many optimizer steps; 0: only epochs count", low=0)
    nll_norm: str = option("response", "the NLL of a response is divided by: response, its own length; token, the mean "
                           "length of all responses, so that every token weighs alike", ("response", "token"))
    clip_norm: float = option(1.0, "gradients are scaled down to this norm", above=0)
    weight_decay: float = option(0.0, "AdamW's weight decay, on matrices only", low=0)
    micro_batch_tokens: int = option(0, "padded tokens per forward pass; affects only speed and memory; 0: 1024 on a "
                                     "CPU, 4096 on a GPU, where more are faster if they fit", low=0, free=True,
                                     group="engine")
    checkpoint_activations: bool = option(False, "keep only the input of each block and recompute the rest in the "
                                          "backward pass: far less memory, a third more work", free=True)
    compile: bool = option(False, "torch.compile the blocks; the first steps take minutes", free=True)
    save_every: int = option(100, "steps between saved states, from which a killed run resumes", low=1, free=True)
    track: str = option("", "pass every step's figures on to: csv (a file train.csv), tensorboard, wandb",
                        ("", *TRACKERS), free=True)
    anyway: bool = option(False, "go on although the code was edited since the run began, and record that", free=True)
    skip_nonfinite: bool = option(False, "skip (and count) steps whose loss or gradient is not finite, instead of "
                                  "stopping", free=True)
    shard_within_node: bool = option(False, "with ranks on several nodes: shard weights within a node and replicate "
                                     "them across", free=True)
    cpu_offload: bool = option(False, "with several ranks: keep weights, gradients and moments in the host's memory",
                               free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.track and not importlib.util.find_spec(self.track):
            raise ValueError(f"--track {self.track} needs a package: pip install {self.track}")


def num_steps(num_items: int, options: TrainOptions) -> int:
    """Count the optimizer steps of a training run; the last batch of an epoch may be smaller."""
    steps = options.epochs * math.ceil(num_items / options.batch_size)
    return min(steps, options.max_steps or steps)


def batch_at(step: int, items: list, batch_size: int, seed: int) -> list:
    """Return the items of a step: every epoch is a fresh permutation, given by (seed, epoch)."""
    epoch, i = divmod(step, math.ceil(len(items) / batch_size))
    order = numpy.random.default_rng([seed, epoch]).permutation(len(items))
    return [items[j] for j in order[i * batch_size:(i + 1) * batch_size]]


def micro_batches(items: list, budget: int) -> list[list]:
    """Split items, sorted by length, so that padded tokens stay within the budget (0: that of the device; one item
    always fits).

    Use as few micro-batches as possible, and make the largest one as small as possible: the same number of passes, but
    less padding and memory than filling all except the last.
    """
    budget = budget or (4096 if device() == "cuda" else 1024)
    items = sorted(items, key=lambda item: item.tokens)  # the longest of a micro-batch comes last

    def split(budget: int) -> list[list]:
        parts: list[list] = []
        for item in items:
            if not parts or (len(parts[-1]) + 1) * item.tokens > budget:
                parts.append([])
            parts[-1].append(item)
        return parts

    fewest = len(split(budget))
    return split(bisect_left(range(budget), True, key=lambda budget: len(split(budget)) == fewest))


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """Return the rate of step 0 <= step < steps."""
    warmup = max(options.warmup_steps, round(options.warmup_share * steps))
    if step < warmup:
        return options.lr * (step + 1) / warmup
    return options.lr * SCHEDULES[options.lr_schedule]((step - warmup) / max(1, steps - warmup))
