"""Iterative Reasoning Preference Optimization (Pang et al. 2024, arXiv 2404.19733 v3, section 2).

    for t = 1 .. T:
        1. sample N responses to every question from M_{t-1}, and grade them
        2. G_w = the right ones and the gold solution, G_l = the wrong ones
        3. pair k of a question, k < K, is (G_w[k mod |G_w|], G_l[k mod |G_l|])
        4. reference log-probabilities of all pairs, under M_{t-1}
        5. M_t minimises the mean of eq. 1 (losses.dpo_nll_loss) over these pairs, starting from M_{t-1}
        6. accuracy of M_t: dev is what choices are made on, test is only reported

The reference is M_{t-1} itself before its first update, so no second model is kept in memory. Each step writes its
result to a file; run the same command again to continue at the first missing one. (The paper counts t from 0.)

    python irpo.py --preset toy --model runs/base-s0/model --run_dir runs/irpo-s0
    python irpo.py --preset toy --alpha 0 ...                  # plain DPO
    python irpo.py --preset toy --method sft_chosen ...        # fine-tuning on the winners alone
    python irpo.py --task gsm8k --model DIR --run_dir DIR
"""
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

import data
from checkpoint import flops, load_config, model_hash, sampler_of
from data.check import check_inputs
from data.task import prompt_option
from data.tokenizer import load_tokenizer
from evaluate import Answered, SampleOptions, Sampler, answer, answer_once, evaluate_model, summarize
from infra import InputError
from infra.config import option, parse_config
from infra.parallel import by_first, computed
from infra.progress import iterations, summary
from infra.run import Pieces, derive_seed, hash_of, once, open_run, read_jsonl, run_script, write_json, write_jsonl
from losses import dpo_loss, dpo_nll_loss
from model import Llama
from train import (Example, TrainOptions, autocast, fit, fit_sft, fitting, load_for_training, micro_batches, num_steps,
                   packed_logps, response_logps, train_once)


@dataclass(frozen=True)
class Config(TrainOptions, SampleOptions):
    """Defaults are the paper's values for GSM8K where it states them."""
    model: str = option("", "directory of M_0 (make base makes the toy world's)", required=True)
    run_dir: str = option("", "directory of this run; empty: runs/ and a name made of the flags")
    seed: int = option(0, "of samples, subsampling and batch order", low=0, high=2**64 - 1)
    prompt: str = prompt_option("irpo")
    num_questions: int = option(0, "use only the first N training questions; 0: all", low=0)
    iterations: int = option(4, "T; more or fewer may be asked for later", low=1, free=True)
    num_samples: int = option(30, "N, responses per question", low=1, group="step 1")
    temperature: tuple[float, ...] = option((0.8, 0.8, 1.3, 1.3), "of sampling, per iteration; the last repeats", low=0)
    gold: bool = option(True, "gold solutions are among the right ones", group="steps 2 and 3")
    dedupe: bool = option(True, "equal responses to a question count once (the paper is silent)")
    pairs_per_question: int = option(10, "K", low=1)
    max_pairs: int = option(60000, "random subsample of the pairs down to this; 0: keep all", low=0)
    method: str = option("irpo", "irpo; sft_chosen: NLL of the winners; sft_gold: NLL of gold",
                         ("irpo", "sft_chosen", "sft_gold"), group="step 5")
    alpha: float = option(1.0, "weight of the NLL term; 0 is plain DPO", low=0)
    beta: float = option(0.1, "of the DPO term", above=0)
    start_from: str = option("", "in iteration 1, start training from this model and use it as the reference; the "
                             "pairs are still sampled from M_0")
    select_every: int = option(500, "choose the number of steps as the paper does: measure dev accuracy every N steps "
                               "of a trial run without the dev questions, then train on everything for the best "
                               "number (from iteration 2 on M_{t-1} has seen dev); 0: off", low=0)
    lr: float = option(7e-7, "learning rate of AdamW", above=0)
    max_steps: int = option(5000, "optimizer steps of an iteration at most; 0: only epochs count", low=0)
    epochs: int = option(2, "passes over the pairs at most", low=1)
    eval_samples: int = option(0, "samples per test question at temperature 1 (the paper votes at 0.8); can be "
                               "added to a finished run; 0: greedy only", low=0, free=True, group="step 6")
    eval_questions: int = option(0, "use only the first N dev and test questions; 0: all", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_from and not os.path.isdir(self.start_from):
            raise ValueError(f"--start_from {self.start_from}: there is no such directory")
        if self.select_every and (self.lr_schedule != "constant" or self.warmup_share):
            raise ValueError(f"--select_every {self.select_every} needs --lr_schedule constant without --warmup_share: "
                             "otherwise the shorter second run would follow another schedule")


TOY = dict(task="toy", prompt="plain", num_questions=500, num_samples=8, temperature=(1.0,), pairs_per_question=4,
           max_pairs=1000, select_every=0, lr=2.3e-5, beta=0.3, lr_schedule="linear", warmup_steps=10, epochs=2,
           max_steps=0, max_new_tokens=160)  # lr, beta, epochs: results/tune/toy.json
SMOKE = TOY | dict(num_questions=40, num_samples=4, iterations=2, eval_questions=20)


@dataclass(frozen=True)
class Pair:
    """Token ids of a preference, and the summed log-probs that the reference gives both responses."""
    id: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    ref_chosen: float = math.nan
    ref_rejected: float = math.nan

    @property
    def tokens(self) -> int:
        """Length of the packed row: the prompt once, its last token again, and both responses."""
        return len(self.prompt) + 1 + len(self.chosen) + len(self.rejected)

    @property
    def longest(self) -> int:
        """Tokens of the longer sequence, prompt included."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


# --- steps 2 and 3: pairs --------------------------------------------------------------------------

def make_pairs(right: list, wrong: list, num_pairs: int) -> list[tuple]:
    """Cycle through both lists in parallel (footnote 2); [] if either is empty."""
    if not right or not wrong:
        return []
    return [(right[k % len(right)], wrong[k % len(wrong)]) for k in range(num_pairs)]


def right_and_wrong(question: Answered, gold: list[int] | None, dedupe: bool) -> tuple[list, list]:
    """Step 2 for one question. A response that was truncated before EOS is wrong, whatever it says.

    A complete one that is copied from the question, or whose check took too long, is neither.
    """
    right = [s.ids for s in question.samples if s.right and s.finished] + ([gold] if gold else [])
    wrong = [s.ids for s in question.samples if not s.finished or s.verdict in ("wrong", "unparsed")]
    if dedupe:
        right, wrong = ([list(ids) for ids in dict.fromkeys(map(tuple, group))] for group in (right, wrong))
    return right, wrong


def preference_pairs(answered: list[Answered], golds: dict[str, list[int]], config: Config) -> list[Pair]:
    """Steps 2 and 3 for all questions."""
    pairs = []
    for question in answered:
        right, wrong = right_and_wrong(question, golds.get(question.id) if config.gold else None, config.dedupe)
        pairs += [Pair(question.id, question.prompt_ids, chosen, rejected)
                  for chosen, rejected in make_pairs(right, wrong, config.pairs_per_question)]
    return pairs


def kept_pairs(pairs: list[Pair], start: str, config: Config, t: int) -> list[Pair]:
    """Drop pairs too long for the model in `start`; draw max_pairs of the others. InputError if there are none."""
    limit = load_config(start).max_length
    short = [pair for pair in pairs if pair.longest <= limit]
    if not short:
        why = f"all {len(pairs)} are longer than the model's {limit} positions" if pairs else (
            "every question has only right or only wrong samples")
        raise InputError(f"iteration {t} has no pairs: {why}. Change --temperature, --num_samples or --max_new_tokens, "
                         "or stop at fewer --iterations.")
    if config.max_pairs and len(short) > config.max_pairs:
        return random.Random(f"{config.seed} {t}").sample(short, config.max_pairs)
    return short


# --- steps 4 and 5: reference and loss -------------------------------------------------------------

def pair_logps(model: Llama, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """Summed log-probs (2, B) and lengths (2, B) of the chosen and the rejected responses."""
    return packed_logps(model, [p.prompt for p in pairs], [[p.chosen, p.rejected] for p in pairs])


@torch.no_grad()
def with_reference(pairs: list[Pair], directory: str, config: Config, path: Path | None = None) -> list[Pair]:
    """Step 4: add the reference log-probs, so that training needs no second model. path: their file."""
    model, parts = load_for_training(directory, config), micro_batches(pairs, config.micro_batch_tokens)

    def logps(part: list[Pair]) -> list[list[float]]:
        with autocast(config.precision):
            return pair_logps(model, part)[0].tolist()  # (2, B)

    found = Pieces(path, model_hash(directory), config.precision, parts).computed(parts, logps, label="reference")
    if not math.isfinite(sum(sum(map(sum, both)) for both in found)):
        raise InputError(f"{directory} gives log-probabilities that are not finite: its logits are NaN or infinite, so "
                         "its weights are damaged, or its training diverged")
    scored = {id(pair): replace(pair, ref_chosen=chosen, ref_rejected=rejected)
              for part, both in zip(parts, found) for pair, chosen, rejected in zip(part, *both)}
    return [scored[id(pair)] for pair in pairs]


def preference_loss(model: Llama, pairs: list[Pair], config: Config, mean_length: float = 0) -> dict[str, Tensor]:
    """Step 5 on a micro-batch: the loss of each pair (B,), and figures that are only recorded.

    mean_length: divides the NLL in place of each response's own length (--nll_norm token).
    """
    (chosen, rejected), (chosen_length, rejected_length) = pair_logps(model, pairs)
    ref_chosen = chosen.new_tensor([pair.ref_chosen for pair in pairs])
    ref_rejected = chosen.new_tensor([pair.ref_rejected for pair in pairs])
    reward_chosen, reward_rejected = config.beta * (chosen - ref_chosen), config.beta * (rejected - ref_rejected)
    length = mean_length or chosen_length
    return {"loss": dpo_nll_loss(chosen, rejected, ref_chosen, ref_rejected, length, config.beta, config.alpha),
            "dpo": dpo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta), "nll": -chosen / chosen_length,
            "logps/chosen": chosen, "logps/rejected": rejected,
            "rewards/chosen": reward_chosen, "rewards/rejected": reward_rejected,
            "rewards/margins": reward_chosen - reward_rejected,
            "rewards/accuracies": (reward_chosen > reward_rejected).float(),
            "length/chosen": chosen_length, "length/rejected": rejected_length}


def training_items(pairs: list[Pair], answered: list[Answered], golds: dict[str, list[int]], start: str,
                   config: Config) -> list:
    """What the method trains on: the pairs, their winners, or the gold solutions of all questions."""
    if config.method == "irpo":
        return pairs
    if config.method == "sft_chosen":
        return [Example(pair.id, pair.prompt, pair.chosen) for pair in pairs]
    examples = [Example(q.id, q.prompt_ids, golds[q.id]) for q in answered if q.id in golds]
    return fitting(examples, load_config(start).max_length)  # here, too, since steps are counted before training


def minimise(directory: str, items: list, pairs: list[Pair], golds: dict[str, list[int]], config: Config, seed: int,
             folder: Path, after_step: Callable[[Llama, int], dict] = lambda model, step: {}) -> Llama:
    """Step 5: train M_{t-1}, from a directory, on items; return M_t.

    `pairs` serve only the check before the first step and the curves. after_step(model, number of steps done) may add
    to a record.
    """
    model = load_for_training(directory, config)
    check_start(model, pairs, config)
    probed, every = pairs[::math.ceil(len(pairs) / 64)], max(1, num_steps(len(items), config) // 10)
    first = {"step": 0, **probe(model, probed, golds, config)}

    def measure(step: int) -> dict:
        found = {"probe": {"step": step, **probe(model, probed, golds, config)}} if step % every == 0 else {}
        return found | after_step(model, step)

    if config.method == "irpo":
        mean_length = fmean(len(pair.chosen) for pair in items) if config.nll_norm == "token" else 0
        loss = partial(preference_loss, config=config, mean_length=mean_length)
        records = fit(model, items, loss, config, seed, folder, measure)
    else:
        records = fit_sft(model, items, config, seed, folder, after_step=measure)
    write_jsonl(folder / "probe.jsonl", [first, *(record["probe"] for record in records if "probe" in record)])
    return model


@torch.no_grad()
def check_start(model: Llama, pairs: list[Pair], config: Config) -> None:
    """Before its first update the policy is the reference, so all margins must be 0 (and the DPO loss ln 2)."""
    first = micro_batches(pairs[:8], config.micro_batch_tokens)[0]
    with autocast(config.precision):
        logps, lengths = pair_logps(model, first)  # (2, B)
    chosen, rejected = logps - logps.new_tensor([[p.ref_chosen, p.ref_rejected] for p in first]).T
    margin = float((chosen - rejected).abs().mean())
    of_token = 1e-4 if config.precision == "fp32" else 0.05  # nats by which a log-prob may be rounded
    rounding = of_token * math.sqrt(lengths.sum(0).float().mean())
    print(f"check: margins before the first step are {margin:.4f} nats, and 0 where policy = reference (at most "
          f"{rounding:.4f} by rounding)")
    if not margin <= rounding:  # nor is NaN
        raise InputError("the reference log-probabilities are not those of the model that is trained")


@torch.no_grad()
def probe(model: Llama, pairs: list[Pair], golds: dict[str, list[int]], config: Config) -> dict[str, float]:
    """Average log-prob of a fixed set of pairs (and of their questions' gold solutions), for the training curves."""
    gold = [Example(pair.id, pair.prompt, golds[pair.id]) for pair in pairs if pair.id in golds]
    gold = [example for example in gold if example.tokens <= model.config.max_length]

    def means(items: list, logps: Callable[[list], Tensor]) -> list[float]:
        def sums(part: list) -> Tensor:
            with autocast(config.precision):
                return logps(part).sum(-1).cpu()
        return (sum(computed(micro_batches(items, config.micro_batch_tokens), sums)) / len(items)).tolist()

    found = dict(zip(("chosen", "rejected"), means(pairs, lambda part: pair_logps(model, part)[0])))
    return found | ({"gold": means(gold, lambda part: response_logps(model, part)[0].sum(-1))} if gold else {})


def check_selection(items: int, config: Config) -> None:
    if num_steps(items, config) < config.select_every:
        raise InputError(f"--select_every {config.select_every} is more than the {num_steps(items, config)} steps of a "
                         "training run: lower it, or give 0 to train without selection")


def dev_accuracies(train: Callable[..., Llama], items: list, dev: list[data.Problem], tokenizer, config: Config,
                   folder: Path) -> list[dict]:
    """Measure dev accuracy every select_every steps of a trial run, train(), on the items of other questions."""
    dev_ids = {problem.id for problem in dev}
    items = [item for item in items if item.id not in dev_ids]
    check_selection(len(items), config)

    def accuracy(model: Llama, step: int) -> dict:
        if step % config.select_every:
            return {}
        sampler = sampler_of(model, config.precision, config.tensor_parallel)
        return {"dev": summarize(answer(sampler, tokenizer, dev, config, label="dev"), config.task)["accuracy"]}

    train(items, config=config, folder=folder, after_step=accuracy)
    records = by_first(lambda: read_jsonl(folder / "train.jsonl"))
    return [{"step": record["step"] + 1, "accuracy": record["dev"]} for record in records if "dev" in record]


# --- the run ---------------------------------------------------------------------------------------

def training_row(t: int, folder: Path, answered: list[Answered], made: list[Pair], pairs: list[Pair], start: str,
                 config: Config) -> dict:
    """Describe how much signal the samples contain, what training did, and the tokens and FLOPs it took."""
    shares = [fmean(s.right and s.finished for s in q.samples) for q in answered]
    limit, found = load_config(start).max_length, summary(read_jsonl(folder / "train.jsonl"))
    overlong = sum(pair.longest > limit for pair in made)
    sampled = sum(len(s.ids) for q in answered for s in q.samples)
    prompts, scored = sum(len(q.prompt_ids) for q in answered), sum(pair.tokens for pair in pairs)
    # only IRPO needs a reference, and SFT on gold needs no samples
    forward = {"irpo": sampled + prompts + scored, "sft_chosen": sampled + prompts, "sft_gold": 0}[config.method]
    trial = folder / "select" / "train.jsonl"
    tried = sum(record["tokens"] for record in read_jsonl(trial)) if trial.exists() else 0
    return {"name": f"M{t}", "iteration": t, "split": "train", "questions": len(answered),
            "all_right": fmean(share == 1 for share in shares), "all_wrong": fmean(share == 0 for share in shares),
            "mixed": fmean(0 < share < 1 for share in shares), "sample_accuracy": fmean(shares),
            "unfinished": sum(not s.finished for q in answered for s in q.samples),
            "pairs_made": len(made), "pairs_overlong": overlong, "pairs_capped": len(made) - overlong - len(pairs),
            "pairs": len(pairs), **found, "tokens_sampled": sampled,
            "flops": flops(start, forward, found["tokens_trained"] + tried),
            "probe": read_jsonl(folder / "probe.jsonl")}


def main() -> None:
    config = parse_config(Config, {"toy": TOY, "smoke": SMOKE}, __doc__)
    tokenizer, problems = load_tokenizer(config.model), config.problems("train", config.num_questions)
    dev = config.problems("dev") if config.select_every else []  # also trained on, for the chosen number of steps
    golds = {p.id: config.gold_ids(tokenizer, p) for p in problems + dev if p.solution}
    if not golds and (config.gold or config.method == "sft_gold"):
        raise InputError(f"{config.task} has no gold solutions: give --no-gold and another --method than sft_gold")
    others = config.held_out()
    check_inputs(config, tokenizer, problems + dev, others)
    most = len(problems) * config.pairs_per_question
    check_selection(len(problems) if config.method == "sft_gold" else min(most, config.max_pairs or most), config)
    run = open_run(config, weights=model_hash(config.model), problems=hash_of(problems, dev, others))

    notes = {"dev_was_trained_on": True} if config.select_every else {}
    M = config.model  # the directory of M_{t-1}
    rows, solved = evaluate_model("M0", 0, M, config, run / "iter0"), set()
    for t in iterations(config.iterations):
        folder, seed = run / f"iter{t}", derive_seed(config.seed, t)
        start = config.start_from if config.start_from and t == 1 else M
        if not by_first(folder.exists):  # then results of fewer iterations are not all any more
            by_first(lambda: (run / "results.json").unlink(missing_ok=True))

        answered = answer_once(folder / "samples.jsonl", Sampler(M, config), problems + dev, split="train",  # step 1
                               num_samples=config.num_samples, seed=derive_seed(config.seed, t, "sample"), reward=True,
                               temperature=config.temperature[min(t, len(config.temperature)) - 1], label="sample")
        made = preference_pairs(answered, golds, config)  # steps 2 and 3
        kept = kept_pairs(made, start, config, t)
        path = folder / "pairs.jsonl"
        pairs = once(path, partial(with_reference, kept, start, config, path), Pair,  # step 4
                     dict(reference=model_hash(start)))

        items, options = training_items(pairs, answered, golds, start, config), config  # step 5
        train = partial(minimise, start, pairs=pairs, golds=golds, seed=seed)
        if config.select_every:
            measured = once(folder / "select.json",
                            partial(dev_accuracies, train, items, dev, tokenizer, config, folder / "select"))
            options = replace(config, max_steps=max(measured, key=lambda row: row["accuracy"])["step"])
        M = train_once(folder, start, partial(train, items, config=options, folder=folder))

        now = {q.id for q in answered if any(s.right and s.finished for s in q.samples)}
        rows.append(training_row(t, folder, answered, made, pairs, start, config) | {"newly_solved": len(now - solved)})
        solved |= now
        rows += evaluate_model(f"M{t}", t, M, config, folder, **notes)  # step 6
    write_json(run / "results.json", rows)
    print(f"{run / 'results.json'} is complete; python -m tools.report {run} draws it")


if __name__ == "__main__":
    run_script(main)
