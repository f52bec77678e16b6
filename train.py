"""Batches, the optimizer step and `fit`, which every driver trains through; as a script, plain SFT.

Micro-batches are formed by length under a token budget and dealt out over ranks; gradients of summed
per-sequence losses are divided once, by the number of items in the whole batch. So neither the budget nor
the number of ranks changes the result. Batches are a pure function of (seed, step), so a training that was
stopped or killed goes on from its newest state as if nothing had happened.

    python train.py --preset base --run_dir runs/base-s0           # the toy world's base model, of IRPO
    python train.py --preset rft_base --run_dir runs/rft-base-s0   # and of RFT
    python train.py --model DIR --task gsm8k --run_dir runs/sft    # SFT on gold solutions
"""
import dataclasses
import hashlib
import math
import shutil
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from statistics import fmean

import numpy
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from checkpoint import drop, load_model, load_state, save_model, save_state, weights_hash
from data import toy
from data.task import TaskOptions
from data.tokenizer import load_tokenizer, train_tokenizer
from infra.experiment import (at_least, fingerprint, finishing_steps, one_of, open_run, option, parse_config,
                        read_json, run_script, write_json, write_jsonl)
from losses import nll_loss
from model import Block, Decoder, Llama, ModelConfig, pad, run_block
from infra.parallel import barrier, by_first, collected, dealt, device, missing, rank, shard, whole, world


@dataclass(frozen=True)
class TrainOptions:
    """How `fit` trains; drivers inherit these fields and give the papers' values as defaults."""
    lr: float = option(2e-5, "peak learning rate of AdamW")
    lr_schedule: str = option("constant", "after warm-up: constant, linear (to 0) or cosine (to 0)")
    warmup_steps: int = option(0, "steps over which the learning rate rises to lr")
    warmup_share: float = option(0.0, "the same as a share of all steps; the longer one counts")
    batch_size: int = option(16, "items (sequences or pairs) of one optimizer step, over all ranks")
    epochs: int = option(1, "passes over the items")
    max_steps: int = option(0, "stop after this many optimizer steps; 0: only epochs count")
    clip_norm: float = option(1.0, "gradients are scaled down to this norm")
    weight_decay: float = option(0.0, "AdamW's weight decay, on matrices only")
    micro_batch_tokens: int = option(4096, "padded tokens of one forward pass; speed and memory only (4096 "
                                     "suits a CPU, a GPU likes as many as fit)")
    precision: str = option("bf16", "of matrix products in training: bf16 (autocast) or fp32")
    checkpoint_activations: bool = option(False, "keep only the input of each block, and compute the rest again "
                                          "in the backward pass: far less memory, a third more work")
    compile: bool = option(False, "torch.compile the blocks for training; the first steps take minutes")
    save_every: int = option(100, "steps after which the state is saved, from which a killed run goes on")
    skip_nonfinite: bool = option(False, "leave a step out whose loss or gradient is not finite, and count "
                                  "it, instead of stopping")
    shard_within_node: bool = option(False, "with ranks on several nodes: shard weights within a node and "
                                     "replicate them across")
    cpu_offload: bool = option(False, "with several ranks: weights, gradients and moments stay in the host's "
                               "memory")

    def __post_init__(self) -> None:
        one_of(self, lr_schedule=SCHEDULES, precision=("bf16", "fp32"))
        at_least(self, 1, "batch_size", "epochs", "micro_batch_tokens", "save_every")
        at_least(self, 0, "max_steps")
        if not 0 <= self.warmup_share < 1:
            raise ValueError(f"--warmup_share {self.warmup_share}: from 0, and below 1")
        for name in ("lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} {getattr(self, name)}: must be above 0")


SCHEDULES: dict[str, Callable[[float], float]] = {  # share of training done -> share of lr
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """The rate of step 0 <= step < steps."""
    warmup = max(options.warmup_steps, round(options.warmup_share * steps))
    if step < warmup:
        return options.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return options.lr * SCHEDULES[options.lr_schedule](done)


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, options: TrainOptions) -> float:
    """Give a step its learning rate, which is returned."""
    rate = learning_rate(step, steps, options)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def num_steps(num_items: int, options: TrainOptions) -> int:
    """Optimizer steps of a whole training; the last batch of an epoch may be smaller."""
    steps = options.epochs * math.ceil(num_items / options.batch_size)
    return min(steps, options.max_steps or steps)


def batch_at(step: int, num_items: int, batch_size: int, seed: int) -> list[int]:
    """Indices of the items of a step: every epoch is a fresh permutation given by (seed, epoch)."""
    epoch, i = divmod(step, math.ceil(num_items / batch_size))
    order = numpy.random.default_rng([seed, epoch]).permutation(num_items)
    return order[i * batch_size:(i + 1) * batch_size].tolist()


def micro_batches(items: list, length: Callable, budget: int) -> list[list]:
    """Split items, sorted by length, so that padded tokens stay within the budget (one item always fits).

    There are as few micro-batches as can be. Of such splits this is the one whose largest is smallest: the
    same number of passes with less padding and less memory than if all but the last were full.
    """
    items = sorted(items, key=length)  # the longest of a micro-batch comes last

    def split(budget: int) -> list[list]:
        batches: list[list] = []
        for item in items:
            if not batches or (len(batches[-1]) + 1) * length(item) > budget:
                batches.append([])
            batches[-1].append(item)
        return batches

    fewest = len(split(budget))
    return split(bisect_left(range(budget), True, key=lambda budget: len(split(budget)) == fewest))


def padded(sequences: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """B (prompt_ids, response_ids) -> tokens (B, T) padded on the right, masks (B, T-1) of response and prompt.

    Column t of a mask belongs to token t + 1, so the first response token, scored by the last prompt
    token, is in column len(prompt) - 1.
    """
    tokens, lengths = pad([prompt + response for prompt, response in sequences], device())  # (B, T)
    starts = torch.tensor([len(prompt) - 1 for prompt, _ in sequences], device=device())[:, None]
    columns = torch.arange(tokens.shape[1] - 1, device=device())
    return tokens, (columns >= starts) & (columns < lengths[:, None] - 1), columns < starts


def response_logps(model: Llama, sequences: list[tuple[list[int], list[int]]], with_prompts: bool = False,
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """B (prompt_ids, response_ids) -> log-probabilities (B, T-1), masks of response and prompt as of `padded`.

    Prompt tokens are scored only if asked; log-probabilities of what is not scored are 0.
    """
    tokens, mask, prompt_mask = padded(sequences)
    return model.logps(tokens, mask | prompt_mask if with_prompts else mask), mask, prompt_mask


def branch_logps(model: Llama, groups: list[tuple[list[int], list[list[int]]]]) -> tuple[Tensor, Tensor]:
    """B (prompt_ids, responses) -> log-probabilities (B, T-1), and the response 1, 2, ... of each column, else 0.

    A prompt is computed once for all its responses, in one row: the prompt up to its last token, then for
    each response that token (which scores the first of the response) and the response. So here, too,
    column t belongs to token t + 1.
    """
    rows, branches = [], []
    for prompt, responses in groups:
        row, branch = prompt[:-1], [1] * (len(prompt) - 1)
        for number, response in enumerate(responses, start=2):
            row = row + prompt[-1:] + response
            branch += [number] * (1 + len(response))
        rows.append(row)
        branches.append(branch)
    tokens, branch = pad(rows, device())[0], pad(branches, device())[0]  # (B, T)
    owner = torch.where(branch[:, 1:] == branch[:, :-1], branch[:, 1:] - 1, 0).clamp(min=0)
    return model.logps(tokens, owner > 0, branch), owner


def prepare(model: nn.Module, options: TrainOptions) -> None:
    """How the model's blocks are run in training."""
    run = torch.compile(run_block, dynamic=True) if options.compile else run_block
    if options.checkpoint_activations:
        run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    for module in model.modules():
        if isinstance(module, Decoder):
            module.run_block = run


def autocast(precision: str):
    """Matrix products in bfloat16 where precision says so; parameters stay float32."""
    return torch.autocast(device(), torch.bfloat16, enabled=precision == "bf16")


def load_trained(directory: str | Path, options: TrainOptions,
                 wrap: Callable[[Llama], nn.Module] = lambda model: model,
                 dtype: torch.dtype = torch.float32) -> nn.Module:
    """wrap(the model of a directory), as training needs it: on this device, or sharded over all ranks."""
    if world() == 1:
        return wrap(load_model(directory, device(), dtype))
    module = wrap(load_model(directory, dtype=None))  # mapped: a rank reads a block when it is sharded
    blocks = [block for block in module.modules() if isinstance(block, Block)]
    return shard(module, blocks, bf16=options.precision == "bf16", within_node=options.shard_within_node,
                 cpu_offload=options.cpu_offload).to(dtype)


def accumulate(module: nn.Module, micro_batches: list[list], precision: str,
               loss: Callable[[nn.Module, list], dict[str, Tensor]]) -> dict[str, list[float]]:
    """Add the gradients of the mean of loss(module, items)["loss"] (B,) over the items of all micro-batches.

    Each is computed by one rank. Returns all values that `loss` measures, item by item, in one order.
    """
    size, found = sum(map(len, micro_batches)), []
    for micro_batch, counts in dealt(micro_batches):
        with autocast(precision):
            measured = loss(module, micro_batch)
        (measured["loss"].sum() / size * counts).backward()
        if counts:
            found.append({name: values.detach().tolist() for name, values in measured.items()})
    values: dict[str, list[float]] = {}
    for part in collected(found):
        for name, x in part.items():
            values.setdefault(name, []).extend(x)
    return values


def descend(module: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[list],
            loss: Callable[[nn.Module, list], dict[str, Tensor]], options: TrainOptions, folder: Path | None,
            label: str, name: Callable = str) -> tuple[dict[str, list[float]], dict[str, float]]:
    """One optimizer step: the values measured item by item, and the figures of the step.

    A loss or gradient that is not finite never reaches the weights: the step is left out, or the run stops.
    """
    values = accumulate(module, micro_batches, options.precision, loss)
    norm = float(whole(nn.utils.clip_grad_norm_(module.parameters(), options.clip_norm)))
    finite = math.isfinite(sum(values["loss"]) + norm)
    if finite:
        optimizer.step()
    elif not options.skip_nonfinite:
        ids = [name(item) for micro_batch in micro_batches for item in micro_batch]
        if folder:
            write_json(folder / "nonfinite.json", {"step": label, "grad_norm": norm, "ids": ids, **values})
        raise SystemExit(f"{label}: the loss is {fmean(values['loss'])} and the gradient's norm {norm}. The batch "
                         f"holds {ids}{f', see {folder}/nonfinite.json' if folder else ''}. Try a smaller --lr, or "
                         "--skip_nonfinite.")
    optimizer.zero_grad()
    return values, {"grad_norm": norm} | ({"skipped": float(not finite)} if options.skip_nonfinite else {})


def fit(model: nn.Module, items: list, loss: Callable[[nn.Module, list], dict[str, Tensor]],
        length: Callable, options: TrainOptions, seed: int, label: str = "train", folder: Path | None = None,
        after_step: Callable[[int], dict] = lambda step: {}) -> list[dict]:
    """Minimise the mean of loss(model, items)["loss"] (B,) over items; one record of means per step.

    The other entries of the dict are measured only; after_step(steps done) may add to a step's record. In
    `folder`, if there is one, the state is saved every so many steps and when the run is asked to stop.
    """
    steps = num_steps(len(items), options)
    prepare(model, options)
    optimizer = new_optimizer(model, options)
    made_of = {"weights": weights_hash(model), "items": items_hash(items), "seed": seed, "steps": steps,
               "lr": options.lr, "batch_size": options.batch_size}
    records = load_state(folder / "state", model, optimizer, made_of) if folder else []
    total, start = 0, time.perf_counter()
    bar = tqdm(range(len(records), steps), desc=label, unit="step", dynamic_ncols=True, initial=len(records),
               total=steps, disable=rank() > 0)
    with finishing_steps() as asked_to_stop:
        for step in bar:
            batch = [items[i] for i in batch_at(step, len(items), options.batch_size, seed)]
            rate = set_rate(optimizer, step, steps, options)
            values, figures = descend(model, optimizer, micro_batches(batch, length, options.micro_batch_tokens),
                                      loss, options, folder, f"{label}, step {step}", attrgetter("id"))
            means, tokens = {name: fmean(x) for name, x in values.items()}, sum(map(length, batch))
            records.append({"step": step, **means, **figures, "lr": rate, "tokens": tokens, **after_step(step + 1)})
            total += tokens
            bar.set_postfix_str(f"loss {means['loss']:.3f}, {total / (time.perf_counter() - start):,.0f} tok/s",
                                refresh=False)
            save_or_stop(asked_to_stop(), folder, model, optimizer, records, steps, made_of, options)
    return records


def save_or_stop(stop: bool, folder: Path | None, module: nn.Module, optimizer: torch.optim.Optimizer,
                 records: list[dict], steps: int, made_of: dict, options: TrainOptions) -> None:
    """After a step: save the state if it is time to, or if the run is asked to stop, which ends it."""
    done = len(records)
    if folder and (stop or done % options.save_every == 0 and done < steps):
        save_state(folder / "state", module, optimizer, records, made_of)
    if stop:
        raise SystemExit(f"\nstopped after step {done} of {steps}; " + (
            "the same command goes on from there" if folder else "nothing is saved of it"))


def items_hash(items: list) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item).encode())
    return digest.hexdigest()


def to_train(folder: Path) -> bool:
    """Whether the folder's model is still missing; if not, the state of its training may go."""
    if missing(folder / "model"):
        return True
    drop(folder / "state")
    return False


def save_trained(model: Llama, records: list[dict], folder: Path, options: TaskOptions,
                 source: str | Path = "") -> None:
    """What a training leaves: the model, with the config and tokenizer of `source` (empty: options.model), and
    the record of its steps; its state no more."""
    write_jsonl(folder / "train.jsonl", records)
    save_model(model, folder / "model", source=source or options.model, asked=options.asked)
    to_train(folder)


def new_optimizer(model: Llama, options: TrainOptions) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": options.weight_decay},
                              {"params": vectors, "weight_decay": 0.0}],
                             lr=options.lr, betas=(0.9, 0.95), fused=True)


@dataclass(frozen=True)
class Config(TrainOptions, TaskOptions):
    """SFT: from `model` on gold solutions, or from a new model on the toy world's corpus."""
    model: str = option("", "model directory to start from; empty: a new model and tokenizer")
    run_dir: str = option("", "directory of this run; empty: runs/ and a name made of the flags")
    seed: int = option(0, "of weights, batch order and the toy corpus")
    prompt_weight: float = option(0.0, "weight of a prompt token in the loss; a response token has 1")
    # shape of a new model
    vocab_size: int = option(288, "tokens of a new tokenizer")
    hidden_size: int = option(128, "width of a new model")
    num_layers: int = option(4, "layers of a new model")
    num_heads: int = option(4, "attention heads of a new model")
    num_kv_heads: int = option(2, "key-value heads of a new model")
    max_positions: int = option(256, "longest sequence of a new model")

    def __post_init__(self) -> None:
        TrainOptions.__post_init__(self)
        TaskOptions.__post_init__(self)
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError("--hidden_size must be a multiple of --num_heads, and that one of "
                             "--num_kv_heads")


BASE = dict(task="toy", lr=3e-3, lr_schedule="cosine", warmup_steps=50, batch_size=32,
            weight_decay=0.05, prompt_weight=0.1)
PRESETS = {"base": BASE, "rft_base": BASE | dict(toy_world="paths")}


def new_model(config: Config, texts: list[str], folder: Path) -> None:
    """Fresh weights and a tokenizer for these texts; numbers up to 99 and calculator marks are tokens."""
    symbols = ["\n", "=<<", ">>", "####", *map(str, range(100))]
    folder.mkdir(parents=True, exist_ok=True)
    by_first(lambda: train_tokenizer([text.replace("\n", " ") for text in texts], folder, config.vocab_size,
                                     symbols))
    tokens = load_tokenizer(folder).vocab_size
    barrier()  # save_model will replace the folder
    D = config.hidden_size
    shape = ModelConfig(
        vocab_size=tokens, hidden_size=D,
        intermediate_size=8 * D // 3 // 8 * 8, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
        head_dim=D // config.num_heads, max_position_embeddings=config.max_positions)
    save_model(Llama(shape).initialize(config.seed), folder, source=folder)


@dataclass(frozen=True)
class Example:
    """A prompt and the response to learn."""
    id: str
    prompt: list[int]
    response: list[int]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.response)


def fitting(examples: list[Example], max_length: int) -> list[Example]:
    """The examples that the model has positions for; says how many have to go."""
    kept = [example for example in examples if example.tokens <= max_length]
    if len(kept) < len(examples):
        print(f"{len(examples) - len(kept):,} of {len(examples):,} examples exceed the model's {max_length} "
              "positions and are left out")
    if not kept:
        raise SystemExit("no example is short enough for this model")
    return kept


def sft_loss(model: Llama, examples: list[Example], prompt_weight: float,
             mean_length: float) -> dict[str, Tensor]:
    """Negative log-likelihood in units of the mean response, so that all tokens of the data weigh alike."""
    sequences = [(example.prompt, example.response) for example in examples]
    logps, mask, prompt_mask = response_logps(model, sequences, with_prompts=prompt_weight != 0)
    weighted = (logps * mask).sum(-1) + prompt_weight * (logps * prompt_mask).sum(-1)
    return {"loss": -weighted / mean_length, "nll": nll_loss(logps, mask)}


def fit_sft(model: Llama, examples: list[Example], options: TrainOptions, seed: int, folder: Path,
            label: str = "train", prompt_weight: float = 0.0) -> list[dict]:
    """SFT on examples, those too long for the model left out; fit's records."""
    examples = fitting(examples, model.config.max_length)
    mean_length = fmean(len(example.response) for example in examples)
    return fit(model, examples, lambda model, batch: sft_loss(model, batch, prompt_weight, mean_length),
               lambda example: example.tokens, options, seed, label, folder)


def documents(config: Config) -> list[data.Problem]:
    """What is learned: a task's gold solutions, or the toy corpus for a new model of that task."""
    if config.task == "toy" and not config.model:
        return [data.Problem(*(row[name] for name in ("id", "question", "answer", "solution")))
                for row in toy.corpus(config.seed, steps=config.toy_steps, world=config.toy_world)]
    return config.problems("train")


def main() -> None:
    config = parse_config(Config, PRESETS, __doc__)
    run = Path(config.run_dir)
    made_of = fingerprint(dataclasses.asdict(config) | {"run_dir": ""},
                          ["data/__init__.py", "data/prompts.py", "data/toy.py", "data/tokenizer.py", "model.py",
                           "train.py", "losses.py"])
    problems = documents(config)
    open_run(config, run, **({"weights": weights_hash(load_model(config.model, dtype=None)),
                              "problems": items_hash(problems)} if config.model else {}))
    made_of_path = run / "made_of.json"
    if not to_train(run):
        if made_of_path.exists() and read_json(made_of_path) == made_of:
            print(f"{run / 'model'} is there, made of the same config and source")
            return
        print(f"{run / 'model'} was made by other source files, and is made anew")
        by_first(lambda: shutil.rmtree(run / "model"))
    start = config.model or str(run / "model.start")
    if not config.model:
        new_model(config, [f"{p.question} {p.solution}" for p in problems], Path(start))
    tokenizer = load_tokenizer(start)
    if not all(problem.solution for problem in problems):
        raise SystemExit(f"{config.task} has no gold solutions in these files to learn from")
    examples = [Example(problem.id, config.prompt_ids(tokenizer, problem),
                        config.gold_ids(tokenizer, problem)) for problem in problems]
    model = load_trained(start, config)
    records = fit_sft(model, examples, config, config.seed, run, prompt_weight=config.prompt_weight)
    write_json(made_of_path, made_of)
    save_trained(model, records, run, config, source=start)
    if skipped := sum(record.get("skipped", 0) for record in records):
        print(f"{skipped:g} steps were left out, since their loss or gradient was not finite")
    print(f"{run / 'model'}: {sum(p.numel() for p in model.parameters()):,} parameters, trained on "
          f"{len(examples):,} documents in {len(records)} steps")


if __name__ == "__main__":
    run_script(main)
