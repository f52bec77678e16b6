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
import textwrap
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from infra.run import ROOT, read_json, run_script, write_json
from reft import letter
from rewards import read_number
from tools.page import Picture, Table, make_table, plain, point, publish, text_of

PAPER = read_json(ROOT / "results" / "paper.json")
TABLES = PAPER["tables"]  # title, note, columns
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306,
         10: 2.262}  # of Student's t with n - 1 degrees of freedom; for more than 10 seeds the last is a bit too wide
GRID = re.compile(r"alpha([\d.]+)-beta([\d.]+)")  # cells of a sweep


# --- loader ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Run:
    """A run as its files tell it. models[i] holds all that is known of a model: how it was made, how it does."""
    path: Path
    config: dict
    models: list[dict]
    steps: list[dict]  # train.jsonl of the last model
    card: dict  # command, commit, machine, minutes
    finished: bool
    kind: str  # irpo, rft or reft (and rerank)
    label: str = ""


def read_jsonl(path: Path) -> list[dict]:
    """Read the rows of a file, none if it is missing; pass over a line that a crash cut short, and say so."""
    rows = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line else []
        except ValueError:
            print(f"{path}: line {number} is cut short and passed over", file=sys.stderr)
    return rows


def load_run(path: Path) -> Run:
    """Load a run; an unfinished one as far as it is evaluated."""
    if not (path / "config.json").exists():
        raise SystemExit(f"{path} is not a run directory: it has no config.json")
    finished = (path / "results.json").exists()
    evaluated = sorted(path.glob("iter*/eval.json"), key=lambda file: int(file.parent.name.removeprefix("iter")))
    by_model: dict[str, list[dict]] = {}
    for file in [path / "results.json"] if finished else evaluated:
        for row in read_json(file):
            by_model.setdefault(row["name"], []).append(row)
    if not by_model:
        raise SystemExit(f"{path} has no evaluated model yet: wait for its iter0/eval.json")
    log = {(line.get("folder"), line["event"]): line for line in read_jsonl(path / "log.jsonl")}
    models = [model_record(rows, log) for rows in by_model.values()]
    first_start = (path / "command.txt").read_text(encoding="utf-8").split("\n\n")[0]
    card = dict(line.split(maxsplit=1) for line in first_start.splitlines())
    card["minutes"] = round(sum(line["seconds"] for line in log.values()) / 60, 1)
    steps = read_jsonl(path / f"iter{models[-1]['iteration']}" / "train.jsonl")
    if warned := Counter(name for step in steps for name in step.get("warnings", ())):
        card["warnings"] = ", ".join(f"{name} at {count} batches" for name, count in warned.items())
    if dev := curve([steps], "dev"):
        middle = next(accuracy for step, accuracy, *_ in dev if 2 * step >= dev[-1][0])
        models[-1] |= {"dev_lowest": min(accuracy for _, accuracy, *_ in dev), "dev_halfway": middle}
    kind = {"M0": "irpo", "SFT": "rft", "RFT": "rft"}.get(models[0]["name"], "reft")
    return Run(path, read_json(path / "config.json"), models, steps, card, finished, kind)


def model_record(rows: list[dict], log: dict) -> dict:
    """Join a model's rows: keys of test stay as they are, those of dev and of its making become dev_X and train_X."""
    record = {"name": rows[0]["name"], "iteration": rows[0].get("iteration")}
    for row in rows:
        prefix = {"dev": "dev_", "train": "train_"}.get(row["split"], "")
        record |= {prefix + key: value for key, value in row.items() if key not in ("name", "iteration", "split")}
    for tag, values in record.get("tags", {}).items():
        record |= {f"{tag}={value}": f"{part['accuracy']:.1%} of {part['share']:.0%}" for value, part in values.items()}
        if tag == "style":
            record["careful"] = values.get("careful", {"share": 0.0})["share"]
    for key in [key for key in record if key.startswith("maj@")]:
        record["vote_gain"] = record[key] - record["accuracy"]
    if probe := record.get("train_probe"):
        record |= {f"{key}_change": probe[-1][key] - probe[0][key] for key in probe[0] if key != "step"}
    for (folder, event), line in log.items():
        if folder == f"iter{record['iteration']}":
            record[f"seconds_{event}"] = line["seconds"]
    return record


def label_runs(runs: list[Run]) -> list[Run]:
    """Label each run with its method and with what tells it from the other runs of that method."""
    unsaid = ("run_dir", "weights", "problems", "pooled")
    methods = [title(run.kind, "dpo" if run.kind == "irpo" and not run.config["alpha"]
                     else run.config.get("method", run.models[-1]["name"])) for run in runs]
    labels = []
    for run, method in zip(runs, methods):
        peers = [peer.config for peer, other in zip(runs, methods) if other == method]
        labels.append(", ".join([method, *(
            f"{name}={value}" for name, value in run.config.items()
            if name not in unsaid and any(peer.get(name) != value for peer in peers))]))
    return [replace(run, label=label if labels.count(label) == 1 else f"{label}, {run.path}")  # labels are keys
            for run, label in zip(runs, labels)]


def title(kind: str, cell: str) -> str:
    """Name a cell's row; a cell that is named by its flags, reft+gae_lambda@0.5, becomes "ReFT, gae_lambda 0.5"."""
    name, *flags = cell.split("+")
    return ", ".join([PAPER[kind]["cells"].get(name, name), *(flag.replace("@", " ") for flag in flags)])


def load_table(root: Path) -> tuple[str, dict[str, dict[int, Run]], list[str]]:
    """Load ROOT/CELL/sSEED: the kind of table (a key of PAPER), cell -> seed -> run, and what is missing."""
    folders = [path for path in sorted(root.glob("*/s*")) if re.fullmatch(r"s\d+", path.name)]
    found = {path: load_run(path) for path in folders if (path / "results.json").exists()}
    if not found:
        raise SystemExit(f"no finished run in {root}: expected {root}/CELL/sSEED/results.json")
    kinds, names = sorted({run.kind for run in found.values()}), {path.parent.name for path in folders}
    if len(kinds) > 1:
        raise SystemExit(f"{root} holds runs of {', '.join(kinds)}: give one table at a time")
    flags = any("+" in name for name in names)  # a table of flags is not expected to hold other cells
    known = [cell for cell in PAPER[kinds[0]]["cells"] if cell in names or not flags]
    order = known + sorted(names - {*known})
    if all(map(GRID.fullmatch, names)):
        alphas, betas = zip(*(GRID.fullmatch(name).groups() for name in names))
        kinds, order = ["sweep"], [f"alpha{alpha}-beta{beta}" for beta in sorted({*betas}, key=float)
                                   for alpha in sorted({*alphas}, key=float)]
    seeds = sorted({int(path.name[1:]) for path in folders})
    cells = {cell: {s: found[path] for s in seeds if (path := root / cell / f"s{s}") in found} for cell in order}
    missing = [f"{cell}/s{seed}" if runs else cell for cell, runs in cells.items()
               for seed in (seeds if runs else seeds[:1]) if seed not in runs]
    return kinds[0], {cell: runs for cell, runs in cells.items() if runs}, missing


# --- estimates -------------------------------------------------------------------------------------

def estimate(values: dict[int, float]) -> dict:
    """Return the mean over seeds and half the width of its 95 % Student interval, which one seed does not have."""
    n = len(values)
    half = T_975[min(n, 10)] * stdev(values.values()) / math.sqrt(n) if n > 1 else None
    return {"mean": fmean(values.values()), "half_width": half, "n": n, "values": values}


def estimates(found: dict[int, dict]) -> dict[str, dict]:
    """Turn seed -> record into an estimate per number; that of a single run keeps its interval over test questions."""
    summary = {}
    for key in dict.fromkeys(key for record in found.values() for key in record):
        values = {seed: record[key] for seed, record in found.items() if isinstance(record.get(key), (int, float))}
        if values and re.fullmatch(PAPER["measures"], key):
            summary[key] = estimate(values)
    if len(found) == 1 and "accuracy" in summary:
        summary["accuracy"]["ci95"] = next(iter(found.values()))["ci95"]
    return summary


def summarize(kind: str, cells: dict) -> dict:
    """Estimate every model of every cell, with the paper's accuracy beside it."""
    summary = {}
    for cell, runs in cells.items():
        names = dict.fromkeys(model["name"] for run in runs.values() for model in run.models)
        models = {name: estimates({seed: model for seed, run in runs.items() for model in run.models
                                   if model["name"] == name}) for name in names}
        for name, accuracy in PAPER[kind].get("accuracy", {}).get(cell, {}).items():
            if name in models:
                models[name]["accuracy"]["paper"] = accuracy
        summary[cell] = {"label": title(kind, cell), "models": models,
                         "runs": {seed: run.card for seed, run in runs.items()}}
    return summary


def estimate_paths(runs: dict[int, Run]) -> dict[int, dict]:
    """k -> estimates of the paths among the first k samples of a question, with the paper's number beside."""
    by_k: dict[int, dict[int, dict]] = {}
    for seed, run in runs.items():
        for row in run.models[-1].get("train_over_k", []):
            by_k.setdefault(row["k"], {})[seed] = row
    found = {k: estimates(rows) for k, rows in by_k.items()}
    for k, paper in PAPER["rft"]["distinct_paths_and_gold"].items():
        if int(k) in found:
            found[int(k)]["distinct_paths_and_gold"]["paper"] = paper
    return found


def add_letters(cells: dict) -> None:
    """Count right letters of ReFT's greedy answers, too, as the runs that are graded by letter do themselves."""
    choices = max((run.config["num_choices"] for run in cells.get("letters", {}).values()), default=0)
    for run in cells.get("reft", {}).values() if choices else []:
        for model in run.models:
            rows = read_jsonl(run.path / f"iter{model['iteration']}" / "eval_samples.jsonl")
            letters = [(letter(row["samples"][0]["answer"], choices), letter(read_number(row["gold"]), choices))
                       for row in rows if "id" in row]
            if letters:
                model["letter_accuracy"] = fmean(given is not None and given == right for given, right in letters)


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
        scale = 100 if unit == "points" else 1
        if by_seed := {seed: round(scale * (high[seed] - low[seed]), 9) for seed in sorted(high.keys() & low.keys())}:
            difference = estimate(by_seed)
            found.append({"claim": text, "difference": difference, "unit": unit, "here": verdict(difference),
                          "by_seed": ", ".join(f"{value:+.3g}" for value in by_seed.values())})
    return found


def verdict(difference: dict) -> str:
    """Say whether a claimed difference is above 0 by its interval."""
    mean, half = difference["mean"], difference["half_width"]
    if half is None or abs(mean) <= half:
        return "not shown (one seed)" if half is None else "not shown"
    return "shown" if mean > 0 else "the other way"


# --- tables ----------------------------------------------------------------------------------------

def tables_of_runs(runs: list[Run]) -> list[Table]:
    """What the screen shows of a few runs, and then everything that report.md shows."""
    rows = [([run.label, model["name"]], model) for run in runs for model in run.models]
    names = ("screen", "accuracy", "kinds", "samples", "training", "rollouts", "cost")
    return [*(make_table(TABLES[name], ["run", "model"], rows) for name in names), paths_table({0: runs[0]})]


def tables_of_cells(cells: dict, summary: dict, claims: list[dict]) -> list[Table]:
    """Everything that NAME.md shows of cells and seeds; models that cells start from come first, equal ones once."""
    starts, ends, known = [], [], set()
    for cell in sorted(summary.values(), key=lambda cell: -len(cell["runs"])):
        name, row = next(iter(cell["models"].items()))
        if len(cell["models"]) > 1 and not (measured := {*zip(row["accuracy"]["values"].items(),
                                                              row["dev_accuracy"]["values"].values())}) <= known:
            starts.append(([f"start of {cell['label']}" if known else "start", name], row))
            known |= measured
    for cell in summary.values():
        ends += [([cell["label"], name], row) for name, row in [*cell["models"].items()][len(cell["models"]) > 1:]]
    rows = [(names, row | {"seeds": row["accuracy"]["n"]}) for names, row in starts + ends]
    shares = [run.models[-1]["train_exclusive"] for run in cells.get("pool", {}).values()]
    pool = [([f"model {m}"], {"share": estimate(dict(enumerate(column)))}) for m, column in enumerate(zip(*shares))]
    return [*(make_table(TABLES[name], ["cell", "model"], rows) for name in ("models", "rollouts")),
            paths_table(cells[main_cell(cells)]), make_table(TABLES["pool"], ["pooled"], pool),
            make_table(TABLES["claims"], ["claim"], [([claim["claim"]], claim) for claim in claims])]


def paths_table(runs: dict[int, Run]) -> Table:
    return make_table(TABLES["paths"], ["k"], [([str(k)], row) for k, row in estimate_paths(runs).items()])


def main_cell(cells: dict) -> str:
    """RFT's largest k, from whose samples the other cells select."""
    return max(cells, key=samples_of)


def samples_of(cell: str) -> int:
    return int(cell[1:]) if re.fullmatch(r"k\d+", cell) else 0


# --- pictures --------------------------------------------------------------------------------------

def curve(records: list[list[dict]], key: str) -> list[tuple]:
    """(step, mean over runs, lowest, highest) of a measure, from the training record of each run."""
    values: dict[int, list[float]] = {}
    for step in (step for steps in records for step in steps if step.get(key) is not None):
        value = step[key]["accuracy"] if isinstance(step[key], dict) else step[key]
        values.setdefault(step["step"] + 1, []).append(value)
    return [(step, fmean(found), min(found), max(found)) for step, found in sorted(values.items())]


def over_models(models: list[dict], pattern: str) -> dict[str, list[tuple]]:
    """A line over M_t for each key that matches."""
    keys = dict.fromkeys(key for model in models for key in model if re.fullmatch(pattern, key))
    return {key.removeprefix("train_").replace("_", " "): [
        point(t, model[key]) for t, model in enumerate(models) if key in model] for key in keys}


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


def pictures_of_runs(runs: list[Run]) -> list[Picture]:
    """What was measured of a few runs."""
    accuracy = {run.label: [(t, model["accuracy"], *model["ci95"]) for t, model in enumerate(run.models)]
                for run in runs}
    coverage = {run.label: over_models(run.models, "train_(all_right|mixed|all_wrong)") for run in runs}
    passk = {runs[0].label: over_models(runs[0].models, r"pass@\d+")}
    return [Picture("accuracy.png", {"": accuracy}, "test accuracy, 95% interval", "model", share=True),
            Picture("logps.png", {run.label: probe_lines(run.models) for run in runs}, "mean summed log-prob", "step"),
            Picture("coverage.png", coverage, "training questions", "iteration", share=True),
            Picture("passk.png", passk, "test questions", "model", share=True),
            *paths_pictures({0: runs[0]}),
            *batch_pictures({run.label: [run.steps] for run in runs if run.kind == "reft"}, "rollouts.png")]


def pictures_of_cells(kind: str, cells: dict, summary: dict) -> list[Picture]:
    """Curves over batches of ReFT, accuracy over k of RFT, and over M_t of IRPO (a sweep: a panel per beta)."""
    if kind == "reft":
        steps = {title(kind, cell): [run.steps for run in runs.values()] for cell, runs in cells.items()}
        return batch_pictures(steps, "accuracy.png")
    if kind == "rft":
        accuracy = {cell: [*row["models"].values()][-1]["accuracy"] for cell, row in summary.items()}
        over_k = [point(samples_of(cell), accuracy[cell]) for cell in cells if samples_of(cell)]
        across = {title(kind, cell): accuracy[cell] for cell in ("matched", "none", "pool") if cell in cells}
        across |= {name: row["accuracy"] for name, row in summary[main_cell(cells)]["models"].items() if name == "SFT"}
        lines = {"RFT": over_k, **{name: [point(None, value)] for name, value in across.items()}}
        return [Picture("accuracy.png", {"": lines}, "test accuracy", "k, samples per question", share=True, log=True),
                *paths_pictures(cells[main_cell(cells)])]

    def panels(measure: str) -> dict[str, dict]:
        found: dict[str, dict] = {}
        for cell, row in summary.items():
            alpha, beta = GRID.fullmatch(cell).groups() if kind == "sweep" else ("", "")
            panel, line = (f"β={beta}", f"α={alpha}") if beta else ("here", row["label"])
            found.setdefault(panel, {})[line] = [
                point(int(name[1:]), model[measure]) for name, model in row["models"].items() if measure in model]
            if measure == "accuracy" and cell in PAPER[kind].get("accuracy", {}):
                found.setdefault(f"the paper: {PAPER[kind]['measured']}", {})[line] = [
                    point(int(name[1:]), value) for name, value in PAPER[kind]["accuracy"][cell].items()]
        return found

    return [Picture("accuracy.png", panels("accuracy"), "test accuracy", "model", share=True),
            Picture("logps.png", panels("chosen_change"), "change of the chosen log-prob", "model")]


def paths_pictures(runs: dict[int, Run]) -> list[Picture]:
    """RFT's distinct paths over k, and how many questions have how many correct samples."""
    paths = {key.replace("_", " "): [point(k, row[key]) for k, row in estimate_paths(runs).items()]
             for key in ("distinct_paths", "distinct_paths_and_gold")}
    counts = [run.models[-1].get("train_histogram", {}) for run in runs.values()]
    most = max((int(n) for count in counts for n in count), default=-1)
    histogram = [point(n, fmean(count.get(str(n), 0) for count in counts)) for n in range(most + 1)]
    return [Picture("paths.png", {"": paths}, "paths per question", "k, samples per question", log=True),
            Picture("solved.png", {"": {"questions with this many correct samples": histogram}}, "questions",
                    "correct among the samples")]


def batch_pictures(steps: dict[str, list[list[dict]]], of_rollouts: str) -> list[Picture]:
    """ReFT's curves over batches of questions: mean and range of the seeds."""
    return [Picture(of_rollouts if key == "accuracy" else f"{key}.png", {
        label: {name: curve(records, key) for name, records in steps.items()}}, label, "batches of questions",
        share=key in ("dev", "accuracy", "eos_rate")) for key, label in PAPER["curves"].items()]


# --- page and commands -----------------------------------------------------------------------------

def findings(runs: list[Run]) -> list[str]:
    """Say what the numbers of a few runs say."""
    ends = runs[0].models[:1] + runs[0].models[1:][-1:]
    lines = [f"{runs[0].label}: " + "; ".join(
        f"{model['name']} answers {model['accuracy']:.1%} of {model['n']:,} test questions (95% interval "
        f"{text_of(model['ci95'], '.1%')})" for model in ends) + "."]
    trained = [run for run in runs if len(run.models) > 1]
    if len(trained) > 1:
        t = min(len(run.models) for run in trained) - 1  # the last iteration that all of them have
        best, *others = sorted(trained, key=lambda run: -run.models[t]["accuracy"])
        close = [run.label for run in others if run.models[t]["ci95"][1] >= best.models[t]["ci95"][0]]
        lines.append(f"At {best.models[t]['name']} {best.label} is the most accurate; its interval overlaps "
                     f"{'that of ' + ' and '.join(close) if close else 'no other'}.")
    if len({run.models[0]["accuracy"] for run in runs}) > 1:
        lines.append("The runs differ in their first models already: not the same base, or not the same questions.")
    return lines + [f"{run.path} is unfinished: {run.models[-1]['name']} is the last model evaluated."
                    for run in runs if not run.finished]


def before_and_after(run: Run) -> list[str]:
    """Three greedy answers of the first and of the last model where the verdict became correct."""
    ends = [run.models[0], run.models[-1]]
    first, last = ({row["id"]: row["samples"][0] for row in read_jsonl(
        run.path / f"iter{model['iteration']}" / "eval_samples.jsonl") if "id" in row} for model in ends)
    right = {id: tuple(answers[id]["verdict"] == "correct" for answers in (first, last)) for id in first if id in last}
    better, worse = ([id for id in right if right[id] == change] for change in ((False, True), (True, False)))
    texts = [f"{id}, {model['name']}, {answers[id]['verdict']}:\n{textwrap.indent(answers[id]['text'].strip(), '    ')}"
             for id in better[:3] for model, answers in zip(ends, (first, last))]
    return [*texts, f"From {ends[0]['name']} to {ends[1]['name']}, {len(better):,} questions went from wrong to right "
            f"and {len(worse):,} from right to wrong."] if ends[0] is not ends[1] else []


def report_runs(paths: list[Path], out: Path) -> None:
    """Write report.md, report.html and the pictures of a few runs."""
    runs = label_runs([load_run(path) for path in paths])
    screen, *tables = tables_of_runs(runs)
    cards = [f"{run.label}: " + "; ".join(f"{key} {value}" for key, value in run.card.items()) for run in runs]
    publish(out, "report", findings(runs) + cards, tables, pictures_of_runs(runs),
            [*before_and_after(runs[0]), plain(screen)])


def report_table(root: Path, out: Path) -> None:
    """Write NAME.json, NAME.md, NAME.html and the pictures of cells and seeds."""
    kind, cells, missing = load_table(root)
    add_letters(cells)
    summary, claims = summarize(kind, cells), find_claims(kind, cells)
    name = PAPER[kind]["name"]
    write_json(out / f"{name}.json", {"missing": missing, "cells": summary, "claims": claims,
                                      "paths": estimate_paths(cells[main_cell(cells)])})
    facts = [f"Missing or unfinished: {', '.join(missing)}."] if missing else []
    facts += [f"Warnings of {cell}/s{seed}: {run.card['warnings']}." for cell, runs in cells.items()
              for seed, run in runs.items() if "warnings" in run.card]
    tables = tables_of_cells(cells, summary, claims)
    publish(out, name, facts, tables, pictures_of_cells(kind, cells, summary), [plain(t) for t in tables if t.rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--table", type=Path, metavar="ROOT", help="folder of ROOT/CELL/sSEED")
    parser.add_argument("--out", type=Path, help="where to write (default: the first RUN, or ROOT)")
    args = parser.parse_args()
    if bool(args.runs) == bool(args.table):
        parser.error("give run directories, or --table ROOT")
    sys.stdout.reconfigure(errors="replace")  # responses may hold what a terminal cannot show
    if args.table:
        report_table(args.table, args.out or args.table)
    else:
        report_runs(args.runs, args.out or args.runs[0])


if __name__ == "__main__":
    run_script(main)
