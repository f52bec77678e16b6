"""How often samples of training questions are right that need a kind of fact: means over a table's seeds.

    python -m results.describe_samples runs/compare spare > results/compare/samples.md

The kinds are those of the toy world (data/toy.py:KINDS).
"""
import sys
from functools import partial
from pathlib import Path
from statistics import fmean

from data import toy
from evaluate import Answered
from infra.run import read_records
from results.describe_pairs import print_means

FORMATS = {"questions that need it": ".0f", "with a right sample": ".1%", "right samples": ".1%"}


def describe(folder: Path, kind: str) -> dict[str, float]:
    """Count the questions that need the kind; the shares of them with a right sample, and of their samples."""
    found = []
    for question in read_records(folder / "samples.jsonl", Answered)[1]:
        ledger = toy.parse(question.question)
        if any(ledger.facts[x].kind == kind for x in ledger.needed()):
            found.append([sample.answer == question.gold for sample in question.samples])
    return dict(zip(FORMATS, (len(found), fmean(map(any, found)), fmean(map(fmean, found)))))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[2] not in toy.KINDS:
        sys.exit(f"give the folder of a table and a kind of fact: {', '.join(toy.KINDS)}")
    print_means(Path(sys.argv[1]), "samples.jsonl", partial(describe, kind=sys.argv[2]), FORMATS)
