"""Runs of rft.py -> the paper's tables and figures: accuracy by cell, paths over k, the pool.

Reads RUNS/CELL/sSEED, as `make rft` and `make rft-table` lay them out, or one run. From several seeds
come means with 95 % Student intervals, from one seed the Wilson interval over test questions.

    python -m tools.report_rft runs/rft --out results/rft
"""
import json
import re
from pathlib import Path
from statistics import fmean

from tools.report import (COLORS, MARKERS, Table, estimate, estimates, find_runs, mean_text, models_table,
                    parse_runs, picture, publish, read_json, run_script, timed_card, write)

CELLS = {  # folder -> row of the tables
    "pool": "RFT, paths of 3 models, k = 50 each",
    "matched": "SFT, steps of k = 50", "none": "k = 50, no dedup", "string": "k = 50, dedup by string",
    "first": "k = 50, first path stays", "nofilter": "k = 50, no equation filter",
    "restart": "k = 50, from the SFT model", "half": "1/2 of the questions, k = 50",
    "quarter": "1/4 of the questions, k = 50", "w96": "width 96, k = 50",
    "w160": "width 160, k = 50"}
PAPER_DISTINCT = {1: 1.17, 3: 1.44, 6: 1.74, 12: 2.20, 25: 2.93, 50: 3.94}  # Table 2, 7B, gold counted


def load_runs(root: Path) -> dict[str, dict[int, Path]]:
    """Cell -> seed -> directory of a finished run, in the table's order; one run alone is the cell of its k."""
    runs = find_runs(root)
    if (root / "results.json").exists():
        return {f"k{read_json(root / 'config.json')['num_samples']}": runs[root.name]}
    order = sorted(filter(sweep_k, runs), key=sweep_k) + [cell for cell in CELLS if cell in runs]
    return {cell: runs[cell] for cell in [*order, *sorted(runs.keys() - set(order))]}


def title(cell: str) -> str:
    return f"RFT, k = {sweep_k(cell)}" if sweep_k(cell) else CELLS.get(cell, cell)


def row_of(rows: list[dict], split: str, name: str = "RFT") -> dict:
    """The row of a model and split in a results.json; split "train" says how it was made. {}: none."""
    return next((row for row in rows if (row["split"], row["name"]) == (split, name)), {})


def measures(rows: list[dict], name: str) -> dict[str, float]:
    """What one run says of its model `name`, "SFT" or "RFT"; {} if it has none."""
    test, dev = row_of(rows, "test", name), row_of(rows, "dev", name)
    if not test:
        return {}
    row = row_of(rows, "train", name) | test | {"dev": dev["accuracy"]}
    wanted = ("accuracy", "dev", "pass@1", "kept", "correct_paths", "distinct_paths", "steps",
              "tokens_trained", "ci95")
    return {key: row[key] for key in row if key in wanted or key.startswith("maj@")}


def summarize(runs: dict[int, list[dict]], name: str) -> dict:
    """Estimates over seeds of every measure of a model."""
    found = {seed: measures(rows, name) for seed, rows in runs.items()}
    return estimates({seed: row for seed, row in found.items() if row})


def accuracy_table(models: dict[str, dict]) -> Table:
    """A line per model: what it was trained on, and how it does."""
    votes = [key for key in next(iter(models.values())) if key.startswith("maj@")]
    specs = {"accuracy": ".1%", **dict.fromkeys(votes, ".1%"), "pass@1": ".1%", "dev": ".1%",
             "kept": ",.0f", "distinct_paths": ".2f", "steps": ",.0f"}
    return models_table(models, specs, "Greedy; mean ± half of its 95% interval over n seeds (Student t), or "
                        "the Wilson interval of one. maj@k and pass@1: sampled. kept: paths trained on beside "
                        "gold. Distinct paths per question, gold not counted.")


def curves(runs: dict[int, list[dict]]) -> dict[str, dict[int, dict]]:
    """Measure -> k -> estimate over seeds, from the sample files of a cell."""
    found: dict = {}
    for seed, rows in runs.items():
        for row in row_of(rows, "train")["over_k"]:
            for key in ("correct_paths", "distinct_paths", "distinct_paths_and_gold", "solved"):
                found.setdefault(key, {}).setdefault(row["k"], {})[seed] = row[key]
    return {key: {k: estimate(values) for k, values in by_k.items()} for key, by_k in found.items()}


def paths_table(over_k: dict) -> Table:
    specs = {"correct_paths": ".2f", "distinct_paths": ".2f", "distinct_paths_and_gold": ".2f",
             "solved": ".1%"}
    rows = [[str(k), *(mean_text({"x": over_k[key][k]}, "x", spec) for key, spec in specs.items()),
             str(PAPER_DISTINCT.get(k, ""))] for k in over_k["solved"]]
    return Table("Paths per question over k", "From the first k samples of one file. solved: questions "
                 "with a correct path. The paper's 7B model found, gold counted: last column.",
                 ["k", *(key.replace("_", " ") for key in specs), "paper"], rows)


def pool_table(runs: dict[int, list[dict]]) -> Table:
    """The share of all distinct paths that only one of the pooled models contributes."""
    shares = {seed: row_of(rows, "train")["exclusive"] for seed, rows in runs.items()}
    models = range(len(next(iter(shares.values()))))
    rows = [[f"model {m}", mean_text({"x": estimate({s: row[m] for s, row in shares.items()})}, "x", ".1%")]
            for m in models]
    return Table("Paths that only one model of the pool has", "Share of all distinct paths, in the order "
                 "pooled; the paper's 7B and 13B models: about 15% each.", ["model", "share"], rows)


def draw_lines(axis, lines: dict[str, list[tuple]]) -> None:
    """Label -> [(k, mean, low, high)]; a line with a single k is drawn across."""
    for i, (name, points) in enumerate(lines.items()):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        if not points:
            continue
        k, mean, low, high = zip(*points)
        if len(points) == 1:
            axis.axhline(mean[0], color=color, label=name, linestyle="--")
            axis.axhspan(low[0], high[0], color=color, alpha=0.12, linewidth=0)
            continue
        axis.errorbar(k, mean, [[m - a for m, a in zip(mean, low)], [b - m for m, b in zip(mean, high)]],
                      label=name, color=color, marker=marker, markersize=4.5, capsize=2)
        axis.set_xscale("log")
        axis.set_xticks(k, [str(n) for n in k])
        axis.minorticks_off()


def point(k: int, value: dict, ci95=None) -> tuple:
    mean, half = value["mean"], value["half_width"] or 0.0
    return (k, mean, *(ci95 or (mean - half, mean + half)))


def draw_histogram(axis, histogram: dict[int, float]) -> None:
    axis.bar(histogram.keys(), histogram.values(), color=COLORS[0], width=0.9,
             label="questions with so many correct samples")


def sweep_k(cell: str) -> int:
    """k of a cell of the sweep over k, 0 of another cell."""
    return int(cell[1:]) if re.fullmatch(r"k\d+", cell) else 0


def pictures(cells: dict, main_cell: str, models: dict[str, dict], over_k: dict) -> dict[str, bytes]:
    by_k = {k: models[title(cell)] for cell in cells if (k := sweep_k(cell))}
    lines = {"RFT": [point(k, row["accuracy"], row.get("ci95")) for k, row in by_k.items()]}
    for name in ("SFT", CELLS["matched"], CELLS["none"], CELLS["pool"]):
        if name in models:
            lines[name] = [point(1, models[name]["accuracy"], models[name].get("ci95"))]
    paths = {name: [point(k, value) for k, value in over_k[key].items()] for name, key in (
        ("distinct", "distinct_paths"), ("distinct, gold counted", "distinct_paths_and_gold"))}
    counts = [row_of(rows, "train")["histogram"] for rows in cells[main_cell].values()]
    histogram = {n: fmean(count.get(str(n), 0) for count in counts)
                 for n in range(max(int(n) for count in counts for n in count) + 1)}
    return {"accuracy.png": picture({"accuracy over k": lines}, draw_lines, "test accuracy",
                                    "k, samples per question"),
            "paths.png": picture({"distinct paths over k": paths}, draw_lines, "paths per question",
                                 "k, samples per question", "{x:g}"),
            "solved.png": picture({"correct samples per question": histogram}, draw_histogram,
                                  "questions", "correct among the samples", "{x:g}")}


def main() -> None:
    root, out = parse_runs(__doc__)
    runs = load_runs(root)
    cells = {cell: {seed: read_json(run / "results.json") for seed, run in by_seed.items()}
             for cell, by_seed in runs.items()}
    main_cell = max(cells, key=sweep_k)  # whose samples the others select from
    models = {"SFT": summarize(cells[main_cell], "SFT")}
    for cell, rows_of in cells.items():
        models[title(cell)] = summarize(rows_of, "RFT")
        if cell in ("half", "quarter", "w96", "w160"):
            models[f"SFT, {CELLS[cell].split(', k')[0]}"] = summarize(rows_of, "SFT")
    models = {name: row for name, row in models.items() if row}
    over_k = curves(cells[main_cell])
    tables = [accuracy_table(models), paths_table(over_k)]
    if "pool" in cells:
        tables.append(pool_table(cells["pool"]))
    cards = {"/".join(run.parts[-2:]): timed_card(run) for by_seed in runs.values() for run in by_seed.values()}
    write(out / "rft.json", json.dumps({"models": models, "over_k": over_k, "runs": cards}, indent=1) + "\n")
    publish(out, "rft", [], tables, pictures(cells, main_cell, models, over_k))


if __name__ == "__main__":
    run_script(main)
