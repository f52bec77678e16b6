"""Runs of rft.py -> the paper's tables and figures: accuracy by cell, paths over k, the pool.

Reads RUNS/CELL/sSEED, as `make rft` and `make rft-table` lay them out, or one run. From several seeds
come means with 95 % Student intervals, from one seed the Wilson interval over test questions.

    python report_rft.py runs/rft --out results/rft
"""
import argparse
import json
import re
from pathlib import Path
from statistics import fmean

from report import (COLORS, MARKERS, Table, estimate, mean_text, picture, plain, publish, read_json,
                    timed_card, write)

CELLS = {  # folder -> row of the tables
    "pool": "RFT, paths of 3 models, k = 50 each",
    "matched": "SFT, steps of k = 50", "none": "k = 50, no dedup", "string": "k = 50, dedup by string",
    "first": "k = 50, first path stays", "nofilter": "k = 50, no equation filter",
    "restart": "k = 50, from the SFT model", "half": "1/2 of the questions, k = 50",
    "quarter": "1/4 of the questions, k = 50", "w96": "width 96, k = 50",
    "w160": "width 160, k = 50"}
PAPER_DISTINCT = {1: 1.17, 3: 1.44, 6: 1.74, 12: 2.20, 25: 2.93, 50: 3.94}  # Table 2, 7B, gold counted


def load_cells(root: Path) -> dict[str, dict[int, list[dict]]]:
    """Cell -> seed -> rows of results.json, of finished runs; one run alone is the cell of its k."""
    if (root / "results.json").exists():
        config = read_json(root / "config.json")
        return {f"k{config['num_samples']}": {config["seed"]: read_json(root / "results.json")}}
    cells: dict = {}
    for file in sorted(root.glob("*/s[0-9]*/results.json")):
        cells.setdefault(file.parent.parent.name, {})[int(file.parent.name[1:])] = read_json(file)
    if not cells:
        raise SystemExit(f"no finished run in {root}: expected {root}/CELL/sSEED/results.json")
    order = sorted(filter(sweep_k, cells), key=sweep_k) + [cell for cell in CELLS if cell in cells]
    return {cell: cells[cell] for cell in [*order, *sorted(cells.keys() - set(order))]}


def title(cell: str) -> str:
    return f"RFT, k = {sweep_k(cell)}" if sweep_k(cell) else CELLS.get(cell, cell)


def measures(rows: list[dict], name: str) -> dict[str, float]:
    """What one run says of its model `name`, "SFT" or "RFT"; {} if it has none."""
    test = [row for row in rows if row["name"] == name and row["split"] == "test"]
    if not test:
        return {}
    row = test[0] | {"dev": next(r["accuracy"] for r in rows if r["name"] == name and r["split"] == "dev")}
    if name == "RFT":
        row |= next(r for r in rows if r["split"] == "train")
    wanted = ("accuracy", "dev", "pass@1", "kept", "correct_paths", "distinct_paths", "steps",
              "tokens_trained")
    return {key: row[key] for key in row if key in wanted or key.startswith("maj@")} | {"ci95": row["ci95"]}


def summarize(runs: dict[int, list[dict]], name: str) -> dict:
    """Estimates over seeds of every measure, and the Wilson interval of the only seed."""
    found = {seed: measures(rows, name) for seed, rows in runs.items()}
    found = {seed: row for seed, row in found.items() if row}
    if not found:
        return {}
    first = next(iter(found.values()))
    summary = {key: estimate({seed: row[key] for seed, row in found.items()})
               for key in first if key != "ci95"}
    return summary | ({"ci95": first["ci95"]} if len(found) == 1 else {})


def accuracy_table(rows: dict[str, dict]) -> Table:
    """A line per model: what it was trained on, and how it does."""
    votes = [key for key in next(iter(rows.values())) if key.startswith("maj@")]
    specs = {"accuracy": ".1%", **dict.fromkeys(votes, ".1%"), "pass@1": ".1%", "dev": ".1%",
             "kept": ",.0f", "distinct_paths": ".2f", "steps": ",.0f"}
    lines = []
    for name, row in rows.items():
        texts = {key: mean_text(row, key, spec) for key, spec in specs.items()}
        if "ci95" in row:
            texts["accuracy"] += " ({:.1%} to {:.1%})".format(*row["ci95"])
        lines.append([name, *texts.values(), str(row["accuracy"]["n"])])
    return Table("Test accuracy", "Greedy; mean ± half of its 95% interval over n seeds (Student t), or "
                 "the Wilson interval of one. maj@k and pass@1: sampled. kept: paths trained on beside "
                 "gold. Distinct paths per question, gold not counted.",
                 ["model", *(key.replace("_", " ") for key in specs), "n"], lines)


def curves(runs: dict[int, list[dict]]) -> dict[str, dict[int, dict]]:
    """Measure -> k -> estimate over seeds, from the sample files of a cell."""
    found: dict = {}
    for seed, rows in runs.items():
        for row in next(r for r in rows if r["split"] == "train")["over_k"]:
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
    shares = {seed: next(r for r in rows if r["split"] == "train")["exclusive"]
              for seed, rows in runs.items()}
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


def pictures(cells: dict, main_cell: str, rows: dict[str, dict], over_k: dict) -> dict[str, bytes]:
    by_k = {k: rows[title(cell)] for cell in cells if (k := sweep_k(cell))}
    lines = {"RFT": [point(k, row["accuracy"], row.get("ci95")) for k, row in by_k.items()]}
    for name in ("SFT", CELLS["matched"], CELLS["none"], CELLS["pool"]):
        if name in rows:
            lines[name] = [point(1, rows[name]["accuracy"], rows[name].get("ci95"))]
    paths = {name: [point(k, value) for k, value in over_k[key].items()] for name, key in (
        ("distinct", "distinct_paths"), ("distinct, gold counted", "distinct_paths_and_gold"))}
    counts = [next(r for r in run if r["split"] == "train")["histogram"] for run in cells[main_cell].values()]
    histogram = {n: fmean(count.get(str(n), 0) for count in counts)
                 for n in range(max(int(n) for count in counts for n in count) + 1)}
    return {"accuracy.png": picture({"accuracy over k": lines}, draw_lines, "test accuracy",
                                    "k, samples per question"),
            "paths.png": picture({"distinct paths over k": paths}, draw_lines, "paths per question",
                                 "k, samples per question", "{x:g}"),
            "solved.png": picture({"correct samples per question": histogram}, draw_histogram,
                                  "questions", "correct among the samples", "{x:g}")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS", help="RUNS/CELL/sSEED, or one run")
    parser.add_argument("--out", type=Path, help="where to write (default: RUNS)")
    args = parser.parse_args()
    cells = load_cells(args.runs)
    main_cell = max(cells, key=sweep_k)  # whose samples the others select from
    rows = {"SFT": summarize(cells[main_cell], "SFT")}
    for cell, runs in cells.items():
        rows[title(cell)] = summarize(runs, "RFT")
        if cell in ("half", "quarter", "w96", "w160"):
            rows[f"SFT, {CELLS[cell].split(', k')[0]}"] = summarize(runs, "SFT")
    rows = {name: row for name, row in rows.items() if row}
    over_k = curves(cells[main_cell])
    tables = [accuracy_table(rows), paths_table(over_k)]
    if "pool" in cells:
        tables.append(pool_table(cells["pool"]))
    out = args.out or args.runs
    found = [args.runs] if (args.runs / "results.json").exists() else [
        args.runs / cell / f"s{seed}" for cell in cells for seed in cells[cell]]
    write(out / "rft.json", json.dumps({
        "models": rows, "over_k": over_k,
        "runs": {"/".join(run.parts[-2:]): timed_card(run) for run in found}}, indent=1) + "\n")
    print("\n\n".join(map(plain, tables)), end="\n\n")
    publish(out, "rft", [], tables, pictures(cells, main_cell, rows, over_k))


if __name__ == "__main__":
    main()
