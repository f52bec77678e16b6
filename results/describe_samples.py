"""How often samples of training questions are right that need a kind of fact: means over a table's seeds.

    python -m results.describe_samples runs/compare spare > results/compare/samples.md

The kinds are those of the toy world (data/toy.py:KINDS).
"""
import sys
from pathlib import Path
from statistics import fmean

from data import toy
from evaluate import Answered
from infra.run import read_records


def describe(path: Path, kind: str) -> tuple[int, float, float]:
    """Count the questions that need the kind; the shares of them with a right sample, and of their samples."""
    found = []
    for question in read_records(path, Answered)[1]:
        ledger = toy.parse(question.question)
        if any(ledger.facts[x].kind == kind for x in ledger.needed()):
            found.append([sample.answer == question.gold for sample in question.samples])
    return len(found), fmean(map(any, found)), fmean(map(fmean, found))


def main(root: Path, kind: str) -> None:
    print(f"| cell | iteration | questions that need {kind!r} | with a right sample | right samples |")
    print("|---|---|---:|---:|---:|")
    for cell in sorted(root.iterdir()):
        for name in sorted({file.parent.name for file in cell.glob("s*/iter*/samples.jsonl")}):
            rows = [describe(file, kind) for file in sorted(cell.glob(f"s*/{name}/samples.jsonl"))]
            questions, solved, right = map(fmean, zip(*rows))
            print(f"| {cell.name} | {name[4:]} | {questions:.0f} | {solved:.1%} | {right:.1%} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
