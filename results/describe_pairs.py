"""What the pairs of a table's runs are like: a row for each cell and iteration, means over seeds.

    python -m results.describe_pairs runs/nll > results/nll/pairs.md

Distance: edits of tokens from the chosen response to the rejected one. Gold winners: those that are no sample. Wrong
winners: those without the right answer, which the run's reward calls right all the same.
"""
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from evaluate import Answered
from infra.run import read_records
from irpo import Pair
from results.pairs import edit_distance

FORMATS = {"pairs": ",.0f", "tokens of a winner": ".1f", "distance": ".1f", "gold winners": ".1%",
           "wrong winners": ".1%"}


def describe(folder: Path) -> dict[str, float]:
    """Describe the pairs of an iteration."""
    pairs, answered = (read_records(folder / name, kind)[1] for name, kind in (
        ("pairs.jsonl", Pair), ("samples.jsonl", Answered)))
    wrong = {(question.id, *sample.ids): sample.answer != question.gold for question in answered
             for sample in question.samples}
    winners = [wrong.get((pair.id, *pair.chosen)) for pair in pairs]  # None: gold
    return {"pairs": len(pairs), "tokens of a winner": fmean(len(pair.chosen) for pair in pairs),
            "distance": fmean(edit_distance(pair.chosen, pair.rejected) for pair in pairs),
            "gold winners": winners.count(None) / len(pairs), "wrong winners": winners.count(True) / len(pairs)}


def print_means(root: Path, file: str, describe: Callable[[Path], dict[str, float]], formats: dict[str, str]) -> None:
    """Print a row for each cell and iteration that has the file: means over seeds of describe(its folder)."""
    print(f"| cell | iteration | {' | '.join(formats)} |\n|---|---|{'---:|' * len(formats)}")
    for cell in sorted(root.iterdir()):
        for name in sorted({path.parent.name for path in cell.glob(f"s*/iter*/{file}")}):
            found = [describe(path.parent) for path in sorted(cell.glob(f"s*/{name}/{file}"))]
            means = [format(fmean(one[key] for one in found), spec) for key, spec in formats.items()]
            print(f"| {cell.name} | {name[4:]} | {' | '.join(means)} |")


if __name__ == "__main__":
    print_means(Path(sys.argv[1]), "pairs.jsonl", describe, FORMATS)
