"""The training loop that all methods share; as a script, fine-tuning on gold solutions (see tools/sft.py).

A batch is split into micro-batches under a token budget, which are distributed over ranks. Gradients of summed
per-sequence losses are divided once, by the number of items in the global batch, so neither the budget nor the number
of ranks changes the result. Batches are a pure function of (seed, step), so an interrupted run resumes from its latest
state and ends with exactly the same result.

    python train.py --preset base --run_dir runs/base-s0           # the toy world's base model
    python train.py --model DIR --task gsm8k --run_dir runs/sft    # SFT on gold solutions
"""
import json
import math
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from checkpoint import load_model, save_model
from infra import InputError
from infra.hardware import autocast, dtype_of
from infra.parallel import by_first, collected, dealt, device, full_weight, shard, world
from infra.progress import Progress, mean_or_max
from infra.run import append, cut_back, flush, hash_of, stop_asked, timed
from infra.state import drop_states, load_state, save_state
from infra.steps import TrainOptions, batch_at, learning_rate, micro_batches, num_steps
from infra.track import tracked
from losses import nll_loss
from model import Block, Decoder, Llama, pad

WIDTH = 16  # sequences are padded to a multiple of this: on a CPU every new shape of a product costs milliseconds


# --- log-probabilities of responses ----------------------------------------------------------------

def padded(examples: list) -> tuple[Tensor, Tensor]:
    """Stack B items (prompt, response) into tokens (B, T), padded on the right, and the mask (B, T-1) of responses.

    Column t belongs to token t + 1, so the first response token, scored by the last prompt token, is in column
    len(prompt) - 1.
    """
    tokens, lengths = pad([e.prompt + e.response for e in examples], device(), WIDTH)
    scored = torch.arange(1, tokens.shape[1], device=device())  # the token that a column belongs to
    prompts = torch.tensor([len(e.prompt) for e in examples], device=device())
    return tokens, (scored >= prompts[:, None]) & (scored < lengths[:, None])


def response_logps(model: Llama, examples: list) -> tuple[Tensor, Tensor]:
    """Score B items (prompt, response): log-probs (B, T-1), 0 off the mask, and mask (B, T-1), as in `padded`."""
    tokens, mask = padded(examples)
    return model.logps(tokens, mask), mask


def packed_logps(model: Llama, prompts: list[list[int]], responses: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    """Score n responses to each of B prompts in one packed row; return summed log-probs (n, B) and lengths (n, B).

    A row is prompt[:-1] and then, for each response, prompt[-1] + response, at the positions they would have alone.
    prompt[-1] is repeated, since it predicts the first token of each. Segments hide the responses from each other
    (Llama.logps).
    """
    rows = []
    for prompt, group in zip(prompts, responses):
        P = len(prompt) - 1
        tokens, positions, segments = prompt[:P], list(range(P)), [0] * P
        for number, response in enumerate(group, start=1):
            tokens = tokens + prompt[P:] + response
            positions += range(P, P + 1 + len(response))
            segments += [number] * (1 + len(response))
        rows.append((tokens, positions, segments))
    tokens, positions, segments = (pad(list(column), device(), WIDTH)[0] for column in zip(*rows))  # (B, T)

    scored = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)  # all but the repeated prompt[-1]
    logps = model.logps(tokens, scored, positions, segments)  # (B, T-1)
    masks = torch.stack([scored & (segments[:, 1:] == n) for n in range(1, len(responses[0]) + 1)])  # (n, B, T-1)
    return (logps * masks).sum(-1), masks.sum(-1)


# --- one step --------------------------------------------------------------------------------------

def accumulate(model: nn.Module, parts: list[list], loss: Callable, precision: str) -> dict[str, list[float]]:
    """Add the gradients of the mean of loss(model, items)["loss"] (B,) over the items of all micro-batches.

    Each micro-batch runs on one rank. Return every measured value for every item, in a fixed order.
    """
    size, found = sum(map(len, parts)), []
    for part, is_mine in dealt(parts):  # a rank without a part of its own computes one that weighs 0: see `dealt`
        with autocast(precision):
            values = loss(model, part)
        (values["loss"].sum() / size * is_mine).backward()
        if is_mine:
            found.append({name: x.detach().tolist() for name, x in values.items()})
    found = collected(found)
    return {name: [x for values in found for x in values[name]] for name in found[0]}


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, parts: list[list], loss: Callable,
            options: TrainOptions) -> dict[str, list[float]]:
    """Take one optimizer step on the mean loss; return the values of all items, and figures of the step.

    Where the loss or the gradient is not finite, the weights stay as they are: stop, or skip with --skip_nonfinite.
    """
    values = accumulate(model, parts, loss, options.precision)
    norm = float(full_weight(nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)))
    finite = math.isfinite(sum(values["loss"]) + norm)
    if finite:
        optimizer.step()
    else:
        check_weights(model)
        if not options.skip_nonfinite:
            bad = [name for name, found in values.items() if not math.isfinite(sum(found))] or ["only the gradient"]
            raise InputError(f"the loss is {fmean(values['loss'])} and the gradient's norm {norm} (not finite: "
                             f"{', '.join(bad)}), for the batch {[item.id for part in parts for item in part]}. Try a "
                             "smaller --lr or --skip_nonfinite.")
    model.zero_grad()
    return values | {"grad_norm": [norm]} | ({"skipped": [float(not finite)]} if options.skip_nonfinite else {})


def check_weights(model: nn.Module) -> None:
    """Refuse a model with a weight that is not finite: no batch and no learning rate can help it."""
    for name, weight in model.named_parameters():
        if not full_weight(weight.detach().sum()).isfinite():
            raise InputError(f"the weights {name} are not finite: the model that training began with was damaged, or "
                             "--lr is too large. No model is saved.")


# --- the loop --------------------------------------------------------------------------------------

def load_for_training(directory: str | Path, options: TrainOptions, wrap: Callable = lambda model: model,
                      dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load wrap(the model of a directory), ready for training: on this device, or sharded over all ranks."""
    alone = world() == 1  # otherwise weights stay mapped as they are stored: a rank reads what it keeps
    module = wrap(load_model(directory, device(), dtype) if alone else load_model(directory, dtype=None))
    blocks = [part for part in module.modules() if isinstance(part, Block)]
    for part in module.modules():
        if isinstance(part, Decoder):
            part.checkpoint_activations = options.checkpoint_activations
    for block in blocks if options.compile else ():
        block.compile(dynamic=True)
    return module if alone else shard(module, blocks, dtype_of(options.precision), cpu_offload=options.cpu_offload,
                                      within_node=options.shard_within_node).to(dtype)


def new_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": options.weight_decay},
                              {"params": vectors, "weight_decay": 0.0}], lr=options.lr, betas=(0.9, 0.95), fused=True)


def fit(model: nn.Module, items: list, loss: Callable[[nn.Module, list], dict[str, Tensor]], options: TrainOptions,
        seed: int, folder: Path, after_step: Callable[[int], dict] = lambda step: {}) -> list[dict]:
    """Minimise the mean of loss(model, items)["loss"] (B,) over items; return a record of means for each step.

    The other values of `loss` are only recorded, and so is what after_step(number of steps done) returns.
    """
    optimizer = new_optimizer(model, options)

    def step_once(step: int) -> dict:
        batch = batch_at(step, items, options.batch_size, seed)
        values = descend(model, optimizer, micro_batches(batch, options.micro_batch_tokens), loss, options)
        means = {name: mean_or_max(name, x) for name, x in values.items()}
        return means | {"tokens": sum(item.tokens for item in batch)} | after_step(step + 1)

    return loop(step_once, num_steps(len(items), options), model, optimizer, options, folder,
                made_of=hash_of(seed, *items))


def loop(step_once: Callable[[int], dict], steps: int, model: nn.Module, optimizer: torch.optim.Optimizer,
         options: TrainOptions, folder: Path, made_of: str, shown: tuple[str, ...] = ("loss",)) -> list[dict]:
    """Call step_once(step) -> record for every step that is not done yet; return the records of all steps.

    Each record is a line of FOLDER/train.jsonl at once. The state is saved every save_every steps, and when the run is
    asked to stop; a run that resumes from it takes the later steps again, so their lines are cut off.
    """
    made_of, path = hash_of(made_of, steps, options.lr, options.batch_size), folder / "train.jsonl"
    done = load_state(folder / "state", model, optimizer, made_of)
    records = by_first(lambda: cut_back(path, done))
    with (stop_asked() as asked, tracked(options.track, folder, records) as track,
          Progress(f"train {folder.name}", steps, "step", done) as bar):
        for step in range(done, steps):
            rate = learning_rate(step, steps, options)
            for group in optimizer.param_groups:
                group["lr"] = rate
            record = {"step": step, "lr": rate, **step_once(step)}
            records.append(record)
            append(path, json.dumps(record) + "\n")
            track(record)
            if record.get("skipped") and (skipped := sum(r.get("skipped", 0) for r in records)) > steps / 2:
                raise InputError(f"{skipped:g} of {steps} steps were skipped, since their loss or gradient was not "
                                 "finite: that is no training, and no model is saved. Try a smaller --lr.")
            bar.advance(1, record["tokens"], **{name: record[name] for name in shown if name in record})

            stop = asked()
            if stop or len(records) % options.save_every == 0 and len(records) < steps:
                by_first(lambda: flush(path))
                save_state(folder / "state", model, optimizer, len(records), made_of)
            if stop:
                raise SystemExit(f"\nstopped after step {step + 1} of {steps}; run the same command again to resume")
    check_weights(model)
    return records


def train_once(folder: Path, source: str, train: Callable[[], Llama]) -> str:
    """Return the model directory in `folder`; where it is missing, train() makes the model.

    The config.json and tokenizer of the model directory `source` are copied.
    """
    if not by_first((folder / "model").exists):
        with timed(folder, "train"):
            save_model(train(), folder / "model", source)
    drop_states(folder)
    return str(folder / "model")


# --- fine-tuning on solutions ----------------------------------------------------------------------

@dataclass(frozen=True)
class Example:
    """A prompt and the response to learn, as token ids."""
    id: str
    prompt: list[int]
    response: list[int]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.response)


def fitting(examples: list[Example], max_length: int) -> list[Example]:
    """Leave out the examples that the model has no positions for, and say how many."""
    kept = [example for example in examples if example.tokens <= max_length]
    if len(kept) < len(examples):
        print(f"{len(examples) - len(kept):,} of {len(examples):,} examples exceed the model's {max_length} positions "
              "and are left out")
    if not kept:
        raise InputError(f"none of {len(examples):,} examples is short enough for the model's {max_length} positions")
    return kept


def sft_loss(model: Llama, batch: list[Example], mean_length: float = 0,
             prompt_weight: float = 0.0) -> dict[str, Tensor]:
    """NLL of each response plus prompt_weight times that of its prompt (B,), divided by the response's length, or by
    mean_length if given."""
    tokens, mask = padded(batch)
    prompt = mask.cumsum(-1) == 0
    logps = model.logps(tokens, mask | prompt if prompt_weight else mask)  # (B, T-1), 0 where not scored
    summed = (logps * mask).sum(-1)
    weighted = summed + prompt_weight * (logps * prompt).sum(-1)
    return {"loss": -weighted / (mean_length or mask.sum(-1)), "nll": nll_loss(logps, mask),
            "logps/chosen": summed}


def fit_sft(model: Llama, examples: list[Example], options: TrainOptions, seed: int, folder: Path,
            prompt_weight: float = 0.0, after_step: Callable[[int], dict] = lambda step: {}) -> list[dict]:
    """Fine-tune on examples: the SFT of all methods."""
    examples = fitting(examples, model.config.max_length)
    mean_length = fmean(len(example.response) for example in examples) if options.nll_norm == "token" else 0
    loss = partial(sft_loss, mean_length=mean_length, prompt_weight=prompt_weight)
    return fit(model, examples, loss, options, seed, folder, after_step)


if __name__ == "__main__":
    runpy.run_module("tools.sft", run_name="__main__")
