"""RFT: rejection-sampling fine-tuning (Yuan et al. 2023, arXiv 2308.01825), one round.

    1. pi <- fine-tune the base model rho on the gold solutions D        (SFT)
    2. sample k paths per training question from pi, at temperature 0.7
    3. keep a path if its answer is right and every <<lhs=rhs>> in it holds
    4. of the paths with the same list of equations keep one: a later path replaces the earlier one if it is farther, by
       summed Levenshtein distance, from the other paths kept so far
    5. fine-tune rho, not pi, on D and the kept paths                     (RFT)

With --pool, step 2 is skipped, and step 1, too, unless step 5 begins there (--restart_from sft): the sample files of
other runs are put together, in the order given, before step 4 (the paper's U13B). --pool with one run and a smaller
--num_samples takes the first k samples of its file.

Selection is that of the authors' code, which differs from "keep the farthest": it is greedy, goes by the order of
samples, and does not count the gold solution, so a path may have its equations. Left out: further rounds (another run,
from the model of this one), the code's top-50 sampling (the paper states none), and its use of no more than 7,000 rows
of a file of samples.

    python rft.py --preset toy --model runs/base-s0/model
    python rft.py --preset toy --model runs/base-s0/model --pool runs/a runs/b --num_samples 25
"""
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean

import data
from checkpoint import flops, load_config, model_hash
from data.check import check_inputs
from data.prompts import gold_text
from data.task import prompt_option
from data.tokenizer import load_tokenizer
from evaluate import Answered, Sample, SampleOptions, Sampler, answer_once, evaluate_model
from infra import InputError
from infra.config import option, parse_config
from infra.parallel import computed
from infra.progress import summary
from infra.run import derive_seed, hash_of, once, open_run, read_jsonl, read_records, run_script, write_json
from infra.steps import SCHEDULES
from model import Llama
from rewards import OWN_FORMAT, equations, equations_hold, grade, plain_equations
from train import Example, TrainOptions, fit_sft, fitting, load_for_training, num_steps, train_once

COUNTS = (1, 3, 6, 12, 25, 50, 100)  # k, as in the paper's figures


@dataclass(frozen=True)
class Config(TrainOptions, SampleOptions):
    """Defaults are the paper's values for 7B and 13B models (App. A) and its code's prompt."""
    model: str = option("", "directory of the base model rho (make base makes the toy world's)", required=True)
    run_dir: str = option("", "directory of this run; empty: runs/ and a name made of the flags")
    seed: int = option(0, "of samples, subsampling and batch order", low=0, high=2**64 - 1)
    prompt: str = prompt_option("rft")
    num_questions: int = option(0, "use only the first N training questions; 0: all", low=0)
    train_fraction: float = option(1.0, "share of the training questions, drawn at random: 0.5, 0.25 ...", above=0,
                                   high=1)
    num_samples: int = option(100, "k, samples per question; from a file: its first k", low=1, group="step 2")
    temperature: float = option(0.7, "of sampling, for training (a pool has its own) and for maj@k", above=0)
    pool: tuple[str, ...] = option((), "runs of rft.py whose sample files are used instead of new samples")
    equation_filter: bool = option(True, "drop a path with an equation that does not hold", group="steps 3 and 4")
    dedup: str = option("equations", "paths are the same if they agree in: equations, in <<...>> (string, where no "
                        "gold solution has any); plain_equations, such as 3 + 4 = 7; string, up to white space; none "
                        "keeps every right path", ("equations", "plain_equations", "string", "none"))
    select: str = option("levenshtein", "which of the same paths stays: levenshtein, or the first",
                         ("levenshtein", "first"))
    restart_from: str = option("base", "step 5 begins at: base, or sft, the model of step 1", ("base", "sft"),
                               group="steps 1 and 5")
    steps_matched: bool = option(False, "step 5 trains on D alone, for as many optimizer steps as with the kept paths: "
                                 "the control that the paper lacks")
    lr: float = option(2e-5, "peak learning rate of AdamW", above=0)
    lr_schedule: str = option("cosine", "after warm-up: constant, linear (to 0) or cosine (to 0)", SCHEDULES)
    warmup_share: float = option(0.03, "share of the steps over which the learning rate rises", low=0, high=1)
    batch_size: int = option(128, "sequences per optimizer step, over all ranks", low=1)
    epochs: int = option(3, "passes over the data; the last one counts", low=1)
    eval_samples: int = option(0, "samples per test question for maj@k; can be added to a finished run; 0: greedy "
                               "only", low=0, free=True, group="the record")
    eval_questions: int = option(0, "use only the first N dev and test questions; 0: all", low=0)


TOY = dict(task="toy", prompt="plain", num_questions=100, num_samples=40, lr=1.1e-4, batch_size=8,
           epochs=16, max_new_tokens=160, eval_samples=8)  # lr, epochs: results/tune/rft.json
SMOKE = TOY | dict(num_questions=40, num_samples=4, epochs=1, eval_questions=20, eval_samples=2)


@dataclass(frozen=True)
class KeptPath(Example):
    """A sampled path that step 5 trains on, and which of the pooled models it is from."""
    text: str
    model: int


# --- steps 3 and 4: selection ----------------------------------------------------------------------

def select_paths(samples: list[str], gold: str, dataset: str, *, answer_format: str | None = None,
                 equation_filter: bool = True, dedup: str = "equations", select: str = "levenshtein") -> list[int]:
    """Return the indices of the paths to keep, in the order kept (the paper's Algorithm 1, as its code has it).

    gold: the right answer, or a solution in the data set's own format.
    """
    right = right_paths(samples, gold, dataset, answer_format or OWN_FORMAT[dataset], equation_filter)
    return distinct_paths(samples, right, dedup, select)


def right_paths(samples: list[str], gold: str, dataset: str, marks: str, equation_filter: bool) -> list[int]:
    """Step 3: indices of the samples with the right answer and equations that hold."""
    return [i for i, text in enumerate(samples) if is_right(text, gold, dataset, marks)
            and (equations_hold(text) or not equation_filter)]


def is_right(text: str, gold: str, dataset: str, marks: str) -> bool:
    """Apply the authors' rule for GSM8K's "#### 72" (and the toy world's), and rewards.grade elsewhere.

    They differ at the edges: "#### $72" has no answer by the authors' rule, and "#### 6/2" is 6.
    """
    if not authors_judge(dataset, marks):
        return grade(text, gold, dataset, marks).verdict == "correct"
    number, wanted = hash_number(text), hash_number(gold if "####" in gold else f"#### {gold}")
    return number is not None and number == wanted


def authors_judge(dataset: str, marks: str) -> bool:
    return marks == "hash" and dataset in ("toy", "gsm8k")


def hash_number(text: str) -> float | None:
    match = re.search(r"#### (-?[0-9.,]+)", text.partition("\0")[0])
    try:
        return float(match[1].replace(",", "")) if match else None
    except ValueError:  # "1.2.3"
        return None


def distinct_paths(samples: list[str], right: list[int], dedup: str, select: str) -> list[int]:
    """Step 4, for the right samples of one question."""
    if dedup == "none":
        return right
    kept: dict[str, int] = {}  # key -> index, in the order in which keys were first seen
    for i in right:
        key = path_key(samples[i], dedup)
        if key not in kept or select == "levenshtein" and is_farther(
                samples[i], samples[kept[key]], [samples[j] for j in kept.values()]):
            kept[key] = i
    return list(kept.values())


def path_key(text: str, dedup: str = "equations") -> str:
    """Dedup key: equations in order (3+4 is not 4+3); the text for string, or if there are no plain ones."""
    if dedup == "equations":
        return "|".join(equations(text))
    key = "|".join(plain_equations(text)) if dedup == "plain_equations" else ""
    return key or " ".join(text.split())


def is_farther(new: str, old: str, kept: list[str]) -> bool:
    """Whether `new` is farther than `old` from the kept paths other than `old`, in sum; a tie is not."""
    return sum(levenshtein(new, path) - levenshtein(old, path) for path in kept if path != old) > 0


@lru_cache(maxsize=4096)  # the same paths are compared again and again within a question
def levenshtein(a: Sequence, b: Sequence) -> int:
    """Edit distance, one column of the table per step, in the bits of two integers (Hyyrö 2003).

    Bit i of `up` says that the distance grows by 1 from row i to row i + 1, bit i of `down` that it falls.
    """
    rows = {}  # item -> bits of the rows in which `a` has it
    for i, item in enumerate(a):
        rows[item] = rows.get(item, 0) | 1 << i
    full = (1 << len(a)) - 1
    last, up, down, distance = 1 << len(a) >> 1, full, 0, len(a)
    for item in b:
        match = rows.get(item, 0)
        diagonal = (((match & up) + up) ^ up) | match | down
        right = down | ~(diagonal | up) & full  # the distance grows by 1 from the last column to this
        left = up & diagonal  # ... and falls
        distance += bool(right & last) - bool(left & last)
        right = right << 1 | 1
        up = (left << 1 | ~(diagonal | right)) & full
        down = right & diagonal & full
    return distance if a else len(b)


def diversity(found: list[list[list[tuple[int, str]]]], golds: list[str], k: int, dedup: str = "equations") -> dict:
    """Means over questions. found[m][q]: (number of the sample, text) of each right path of model m to
    question q, of which those among the first k samples count.

    The paper's Table 2 has at least one distinct path per question even at k = 1, so it must count the
    gold solution's; both countings are given. `exclusive[m]` is the share of all distinct paths that
    only model m contributes (the paper's Fig. 6).
    """
    keys = [[[path_key(text, dedup) for n, text in paths if n < k] for paths in model] for model in found]
    correct = [sum(map(len, question)) for question in zip(*keys)]
    distinct = [set().union(*question) for question in zip(*keys)]
    owners = [Counter(key for paths in question for key in set(paths)) for question in zip(*keys)]
    exclusive = [sum(owner[key] == 1 for paths, owner in zip(model, owners) for key in set(paths))
                 for model in keys]
    total = max(1, sum(map(len, distinct)))
    return {"correct_paths": fmean(correct), "distinct_paths": fmean(map(len, distinct)),
            "distinct_paths_and_gold": fmean(len(mine | {path_key(gold, dedup)})
                                             for mine, gold in zip(distinct, golds)),
            "solved": sum(map(bool, correct)) / len(correct),
            "exclusive": [count / total for count in exclusive],
            # number of right paths -> questions that have so many
            "histogram": {str(n): count for n, count in sorted(Counter(correct).items())}}


# --- the run ---------------------------------------------------------------------------------------

def training_problems(config: Config) -> list[data.Problem]:
    """Load D's questions: the first of train, and of these a random share, in their order."""
    problems = config.problems("train", config.num_questions)
    size = max(1, round(config.train_fraction * len(problems)))
    return [problems[i] for i in sorted(random.Random(config.seed).sample(range(len(problems)), size))]


def counted_by(config: Config, problems: list[data.Problem]) -> str:
    """Name the dedup key for the counts: the text if gold has no <<...>>, as all paths would then be equal."""
    if config.dedup == "plain_equations":
        return config.dedup
    return "equations" if any(equations(gold_text(p, config.marks)) for p in problems) else "string"


def check_golds(config: Config, problems: list[data.Problem]) -> None:
    """InputError unless step 3 keeps a gold solution (unchecked with --reward); D holds all of them anyway."""
    if absent := [problem.id for problem in problems if not problem.solution]:
        raise InputError(f"{len(absent)} of {len(problems)} questions of {config.task} have no gold solution, which "
                         f"step 1 trains on, such as {absent[0]}")
    if config.reward:
        return
    kept = sum(bool(right_paths([gold_text(p, config.marks)], p.answer, config.kind, config.marks,
                                config.equation_filter)) for p in problems)
    print(f"check: {kept} of {len(problems)} gold solutions pass step 3")
    if not kept:
        raise InputError("step 3 would drop every path: the answer format does not fit this task")


def pooled_samples(folder: Path, problems: list[data.Problem], config: Config) -> list[Answered]:
    """Read the first k samples of each problem from the file of another run."""
    path, k = folder / "iter1" / "samples.jsonl", config.num_samples
    if not path.is_file():
        raise InputError(f"{path} does not exist: --pool takes runs of rft.py that have sampled")
    settings, answered = read_records(path, Answered)
    for name in ("task", "prompt", "chat", "system", "marks", "reward_hash"):
        if settings.get(name, "") != getattr(config, name):
            raise InputError(f"{path} was sampled with {name} {settings.get(name)!r}, not {getattr(config, name)!r}")
    questions = {question.id: question for question in answered}
    absent = [p.id for p in problems if p.id not in questions or questions[p.id].gold != p.answer]
    if absent:
        raise InputError(f"{path} lacks {len(absent)} of the questions, such as {absent[0]}, or has another right "
                         "answer to them: it is of other data, or of other --num_questions or --train_fraction")
    fewest = min(len(questions[p.id].samples) for p in problems)
    if fewest < k:
        raise InputError(f"{path} has {fewest} samples per question, fewer than --num_samples {k}")
    return [replace(questions[p.id], samples=questions[p.id].samples[:k]) for p in problems]


def pooled(files: list[list[Answered]]) -> list[list[Sample]]:
    """Put the samples of each question together; a truncated one has no end to learn, so its text counts as empty."""
    return [[sample if sample.finished else replace(sample, text="") for question in of_models
             for sample in question.samples] for of_models in zip(*files)]


def all_right_paths(samples: list[list[Sample]], problems: list[data.Problem], config: Config) -> list[list[int]]:
    """Step 3 for every question. Where the authors have no rule of their own, the verdicts of step 2 count."""
    if authors_judge(config.kind, config.marks) and not config.reward:
        return [right_paths([sample.text for sample in group], problem.answer, config.kind, config.marks,
                            config.equation_filter) for group, problem in zip(samples, problems)]
    return [[i for i, sample in enumerate(group) if sample.right and sample.finished
             and (equations_hold(sample.text) or not config.equation_filter)] for group in samples]


def kept_paths(samples: list[list[Sample]], right: list[list[int]], problems: list[data.Problem], tokenizer,
               config: Config) -> list[KeptPath]:
    """Step 4 for every question. A run's own samples keep their ids; pooled texts are encoded anew, since their models
    may have other tokenizers."""
    def kept(i: int) -> list[KeptPath]:
        problem, texts = problems[i], [sample.text for sample in samples[i]]
        prompt = config.prompt_ids(tokenizer, problem)
        return [KeptPath(problem.id, prompt, config.solution_ids(tokenizer, problem, texts[j].strip())
                         if config.pool else samples[i][j].ids, texts[j], j // config.num_samples)
                for j in distinct_paths(texts, right[i], config.dedup, config.select)]

    paths = [path for group in computed(range(len(problems)), kept, label="select") for path in group]
    if not paths:
        print("warning: no path was kept, so step 5 trains on gold alone, as step 1 does")
    return paths


def training_row(samples: list[list[Sample]], right: list[list[int]], paths: list[KeptPath], gold: list[Example],
                 problems: list[data.Problem], config: Config, folder: Path) -> dict:
    """Describe what was found, what step 5 learned from besides gold, its steps and tokens, and the FLOPs of all steps
    (a pool's step 1 is not counted, and its tokens cost what this model's do; matched SFT needs no samples)."""
    k, golds = config.num_samples, [gold_text(problem, config.marks) for problem in problems]
    count = partial(diversity, dedup=counted_by(config, problems))
    found = [[[(j % k, samples[i][j].text) for j in right[i] if j // k == m] for i in range(len(problems))]
             for m in range(len(samples[0]) // k)]
    done, step_1 = summary(read_jsonl(folder / "train.jsonl")), folder.parent / "iter0" / "train.jsonl"
    sampled = sum(len(sample.ids) for group in samples for sample in group)
    forward, trained = sampled + len(found) * sum(len(example.prompt) for example in gold), done["tokens_trained"]
    if config.steps_matched:
        forward = 0
    if step_1.exists() and not (config.steps_matched and config.restart_from == "base"):
        trained += summary(read_jsonl(step_1))["tokens_trained"]
    return {"name": "RFT", "iteration": 1, "split": "train", "kept": 0 if config.steps_matched else len(paths),
            **count(found, golds, k), "over_k": [{"k": n, **count(found, golds, n)} for n in COUNTS if n <= k],
            "steps": done["steps"], "tokens_trained": done["tokens_trained"], "tokens_sampled": sampled,
            "flops": flops(config.model, forward, trained)}


def fine_tune(start: str, examples: list[Example], config: Config, name: str, folder: Path) -> Llama:
    """Steps 1 and 5: SFT, with the loss on responses only."""
    model = load_for_training(start, config)
    fit_sft(model, examples, config, derive_seed(config.seed, name), folder)
    return model


def main() -> None:
    config = parse_config(Config, {"toy": TOY, "smoke": SMOKE}, __doc__)
    tokenizer, problems, others = load_tokenizer(config.model), training_problems(config), config.held_out()
    check_golds(config, problems)
    if config.dedup == "equations" and counted_by(config, problems) == "string":
        print("check: no gold solution has an equation in <<...>>, so paths are the same if their texts are, as with "
              "--dedup string; --dedup plain_equations compares equations such as 3 + 4 = 7")
        config = replace(config, dedup="string")
    check_inputs(config, tokenizer, problems, others)
    files = [pooled_samples(Path(other), problems, config) for other in config.pool]
    weights = model_hash(config.model)
    run = open_run(config, weights=weights, problems=hash_of(problems, others), pooled=hash_of(files))
    gold = [Example(p.id, config.prompt_ids(tokenizer, p), config.gold_ids(tokenizer, p)) for p in problems]
    sft, rft, rows = run / "iter0", run / "iter1", []

    if not files or config.restart_from == "sft":  # step 1
        pi = train_once(sft, config.model, partial(fine_tune, config.model, gold, config, "SFT", sft))
        rows += evaluate_model("SFT", 0, pi, config, sft, config.temperature)

    files = files or [answer_once(rft / "samples.jsonl", Sampler(pi, config), problems, split="train",  # step 2
                                  num_samples=config.num_samples, temperature=config.temperature,
                                  seed=derive_seed(config.seed, "sample", weights),  # or pooled models would agree
                                  label="sample", reward=True)]
    samples = pooled(files)
    right = all_right_paths(samples, problems, config)  # step 3
    paths = once(rft / "paths.jsonl", partial(kept_paths, samples, right, problems, tokenizer, config),  # step 4
                 KeptPath)

    start = config.model if config.restart_from == "base" else pi
    examples, options = fitting(gold + paths, load_config(start).max_length), config  # step 5
    if config.steps_matched:
        steps = num_steps(len(examples), config)
        examples, options = gold, replace(config, epochs=steps, max_steps=steps)
    last = train_once(rft, start, partial(fine_tune, start, examples, options, "RFT", rft))
    rows.append(training_row(samples, right, paths, gold, problems, config, rft))
    rows += evaluate_model("RFT", 1, last, config, rft, config.temperature)
    write_json(run / "results.json", rows)
    print(f"{run / 'results.json'} is complete; python -m tools.report {run} draws it")


if __name__ == "__main__":
    run_script(main)
