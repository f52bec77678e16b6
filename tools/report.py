"""Training runs -> tables, pictures and one page; many seeds -> means with intervals, and what the papers claim.

Every number is read from a file of irpo.py, rft.py, reft.py or tools/rerank.py, or is a mean, difference or interval of
such numbers. The papers' numbers and claims and the tables' columns are in results/paper.json; tools/page.py draws.
An interval of one run is about the draw of test questions, that of a mean over seeds about the draw of runs.

    python -m tools.report RUN [RUN ...] [--out DIR]              # runs from one base, the main one first
    python -m tools.report --table ROOT --out results/irpo-table  # finished runs, ROOT/CELL/sSEED
"""
import argparse
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from infra.run import ROOT, read_json, run_script, write_json
from tools.page import fenced, make_table, plain, point, publish, render

PAPER = read_json(ROOT / "results" / "paper.json")
TABLES = PAPER["tables"]  # title, note, columns
SHARES = "|".join(re.findall(r"(\S+):\S*%", " ".join(columns for *_, columns in TABLES.values())))  # are in [0, 1]
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306,
         10: 2.262}  # of Student's t with n - 1 degrees of freedom; for more than 10 seeds the last is a bit too wide


# --- what a run tells ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Run:
    """A run as its files tell it. models[i] holds all that is known of a model: how it was made, how it does."""
    path: Path
    models: list[dict]
    steps: list[dict]  # train.jsonl of the last model
    card: dict  # command, commit, machine, minutes
    finished: bool
    kind: str  # irpo, rft or reft (and rerank)


def read_jsonl(path: Path, *keys: str) -> list[dict]:
    """Read the rows of a file that have these keys, none if it is missing; pass over a line that a crash cut short, and
    say so."""
    rows = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [dict(json.loads(line))] if line else []
        except (ValueError, TypeError):
            print(f"{path}: line {number} is cut short and passed over", file=sys.stderr)
    return [row for row in rows if row.keys() >= {*keys}]


def load_run(path: Path) -> Run:
    """Load a run, an unfinished one as far as it is evaluated; SystemExit where another program wrote the files."""
    if not (path / "config.json").exists():
        raise SystemExit(f"{path} is not a run directory: it has no config.json")
    try:
        return read_run(path)
    except Exception as error:  # whatever it is that the files do not have
        raise SystemExit(f"{path} cannot be read as a run of irpo.py, rft.py, reft.py or tools.rerank of this version: "
                         f"{error!r}") from error


def read_run(path: Path) -> Run:
    evaluated = [file for file in path.glob("iter*/eval.json") if re.fullmatch(r"iter\d+", file.parent.name)]
    finished = (path / "results.json").exists()
    by_model: dict[str, list[dict]] = {}
    for file in [path / "results.json"] if finished else sorted(evaluated, key=lambda file: int(file.parent.name[4:])):
        for row in read_json(file):
            by_model.setdefault(row["name"], []).append(row)
    if not by_model:
        raise SystemExit(f"{path} has no evaluated model yet: irpo.py, rft.py and reft.py write its iter0/eval.json "
                         "first, tools.rerank its results.json")

    log = {(line["folder"], line["event"]): line["seconds"]
           for line in read_jsonl(path / "log.jsonl", "folder", "event", "seconds")}
    models = [model_record(rows, log) for rows in by_model.values()]
    card = path / "command.txt"
    first_start = card.read_text(encoding="utf-8", errors="replace").split("\n\n")[0] if card.exists() else ""
    card = dict(line.split(maxsplit=1) for line in first_start.splitlines() if len(line.split()) > 1)
    card["minutes"] = round(sum(log.values()) / 60, 1)
    steps = read_jsonl(path / f"iter{models[-1]['iteration']}" / "train.jsonl", "step")
    if warned := Counter(name for step in steps for name in step.get("warnings", ())):
        card["warnings"] = ", ".join(f"{name} at {count} batches" for name, count in warned.items())
    if dev := curve([steps], "dev"):
        middle = next(accuracy for step, accuracy, *_ in dev if 2 * step >= dev[-1][0])
        models[-1] |= {"dev_lowest": min(accuracy for _, accuracy, *_ in dev), "dev_halfway": middle}
    kind = {"M0": "irpo", "SFT": "rft", "RFT": "rft"}.get(models[0]["name"], "reft")
    return Run(path, models, steps, card, finished, kind)


def model_record(rows: list[dict], log: dict) -> dict:
    """Join a model's rows: keys of test stay as they are, those of dev and of its making become dev_X and train_X."""
    record = {}
    for row in rows:
        prefix = {"dev": "dev_", "train": "train_"}.get(row.get("split"), "")
        record |= {prefix + {"ci95": "accuracy_ci95"}.get(key, key): value for key, value in row.items()}
    record |= {"name": str(rows[0]["name"]), "iteration": rows[0].get("iteration")}
    for tag, values in record.get("tags", {}).items():
        for value, part in values.items():
            record |= {f"{tag}={value}": part["accuracy"], f"share of {tag}={value}": part["share"]}
    for vote in [value for key, value in record.items() if key.startswith("maj@") and "accuracy" in record]:
        record["vote_gain"] = vote - record["accuracy"]
    if probe := record.get("train_probe"):
        record |= {f"{key}_change": probe[-1][key] - probe[0][key] for key in probe[0] if key != "step"}
    if len(shares := record.get("train_exclusive", ())) > 1:
        record |= {f"only model {m}": share for m, share in enumerate(shares)}
    return record | {f"seconds_{event}": seconds for (folder, event), seconds in log.items()
                     if folder == f"iter{record['iteration']}"}


def curve(records: list[list[dict]], key: str) -> list[tuple]:
    """(step, mean over runs, lowest, highest) of a measure, from the training record of each run."""
    values: dict[int, list[float]] = {}
    for step in (step for steps in records for step in steps if key in step):
        value = step[key]["accuracy"] if isinstance(step[key], dict) else step[key]
        if isinstance(value, (int, float)):
            values.setdefault(step["step"] + 1, []).append(value)
    return [(step, fmean(found), min(found), max(found)) for step, found in sorted(values.items())]


# --- cells and seeds -------------------------------------------------------------------------------

def load_table(root: Path) -> tuple[str, dict[str, dict[int, Run]], list[str]]:
    """Load ROOT/CELL/sSEED: the kind of table (a key of PAPER), cell -> seed -> run, and what is missing."""
    folders = [path for path in sorted(root.glob("*/s*")) if re.fullmatch(r"s\d+", path.name)]
    found = {path: load_run(path) for path in folders if (path / "results.json").exists()}
    if not found:
        raise SystemExit(f"no finished run in {root}: expected {root}/CELL/sSEED/results.json")
    kinds, names = sorted({run.kind for run in found.values()}), {path.parent.name for path in folders}
    if len(kinds) > 1:
        raise SystemExit(f"{root} holds runs of {', '.join(kinds)}: give one table at a time")
    kind = "sweep" if names <= PAPER["sweep"]["cells"].keys() else kinds[0]
    known = PAPER[kind]["cells"]  # all of them are expected, but not in a table that has other cells, too
    order = [cell for cell in known if cell in names or names <= known.keys()] + sorted(names - known.keys())
    seeds = sorted({int(path.name[1:]) for path in folders})
    cells = {cell: {s: found[path] for s in seeds if (path := root / cell / f"s{s}") in found} for cell in order}
    missing = [f"{cell}/s{seed}" if runs else cell for cell, runs in cells.items()
               for seed in (seeds if runs else seeds[:1]) if seed not in runs]
    return kind, {cell: runs for cell, runs in cells.items() if runs}, missing


def label_of(kind: str, cell: str) -> str:
    """Name a cell; one that is named by its flags, reft+gae_lambda@0.5, becomes "ReFT, gae_lambda 0.5"."""
    if kind == "runs":  # named by their directories
        return cell
    name, *flags = cell.split("+")
    return ", ".join([PAPER[kind]["cells"].get(name, name), *(flag.replace("@", " ") for flag in flags)])


def estimate(values: dict[int, float], low: float = -math.inf, high: float = math.inf) -> dict:
    """Return the mean over seeds and its 95 % Student interval, cut off at the value's bounds; one seed has none."""
    n, mean = len(values), fmean(values.values())
    found = {"mean": mean, "half_width": None, "ci95": None, "n": n, "values": values}
    if n > 1:
        half = T_975[min(n, 10)] * math.dist(values.values(), [mean] * n) / math.sqrt(n * (n - 1))
        found["ci95"] = [max(low, mean - half), min(high, mean + half)]
        if found["ci95"] == [mean - half, mean + half]:
            found["half_width"] = half
    return found


def estimates(found: dict[int, dict]) -> dict[str, dict]:
    """Turn seed -> record into an estimate per number.

    Where seeds do not differ, or there is one, they tell nothing of the draw of runs, and the interval is a run's own.
    """
    summary = {"seeds": len(found)}
    for key in dict.fromkeys(key for record in found.values() for key in record):
        default = 0.0 if key.startswith("share of") else None  # no such response in that seed
        values = {seed: record.get(key, default) for seed, record in found.items()}
        if values := {seed: value for seed, value in values.items() if isinstance(value, (int, float))}:
            summary[key] = estimate(values, *(0.0, 1.0) if re.fullmatch(SHARES, key) else ())
            own = found[next(iter(values))].get(f"{key}_ci95")
            if own and len({*values.values()}) == 1:
                summary[key] |= {"half_width": None, "ci95": own}
    return summary


def summarize(kind: str, cells: dict) -> dict:
    """Estimate every model of every cell, in a table with the paper's accuracy next to it."""
    paper, summary = PAPER[kind].get("accuracy", {}), {}
    for cell, runs in cells.items():
        names = dict.fromkeys(model["name"] for run in runs.values() for model in run.models)
        models = {name: estimates({seed: model for seed, run in runs.items() for model in run.models
                                   if model["name"] == name}) for name in names}
        for name in models.keys() & paper.get(cell, {}).keys():
            models[name]["accuracy"]["paper"] = paper[cell][name]
        summary[cell] = {"label": label_of(kind, cell), "models": models,
                         "runs": {seed: run.card for seed, run in runs.items()}}
    return summary


def estimate_paths(cells: dict) -> dict[int, dict]:
    """k -> estimates of the paths among the first k samples of a question, with the paper's number next to it, in the
    cell of the largest k, from whose samples the others select."""
    by_k: dict[int, dict[int, dict]] = {}
    for seed, run in cells[max(cells, key=samples_of)].items():
        for row in run.models[-1].get("train_over_k", []):
            by_k.setdefault(row["k"], {})[seed] = row
    found, paper = {k: estimates(rows) for k, rows in by_k.items()}, PAPER["rft"]["distinct_paths_and_gold"]
    for k in found.keys() & map(int, paper):
        found[k]["distinct_paths_and_gold"]["paper"] = paper[str(k)]
    return found


def samples_of(cell: str) -> int:
    return int(cell[1:]) if re.fullmatch(r"k\d+", cell) else 0


def find_claims(kind: str, cells: dict) -> list[dict]:
    """Of the claims whose two sides were run: the difference between runs of the same seed, and what it says."""
    def values(side: str) -> dict[int, float]:
        cell, name, measure = side.split()
        return {seed: value for seed, run in cells.get(cell, {}).items()
                for i, model in enumerate(run.models)
                if name in (model["name"], "first" * (i == 0), "last" * (i == len(run.models) - 1))
                for key, value in model.items() if re.fullmatch(measure, key)}

    found = []
    for text, *sides, unit in ([*claim, "points"][:4] for claim in PAPER[kind]["claims"]):
        high, low = map(values, sides)
        scale, bounds = (100, (-100.0, 100.0)) if unit == "points" else (1, ())
        if by_seed := {seed: round(scale * (high[seed] - low[seed]), 9) for seed in sorted(high.keys() & low.keys())}:
            difference = estimate(by_seed, *bounds)
            least, most = difference["ci95"] or (0, 0)  # of one seed
            said = "shown" if least > 0 else "the other way" if most < 0 else "not shown"
            found.append({"claim": text, "difference": difference, "unit": unit,
                          "here": said + " (one seed)" * (len(by_seed) == 1),
                          "by_seed": ", ".join(f"{value:+.3g}" for value in by_seed.values())})
    return found


# --- tables and pictures ---------------------------------------------------------------------------

def model_tables(summary: dict) -> list[str]:
    """Show every model of every cell; a first model with the figures of another's in the same seeds only once."""
    rows: dict[tuple, tuple[list[str], dict]] = {}
    for cell in summary.values():
        for i, (name, model) in enumerate(cell["models"].items()):
            values = [str(model[key]["values"]) for key in ("accuracy", "dev_accuracy") if key in model]
            start = i == 0 and len(cell["models"]) > 1
            known = rows.setdefault((name, *values) if start else (cell["label"], name), ([cell["label"], name], {}))
            known[1].update(model | known[1])
    names = ("models", "responses", "samples", "training", "rollouts", "cost")
    return [make_table(TABLES[name], ["cell", "model"], [*rows.values()]) for name in names]


def probe_lines(models: list[dict]) -> dict[str, list[tuple]]:
    """The paper's figures 2 and 3, all iterations in a row; the lines break where other pairs are measured."""
    lines: dict[str, list[tuple]] = {}
    offset = 0
    for model in models:
        for row in model.get("train_probe", []):
            for name in sorted(row.keys() - {"step"}):
                lines.setdefault(name, []).append(point(offset + row["step"], row[name]))
        offset += model.get("train_steps", 0)
        lines = {name: [*points, point(offset, math.nan)] for name, points in lines.items()}
    return lines


def over_models(summary: dict) -> dict[str, dict]:
    """Accuracy over M_t for each cell, in the panel that its label names ("β=0.1: α=1"), and the paper's."""
    panels: dict[str, dict] = {}
    for cell in summary.values():
        panel, _, line = cell["label"].rpartition(": ")
        found = [(model["iteration"]["mean"], model["accuracy"]) for model in cell["models"].values()
                 if model.keys() >= {"iteration", "accuracy"}]
        panels.setdefault(panel or "here", {})[line] = [point(t, accuracy) for t, accuracy in found]
        panels.setdefault("the paper", {})[line] = [
            point(t, accuracy["paper"]) for t, accuracy in found if "paper" in accuracy]
    return panels


def over_k(summary: dict) -> dict[str, dict]:
    """RFT's accuracy over k; that of SFT is k = 0."""
    models = {samples_of(cell): [*row["models"].values()] for cell, row in summary.items() if samples_of(cell)}
    points = [point(k, rows[-1]["accuracy"]) for k, rows in models.items()]
    starts = [point(0, rows[0]["accuracy"]) for k, rows in models.items() if len(rows) > 1 and k == max(models)]
    return {"": {"RFT": starts + points}} if models else {}


def pictures(cells: dict, summary: dict) -> dict[str, bytes]:
    """Draw accuracy over M_t (RFT: over k), log-probs of pairs, and ReFT's curves: mean and range of the seeds."""
    runs = {row["label"]: [*cells[cell].values()] for cell, row in summary.items()}
    ks, label = over_k(summary), "test accuracy, 95% interval"
    probes = {label: probe_lines(seeds[0].models) for label, seeds in runs.items()}
    drawn = {"accuracy.png": render(ks, label, "k, samples per question", "share", "symlog") if ks
             else render(over_models(summary), label, "iteration (0: the first model)", "share"),
             "logps.png": render(probes, "mean summed log-prob, nats, first seed", "optimizer steps")}
    for name, (key, label, scale) in PAPER["curves"].items():
        lines = {cell: curve([run.steps for run in seeds if run.kind == "reft"], key) for cell, seeds in runs.items()}
        drawn[f"{name}.png"] = render({"": lines}, label, "batches of questions", scale)
    return drawn


def before_and_after(run: Run) -> list[str]:
    """Three greedy answers of the first and of the last model where the verdict became correct."""
    ends = [run.models[0], run.models[-1]]
    files = [read_jsonl(run.path / f"iter{model['iteration']}" / "eval_samples.jsonl", "id", "samples")
             for model in ends]
    first, last = ({str(row["id"]): (sample["verdict"], sample["text"].strip()) for row in rows
                    for sample in row["samples"][:1] if sample.keys() >= {"verdict", "text"}} for rows in files)
    right = {id: (first[id][0] == "correct", last[id][0] == "correct") for id in first if id in last}
    better, worse = ([id for id in right if right[id] == change] for change in ((False, True), (True, False)))
    names = [model["name"] for model in ends]
    texts = [f"{plain(f'{id}, {name}, {verdict}')}:\n\n{fenced(text)}" for id in better[:3]
             for name, (verdict, text) in zip(names, (first[id], last[id]))]
    return ["## Before and after", *texts, plain(
        f"From {' to '.join(names)}, {len(better):,} questions went from wrong to right and {len(worse):,} from right "
        "to wrong.")] if right and ends[0] is not ends[1] else []


# --- the report ------------------------------------------------------------------------------------

def report(kind: str, cells: dict[str, dict[int, Run]], missing: list[str], out: Path) -> None:
    """Write NAME.json, NAME.md, NAME.html and the pictures of cells and seeds."""
    name, runs = PAPER[kind]["name"], [run for seeds in cells.values() for run in seeds.values()]
    summary, claims, paths = summarize(kind, cells), find_claims(kind, cells), estimate_paths(cells)
    write_json(out / f"{name}.json", {"missing": missing, "cells": summary, "claims": claims, "paths": paths})
    facts = [f"Missing or unfinished: {', '.join(missing)}."] if missing else []
    facts += [f"{run.path} is unfinished: {run.models[-1]['name']} is the last model evaluated."
              for run in runs if not run.finished]
    if warned := [f"{'/'.join(run.path.parts[-2:])}: {run.card['warnings']}" for run in runs if "warnings" in run.card]:
        facts.append(f"Warnings of {'; '.join(warned)}.")
    if kind == "runs" and len({run.models[0].get("accuracy") for run in runs}) > 1:
        facts.append("The runs differ in their first models already: not the same base, or not the same questions.")
    models, *others = model_tables(summary)
    main = [models, make_table(TABLES["paths"], ["k"], [([str(k)], row) for k, row in paths.items()]),
            make_table(TABLES["claims"], ["claim"], [([claim["claim"]], claim) for claim in claims])]
    texts = before_and_after(runs[0]) if kind == "runs" else []
    cards = ["## How the runs were made", *(
        plain(f"{run.path}: " + "; ".join(f"{key} {value}" for key, value in run.card.items())) for run in runs)]
    publish(out, name, facts, pictures(cells, summary), [*main, *others, *texts, *cards], [*texts, *main])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--table", type=Path, metavar="ROOT", help="folder of ROOT/CELL/sSEED")
    parser.add_argument("--out", type=Path, help="where to write (default: the first RUN, or ROOT)")
    args = parser.parse_args()
    if bool(args.runs) == bool(args.table):
        parser.error("give run directories, or --table ROOT")
    found = load_table(args.table) if args.table else (
        "runs", {str(path): {0: load_run(path)} for path in args.runs}, [])
    report(*found, args.out or args.table or args.runs[0])


if __name__ == "__main__":
    run_script(main)
