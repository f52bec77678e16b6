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
CURVES = {  # measure of a batch -> title of its picture
    "dev": "dev accuracy", "reward": "reward of the rollouts", "accuracy": "accuracy of the rollouts",
    "kl": "KL per response, nats", "entropy": "entropy per token, nats", "length": "response length, tokens",
    "eos_rate": "responses that end in EOS", "ratio_max": "largest ratio", "clip_fraction": "clipped tokens",
    "explained_variance": "explained variance of V", "value_loss": "value loss", "grad_norm": "gradient norm"}


def load_runs(root: Path) -> dict[str, dict[int, Path]]:
    """Cell -> seed -> directory of a finished run; one run alone is a cell of its own name."""
    if (root / "results.json").exists():
        return {root.name: {read_json(root / "config.json")["seed"]: root}}
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


def letter_accuracy(run: Path, t: int, num_choices: int) -> float:
    """Of greedy test answers: how many equal the right one modulo num_choices."""
    rows = [row for row in read_jsonl(run / f"iter{t}" / "eval_samples.jsonl") if "id" in row]
    answers = [(row["samples"][0]["answer"], row["gold"]) for row in rows]
    return fmean(bool(answer) and re.fullmatch(r"-?\d+", answer) is not None
                 and int(answer) % num_choices == int(gold) % num_choices for answer, gold in answers)


def warnings(runs: dict[str, dict[int, Path]]) -> list[str]:
    """A line for each run that left a healthy range, with the number of batches."""
    lines = []
    for cell, by_seed in runs.items():
        for seed, run in by_seed.items():
            path = run / "iter1" / "train.jsonl"
            found = [name for record in (read_jsonl(path) if path.exists() else [])
                     for name in record.get("warnings", ())]
            if found:
                counts = ", ".join(f"{name} at {found.count(name)} batches" for name in dict.fromkeys(found))
                lines.append(f"Warnings of {cell}/s{seed}: {counts}.")
    return lines


def accuracy_table(models: dict[str, dict]) -> Table:
    votes = sorted({key for row in models.values() for key in row if re.fullmatch(r"maj@\d+|letter_\w+", key)})
    specs = {"accuracy": ".1%", "pass@1": ".1%", **dict.fromkeys(votes, ".1%"), "dev_accuracy": ".1%"}
    lines = []
    for title, row in models.items():
        texts = {key: mean_text(row, key, spec) for key, spec in specs.items()}
        if "ci95" in row:
            texts["accuracy"] += " ({:.1%} to {:.1%})".format(*row["ci95"])
        lines.append([title, *texts.values(), str(row["accuracy"]["n"])])
    return Table("Test accuracy", "Greedy, or the best of k samples; mean ± half of its 95% interval over "
                 "n seeds (Student t), or the Wilson interval of one. pass@1 and maj@k: samples at T = 1.",
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
    warmed = {seed: found for rows_of in rows.values() for seed, found in rows_of.items()
              if any(row.get("iteration") == 0 for row in found)}
    models = {"warm-up": summarize(warmed, lambda row: row.get("iteration") == 0)}
    for cell, rows_of in rows.items():
        if cell.startswith("rerank"):
            title = CELLS.get(cell.removeprefix("rerank-"), cell)
            name = next(iter(rows_of.values()))[0]["name"]
            models[f"{title}, {name}"] = summarize(rows_of, lambda row: True)
        else:
            models[CELLS.get(cell, cell)] = summarize(rows_of, lambda row: row.get("iteration") == 1)
    if "letters" in runs:
        num_choices = read_json(next(iter(runs["letters"].values())) / "config.json")["num_choices"]
        for title, cell, t in (("warm-up", "letters", 0), (CELLS["reft"], "reft", 1),
                               (CELLS["letters"], "letters", 1)):
            if cell in runs:
                models[title]["letter_accuracy"] = estimate(
                    {seed: letter_accuracy(run, t, num_choices) for seed, run in runs[cell].items()})
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
                                         "{x:.0%}" if key in ("dev", "accuracy", "eos_rate") else "{x:g}")
    facts = warnings(runs)
    print("\n".join(facts), end="\n\n" if facts else "")
    publish(out, "reft", facts, tables, pngs)


if __name__ == "__main__":
    main()
