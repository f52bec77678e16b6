"""What a table's runs made: a row for each cell and iteration, means over seeds.

    python -m results.describe pairs runs/nll                 # results/nll/pairs.md
    python -m results.describe paths runs/rft                 # or one run, such as runs/rft/w96/s0
    python -m results.describe samples runs/compare spare     # results/compare/samples.md

pairs: distance is in edits of tokens from the chosen response to the rejected one; gold winners are those that are no
sample, wrong ones lack the right answer, which the run's reward calls right all the same. paths: of those beyond the
first of their question, swapped are those with the equations of another one, but for the order of the two numbers in a
sum or a product; of all, those with a step that is wrong (data/toy.py:judge; nan where the toy world's training
questions, of 2 to 5 steps, are not the data). samples: of training questions that need a kind of fact
(data/toy.py:KINDS).
"""
import math
import re
import sys
from functools import cache, partial
from pathlib import Path
from statistics import fmean

from data import toy
from evaluate import Answered
from infra.run import read_records, run_script
from irpo import Pair
from rewards import equations
from rft import KeptPath, levenshtein


def pairs(folder: Path) -> dict[str, float]:
    """Describe the pairs of an iteration."""
    made, answered = (read_records(folder / name, kind)[1] for name, kind in (
        ("pairs.jsonl", Pair), ("samples.jsonl", Answered)))
    wrong = {(question.id, *sample.ids): sample.answer != question.gold for question in answered
             for sample in question.samples}
    winners = [wrong.get((pair.id, *pair.chosen)) for pair in made]  # None: gold
    return {"pairs": len(made), "tokens of a winner": fmean(len(pair.chosen) for pair in made),
            "distance": fmean(levenshtein(tuple(pair.chosen), tuple(pair.rejected)) for pair in made),
            "gold winners": winners.count(None) / len(made), "wrong winners": winners.count(True) / len(made)}


def unordered(text: str) -> tuple[str, ...]:
    """List a path's equations with the smaller number of a sum or a product first."""
    def ordered(match: re.Match) -> str:
        return match[2].join(sorted((match[1], match[3]), key=int))

    return tuple(re.sub(r"^(\d+)([+*])(\d+)(?==)", ordered, equation) for equation in equations(text))


@cache
def questions() -> dict[str, str]:
    """Map the ids of the toy world's training questions to the questions."""
    return {problem["id"]: problem["question"] for problem in toy.problems("train")}


def paths(folder: Path) -> dict[str, float]:
    """Describe the paths that RFT's step 5 trained on, besides gold."""
    kept = read_records(folder / "paths.jsonl", KeptPath)[1]
    extra = len(kept) - len({path.id for path in kept})
    swapped = len(kept) - len({(path.id, unordered(path.text)) for path in kept})
    wrong = [toy.tags(questions()[path.id], path.text)["first wrong"] != "nothing"
             for path in kept if path.id in questions()]
    return {"paths": len(kept), "beyond the first of a question": extra, "swapped": swapped / max(1, extra),
            "with a wrong step": fmean(wrong) if wrong else math.nan}


def samples(folder: Path, kind: str) -> dict[str, float]:
    """Count the questions that need the kind; the shares of them with a right sample, and of their samples."""
    found = []
    for question in read_records(folder / "samples.jsonl", Answered)[1]:
        ledger = toy.parse(question.question)
        if any(ledger.facts[x].kind == kind for x in ledger.needed()):
            found.append([sample.answer == question.gold for sample in question.samples])
    return {"questions that need it": len(found), "with a right sample": fmean(map(any, found)),
            "right samples": fmean(map(fmean, found))}


WHAT = {  # name -> function, and the formats of its columns
    "pairs": (pairs, [",.0f", ".1f", ".1f", ".1%", ".1%"]), "paths": (paths, [",.0f", ",.0f", ".1%", ".1%"]),
    "samples": (samples, [".0f", ".1%", ".1%"])}


def main(what: str = "", root: str = "", *kind: str) -> None:
    if what not in WHAT or not Path(root).is_dir() or len(kind) != (what == "samples") or set(kind) - set(toy.KINDS):
        raise SystemExit(f"{__doc__}\nkinds: {', '.join(toy.KINDS)}")
    describe, formats = WHAT[what]
    found = {}  # (cell, iteration) -> what each seed has
    folder = Path(root).absolute()
    for file in sorted([*folder.glob(f"*/s*/iter*/{what}.jsonl"), *folder.glob(f"iter*/{what}.jsonl")]):
        found.setdefault((file.parts[-4], file.parts[-2][4:]), []).append(describe(file.parent, *kind))
    names = [*next(iter(found.values()), [{}])[0]]
    print(f"| cell | iteration | {' | '.join(names)} |\n|---|---|{'---:|' * len(names)}")
    for (cell, iteration), seeds in sorted(found.items()):
        means = [format(fmean(one[name] for one in seeds), spec) for name, spec in zip(names, formats)]
        print(f"| {cell} | {iteration} | {' | '.join(means)} |")


if __name__ == "__main__":
    run_script(partial(main, *sys.argv[1:]))
