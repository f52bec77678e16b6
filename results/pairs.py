"""IRPO on pairs that are as alike, or as unlike, as a question's responses allow (results/nll/plan.md).

    python -m results.pairs --preset toy --model runs/base-s0/model --pairing far --run_dir runs/far

All other flags, and all that follows from the pairs, are irpo.py's.
"""
from dataclasses import dataclass
from pathlib import Path

import irpo
from evaluate import Answered
from infra.config import option
from infra.run import run_script
from rft import levenshtein


@dataclass(frozen=True)
class Config(irpo.Config):
    pairing: str = option("near", "near: of each question, the pairs with the smallest edit distance; far: the largest",
                          ("near", "far"), group="steps 2 and 3")

    def own_files(self) -> dict[str, Path]:
        return super().own_files() | {"pairs": Path(__file__)}  # kept with the run


def preference_pairs(answered: list[Answered], golds: dict[str, list[int]], config: Config) -> list[irpo.Pair]:
    """Steps 2 and 3: the nearest or the farthest of all pairs of a question."""
    pairs = []
    for question in answered:
        right, wrong = irpo.right_and_wrong(question, golds.get(question.id) if config.gold else None, config.dedupe)
        ranked = sorted(((levenshtein(tuple(chosen), tuple(rejected)), chosen, rejected)
                         for chosen in right for rejected in wrong), reverse=config.pairing == "far")
        pairs += [irpo.Pair(question.id, question.prompt_ids, chosen, rejected)
                  for _, chosen, rejected in ranked[:config.pairs_per_question]]
    return pairs


if __name__ == "__main__":
    irpo.Config, irpo.preference_pairs = Config, preference_pairs
    run_script(irpo.main)
