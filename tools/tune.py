"""Tune every method with the same budget: settings drawn at random, judged on dev, on seeds that no table uses.

    python -m tools.tune real --jobs 2    # results/tune/real.json: every setting, its dev accuracies, and the best one
    python -m tools.tune real --list      # the settings that all begin with, as commands

What is tuned is in results/tables.json, under "tune". Cells of tables use the best settings as {BEST_NAME_METHOD}. A
setting's score is the mean over seeds of the last iteration's dev accuracy; with --failed_as_zero, 0 for a run that
fails, such as one whose weights diverge. With "iterations": [2, 4], all settings have two iterations and the better
half of them has four (successive halving, arXiv 1502.07943). Ctrl-C stops the runs, and the same command resumes.
"""
import argparse
import random
import sys
from pathlib import Path
from statistics import fmean

from infra.run import read_json, run_script, write_json
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
    """List the drawn settings of each method of a tuning; with "same_draws" they are the same for all of one space."""
    tuning = sweep.ALL["tune"][name]
    return {method: drawn(what["space"], tuning["draws"], name if tuning.get("same_draws") else f"{name} {method}")
            for method, what in tuning["methods"].items()}


def rungs(name: str, method: str) -> list[int]:
    """Numbers of iterations after which the better half of the settings goes on; [0]: as many as the command says."""
    tuning = sweep.ALL["tune"][name]
    return tuning["methods"][method].get("iterations", tuning.get("iterations", [0]))


def left(name: str, method: str, rung: int) -> list[int]:
    """Number the settings that reach a rung: all of them, then the better half (successive halving)."""
    if rung == 0:
        return [*range(len(settings(name)[method]))]
    before = left(name, method, rung - 1)
    best = sorted(before, key=lambda i: -fmean(dev_accuracies(name, method, i, rungs(name, method)[rung - 1])))
    return sorted(best[:(len(before) + 1) // 2])


def table_of(name: str, rung: int = 0) -> dict:
    """Make a table of the settings that reach a rung, which tools/sweep.py can run."""
    tuning, cells = sweep.ALL["tune"][name], {}
    for method, drawn_flags in settings(name).items():
        if rung < len(rungs(name, method)):
            iterations = rungs(name, method)[rung]
            length = f" --iterations {iterations}" if iterations else ""
            cells |= {f"{method}-{i}": f"{tuning['methods'][method]['command']} {drawn_flags[i]}{length}"
                      for i in left(name, method, rung)}
    return {"folder": f"runs/tune-{name}", "seeds": tuning["seeds"], "shared": f"tune-{name}/{next(iter(cells))}",
            "cells": cells}


def dev_accuracies(name: str, method: str, number: int, iteration: int) -> list[float]:
    """Accuracy of a setting on dev after an iteration (0: the last one), for each seed; 0 where its run failed."""
    found, file = [], f"iter{iteration}/eval.json" if iteration else "results.json"
    for seed in sweep.ALL["tune"][name]["seeds"]:
        path = Path(f"runs/tune-{name}/{method}-{number}/s{seed}/{file}")
        rows = [row for row in (read_json(path) if path.exists() else []) if row["split"] == "dev"]
        found.append(max(rows, key=lambda row: row["iteration"])["accuracy"] if rows else 0.0)
    return found


def record(name: str) -> dict:
    """Collect the dev accuracies of all settings, and the best setting of each method (the first of equals)."""
    found = {}
    for method, drawn_flags in settings(name).items():
        tried = [{"flags": flags} for flags in drawn_flags]
        for rung, iterations in enumerate(rungs(name, method)):
            last = left(name, method, rung)
            for i in last:
                tried[i] |= {"dev": dev_accuracies(name, method, i, iterations), "iterations": iterations}
        found[method] = {"best": tried[max(last, key=lambda i: fmean(tried[i]["dev"]))]["flags"], "tried": tried}
    return {"seeds": sweep.ALL["tune"][name]["seeds"], "methods": found}


def reopen(run: str, command: str) -> None:
    """Remove the results of a run that is to have more iterations, so that it goes on."""
    path, asked = Path(run, "results.json"), command.rpartition("--iterations ")[2]
    if asked.isdecimal() and path.exists() and max(row["iteration"] for row in read_json(path)) < int(asked):
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sweep.ALL["tune"])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; above 1 each has one thread")
    parser.add_argument("--list", action="store_true", help="only print the commands")
    parser.add_argument("--failed_as_zero", action="store_true", help="a run that fails has accuracy 0")
    parser.add_argument("--anyway", action="store_true", help="keep runs that were made before the code was edited")
    args = parser.parse_args()
    for rung in range(max(len(rungs(args.name, method)) for method in settings(args.name))):
        table = sweep.TABLES[f"tune-{args.name}"] = table_of(args.name, rung)
        runs = [f"{table['folder']}/{cell}/s{seed}" for seed in table["seeds"] for cell in table["cells"]]
        if args.list:
            print(*(f"python {sweep.command(run)}" for run in runs), sep="\n")
            return
        if not args.anyway:
            sweep.refuse_other(runs, flags_too=rung == 0)  # later, runs have more iterations than they began with
        for run in runs:
            reopen(run, sweep.command(run))
        failed = sweep.work(runs, args.jobs)
        if failed and not (args.failed_as_zero and set(failed) <= set(runs)):
            sys.exit(f"no record, since these failed: {' '.join(failed)}\nTheir output.txt says why. Where training "
                     "diverged, --failed_as_zero gives the setting accuracy 0.")
    out = Path("results/tune", f"{args.name}.json")
    write_json(out, found := record(args.name))
    for method, what in found["methods"].items():
        print(f"{method:12s} {what['best']}")
    print(f"{out} is complete")


if __name__ == "__main__":
    run_script(main)
