"""Tune every method with the same budget: settings drawn at random, judged on dev, on seeds that no table uses.

    python -m tools.tune real --jobs 2    # results/tune/real.json: every setting, its dev accuracies, and the best one
    python -m tools.tune real --list      # the settings, as commands

What is tuned is in results/tables.json, under "tune". Cells of tables use the best settings as {BEST_NAME_METHOD}. A
setting's score is the mean over seeds of the last iteration's dev accuracy; a run that fails, such as one whose weights
diverge, has 0. Ctrl-C stops the runs, and the same command resumes.
"""
import argparse
import random
import sys
from pathlib import Path
from statistics import fmean

from infra.run import read_json, write_json
from tools import sweep


def drawn(space: dict, draws: int, key: str) -> list[str]:
    """Draw settings as flags, by a Latin hypercube: one value of a flag from each of `draws` equal parts of its range.

    A range is a list of values, or {"low", "high"} on a log scale. The same key gives the same settings.
    """
    columns = []
    for name, values in space.items():
        chance = random.Random(f"{key} {name}")
        shares = [(part + chance.random()) / draws for part in chance.sample(range(draws), draws)]
        columns.append([f"--{name} {value_at(values, share)}" for share in shares])
    return [" ".join(flags) for flags in zip(*columns)]


def value_at(values: list | dict, share: float):
    if isinstance(values, list):
        return values[int(share * len(values))]
    return f"{values['low'] * (values['high'] / values['low']) ** share:.2g}"


def settings(name: str) -> dict[str, list[str]]:
    """List the drawn settings of each method of a tuning."""
    tuning = sweep.ALL["tune"][name]
    return {method: drawn(what["space"], tuning["draws"], f"{name} {method}")
            for method, what in tuning["methods"].items()}


def table_of(name: str) -> dict:
    """Make a table of the drawn settings, which tools/sweep.py can run."""
    tuning = sweep.ALL["tune"][name]
    cells = {f"{method}-{i}": f"{tuning['methods'][method]['command']} {flags}"
             for method, drawn_flags in settings(name).items() for i, flags in enumerate(drawn_flags)}
    return {"folder": f"runs/tune-{name}", "seeds": tuning["seeds"], "shared": f"tune-{name}/{next(iter(cells))}",
            "cells": cells}


def dev_accuracy(run: str) -> float:
    """Accuracy on dev after the last iteration of a run; 0 if it failed."""
    if not sweep.done(run):
        return 0.0
    rows = [row for row in read_json(Path(run, "results.json")) if row.get("split") == "dev"]
    return max(rows, key=lambda row: row["iteration"])["accuracy"]


def record(name: str) -> dict:
    """Collect the dev accuracies of all settings, and the best setting of each method (the first of equals)."""
    found, seeds = {}, sweep.ALL["tune"][name]["seeds"]
    for method, drawn_flags in settings(name).items():
        tried = [{"flags": flags, "dev": [dev_accuracy(f"runs/tune-{name}/{method}-{i}/s{seed}") for seed in seeds]}
                 for i, flags in enumerate(drawn_flags)]
        found[method] = {"best": max(tried, key=lambda one: fmean(one["dev"]))["flags"], "tried": tried}
    return {"seeds": seeds, "methods": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sweep.ALL["tune"])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; above 1 each has one thread")
    parser.add_argument("--list", action="store_true", help="only print the commands")
    args = parser.parse_args()
    table = sweep.TABLES[f"tune-{args.name}"] = table_of(args.name)
    runs = [f"{table['folder']}/{cell}/s{seed}" for seed in table["seeds"] for cell in table["cells"]]
    if args.list:
        print(*(f"python {sweep.command(run)}" for run in runs), sep="\n")
        return
    if first := [run for run in sweep.work_on(runs, args.jobs) if run not in runs]:
        sys.exit(f"no record, since these are missing: {' '.join(first)}")
    out = Path("results/tune", f"{args.name}.json")
    write_json(out, found := record(args.name))
    for method, what in found["methods"].items():
        print(f"{method:12s} {what['best']}")
    print(f"{out} is complete")


if __name__ == "__main__":
    main()
