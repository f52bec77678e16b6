"""Iterative Reasoning Preference Optimization (Pang et al. 2024, arXiv 2404.19733 v3, section 2).

    for t = 1 .. T:
        1. sample N responses to every question from M_{t-1}; each is right or wrong
        2. G_w = the right ones and the gold solution, G_l = the wrong ones
        3. pair k of a question, k < K, is (G_w[k mod |G_w|], G_l[k mod |G_l|])
        4. reference log-probabilities of all pairs under M_{t-1}
        5. M_t = argmin of the mean of eq. 1 (losses.dpo_nll_loss) over these pairs, from M_{t-1}
        6. accuracy of M_t: on dev for whoever chooses, on test for the record

The paper counts from 0: its t is our t - 1. No reference model is in memory: the reference is M_{t-1}
itself before its first update. Every step
writes a file that exists only when complete; the same command run again goes on at the first missing.
Left out: pairs of earlier iterations (the paper trains on the newest only).

    python irpo.py --preset toy --model runs/base-s0/model --run_dir runs/irpo-s0
    python irpo.py --preset toy --alpha 0 ...                  # plain DPO
    python irpo.py --preset toy --method sft_chosen ...        # fine-tuning on the winners alone
    python irpo.py --task gsm8k --prompt irpo --answer_format final_answer --model DIR --run_dir DIR
"""
import dataclasses
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

import data
from checkpoint import drop, load_config, load_model, load_sampler, sampler_of, weights_hash
from data.prompts import PROMPTS
from data.tokenizer import load_tokenizer
from evaluate import (Answered, SampleOptions, answer, answer_to, evaluate_model, held_out, load_answered,
                      self_check, summarize)
from infra.experiment import (at_least, derive_seed, log, one_of, open_run, option, parse_config, read_json,
                        read_jsonl, run_script, write_json, write_jsonl)
from losses import dpo_loss, dpo_nll_loss, nll_loss
from model import Llama
from infra.parallel import barrier, computed, missing, rank, world
from train import (TrainOptions, autocast, branch_logps, fit, items_hash, load_trained, micro_batches, num_steps,
                   response_logps, save_trained, to_train)


@dataclass(frozen=True)
class Config(TrainOptions, SampleOptions):
    """Defaults are the paper's values for GSM8K where it states them."""
    model: str = option("", "directory of M_0")
    run_dir: str = option("", "directory of this run; empty: runs/ and a name made of the flags")
    seed: int = option(0, "of samples, subsampling and batch order")
    prompt: str = option("irpo", f"prompt template: {', '.join(PROMPTS)}")
    num_questions: int = option(0, "only the first so many training questions; 0: all")
    iterations: int = option(4, "T")
    # step 1
    num_samples: int = option(30, "N, responses per question")
    temperature: tuple[float, ...] = option((0.8, 0.8, 1.3, 1.3), "of sampling, per iteration; the "
                                            "last one repeats")
    # steps 2 and 3
    gold: bool = option(True, "gold solutions are among the right ones")
    dedupe: bool = option(True, "equal responses to a question count once (the paper is silent)")
    pairs_per_question: int = option(10, "K")
    max_pairs: int = option(60000, "random subsample of the pairs down to this; 0: keep all")
    # step 5
    method: str = option("irpo", "irpo; sft_chosen: NLL of the winners; sft_gold: NLL of gold")
    alpha: float = option(1.0, "weight of the NLL term; 0 is plain DPO")
    beta: float = option(0.1, "of the DPO term")
    start_from: str = option("", "iteration 1 trains, and takes its reference, from this model "
                             "instead of M_0; its pairs are still M_0's")
    select_every: int = option(500, "train once without dev questions and measure dev accuracy every "
                               "so many steps, then train with them for the best number (the "
                               "paper's way; from iteration 2 on M_{t-1} has seen dev); 0: do not")
    lr: float = option(7e-7, "learning rate of AdamW")
    max_steps: int = option(5000, "optimizer steps of an iteration at most; 0: only epochs count")
    epochs: int = option(2, "passes over the pairs at most")
    # step 6
    eval_samples: int = option(0, "samples per test question at temperature 1; 0: greedy only")
    eval_questions: int = option(0, "only the first so many dev and test questions; 0: all")

    def __post_init__(self) -> None:
        TrainOptions.__post_init__(self)
        SampleOptions.__post_init__(self)
        self.refuse_one_file()
        if not self.model:
            raise ValueError("--model: give the directory of M_0; `make base` makes the toy world's")
        if self.start_from and not Path(self.start_from).is_dir():
            raise ValueError(f"--start_from {self.start_from}: there is no such directory")
        one_of(self, method=("irpo", "sft_chosen", "sft_gold"))
        at_least(self, 1, "num_samples", "pairs_per_question", "iterations")
        if self.beta <= 0 or min(self.temperature) < 0:
            raise ValueError(f"--beta {self.beta} --temperature {self.temperature}: must be above 0, "
                             "and not below 0")
        if self.select_every and self.lr_schedule != "constant":
            raise ValueError(f"--select_every {self.select_every} needs --lr_schedule constant: with "
                             "another the shorter second training would have other rates")


TOY = dict(task="toy", prompt="plain", num_questions=1000, num_samples=8, temperature=(1.0,), pairs_per_question=4,
           max_pairs=2000, select_every=0, lr=5e-5, lr_schedule="linear", warmup_steps=10, epochs=1,
           max_steps=0, max_new_tokens=96, eval_samples=8)
SMOKE = TOY | dict(num_questions=40, num_samples=4, iterations=2, eval_questions=20)
PRESETS = {"toy": TOY, "smoke": SMOKE}


@dataclass(frozen=True)
class Pair:
    """Token ids of a preference, and what the reference gives both responses (summed log-probs)."""
    id: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    ref_chosen: float = math.nan
    ref_rejected: float = math.nan

    @property
    def tokens(self) -> int:
        """Of the row that holds the prompt once, and then its last token and a response twice."""
        return len(self.prompt) + 1 + len(self.chosen) + len(self.rejected)

    @property
    def longest(self) -> int:
        """Positions that the longer sequence needs."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))

    @property
    def chosen_tokens(self) -> int:
        return len(self.prompt) + len(self.chosen)


def make_pairs(right: list, wrong: list, num_pairs: int) -> list[tuple]:
    """Walk both lists at once, starting over at the end of each (footnote 2); [] if either is empty."""
    if not right or not wrong:
        return []
    return [(right[k % len(right)], wrong[k % len(wrong)]) for k in range(num_pairs)]


def right_and_wrong(question: Answered, gold: list[int] | None,
                    dedupe: bool) -> tuple[list[list[int]], list[list[int]]]:
    """Steps 1 and 2 for one question. A response cut short of EOS is wrong, whatever it says."""
    right = [s.ids for s in question.samples if s.right and s.finished]
    wrong = [s.ids for s in question.samples if not (s.right and s.finished)]
    if gold is not None:
        right.append(gold)
    if dedupe:
        right, wrong = ([list(ids) for ids in dict.fromkeys(map(tuple, group))]
                        for group in (right, wrong))
    return right, wrong


def collect_pairs(answered: list[Answered], golds: dict[str, list[int]], config: Config,
                  iteration: int, max_tokens: int) -> tuple[list[Pair], dict]:
    """Steps 2 and 3 for all questions, and the counts that tell how much was there to learn from."""
    pairs, counts = [], []
    for question in answered:
        gold = golds.get(question.id) if config.gold else None
        right, wrong = right_and_wrong(question, gold, config.dedupe)
        counts.append(sum(sample.right and sample.finished for sample in question.samples))
        pairs += [Pair(question.id, question.prompt_ids, chosen, rejected)
                  for chosen, rejected in make_pairs(right, wrong, config.pairs_per_question)]
    fitting = [pair for pair in pairs if pair.longest <= max_tokens]
    kept = fitting
    if config.max_pairs and len(fitting) > config.max_pairs:
        kept = random.Random(f"{config.seed} {iteration}").sample(fitting, config.max_pairs)
    coverage = {
        "questions": len(answered),
        "all_right": sum(c == config.num_samples for c in counts) / len(counts),
        "all_wrong": sum(c == 0 for c in counts) / len(counts),
        "mixed": sum(0 < c < config.num_samples for c in counts) / len(counts),
        "sample_accuracy": sum(counts) / len(counts) / config.num_samples,
        "unfinished": sum(not s.finished for q in answered for s in q.samples),
        "pairs_made": len(pairs), "pairs_overlong": len(pairs) - len(fitting),
        "pairs_capped": len(fitting) - len(kept), "pairs": len(kept)}
    if not kept:
        raise SystemExit(
            f"iteration {iteration} has no pairs: of {len(counts)} questions {coverage['all_right']:.0%} "
            f"have only right and {coverage['all_wrong']:.0%} only wrong samples, and "
            f"{coverage['pairs_overlong']} pairs exceed {max_tokens} tokens. Raise --temperature or "
            "--num_samples, or stop at fewer --iterations.")
    return kept, coverage


def pair_logps(model: Llama, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """(2, B) summed log-probabilities and (2, B) token counts of the chosen and rejected responses."""
    logps, owner = branch_logps(model, [(p.prompt, [p.chosen, p.rejected]) for p in pairs])  # (B, T-1)
    masks = torch.stack([owner == 1, owner == 2])  # (2, B, T-1)
    return (logps * masks).sum(-1), masks.sum(-1)


@torch.no_grad()
def add_reference(model: Llama, pairs: list[Pair], config: Config) -> list[Pair]:
    """Step 4: two numbers per pair from M_{t-1}, so that training needs no second model."""
    batches = micro_batches(range(len(pairs)), lambda i: pairs[i].tokens, config.micro_batch_tokens)
    with tqdm(total=len(pairs), desc="reference", unit="pair", dynamic_ncols=True, disable=rank() > 0) as bar:
        def logps(batch: list[int]) -> list[tuple[int, float, float]]:
            with autocast(config.precision):
                (chosen, rejected), _ = pair_logps(model, [pairs[i] for i in batch])
            bar.update(len(batch) * world())
            return list(zip(batch, chosen.tolist(), rejected.tolist()))

        found = sorted(row for batch in computed(batches, logps) for row in batch)
    return [dataclasses.replace(pairs[i], ref_chosen=chosen, ref_rejected=rejected) for i, chosen, rejected in found]


def preference_loss(model: Llama, pairs: list[Pair], config: Config) -> dict[str, Tensor]:
    """Step 5 on a micro-batch: the loss of every pair, and what the paper's figures are drawn from."""
    (chosen, rejected), (chosen_length, rejected_length) = pair_logps(model, pairs)
    ref_chosen = chosen.new_tensor([pair.ref_chosen for pair in pairs])
    ref_rejected = chosen.new_tensor([pair.ref_rejected for pair in pairs])
    loss = dpo_nll_loss(chosen, rejected, ref_chosen, ref_rejected, chosen_length,
                        config.beta, config.alpha)
    reward_chosen, reward_rejected = chosen - ref_chosen, rejected - ref_rejected
    return {"loss": loss, "nll": -chosen / chosen_length,
            "dpo": dpo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta),
            "logps/chosen": chosen, "logps/rejected": rejected,
            "rewards/chosen": config.beta * reward_chosen,
            "rewards/rejected": config.beta * reward_rejected,
            "rewards/margins": config.beta * (reward_chosen - reward_rejected),
            "rewards/accuracies": (reward_chosen > reward_rejected).float(),
            "length/chosen": chosen_length, "length/rejected": rejected_length}


def chosen_loss(model: Llama, pairs: list[Pair]) -> dict[str, Tensor]:
    """The baselines' step 5: the NLL of the chosen responses, or of gold in their place."""
    logps, mask, _ = response_logps(model, [(pair.prompt, pair.chosen) for pair in pairs])
    return {"loss": nll_loss(logps, mask), "logps/chosen": (logps * mask).sum(-1)}


def gold_pairs(answered: list[Answered], golds: dict[str, list[int]], max_tokens: int) -> list[Pair]:
    """Every question with its gold solution as chosen, and nothing rejected: SFT on gold."""
    pairs = [Pair(q.id, q.prompt_ids, golds[q.id], []) for q in answered if q.id in golds]
    return [pair for pair in pairs if pair.chosen_tokens <= max_tokens]


@torch.no_grad()
def probe(model: Llama, pairs: list[Pair], golds: dict[str, list[int]], config: Config) -> dict:
    """Mean summed log-probabilities of the same few pairs and their gold, to be drawn over training."""
    fitting = {p.id: golds[p.id] for p in pairs
               if p.id in golds and len(p.prompt) + len(golds[p.id]) <= model.config.max_length}

    def sums(batch: list[Pair]) -> dict[str, float]:
        with autocast(config.precision):
            (chosen, rejected), _ = pair_logps(model, batch)
            logps, mask, _ = response_logps(model, [(p.prompt, fitting.get(p.id, p.chosen)) for p in batch])
            gold = (logps * mask).sum(-1) * logps.new_tensor([p.id in fitting for p in batch])
        return {"chosen": float(chosen.sum()), "rejected": float(rejected.sum()), "gold": float(gold.sum())}

    found = computed(micro_batches(pairs, lambda pair: pair.tokens, config.micro_batch_tokens), sums)
    return {name: sum(part[name] for part in found) / len(pairs)
            for name in (("chosen", "rejected", "gold") if golds else ("chosen", "rejected"))}


def optimize(config: Config, model: Llama, items: list[Pair], pairs: list[Pair], golds: dict[str, list[int]],
             iteration: int, label: str, folder: Path, after_step: Callable[[int], dict] = lambda step: {},
             ) -> tuple[list[dict], list[dict]]:
    """Step 5: M_{t-1} becomes M_t in place. Returns the records of the steps and of the probe."""
    check_start(model, pairs, config)
    fixed = pairs[::max(1, len(pairs) // 64)][:64]
    every = max(1, num_steps(len(items), config) // 10)
    first = {"step": 0, **probe(model, fixed, golds, config)}

    def measure(step: int) -> dict:
        probed = {"probe": {"step": step, **probe(model, fixed, golds, config)}} if step % every == 0 else {}
        return probed | after_step(step)

    if config.method == "irpo":
        loss, length = partial(preference_loss, config=config), attrgetter("tokens")
    else:
        loss, length = chosen_loss, attrgetter("chosen_tokens")
    records = fit(model, items, loss, length, config, derive_seed(config.seed, iteration), label, folder, measure)
    return records, [first, *(record.pop("probe") for record in records if "probe" in record)]


@torch.no_grad()
def check_start(model: Llama, pairs: list[Pair], config: Config) -> None:
    """Before its first update the policy is the reference, so the DPO loss must be ln 2."""
    with autocast(config.precision):
        loss = float(preference_loss(model, pairs[:8], config)["dpo"].mean())
    nats = 1e-3 if config.precision == "fp32" else 0.5  # rounding of a margin; bf16: 100 tokens
    print(f"check: DPO loss before the first step is {loss:.4f}, ln 2 is {math.log(2):.4f}")
    if abs(loss - math.log(2)) > config.beta * nats:
        raise SystemExit("the reference log-probabilities are not those of the model that is trained")


def choose_steps(config: Config, start: str, items: list[Pair], pairs: list[Pair], golds,
                 dev: list[data.Problem], tokenizer, folder: Path, iteration: int) -> int:
    """Steps after which dev accuracy is best, in a training without the pairs of dev questions."""
    path = folder / "select.json"
    if missing(path):
        def measure(step: int) -> dict:
            if step % config.select_every:
                return {}
            sampler = sampler_of(model, config.tensor_parallel)
            return {"dev": summarize(answer(sampler, tokenizer, dev, config, num_samples=1, temperature=0, seed=0,
                                            label="dev"), config.task)["accuracy"]}

        held_out = {problem.id for problem in dev}
        rest = [item for item in items if item.id not in held_out]
        if num_steps(len(rest), config) < config.select_every:
            raise SystemExit(f"--select_every {config.select_every} is more than the "
                             f"{num_steps(len(rest), config)} steps of a training: lower it, or give "
                             "0 to train without selection")
        model = load_trained(start, config)
        records, _ = optimize(config, model, rest, pairs, golds, iteration, f"select {iteration}",
                              folder / "select", measure)
        write_json(path, [{"step": record["step"] + 1, "accuracy": record["dev"]} for record in records
                          if "dev" in record])
        barrier()
    drop(folder / "select")  # the state of that training
    return max(read_json(path), key=lambda row: row["accuracy"])["step"]


def sample_step(config: Config, folder: Path, model_dir: str, tokenizer, problems, t: int) -> None:
    """Step 1."""
    start, model = time.perf_counter(), load_sampler(model_dir, config.tensor_parallel)
    answered = answer_to(folder / "samples.jsonl", model, tokenizer, problems, config, split="train",
                         weights=weights_hash(model), num_samples=config.num_samples,
                         temperature=config.temperature[min(t, len(config.temperature)) - 1],
                         seed=derive_seed(config.seed, t, "sample"), label=f"sample {t}")
    log(folder.parent, event="sample", iteration=t, seconds=time.perf_counter() - start,
        tokens=sum(len(s.ids) for q in answered for s in q.samples))


def pair_step(config: Config, folder: Path, model_dir: str, golds, t: int) -> None:
    """Steps 2 to 4."""
    model = load_trained(model_dir, config)
    pairs, coverage = collect_pairs(load_answered(folder / "samples.jsonl"), golds, config, t,
                                    model.config.max_length)
    start = time.perf_counter()
    pairs = add_reference(model, pairs, config)
    coverage["reference"] = weights_hash(model)
    write_json(folder / "coverage.json", coverage)
    write_jsonl(folder / "pairs.jsonl", [dataclasses.asdict(pair) for pair in pairs])
    log(folder.parent, event="reference", iteration=t, seconds=time.perf_counter() - start)


def train_step(config: Config, folder: Path, model_dir: str, tokenizer, golds, dev, t: int) -> None:
    """Step 5."""
    items = pairs = [Pair(**row) for row in read_jsonl(folder / "pairs.jsonl")]
    if config.method == "sft_gold":
        items = gold_pairs(load_answered(folder / "samples.jsonl"), golds, load_config(Path(model_dir)).max_length)
    if config.select_every:
        steps = choose_steps(config, model_dir, items, pairs, golds, dev, tokenizer, folder, t)
        config = dataclasses.replace(config, max_steps=steps)
    model = load_trained(model_dir, config)
    reference = read_json(folder / "coverage.json")["reference"]
    if weights_hash(model) != reference:
        raise SystemExit(f"{folder / 'pairs.jsonl'} holds reference log-probabilities of other weights "
                         f"({reference[:12]}) than {model_dir}: remove {folder} and run again")
    start, resumed = time.perf_counter(), (folder / "state").exists()
    records, probes = optimize(config, model, items, pairs, golds, t, f"train {t}", folder)
    log(folder.parent, event="train", iteration=t, seconds=time.perf_counter() - start, resumed=resumed,
        tokens=sum(record["tokens"] for record in records))
    write_jsonl(folder / "probe.jsonl", probes)
    save_trained(model, records, folder, config)


def evaluate_step(config: Config, folder: Path, model_dir: str, tokenizer, t: int) -> None:
    """Step 6."""
    start = time.perf_counter()
    rows = evaluate_model(load_sampler(model_dir, config.tensor_parallel), tokenizer, config, folder,
                          config.eval_questions, config.eval_samples, seed=config.seed, label=f"M{t}")
    saw_dev = {"dev_was_trained_on": True} if t and config.select_every else {}
    write_json(folder / "eval.json",
               [{"name": f"M{t}", "iteration": t, **row, **saw_dev} for row in rows])
    log(folder.parent, event="evaluate", iteration=t, seconds=time.perf_counter() - start)


def training_row(folder: Path, num_parameters: int, t: int) -> dict:
    """The pairs of an iteration, what training did to them, and the tokens and FLOPs it took."""
    records, samples = read_jsonl(folder / "train.jsonl"), load_answered(folder / "samples.jsonl")
    counted = [record for record in records if not record.get("skipped")] or records
    sampled = sum(len(s.ids) for question in samples for s in question.samples)
    trained = sum(record["tokens"] for record in records)
    last_quarter = counted[-max(1, len(counted) // 4):]
    return {"name": f"M{t}", "iteration": t, "split": "train", **read_json(folder / "coverage.json"),
            **{name: fmean(record[name] for record in last_quarter)
               for name in records[0] if name not in ("step", "tokens", "lr", "skipped")},
            "steps": len(records), "skipped": sum(record.get("skipped", 0) for record in records),
            "tokens_sampled": sampled, "tokens_trained": trained,
            # per parameter and token 2 FLOPs forward, 6 with backward; attention, prompts of samples
            # and the reference pass are not counted
            "flops": num_parameters * (2 * sampled + 6 * trained),
            "probe": read_jsonl(folder / "probe.jsonl")}


def main() -> None:
    config = parse_config(Config, PRESETS, __doc__)
    tokenizer = load_tokenizer(config.model)
    problems = config.problems("train", config.num_questions)
    dev = config.problems("dev") if config.select_every else []
    golds = {problem.id: config.gold_ids(tokenizer, problem) for problem in problems + dev
             if problem.solution}
    if not golds and (config.gold or config.method == "sft_gold"):
        raise SystemExit(f"{config.task} has no gold solutions: go without them, with --no-gold and "
                         "another method than sft_gold")
    model = load_model(config.model, dtype=None)
    others = held_out(config)
    self_check(config, tokenizer, problems + dev, model.config, others)
    run = open_run(config, config.run_dir, weights=weights_hash(model),
                   problems=items_hash([*problems, *dev, *others]))
    num_parameters = sum(p.numel() for p in model.parameters())
    del model

    M = config.model
    if missing(run / "iter0" / "eval.json"):
        evaluate_step(config, run / "iter0", M, tokenizer, 0)
    for t in range(1, config.iterations + 1):
        folder = run / f"iter{t}"
        start = config.start_from if t == 1 and config.start_from else M
        if missing(folder / "samples.jsonl"):
            sample_step(config, folder, M, tokenizer, problems + dev, t)
        if missing(folder / "pairs.jsonl"):
            pair_step(config, folder, start, golds, t)
        if to_train(folder):
            train_step(config, folder, start, tokenizer, golds, dev, t)
        M = str(folder / "model")
        if missing(folder / "eval.json"):
            evaluate_step(config, folder, M, tokenizer, t)

    barrier()
    rows = read_json(run / "iter0" / "eval.json")
    for t in range(1, config.iterations + 1):
        folder = run / f"iter{t}"
        rows += [training_row(folder, num_parameters, t), *read_json(folder / "eval.json")]
    write_json(run / "results.json", rows)
    print(f"{run / 'results.json'} is written; python -m tools.report {run} draws it")


if __name__ == "__main__":
    run_script(main)
