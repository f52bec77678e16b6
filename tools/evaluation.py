"""Measure a model directory on a task, or grade the texts of a file of samples again.

    python evaluate.py --preset toy --model runs/base-s0/model     # the same as python -m tools.evaluation
    python evaluate.py --task gsm8k --model DIR --num_samples 8 --temperature 0.7
    python evaluate.py --rescore runs/evaluate-s0/eval_samples.jsonl    # by the rule in the file's first line
"""
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import data
from checkpoint import model_hash
from data.check import check_inputs
from data.tokenizer import load_tokenizer
from evaluate import Answered, SampleOptions, Sampler, answer_once, print_summary, summarize
from infra import InputError
from infra.config import option, parse_config
from infra.hardware import ComputeOptions
from infra.progress import printable
from infra.run import hash_of, open_run, read_records, run_script, write_json
from rewards import grade_all


@dataclass(frozen=True)
class Config(SampleOptions):
    model: str = option("", "model directory")
    split: str = option("test", "train, dev or test", data.SPLITS)
    limit: int = option(0, "use only the first N problems; 0: all", low=0)
    num_samples: int = option(1, "responses per question", low=1)
    temperature: float = option(0.0, "0: always the most likely token", low=0)
    seed: int = option(0, "same seed, same responses", low=0, high=2**64 - 1)
    run_dir: str = option("", "directory for results.json and eval_samples.jsonl; empty: runs/ and a name made of "
                          "the flags")
    anyway: bool = option(False, "go on although the code was edited since the run began, and record that", free=True)
    rescore: str = option("", "grade the samples of this file again, and do nothing else")

    def __post_init__(self) -> None:
        super().__post_init__()
        computing = [field.name for field in fields(ComputeOptions)]
        ignored = [f"--{field.name}" for field in fields(self) if field.name not in ("rescore", "run_dir", *computing)
                   and getattr(self, field.name) != field.default]
        if self.rescore and ignored:
            raise ValueError(f"--rescore takes all settings from its file: leave {' '.join(ignored)} out")
        if not self.rescore and not self.model:
            raise ValueError("--model is missing: give a model directory")


def rescore(path: Path) -> None:
    """Grade the texts of a file again, and show where a verdict has changed."""
    settings, before = read_records(path, Answered)
    task, marks, kind = settings.get("task"), settings.get("marks"), settings.get("answer") or settings.get("task")
    if settings.get("reward_hash"):
        raise InputError(f"{path} was judged by --reward {settings['reward']}, and --rescore knows only right answers")
    if not task or not marks:
        raise InputError(f"{path} does not say its task and how answers are marked, so they cannot be graded again")
    grades = grade_all([[s.text for s in q.samples] for q in before], [q.gold for q in before], kind, marks,
                       [q.prompt for q in before])
    after = [replace(question, samples=[replace(sample, **asdict(verdict)) for sample, verdict in zip(
        question.samples, group)]) for question, group in zip(before, grades)]
    for old, new in zip(before, after):
        for a, b in zip(old.samples, new.samples):
            if a.verdict != b.verdict:
                print(printable(f"{old.id}: {a.verdict} in the file, {b.verdict} now; answer {b.answer}, "
                                f"gold {old.gold}"))
    print(f"{path}: {task}, answers marked as {marks}")
    print_shares(f"{task} {settings.get('split', '')}".strip(), summarize(after, task))


def print_shares(name: str, found: dict) -> None:
    print_summary(name, found)
    print_tags(name, found["tags"])
    if "num_samples" in found:
        print(", ".join(f"{name} {value:.1%}" for name, value in found.items()
                        if re.fullmatch(r"(pass|maj)@\d+", name)))


def print_tags(name: str, tags: dict) -> None:
    """Print the accuracy of the responses that have a tag's value, and their share of all, for the eight most frequent
    values."""
    for tag, values in tags.items():
        often = sorted(values, key=lambda value: -values[value]["share"])[:8]
        print(f"{name} by {tag}: " + ", ".join(f"{value} ({part['share']:.1%} of all) {part['accuracy']:.1%} right"
                                               for value, part in values.items() if value in often))


def main() -> None:
    config = parse_config(Config, {"toy": dict(task="toy", max_new_tokens=160)}, __doc__)
    if config.rescore:
        return rescore(Path(config.rescore))
    tokenizer, problems = load_tokenizer(config.model), config.problems(config.split, config.limit)
    check_inputs(config, tokenizer, problems)
    run = open_run(config, weights=model_hash(config.model), problems=hash_of(*problems))
    answered = answer_once(run / "eval_samples.jsonl", Sampler(config.model, config), problems,
                           split=config.split, num_samples=config.num_samples, temperature=config.temperature,
                           seed=config.seed, label="evaluate", reward=True)
    found = summarize(answered, config.task)
    write_json(run / "results.json", [{"name": "model", "iteration": 0, "split": config.split, **found}])
    print_shares(f"{config.task} {config.split}", found)
    print(f"everything is in {run}; python -m tools.report {run} draws it, and compares it with other runs")


if __name__ == "__main__":
    run_script(main)
