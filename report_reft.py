"""Runs of reft.py and rerank.py -> tables by method, curves of reward, KL and dev accuracy.

Reads RUNS/CELL/sSEED, as `make reft` and `make reft-table` lay them out, or one run. From several seeds
come means with 95 % Student intervals, from one seed the Wilson interval over test questions.

    python report_reft.py runs/reft --out results/reft
"""
import argparse
import json
import re
from pathlib import Path
from statistics import fmean

from report import (COLORS, Table, estimate, mean_text, picture, plain, publish, read_json, read_jsonl,
                    timed_card, write)

CELLS = {  # folder -> row of the tables
    "reft": "ReFT", "nokl": "ReFT, no KL", "nopartial": "ReFT, no partial reward",
    "separate": "ReFT, separate critic", "group": "group advantage, no critic", "sft": "SFT",
    "offline_st": "Offline-ST", "online_st": "Online-ST", "letters": "ReFT, graded by letter"}
TRAINED = {"reward": ".2f", "accuracy": ".1%", "kl": ".2f", "kl_k3": ".2f", "entropy": ".3f",
           "length": ".1f", "eos_rate": ".1%", "explained_variance": ".2f", "ratio_max": ".2f",
           "clip_fraction": ".1%", "grad_norm": ".2f"}  # of the rollouts, last quarter of the steps
CURVES = {"reward": "reward of the rollouts", "kl": "KL per response, nats", "entropy": "entropy per token, nats",
          "dev": "dev accuracy"}


def load_runs(root: Path) -> dict[str, dict[int, Path]]:
    """Cell -> seed -> directory of a finished run; one run alone is the cell of its method."""
    if (root / "results.json").exists():
        config = read_json(root / "config.json")
        return {config["method"]: {config["seed"]: root}}
    runs: dict = {}
    for file in sorted(root.glob("*/s[0-9]*/results.json")):
        runs.setdefault(file.parent.parent.name, {})[int(file.parent.name[1:])] = file.parent
    if not runs:
        raise SystemExit(f"no finished run in {root}: expected {root}/CELL/sSEED/results.json")
    return {cell: runs[cell] for cell in [*CELLS, *sorted(runs.keys() - CELLS.keys())] if cell in runs}


def summarize(rows_of: dict[int, list[dict]], wanted) -> dict:
    """Estimates over seeds of the numbers of those rows, the last of a key, for which wanted(row)."""
    found = {}
    for seed, rows in rows_of.items():
        merged = {}
        for row in filter(wanted, rows):
            prefix = {"dev": "dev_", "train": "train_"}.get(row["split"], "")
            merged |= {prefix + key: value for key, value in row.items()
                       if isinstance(value, float) or key == "ci95"}
        if merged:
            found[seed] = merged
    if not found:
        return {}
    first = next(iter(found.values()))
    summary = {key: estimate({seed: row[key] for seed, row in found.items() if key in row})
               for key in first if not key.endswith("ci95")}
    return summary | ({"ci95": first["ci95"]} if len(found) == 1 and "ci95" in first else {})


def accuracy_table(models: dict[str, dict]) -> Table:
    votes = sorted({key for row in models.values() for key in row if re.fullmatch(r"maj@\d+|letter_\w+", key)})
    specs = {"accuracy": ".1%", "pass@1": ".1%", **dict.fromkeys(votes, ".1%"), "dev_accuracy": ".1%"}
    lines = []
    for title, row in models.items():
        texts = {key: mean_text(row, key, spec) for key, spec in specs.items()}
        if "ci95" in row:
            texts["accuracy"] += " ({:.1%} to {:.1%})".format(*row["ci95"])
        lines.append([title, *texts.values(), str(row["accuracy"]["n"])])
    return Table("Test accuracy", "Greedy; mean ± half of its 95% interval over n seeds (Student t), or "
                 "the Wilson interval of one. pass@1 and maj@k: samples at T = 1.",
                 ["model", *(key.replace("_", " ") for key in specs), "n"], lines)


def training_table(models: dict[str, dict]) -> Table:
    """How the rollouts looked at the end of training."""
    rows = [[title, *(mean_text(row, f"train_{key}", spec) for key, spec in TRAINED.items())]
            for title, row in models.items() if "train_kl" in row]
    return Table("Rollouts", "Means over the last quarter of the batches: of training questions, "
                 "sampled at T = 1.", ["run", *(key.replace("_", " ") for key in TRAINED)], rows)


def curve(runs: dict[int, Path], key: str) -> list[tuple]:
    """(step, mean over seeds, lowest, highest) of a measure of the training record."""
    values: dict[int, list[float]] = {}
    for run in runs.values():
        path = run / "iter1" / "train.jsonl"
        for record in read_jsonl(path) if path.exists() else []:
            value = record.get(key)
            value = value["accuracy"] if isinstance(value, dict) else value
            if value is not None:
                values.setdefault(record["step"] + 1, []).append(value)
    return [(step, fmean(found), min(found), max(found)) for step, found in sorted(values.items())]


def draw_curves(axis, curves: dict[str, list[tuple]]) -> None:
    """A line of means per run, and a band from the lowest to the highest seed."""
    for i, (name, points) in enumerate(curves.items()):
        if points:
            step, mean, low, high = zip(*points)
            axis.plot(step, mean, color=COLORS[i % len(COLORS)], label=name, linewidth=1.5)
            axis.fill_between(step, low, high, color=COLORS[i % len(COLORS)], alpha=0.12, linewidth=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS", help="RUNS/CELL/sSEED, or one run")
    parser.add_argument("--out", type=Path, help="where to write (default: RUNS)")
    args = parser.parse_args()
    runs = load_runs(args.runs)
    rows = {cell: {seed: read_json(run / "results.json") for seed, run in by_seed.items()}
            for cell, by_seed in runs.items()}
    models = {}
    for cell, rows_of in rows.items():
        if cell.startswith("rerank"):
            title = CELLS.get(cell.removeprefix("rerank-"), cell)
            models[f"{title} + reranking"] = summarize(rows_of, lambda row: True)
            continue
        models.setdefault("warm-up", summarize(rows_of, lambda row: row["iteration"] == 0))
        models[CELLS.get(cell, cell)] = summarize(rows_of, lambda row: row["iteration"] == 1)
    models = {title: row for title, row in models.items() if row}
    tables = [accuracy_table(models), training_table(models)]
    out = args.out or args.runs
    cards = {f"{cell}/s{seed}": timed_card(run) for cell, by_seed in runs.items()
             for seed, run in by_seed.items()}
    write(out / "reft.json", json.dumps({"models": models, "runs": cards}, indent=1) + "\n")
    print("\n\n".join(map(plain, tables)), end="\n\n")
    pngs = {}
    for key, label in CURVES.items():
        curves = {CELLS.get(cell, cell): curve(by_seed, key) for cell, by_seed in runs.items()}
        if any(curves.values()):
            pngs[f"{key}.png"] = picture({label: curves}, draw_curves, label, "batches of questions",
                                         "{x:.0%}" if key == "dev" else "{x:g}")
    publish(out, "reft", [], tables, pngs)


if __name__ == "__main__":
    main()
