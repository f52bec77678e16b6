"""Questions -> graded responses, for training and for testing; and what can be counted on them.

Left out: any choice. Nothing here picks a checkpoint or a setting; a driver that chooses does so on
dev and says so.

    python evaluate.py --preset toy --model runs/base-s0/model
    python evaluate.py --task gsm8k --data_path DIR --model DIR --num_samples 8 --temperature 0.7
"""
import dataclasses
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from tqdm import tqdm

import data
from checkpoint import load_sampler, weights_hash
from data.tokenizer import load_tokenizer
from experiment import open_run, option, parse_config, read_jsonl, run_script, write_json, write_jsonl
from model import Llama
from rewards import grade
from sample import generate
from train import TaskOptions


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
    """A question's prompt and its graded samples."""
    id: str
    prompt_ids: list[int]
    samples: list[Sample]


@dataclass(frozen=True)
class SampleOptions(TaskOptions):
    """How responses are sampled; drivers inherit these fields."""
    max_new_tokens: int = option(512, "longest response; one that is cut counts as it stands")
    batch_rows: int = option(1024, "responses sampled together; speed and memory only")


def answer(model: Llama, tokenizer, problems: list[data.Problem], options: SampleOptions, *,
           num_samples: int, temperature: float, seed: int, label: str) -> list[Answered]:
    """Sample num_samples responses to each problem and grade them."""
    prompts = [options.prompt_ids(tokenizer, problem) for problem in problems]
    start, total = time.perf_counter(), 0
    with tqdm(total=len(prompts) * num_samples, desc=label, unit="sample", dynamic_ncols=True) as bar:
        def progress(responses: int, tokens: int) -> None:
            nonlocal total
            total += tokens
            bar.update(responses)
            bar.set_postfix_str(f"{total / (time.perf_counter() - start):,.0f} tok/s")
        responses = generate(
            model, prompts, num_samples=num_samples, max_new_tokens=options.max_new_tokens,
            temperature=temperature, eos_id=tokenizer.eos_id, seed=seed,
            batch_rows=options.batch_rows, progress=progress)
    answered = []
    for problem, prompt, group in zip(problems, prompts, responses):
        samples = []
        for response in group:
            text = tokenizer.decode(response.ids)
            verdict = grade(text, problem.answer, options.task, options.answer_format or None)
            samples.append(Sample(response.ids, response.finished, text, verdict.verdict,
                                  verdict.answer))
        answered.append(Answered(problem.id, prompt, samples))
    return answered


def save_answered(path: Path, answered: list[Answered]) -> None:
    write_jsonl(path, [dataclasses.asdict(question) for question in answered])


def load_answered(path: Path) -> list[Answered]:
    return [Answered(row["id"], row["prompt_ids"], [Sample(**sample) for sample in row["samples"]])
            for row in read_jsonl(path)]


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
                   num_samples: int, seed: int, label: str) -> list[dict]:
    """Rows for dev and test: greedy, and on test also num_samples at temperature 1 if that is not 0."""
    def answers(split: str, num_samples: int, temperature: float) -> list[Answered]:
        return answer(model, tokenizer, options.problems(split, limit), options,
                      num_samples=num_samples, temperature=temperature, seed=seed,
                      label=f"{label} {split}")

    greedy = {split: answers(split, 1, 0.0) for split in ("dev", "test")}
    rows = [{"split": split, **summarize(greedy[split], options.task)} for split in greedy]
    save_answered(folder / "eval_samples.jsonl", greedy["test"])
    if num_samples:
        rows[-1] |= summarize_samples(answers("test", num_samples, 1.0), options.task)
    return rows


def self_check(options: SampleOptions, tokenizer, problems: list[data.Problem],
               max_positions: int) -> None:
    """What must hold before an hour is spent: prompts fit, have one BOS, and gold is graded right."""
    prompts = [options.prompt_ids(tokenizer, problem) for problem in problems]
    golds = [options.gold_ids(tokenizer, problem) for problem in problems]
    one_bos = sum(prompt.count(tokenizer.bos_id) == 1 for prompt in prompts)
    right = sum(grade(tokenizer.decode(gold), problem.answer, options.task,
                      options.answer_format or None).verdict == "correct"
                for gold, problem in zip(golds, problems))
    longest = max(map(len, prompts))
    if longest + options.max_new_tokens > max_positions:
        raise SystemExit(f"the longest prompt has {longest} tokens, and with --max_new_tokens "
                         f"{options.max_new_tokens} it exceeds the model's {max_positions} positions")
    response_tokens, prompt_tokens = sum(map(len, golds)), sum(map(len, prompts))
    print(f"check: {one_bos} of {len(problems)} prompts have exactly one BOS\n"
          f"check: {right} of {len(problems)} gold solutions are graded correct\n"
          f"check: {response_tokens / (response_tokens + prompt_tokens):.0%} of the tokens of prompts "
          "with their gold solutions belong to the solutions")
    if one_bos < len(problems) or right < len(problems):
        raise SystemExit("the tokenizer, the prompt or the answer format does not fit this task")


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ValueError("--model: give a model directory")
        if self.num_samples < 1 or self.temperature < 0:
            raise ValueError(f"--num_samples {self.num_samples} --temperature {self.temperature}: at "
                             "least one sample, and no temperature below 0")


def main() -> None:
    config = parse_config(Config, {"toy": dict(task="toy", max_new_tokens=96)}, __doc__)
    model, tokenizer = load_sampler(config.model), load_tokenizer(config.model)
    problems = config.problems(config.split, config.limit)
    self_check(config, tokenizer, problems, model.config.max_position_embeddings)
    run = open_run(config, config.run_dir, weights=weights_hash(model))
    answered = answer(model, tokenizer, problems, config, num_samples=config.num_samples,
                      temperature=config.temperature, seed=config.seed, label="evaluate")
    save_answered(run / "eval_samples.jsonl", answered)
    summary = summarize(answered, config.task)
    if config.num_samples > 1:
        summary |= summarize_samples(answered, config.task)
    write_json(run / "eval.json", summary)
    low, high = summary["ci95"]
    print(f"accuracy {summary['accuracy']:.1%}, 95 % interval {low:.1%} to {high:.1%}, "
          f"{summary['n']} questions; all of it in {run / 'eval.json'}")


if __name__ == "__main__":
    run_script(main)
