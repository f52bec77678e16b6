"""Questions -> graded responses, for training and for testing; and what can be counted on them.

Left out: any choice. Nothing here picks a checkpoint or a setting; a driver that chooses does so on
dev and says so.

    python evaluate.py --preset toy --model runs/base-s0/model
    python evaluate.py --task gsm8k --model DIR --num_samples 8 --temperature 0.7
    python evaluate.py --rescore runs/evaluate-s0/eval_samples.jsonl    # the same number, from the text

A file of samples begins with the settings they were drawn with and a SHA-256 over all that follows.
"""
import dataclasses
import hashlib
import json
import math
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from tqdm import tqdm

import data
from checkpoint import load_sampler, weights_hash
from data.tokenizer import load_tokenizer
from infra.experiment import (FREE, at_least, open_run, option, parse_config, read_jsonl, run_script, write_json,
                              write_jsonl)
from model import Llama, ModelConfig
from infra.parallel import collected, dealt, gather, missing, node_size, rank, world
from rewards import Grade, grade, grade_programs, require_math_verify
from sample import Response, cache_budget, generate
from data.task import TaskOptions
from train import items_hash


@dataclass(frozen=True)
class Sample:
    """A response with its text, its verdict (see rewards.grade) and the answer it gave, if any."""
    ids: list[int]
    finished: bool
    text: str
    verdict: str
    answer: str | None

    @property
    def right(self) -> bool:
        return self.verdict == "correct"


@dataclass(frozen=True)
class Answered:
    """A question's prompt, its right answer and its graded samples."""
    id: str
    prompt: str
    prompt_ids: list[int]
    gold: str
    samples: list[Sample]


@dataclass(frozen=True)
class SampleOptions(TaskOptions):
    """How responses are sampled; drivers inherit these fields."""
    max_new_tokens: int = option(512, "longest response; one that is cut counts as it stands")
    batch_rows: int = option(1024, "responses sampled together, by one rank; speed and memory only")
    tensor_parallel: int = option(1, "ranks that hold one sampling model together, where it is too large for one "
                                  "device")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "max_new_tokens", "batch_rows", "tensor_parallel")
        counts = ("limit", "num_questions", "eval_questions", "eval_samples")  # where a driver has them
        at_least(self, 0, *(name for name in counts if hasattr(self, name)))


def answer(model: Llama, tokenizer, problems: list[data.Problem], options: SampleOptions, *,
           num_samples: int, temperature: float, seed: int, label: str) -> list[Answered]:
    """Sample num_samples responses to each problem and grade them. Without a label, no bar is shown.

    Prompts of like length make a piece, and pieces are dealt out over ranks; all ranks return all answers.
    """
    prompts = [options.prompt_ids(tokenizer, problem) for problem in problems]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    # about 64 pieces, whatever the number of ranks: in large ones responses can take the place of others
    size = max(1, options.batch_rows // num_samples, len(order) // 64)
    pieces = [order[i:i + size] for i in range(0, len(order), size)]
    hands = world() // options.tensor_parallel
    if len(pieces) < hands and rank() == 0:
        warnings.warn(f"{len(prompts) * num_samples} responses are {len(pieces)} pieces of --batch_rows "
                      f"{options.batch_rows}, and {hands - len(pieces)} of {hands} samplers have nothing to do: lower "
                      "--batch_rows", stacklevel=2)
    mine = [piece for piece, _ in dealt(pieces, hands)]
    cache_tokens = min(gather(cache_budget(model)))  # ranks of a split model must agree
    start, total, found = time.perf_counter(), 0, []
    with tqdm(total=sum(map(len, mine)) * num_samples, desc=label, unit="sample", dynamic_ncols=True,
              disable=not label or rank() > 0) as bar:
        def progress(responses: int, tokens: int) -> None:
            nonlocal total
            total += tokens
            bar.update(responses)
            bar.set_postfix_str(f"{total / (time.perf_counter() - start):,.0f} tok/s", refresh=False)

        for piece in mine:
            responses = generate(
                model, [prompts[i] for i in piece], num_samples=num_samples, max_new_tokens=options.max_new_tokens,
                temperature=temperature, eos_id=tokenizer.eos_id, seed=seed, batch_rows=options.batch_rows,
                cache_tokens=cache_tokens, progress=progress)
            leads = rank() % options.tensor_parallel == 0  # the others of a group have the same responses
            found.append(graded(responses, [problems[i] for i in piece], tokenizer, options) if leads else None)
    samples = dict(zip(order, (group for piece in collected(found, hands) for group in piece)))
    return [Answered(problem.id, options.prompt_text(problem), prompts[i], problem.answer, samples[i])
            for i, problem in enumerate(problems)]


def graded(responses: list[list[Response]], problems: list[data.Problem], tokenizer,
           options: SampleOptions) -> list[list[Sample]]:
    """The responses to each problem with their texts and verdicts."""
    texts = [[tokenizer.decode(response.ids) for response in group] for group in responses]
    grades = iter(judge([text for group in texts for text in group],
                        [problem.answer for problem, group in zip(problems, texts) for _ in group],
                        options.task, options.marks))
    return [[Sample(response.ids, response.finished, text, *dataclasses.astuple(next(grades)))
             for response, text in zip(*group)] for group in zip(responses, texts)]


def answer_to(path: Path, model: Llama, tokenizer, problems: list[data.Problem], options: SampleOptions, *,
              weights: str, split: str, num_samples: int, temperature: float, seed: int,
              label: str) -> list[Answered]:
    """What `answer` gives, and a file of it; weights: the model's hash."""
    settings = dict(num_samples=num_samples, temperature=temperature, seed=seed)
    answered = answer(model, tokenizer, problems, options, **settings, label=label)
    save_answered(path, answered, options, split=split, weights=weights, **settings)
    return answered


def judge(texts: list[str], golds: list[str], task: str, answer_format: str) -> list[Grade]:
    """The verdict on each text; programs run beside each other."""
    if answer_format == "python":
        return grade_programs(texts, golds, task, workers=max(1, os.cpu_count() // node_size()))
    return [grade(text, gold, task, answer_format) for text, gold in zip(texts, golds)]


def save_answered(path: Path, answered: list[Answered], options: SampleOptions, **settings) -> None:
    """Write samples behind a line with what they were drawn with and the hash of all the rest."""
    rows = [dataclasses.asdict(question) for question in answered]
    names = [field.name for field in dataclasses.fields(SampleOptions) if field.name not in FREE]
    settings = {name: getattr(options, name) for name in names} | {"marks": options.marks} | settings
    write_jsonl(path, [{"settings": settings, "sha256": content_hash(settings, rows)}, *rows])


def read_answered(path: Path) -> tuple[dict, list[Answered]]:
    """(settings, samples) of a file; SystemExit if it is not as it was written."""
    try:
        header, *rows = read_jsonl(path)
        settings, digest = header["settings"], header["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is not a file of samples, or a broken one ({error!r})") from None
    if content_hash(settings, rows) != digest:
        raise SystemExit(f"{path} was changed after it was written: its SHA-256 is not the one in its "
                         "first line")
    samples = [[Sample(**sample) for sample in row.pop("samples")] for row in rows]
    return settings, [Answered(**row, samples=group) for row, group in zip(rows, samples)]


def load_answered(path: Path) -> list[Answered]:
    return read_answered(path)[1]


def content_hash(settings: dict, rows: list[dict]) -> str:
    return hashlib.sha256(json.dumps([settings, rows]).encode()).hexdigest()


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927): never leaves [0, 1], sound near its ends."""
    z, p = 1.959964, successes / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold one of the c right ones (unbiased)."""
    if not 0 < k <= n:
        raise ValueError(f"pass@{k} needs 1 to {n} samples")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers: list[tuple[str | None, bool]]) -> float:
    """Share of the most voted answers that is right, from (answer, is right); no answer, no vote.

    A tie is shared rather than broken, so that the order of samples cannot matter.
    """
    votes = Counter(answer for answer, _ in answers if answer is not None)
    if not votes:
        return 0.0
    right = dict(answers)
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(right[answer] for answer in winners) / len(winners)


def summarize(answered: list[Answered], task: str) -> dict:
    """Of each question's first sample: accuracy with its interval, verdicts, lengths, the task's tags."""
    samples = [question.samples[0] for question in answered]
    n, right = len(samples), sum(sample.right for sample in samples)
    verdicts = Counter(sample.verdict for sample in samples)
    return {"n": n, "accuracy": right / n, "ci95": wilson(right, n),
            "verdicts": {name: verdicts[name] / n for name in sorted(verdicts)},
            "finished": sum(sample.finished for sample in samples) / n,
            "length": sum(len(sample.ids) for sample in samples) / n,
            "tags": by_tags([(q.id, sample) for q, sample in zip(answered, samples)], task)}


def summarize_samples(answered: list[Answered], task: str) -> dict:
    """Of all samples of each question: pass@k for k = 1, 2, 4 ..., maj@k, and the task's tags.

    pass@1 is the accuracy of a sample. Samples of a question are not independent, so its interval is
    1.96 standard errors of the mean over questions.
    """
    n, k = len(answered), len(answered[0].samples)
    counts = [sum(sample.right for sample in question.samples) for question in answered]
    summary = {f"pass@{2 ** i}": fmean(pass_at_k(k, c, 2 ** i) for c in counts)
               for i in range(k.bit_length())}
    half = 1.959964 * stdev(c / k for c in counts) / math.sqrt(n) if n > 1 else 1.0
    votes = [[(s.answer, s.right) for s in question.samples] for question in answered]
    return summary | {
        "pass@1_ci95": [max(0.0, summary["pass@1"] - half), min(1.0, summary["pass@1"] + half)],
        f"maj@{k}": fmean(map(majority, votes)), "num_samples": k,
        "sampled_tags": by_tags([(q.id, s) for q in answered for s in q.samples], task)}


def by_tags(samples: list[tuple[str, Sample]], task: str) -> dict:
    """(problem id, sample) -> {"style": {"careful": {"share": 0.2, "accuracy": 0.97}, ...}, ...}."""
    total, right = Counter(), Counter()
    for problem_id, sample in samples:
        for tag in data.tags(task, problem_id, sample.text).items():
            total[tag] += 1
            right[tag] += sample.right
    tables: dict = {}
    for name, value in sorted(total):
        tables.setdefault(name, {})[value] = {"share": total[name, value] / len(samples),
                                              "accuracy": right[name, value] / total[name, value]}
    return tables


def evaluate_model(model: Llama, tokenizer, options: SampleOptions, folder: Path, limit: int,
                   num_samples: int, seed: int, label: str, temperature: float = 1.0) -> list[dict]:
    """Rows for dev and test: greedy, and on test also num_samples at a temperature if that is not 0."""
    weights = weights_hash(model)

    def answers(file: str, split: str, num_samples: int, temperature: float) -> list[Answered]:
        return answer_to(folder / file, model, tokenizer, options.problems(split, limit), options, split=split,
                         weights=weights, num_samples=num_samples, temperature=temperature, seed=seed,
                         label=f"{label} {split}")

    rows = [{"split": split, **summarize(answers(file, split, 1, 0.0), options.task)}
            for split, file in (("dev", "eval_dev.jsonl"), ("test", "eval_samples.jsonl"))]
    if num_samples:
        sampled = answers("eval_sampled.jsonl", "test", num_samples, temperature)
        rows[-1] |= summarize_samples(sampled, options.task)
    return rows


def held_out(options: SampleOptions) -> list[data.Problem]:
    """The dev and test questions that a driver will be measured on."""
    return [p for split in ("dev", "test") for p in options.problems(split, options.eval_questions)]


def self_check(options: SampleOptions, tokenizer, problems: list[data.Problem],
               model_config: ModelConfig, others: Sequence[data.Problem] = ()) -> None:
    """What must hold before an hour is spent: prompts fit, have one BOS, and gold is graded right.

    others: problems that will only be asked.
    """
    prompts = [options.prompt_ids(tokenizer, problem) for problem in [*problems, *others]]
    golds = [(options.gold_ids(tokenizer, problem), problem.answer) for problem in problems]
    golds = [(gold, answer) for gold, answer in golds if gold]
    longest = max(map(len, prompts))
    if longest + options.max_new_tokens > model_config.max_length:
        raise SystemExit(f"the longest prompt has {longest} tokens, and with --max_new_tokens "
                         f"{options.max_new_tokens} it exceeds the model's {model_config.max_length} "
                         "positions")
    last = max(max(ids) for ids in [*prompts, *(gold for gold, _ in golds)])
    if last >= model_config.vocab_size:
        raise SystemExit(f"the tokenizer gives token {last}, and the model knows "
                         f"{model_config.vocab_size}: they do not belong together")
    if tokenizer.bos_id is None:
        print("check: this tokenizer has no BOS")
    else:
        one_bos = sum(prompt.count(tokenizer.bos_id) == 1 for prompt in prompts)
        print(f"check: {one_bos} of {len(prompts)} prompts have exactly one BOS")
        if one_bos < len(prompts):
            raise SystemExit("the prompts have BOS in their text, or the tokenizer adds another")
    if not golds:
        print("check: these problems have no gold solutions")
        return
    verdicts = judge([tokenizer.decode(gold) for gold, _ in golds], [answer for _, answer in golds],
                     options.task, options.marks)
    right = sum(verdict.verdict == "correct" for verdict in verdicts)
    response_tokens = sum(len(gold) for gold, _ in golds)
    prompt_tokens = sum(map(len, prompts[:len(problems)]))
    print(f"check: {right} of {len(golds)} gold solutions are graded correct\n"
          f"check: {response_tokens / (response_tokens + prompt_tokens):.0%} of the tokens of prompts "
          "with their gold solutions belong to the solutions")
    if right < len(golds):
        wrong = next(i for i, verdict in enumerate(verdicts) if verdict.verdict != "correct")
        raise SystemExit("the tokenizer, the prompt or the answer format does not fit this task. The "
                         f"first gold solution that fails, as the tokenizer gives it back:\n"
                         f"{tokenizer.decode(golds[wrong][0])}\nverdict {verdicts[wrong].verdict}, answer "
                         f"{verdicts[wrong].answer}, gold answer {golds[wrong][1]}")


@dataclass(frozen=True)
class Config(SampleOptions):
    model: str = option("", "model directory")
    split: str = option("test", "train, dev or test")
    limit: int = option(0, "only the first so many problems; 0: all")
    num_samples: int = option(1, "responses per question")
    temperature: float = option(0.0, "0: the likeliest token always")
    seed: int = option(0, "same seed, same responses")
    run_dir: str = option("", "directory for eval.json and eval_samples.jsonl; empty: runs/ and a "
                          "name made of the flags")
    rescore: str = option("", "grade the samples of this file again, and do nothing else")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model and not self.rescore:
            raise ValueError("--model: give a model directory")
        ignored = [f"--{field.name}" for field in dataclasses.fields(self)
                   if field.name not in ("rescore", "run_dir") and getattr(self, field.name) != field.default]
        if self.rescore and ignored:
            raise ValueError(f"--rescore takes all settings from its file: leave {' '.join(ignored)} out")
        if self.num_samples < 1 or self.temperature < 0:
            raise ValueError(f"--num_samples {self.num_samples} --temperature {self.temperature}: at "
                             "least one sample, and no temperature below 0")


def rescore(path: Path) -> None:
    """Grade a file's texts again by the rule in its first line; say where a verdict is another now."""
    settings, before = read_answered(path)
    task, marks = settings["task"], settings["marks"]
    if task == "math":
        require_math_verify()
    texts = [sample.text for question in before for sample in question.samples]
    golds = [question.gold for question in before for _ in question.samples]
    grades = iter(judge(texts, golds, task, marks))
    after = [dataclasses.replace(question, samples=[
        dataclasses.replace(sample, **dataclasses.asdict(next(grades))) for sample in question.samples])
        for question in before]
    for old, new in zip(before, after):
        for a, b in zip(old.samples, new.samples):
            if a.verdict != b.verdict:
                print(f"{old.id}: {a.verdict} in the file, {b.verdict} now; answer {b.answer}, gold {old.gold}")
    print(f"{path}: {task}, answers marked as {marks}")
    print_accuracy(after, task)


def print_accuracy(answered: list[Answered], task: str) -> dict:
    """Print and return what is counted on the samples."""
    summary = summarize(answered, task)
    low, high = summary["ci95"]
    print(f"accuracy {summary['accuracy']:.1%}, 95 % interval {low:.1%} to {high:.1%}, "
          f"{summary['n']} questions")
    if len(answered[0].samples) > 1:
        summary |= summarize_samples(answered, task)
        print(", ".join(f"{name} {value:.1%}" for name, value in summary.items()
                        if re.fullmatch(r"(pass|maj)@\d+", name)))
    return summary


def main() -> None:
    config = parse_config(Config, {"toy": dict(task="toy", max_new_tokens=96)}, __doc__)
    if config.rescore:
        return rescore(Path(config.rescore))
    model, tokenizer = load_sampler(config.model, config.tensor_parallel), load_tokenizer(config.model)
    config.compare(config.model)
    problems = config.problems(config.split, config.limit)
    self_check(config, tokenizer, problems, model.config)
    weights = weights_hash(model)
    run = open_run(config, config.run_dir, weights=weights, problems=items_hash(problems))
    if not missing(run / "eval.json"):
        print_accuracy(load_answered(run / "eval_samples.jsonl"), config.task)
        print(f"all of it is in {run}, from an earlier call")
        return
    answered = answer_to(run / "eval_samples.jsonl", model, tokenizer, problems, config, split=config.split,
                         weights=weights, num_samples=config.num_samples, temperature=config.temperature,
                         seed=config.seed, label="evaluate")
    write_json(run / "eval.json", print_accuracy(answered, config.task))
    print(f"all of it is in {run}")


if __name__ == "__main__":
    run_script(main)
