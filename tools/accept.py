"""Measure what a base model of the toy world can do, and whether the world is fit for experiments with it.

    python -m tools.accept --model runs/base-s0/model
    python -m tools.accept --model runs/base-s0/model --split test

Exit status 1 if a number is out of the range in which a method can be told from another (docs/toy-world.md).
"""
from dataclasses import dataclass, replace
from statistics import fmean

import data
from data import toy
from evaluate import Answered, SampleOptions, Sampler, answer, summarize
from infra import InputError
from infra.config import option, parse_config
from infra.run import run_script
from tools.evaluation import print_tags

DEEP = (6, 7, 8)  # steps of questions that are longer than all in the corpus
RANGES = {"greedy accuracy": (0.35, 0.55), "pass@8": (0.60, 0.85), "lucky share": (0.0, 0.05)}


@dataclass(frozen=True)
class Config(SampleOptions):
    model: str = option("", "model directory", required=True)
    task: str = option("toy", "the toy world", ("toy",))
    max_new_tokens: int = option(200, "longest response; a solution of 8 steps has 195", low=1)
    split: str = option("dev", "train, dev or test", data.SPLITS)
    limit: int = option(0, "use only the first N problems; 0: all", low=0)
    seed: int = option(0, "of the samples", low=0, high=2**64 - 1)


def process(answered: list[Answered]) -> dict[str, float]:
    """Count over all samples: steps and solutions without mistake, and right answers in spite of one (their share of
    all right answers)."""
    judged = [(sample.right, [verdict == "right" for _, verdict in toy.judge(question.question, sample.text)])
              for question in answered for sample in question.samples]
    sound = [all(steps) for right, steps in judged if right]
    return {"process accuracy": fmean(step for _, steps in judged for step in steps),
            "sound solutions": fmean(all(steps) for _, steps in judged),
            "lucky share": 1 - fmean(sound) if sound else 0.0}


def main() -> None:
    config = parse_config(Config, {}, __doc__)
    sampler = Sampler(config.model, config)

    def answers(options: Config, **how) -> list[Answered]:
        return answer(*sampler.loaded, options.problems(config.split, config.limit), options, seed=config.seed, **how)

    greedy, deep = answers(config), answers(replace(config, toy_steps=DEEP))
    sampled = answers(config, num_samples=8, temperature=1.0)
    short, many = summarize(greedy, "toy"), summarize(sampled, "toy")
    found = {"greedy accuracy": short["accuracy"], "accuracy at temperature 1": many["pass@1"],
             "pass@8": many["pass@8"], **process(sampled),
             "greedy accuracy, 6 to 8 steps": summarize(deep, "toy")["accuracy"]}
    by_depth = [row["accuracy"] for _, row in sorted(short["tags"]["depth"].items())]
    print_tags("greedy", short["tags"])
    print_tags("at temperature 1", many["sampled_tags"])
    outside = [name for name, (low, high) in RANGES.items() if not low <= found[name] <= high]
    outside += ["accuracy by number of steps"] * (by_depth != sorted(by_depth, reverse=True))
    for name, value in found.items():
        print(f"{name}: {value:.1%}" + (" (out of range)" if name in outside else ""))
    if outside:
        raise InputError("not accepted: " + ", ".join(outside))
    print("accepted")


if __name__ == "__main__":
    run_script(main)
