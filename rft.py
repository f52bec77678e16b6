"""RFT: rejection-sampling fine-tuning (Yuan et al., arXiv 2308.01825), one round.

    1. pi <- fine-tune the base model rho on the gold solutions D        (SFT)
    2. sample k paths per training question from pi, at temperature 0.7
    3. keep a path if its answer is right and every <<lhs=rhs>> in it holds
    4. of the paths with the same list of equations keep one: a later path takes the earlier one's
       place if it is farther, by summed Levenshtein distance, from the other paths kept so far
    5. fine-tune rho, not pi, on D and the kept paths                     (RFT)

There is no second round. Several models help: with --pool, steps 1 and 2 are left out and the sample
files of other runs are put together, in the order given, before step 4 (the paper's U13B). --pool with
one run and another --num_samples takes the first k samples of the same file.

Selection is that of the authors' code, which differs from "keep the farthest": it is greedy, goes by
the order of samples, and does not count the gold solution, whose equations may be found again. Left
out: the code's top-50 sampling (the paper states none) and its 7,000-row rule for sample files.

    python rft.py --preset toy --model runs/rft-base-s0/model
    python rft.py --preset toy --model runs/rft-base-s0/model --pool runs/a runs/b --num_samples 25
"""
import dataclasses
import random
import re
import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean

import data
from checkpoint import load_model, load_sampler, weights_hash
from data.prompts import encode_solution, gold_text
from data.tokenizer import load_tokenizer
from evaluate import Answered, Sample, SampleOptions, answer_to, evaluate_model, held_out, read_answered, self_check
from infra.experiment import (derive_seed, log, one_of, open_run, option, parse_config, read_json, read_jsonl,
                        run_script, write_json, write_jsonl)
from infra.parallel import barrier, collected, dealt, missing, world
from rewards import OWN_FORMAT, equations, equations_hold, grade
from train import Example, TrainOptions, fit_sft, items_hash, load_trained, num_steps, save_trained, to_train

COUNTS = (1, 3, 6, 12, 25, 50, 100)  # k, as in the paper's figures


@dataclass(frozen=True)
class Config(TrainOptions, SampleOptions):
    """Defaults are the paper's values for 7B and 13B models (App. A) and its code's prompt."""
    model: str = option("", "directory of the base model rho")
    run_dir: str = option("", "directory of this run; empty: runs/ and a name made of the flags")
    seed: int = option(0, "of samples, subsampling and batch order")
    prompt: str = option("rft", "prompt template")
    num_questions: int = option(0, "only the first so many training questions; 0: all")
    train_fraction: float = option(1.0, "share of the training questions, drawn at random: 0.5, 0.25 ...")
    # step 2
    num_samples: int = option(100, "k, samples per question; from a file: its first k")
    temperature: float = option(0.7, "of sampling, for training and for maj@k")
    pool: tuple[str, ...] = option((), "runs of rft.py whose sample files are used instead of new samples")
    # steps 3 and 4
    equation_filter: bool = option(True, "drop a path with an equation that does not hold")
    dedup: str = option("equations", "paths are the same if they agree in: equations; string; none "
                        "keeps every right path")
    select: str = option("levenshtein", "which of the same paths stays: levenshtein, or the first")
    # steps 1 and 5
    restart_from: str = option("base", "step 5 begins at: base, or sft, the model of step 1")
    steps_matched: bool = option(False, "step 5 trains on D alone, for as many optimizer steps as with "
                                 "the kept paths: the control that the paper lacks")
    lr: float = option(2e-5, "peak learning rate of AdamW")
    lr_schedule: str = option("cosine", "after warm-up: constant, linear (to 0) or cosine (to 0)")
    warmup_share: float = option(0.03, "share of the steps over which the learning rate rises")
    batch_size: int = option(128, "sequences of one optimizer step, over all ranks")
    epochs: int = option(3, "passes over the data, the last one counts")
    # the record
    eval_samples: int = option(0, "samples per test question for maj@k; 0: greedy only")
    eval_questions: int = option(0, "only the first so many dev and test questions; 0: all")

    def __post_init__(self) -> None:
        TrainOptions.__post_init__(self)
        SampleOptions.__post_init__(self)
        self.refuse_one_file()
        if not self.model:
            raise ValueError("--model: give the directory of the base model; `make rft-base` makes the "
                             "toy world's")
        one_of(self, dedup=("equations", "string", "none"), select=("levenshtein", "first"),
               restart_from=("base", "sft"))
        if self.num_samples < 1 or self.temperature <= 0:
            raise ValueError(f"--num_samples {self.num_samples} --temperature {self.temperature}: at "
                             "least one sample, at a temperature above 0")
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"--train_fraction {self.train_fraction}: above 0, and at most 1")


TOY = dict(task="toy", prompt="plain", toy_world="paths", num_questions=300, num_samples=50, lr=1e-3,
           batch_size=8, epochs=10, max_new_tokens=96, eval_samples=8)
SMOKE = TOY | dict(num_questions=40, num_samples=4, epochs=1, eval_questions=20, eval_samples=2)
PRESETS = {"toy": TOY, "smoke": SMOKE}


# --- steps 3 and 4 --------------------------------------------------------------------------------

def select_paths(samples: list[str], gold: str, dataset: str, *, answer_format: str | None = None,
                 equation_filter: bool = True, dedup: str = "equations",
                 select: str = "levenshtein") -> list[int]:
    """Indices of the paths to keep, in the order kept (the paper's Algorithm 1, as its code has it).

    gold: the right answer, or a solution in the data set's own format.
    """
    marks = answer_format or OWN_FORMAT[dataset]
    right = right_paths(samples, gold, dataset, marks, equation_filter)
    return distinct_paths(samples, right, dedup, select)


def right_paths(samples: list[str], gold: str, dataset: str, marks: str, equation_filter: bool) -> list[int]:
    """Step 3: indices of the samples with the right answer and with equations that hold."""
    return [i for i, text in enumerate(samples) if is_right(text, gold, dataset, marks)
            and (equations_hold(text) or not equation_filter)]


def is_right(text: str, gold: str, dataset: str, marks: str) -> bool:
    """The authors' rule for GSM8K's "#### 72" (and the toy world's), and rewards.grade elsewhere.

    They differ at the edges: "#### $72" has no answer by the authors' rule, and "#### 6/2" is 6.
    """
    if marks != "hash" or OWN_FORMAT[dataset] != "hash":
        return grade(text, gold, dataset, marks).verdict == "correct"
    number, wanted = hash_number(text), hash_number(gold if "####" in gold else f"#### {gold}")
    return number is not None and number == wanted


def hash_number(text: str) -> float | None:
    match = re.search(r"#### (-?[0-9.,]+)", text.partition("\0")[0])
    try:
        return float(match[1].replace(",", "")) if match else None
    except ValueError:  # "1.2.3"
        return None


def distinct_paths(samples: list[str], right: list[int], dedup: str, select: str) -> list[int]:
    """Step 4 on the right ones among the samples of a question."""
    if dedup == "none":
        return right
    kept: dict[str, int] = {}  # key -> index, in the order in which keys were first seen
    for i in right:
        key = path_key(samples[i]) if dedup == "equations" else samples[i]
        if key not in kept or select == "levenshtein" and is_farther(
                samples[i], samples[kept[key]], [samples[j] for j in kept.values()]):
            kept[key] = i
    return list(kept.values())


def path_key(text: str) -> str:
    """The list of a path's equations. Order counts, and 3+4 is not 4+3."""
    return "|".join(equations(text))


def is_farther(new: str, old: str, kept: list[str]) -> bool:
    """Whether `new` is farther than `old` from the kept paths other than `old`, in sum; ties are not."""
    others = [path for path in kept if path != old]
    return new != old and sum(levenshtein(new, path) for path in others) > sum(
        levenshtein(old, path) for path in others)


@lru_cache(maxsize=4096)  # the same paths meet again and again within a question
def levenshtein(a: str, b: str) -> int:
    """Edit distance, a whole column of the table per step in the bits of two integers (Hyyrö 2003).

    Bit i of `up` says that the distance grows by 1 from row i to row i + 1, bit i of `down` that it
    falls. So 250 x 250 characters take 250 steps of a dozen integer operations.
    """
    rows: dict[str, int] = {}  # character -> bits of the rows in which `a` has it
    for i, character in enumerate(a):
        rows[character] = rows.get(character, 0) | 1 << i
    full = (1 << len(a)) - 1
    last, up, down, distance = 1 << len(a) >> 1, full, 0, len(a)
    for character in b:
        match = rows.get(character, 0)
        diagonal = (((match & up) + up) ^ up) | match | down
        right = down | ~(diagonal | up) & full  # the distance grows by 1 from the last column to this
        left = up & diagonal  # ... and falls
        distance += bool(right & last) - bool(left & last)
        right = right << 1 | 1
        up = (left << 1 | ~(diagonal | right)) & full
        down = right & diagonal & full
    return distance if a else len(b)


def diversity(found: list[list[list[tuple[int, str]]]], golds: list[str], k: int) -> dict:
    """Means over questions. found[m][q]: (number of the sample, text) of each right path of model m to
    question q, of which those among the first k samples count.

    The paper's Table 2 has at least one distinct path per question even at k = 1, so it must count the
    gold solution's; both countings are given. `exclusive[m]` is the share of all distinct paths that
    only model m contributes (the paper's Fig. 6).
    """
    keys = [[[path_key(text) for n, text in paths if n < k] for paths in model] for model in found]
    correct = [sum(map(len, question)) for question in zip(*keys)]
    distinct = [set().union(*question) for question in zip(*keys)]
    owners = [Counter(key for paths in question for key in set(paths)) for question in zip(*keys)]
    exclusive = [sum(owner[key] == 1 for paths, owner in zip(model, owners) for key in set(paths))
                 for model in keys]
    total = max(1, sum(map(len, distinct)))
    return {"correct_paths": fmean(correct), "distinct_paths": fmean(map(len, distinct)),
            "distinct_paths_and_gold": fmean(len(mine | {path_key(gold)})
                                             for mine, gold in zip(distinct, golds)),
            "solved": sum(map(bool, correct)) / len(correct),
            "exclusive": [count / total for count in exclusive],
            # number of right paths -> questions that have so many
            "histogram": {str(n): count for n, count in sorted(Counter(correct).items())}}


# --- the run --------------------------------------------------------------------------------------

def training_problems(config: Config) -> list[data.Problem]:
    """D's questions: the first of train, and of these a random share, in their order."""
    problems = config.problems("train", config.num_questions)
    size = max(1, round(config.train_fraction * len(problems)))
    return [problems[i] for i in sorted(random.Random(config.seed).sample(range(len(problems)), size))]


def gold_examples(config: Config, tokenizer, problems: list[data.Problem]) -> list[Example]:
    return [Example(problem.id, config.prompt_ids(tokenizer, problem), config.gold_ids(tokenizer, problem))
            for problem in problems]


def finetune(config: Config, start: str, examples: list[Example], folder: Path, label: str) -> None:
    """Steps 1 and 5: SFT, the loss on responses only."""
    model, started = load_trained(start, config), time.perf_counter()
    records = fit_sft(model, examples, config, derive_seed(config.seed, label), folder, label)
    save_trained(model, records, folder, config)
    log(folder.parent, event=label, seconds=time.perf_counter() - started,
        tokens=sum(record["tokens"] for record in records))


def sample_step(config: Config, folder: Path, model_dir: Path, tokenizer, problems) -> None:
    """Step 2."""
    started, model = time.perf_counter(), load_sampler(model_dir, config.tensor_parallel)
    answered = answer_to(folder / "samples.jsonl", model, tokenizer, problems, config, split="train",
                         weights=weights_hash(model), num_samples=config.num_samples,
                         temperature=config.temperature, seed=derive_seed(config.seed, "sample"), label="sample")
    log(folder.parent, event="sample", seconds=time.perf_counter() - started,
        tokens=sum(len(s.ids) for q in answered for s in q.samples))


def check_golds(config: Config, problems: list[data.Problem]) -> None:
    """Step 3 must keep gold solutions; one that it drops is kept in D all the same."""
    kept = sum(bool(right_paths([gold_text(p, config.marks)], p.answer, config.task, config.marks,
                                config.equation_filter)) for p in problems)
    print(f"check: {kept} of {len(problems)} gold solutions pass step 3")
    if not kept:
        raise SystemExit("step 3 would drop every path: the answer format does not fit this task")


def load_samples(config: Config, folder: Path, problems: list[data.Problem]) -> list[Answered]:
    """The first k samples of each problem in a run's file, in the order of the problems."""
    path, k = folder / "samples.jsonl", config.num_samples
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: --pool takes runs of rft.py that have sampled")
    settings, answered = read_answered(path)
    for name in ("task", "prompt", "chat", "marks"):
        if settings[name] != getattr(config, name):
            raise SystemExit(f"{path} was sampled with {name} {settings[name]!r}, not {getattr(config, name)!r}")
    questions = {question.id: question for question in answered}
    others = [p.id for p in problems if p.id in questions and questions[p.id].gold != p.answer]
    if others:
        raise SystemExit(f"{path} has another right answer to {others[0]}: it was made from other data")
    absent = [problem.id for problem in problems if problem.id not in questions]
    if absent:
        raise SystemExit(f"{path} has no samples of {len(absent)} of the questions, such as {absent[0]}: it "
                         "was made with other --num_questions, --train_fraction or --task")
    fewest = min(len(questions[problem.id].samples) for problem in problems)
    if fewest < k:
        raise SystemExit(f"{path} has {fewest} samples per question, fewer than --num_samples {k}")
    return [dataclasses.replace(questions[p.id], samples=questions[p.id].samples[:k]) for p in problems]


def select(config: Config, problem: data.Problem, pooled: list[Sample], tokenizer,
           ) -> tuple[list[dict], list[list[tuple[int, str]]]]:
    """Steps 3 and 4 for one question: the paths to keep, and the right ones by model as `diversity` wants them.

    Ids of this run's own samples are kept; pooled texts are encoded anew, since their models may have
    other tokenizers.
    """
    k = config.num_samples
    # a path that was cut short has no end to learn
    texts = [sample.text if sample.finished else "" for sample in pooled]
    right = right_paths(texts, problem.answer, config.task, config.marks, config.equation_filter)
    kept = [{"id": problem.id, "prompt": config.prompt_ids(tokenizer, problem), "text": texts[i], "model": i // k,
             "response": encode_solution(tokenizer, texts[i], config.prompt_text(problem)) if config.pool
             else pooled[i].ids} for i in distinct_paths(texts, right, config.dedup, config.select)]
    return kept, [[(i % k, texts[i]) for i in right if i // k == m] for m in range(len(pooled) // k)]


def select_step(config: Config, folder: Path, files: list[list[Answered]], tokenizer,
                problems: list[data.Problem]) -> None:
    """Steps 3 and 4, question by question, on all ranks."""
    pooled = [[sample for file in files for sample in file[q].samples] for q in range(len(problems))]
    selected = collected([select(config, problems[q], pooled[q], tokenizer)
                          for q, _ in dealt(range(len(problems)), hands=world())], hands=world())
    rows = [row for kept, _ in selected for row in kept]
    found = [list(of_model) for of_model in zip(*(by_model for _, by_model in selected))]
    golds = [problem.solution for problem in problems]
    figures = {"kept": len(rows), **diversity(found, golds, config.num_samples), "over_k": [
        {"k": n, **diversity(found, golds, n)} for n in COUNTS if n <= config.num_samples]}
    if not rows:
        print("warning: no path was kept, so step 5 trains on gold alone, as step 1")
    write_json(folder / "diversity.json", figures)
    write_jsonl(folder / "paths.jsonl", rows)


def main() -> None:
    config = parse_config(Config, PRESETS, __doc__)
    tokenizer, problems = load_tokenizer(config.model), training_problems(config)
    if not all(problem.solution for problem in problems):
        raise SystemExit(f"{config.task} has no gold solutions, which step 1 trains on")
    rho = load_model(config.model, dtype=None)
    others = held_out(config)
    self_check(config, tokenizer, problems, rho.config, others)
    check_golds(config, problems)
    files = [load_samples(config, Path(pooled) / "iter1", problems) for pooled in config.pool]
    run = open_run(config, config.run_dir, weights=weights_hash(rho), problems=items_hash([*problems, *others]),
                   pooled=items_hash(files))
    del rho
    gold = gold_examples(config, tokenizer, problems)
    sft, rft = run / "iter0", run / "iter1"

    if not config.pool or config.restart_from == "sft":
        if to_train(sft):
            finetune(config, config.model, gold, sft, "SFT")
        evaluate(config, sft, tokenizer, 0)
    if not config.pool and missing(rft / "samples.jsonl"):
        sample_step(config, rft, sft / "model", tokenizer, problems)
    if missing(rft / "paths.jsonl"):
        files = files or [load_samples(config, rft, problems)]
        select_step(config, rft, files, tokenizer, problems)
    if to_train(rft):
        paths = [Example(row["id"], row["prompt"], row["response"]) for row in read_jsonl(rft / "paths.jsonl")]
        steps = num_steps(len(gold + paths), config)
        start = config.model if config.restart_from == "base" else sft / "model"
        if config.steps_matched:
            config_of_control = dataclasses.replace(config, epochs=steps, max_steps=steps)
            finetune(config_of_control, start, gold, rft, "RFT")
        else:
            finetune(config, start, gold + paths, rft, "RFT")
    evaluate(config, rft, tokenizer, 1)

    barrier()
    rows = read_json(sft / "eval.json") if (sft / "eval.json").exists() else []
    rows += [training_row(config, rft), *read_json(rft / "eval.json")]
    write_json(run / "results.json", rows)
    print(f"{run / 'results.json'} is written; python -m tools.report_rft {run} draws it")


def evaluate(config: Config, folder: Path, tokenizer, iteration: int) -> None:
    """Dev and test rows of a model, for the record."""
    if not missing(folder / "eval.json"):
        return
    started = time.perf_counter()
    name = ("SFT", "RFT")[iteration]
    rows = evaluate_model(load_sampler(folder / "model", config.tensor_parallel), tokenizer, config, folder,
                          config.eval_questions, config.eval_samples, seed=config.seed, label=name,
                          temperature=config.temperature)
    write_json(folder / "eval.json", [{"name": name, "iteration": iteration, **row} for row in rows])
    log(folder.parent, event=f"evaluate {name}", seconds=time.perf_counter() - started)


def training_row(config: Config, folder: Path) -> dict:
    """What was found, what step 5 learned from beside gold, and for how many steps and tokens."""
    records, figures = read_jsonl(folder / "train.jsonl"), read_json(folder / "diversity.json")
    return {"name": "RFT", "iteration": 1, "split": "train", **figures,
            "kept": 0 if config.steps_matched else figures["kept"],
            "steps": len(records), "tokens_trained": sum(record["tokens"] for record in records)}


if __name__ == "__main__":
    run_script(main)
