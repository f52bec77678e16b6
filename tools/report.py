"""Training runs -> tables, pictures and one page; many seeds -> means with intervals, and what the papers claim.

Every number is read from a file of irpo.py, rft.py, reft.py or tools/rerank.py, or is a mean, difference or interval of
such numbers. The papers' numbers and claims and the tables' columns are in results/paper.json; tools/evidence.py judges
claims and differences, tools/page.py draws. An interval of one run is about the draw of test questions, that of a mean
over seeds about the draw of runs.

    python -m tools.report RUN [RUN ...] [--out DIR]              # compared question by question, the main one first
    python -m tools.report --table ROOT --out results/irpo-table  # finished runs, ROOT/CELL/sSEED

RUN is a run directory, or a folder of them, sSEED. Runs that differ in the seed alone are a group, and groups are named
by the flags that differ.
"""
import argparse
import itertools
import json
import math
import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean

import irpo
import reft
import rft
from data.toy import KINDS
from evaluate import majority, pass_at_k
from infra import InputError
from infra.run import ROOT, hash_of, read_json, run_card, run_script, write_json
from tools.evidence import LEVEL, by_same, difference, interval, judge, mcnemar, quantile
from tools.page import fenced, make_table, plain, point, publish, render

PAPER = read_json(ROOT / "results" / "paper.json")
PLANNED = {Path(table["folder"]).name: table  # cells and seeds, whether run or not
           for table in read_json(ROOT / "results" / "tables.json")["tables"].values()}
TABLES = PAPER["tables"]  # title, note, columns
COLUMNS = [column.rsplit(":", 1) for name, (*_, columns) in TABLES.items() if name != "others"
           for column in columns.split()]
SHARES = "|".join(key for key, spec in COLUMNS if spec.endswith("%"))  # are in [0, 1]
KNOWN = "|".join([key for key, _ in COLUMNS] + [f"train_{key}" for key, *_ in PAPER["curves"].values()] + [
    r"(train_)?(iteration|lr|step|tokens|skipped)", r"dev_\w+", r"\w+_(before|after)",
    "empty|num_samples"])  # what is shown elsewhere, or tells nothing
NO_METHOD = {"seed", "run_dir", *(field.name for script in (irpo, rft, reft) for field in fields(script.Config)
                                  if field.metadata["free"])}
RIGHT = {  # measures of questions: the file of the answers, and the value of one question's samples
    "accuracy": ("eval_samples", lambda samples: float(samples[0]["verdict"] == "correct")),
    "dev_accuracy": ("eval_dev", lambda samples: float(samples[0]["verdict"] == "correct")),
    r"maj@\d+": ("eval_sampled", lambda samples: majority([(s["answer"], s["verdict"] == "correct") for s in samples])),
    r"pass@(\d+)": ("eval_sampled", lambda samples, k: pass_at_k(
        len(samples), sum(s["verdict"] == "correct" for s in samples), int(k)))}


# --- what a run tells ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Run:
    """A run as its files tell it. models[i] holds all that is known of a model: how it was made, how it does."""
    path: Path
    models: list[dict]
    steps: list[dict]  # train.jsonl of the last model
    config: dict
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
    """Load a run, an unfinished one as far as it is evaluated; InputError where another program wrote the files."""
    if not (path / "config.json").exists():
        raise InputError(f"{path} is not a run directory: it has no config.json")
    try:
        return read_run(path)
    except InputError:
        raise
    except Exception as error:  # whatever it is that the files do not have
        raise InputError(f"{path} cannot be read as a run of irpo.py, rft.py, reft.py or tools.rerank of this version: "
                         f"{error!r}") from error


def read_run(path: Path) -> Run:
    evaluated = [file for file in path.glob("iter*/eval.json") if re.fullmatch(r"iter\d+", file.parent.name)]
    finished = (path / "results.json").exists()
    by_model: dict[str, list[dict]] = {}
    for file in [path / "results.json"] if finished else sorted(evaluated, key=lambda file: int(file.parent.name[4:])):
        for row in read_json(file):
            by_model.setdefault(row["name"], []).append(row)
    if not by_model:
        raise InputError(f"{path} has no evaluated model yet: irpo.py, rft.py and reft.py write its iter0/eval.json "
                         "first, tools.rerank its results.json")

    log = Counter()  # a line of each time that something was begun or resumed
    for line in read_jsonl(path / "log.jsonl", "folder", "event", "seconds"):
        log[line["folder"], line["event"]] += line["seconds"]
    models = [model_record(rows, log) for rows in by_model.values()]
    card = path / "command.txt"
    card = read_card(card.read_text(encoding="utf-8", errors="replace") if card.exists() else "")
    card["minutes"] = round(sum(log.values()) / 60, 1)
    if edited := [name for line in read_jsonl(path / "log.jsonl", "files") for name in line["files"]]:
        card["edited"] = ", ".join(dict.fromkeys(edited))
    steps = read_jsonl(path / f"iter{models[-1]['iteration']}" / "train.jsonl", "step")
    if warned := Counter(name for step in steps for name in step.get("warnings", ())):
        card["warnings"] = ", ".join(f"{name} at {count} batches" for name, count in warned.items())
    if dev := curve([steps], "dev"):
        middle = next(accuracy for step, accuracy, *_ in dev if 2 * step >= dev[-1][0])
        models[-1] |= {"dev_early": dev[0][1], "dev_halfway": middle}
    if len(tested := [model["accuracy"] for model in models if "accuracy" in model]) > 2:
        models[-1]["worst_fall"] = max(best - now for best, now in zip(itertools.accumulate(tested, max), tested))
    kind = {"M0": "irpo", "SFT": "rft", "RFT": "rft"}.get(models[0]["name"], "reft")
    return Run(path, models, steps, dict(read_json(path / "config.json")), card, finished, kind)


def read_card(text: str) -> dict[str, str]:
    """Read the first start that a command.txt tells of."""
    lines = text.split("\n\n")[0].splitlines()
    return dict(line.split(maxsplit=1) for line in lines if len(line.split()) > 1)


def model_record(rows: list[dict], log: dict) -> dict:
    """Join a model's rows: keys of test stay as they are, those of dev and of its making become dev_X and train_X."""
    record = {}
    for row in rows:
        prefix = {"dev": "dev_", "train": "train_"}.get(row.get("split"), "")
        record |= {prefix + {"ci95": "accuracy_ci95"}.get(key, key): value for key, value in row.items()}
    record |= {"name": str(rows[0]["name"]), "iteration": rows[0].get("iteration")}
    tags = record.get("tags", {})
    record |= {f"depth={depth}": part["accuracy"] for depth, part in tags.get("depth", {}).items()}
    if wrong := tags.get("first wrong"):  # in the toy world
        shares = Counter({name: part["share"] for name, part in wrong.items()})
        record |= {f"misread {kind}": shares[f"{kind} misread"] for kind in KINDS if KINDS[kind].misread >= 0.4}
        record |= {"sound": shares["nothing"], "other errors": 1 - shares["nothing"] - sum(
            value for key, value in record.items() if key.startswith("misread "))}
    if probe := record.get("train_probe"):
        for key, before in probe[0].items():
            record |= {f"{key}_before": before, f"{key}_after": probe[-1][key],
                       f"{key}_change": probe[-1][key] - before}
    if len(shares := record.get("train_exclusive", ())) > 1:
        record |= {f"only model {m}": share for m, share in enumerate(shares)}
    return record | {f"seconds_{event}": seconds for (folder, event), seconds in log.items()
                     if folder == f"iter{record['iteration']}"}


def curve(records: list[list[dict]], key: str) -> list[tuple]:
    """Points of a measure over steps, the mean of the runs and each run's value, from the runs' training records."""
    values: dict[int, list[float]] = {}
    for step in (step for steps in records for step in steps if key in step):
        value = step[key].get("accuracy") if isinstance(step[key], dict) else step[key]
        if isinstance(value, (int, float)):
            values.setdefault(step["step"] + 1, []).append(value)
    return [(step, *[fmean(found)] * 3, found if len(found) > 1 else []) for step, found in sorted(values.items())]


# --- cells and seeds -------------------------------------------------------------------------------

def how_made(run: Run) -> dict[str, str]:
    """Return a run's script, flags and source: all that its results follow from, except the seed.

    A path that names a seed, runs/base-s0/model, is the same for every seed.
    """
    values = {key: " ".join(map(str, value)) if isinstance(value, list) else str(value)
              for key, value in run.config.items() if key not in NO_METHOD}
    flags = {key: re.sub(r"(?<=[-/]s)\d+\b", "SEED", value) for key, value in values.items()
             if not re.fullmatch("[0-9a-f]{64}", value)}
    source = [path for path in sorted(run.path.glob("source*/**/*.py")) if path.parent.name != "tools"]
    return {"": run.kind, **flags, "source": hash_of(*source), "problems": run.config.get("problems")}


def not_alike(made: list[dict]) -> list[str]:
    """Name what differs between runs, of what how_made tells of them."""
    return [key for key in dict.fromkeys(key for one in made for key in one) if len({one.get(key) for one in made}) > 1]


def load_runs(paths: list[Path]) -> dict[str, dict[int, Run]]:
    """Load runs, and folders of them: group -> seed -> run.

    Seeds of one method are a group, named by the flags that differ between groups; by its directory where none does, or
    more than four do.
    """
    runs = [load_run(path) for given in paths for path in (
        [given] if (given / "config.json").exists() else sorted(given.glob("s[0-9]*")) or [given])]
    made, seeds, groups = [how_made(run) for run in runs], [run.config.get("seed", 0) for run in runs], {}
    for i, flags in enumerate(made):
        groups.setdefault(repr(flags), []).append(i)
    if len(groups) == 1 or any(len({seeds[i] for i in group}) < len(group) for group in groups.values()):
        groups = {i: [i] for i in range(len(runs))}  # nothing but the seed differs, or not even that: each for itself
    differing = [key for key in not_alike(made) if key not in ("source", "problems")]
    names = [", ".join(f"{key} {made[i][key]}".strip() for key in differing if key in made[i])
             for i, *_ in groups.values()]

    found = {}
    for name, group in zip(names, groups.values()):
        directory = str(runs[group[0]].path)
        if not name or names.count(name) > 1 or len(differing) > 4:
            name = directory if len(group) == 1 else re.sub(r"[-/]s\d+$", "", directory)
        if name in found:  # seeds of one folder, made in two ways
            name = f"{name}, seeds {' '.join(str(seeds[i]) for i in group)}"
        mixed = len(groups) == len(runs) and len({*seeds}) > 1  # different seeds, compared all the same
        found[name] = {None if mixed else seeds[i]: runs[i] for i in group}
    return found


def load_table(root: Path, only: tuple[int, ...] = ()) -> tuple[str, dict[str, dict[int, Run]], list[str]]:
    """Load ROOT/CELL/sSEED: the kind of table (a key of PAPER), cell -> seed -> run, and what is missing.

    only: the seeds that count (default: the planned ones; all, where the table is not planned).
    """
    planned = PLANNED.get(root.name, {})
    wanted = only or planned.get("seeds", ())
    folders = [path for path in sorted(root.glob("*/s*")) if re.fullmatch(r"s\d+", path.name)
               and (not wanted or int(path.name[1:]) in wanted)]
    found = {path: load_run(path) for path in folders if (path / "results.json").exists()}
    if not found:
        of_seeds = f" of seeds {' '.join(map(str, wanted))} (others: --seeds)" if wanted else ""
        raise InputError(f"no finished run{of_seeds} in {root}: expected {root}/CELL/sSEED/results.json")
    kinds, names = sorted({run.kind for run in found.values()}), {path.parent.name for path in folders}
    has_own = PAPER.get(root.name, {}).get("cells")
    if len(kinds) > 1 and not has_own:
        raise InputError(f"{root} holds runs of {', '.join(kinds)}: give one table at a time")
    kind = root.name if has_own else kinds[0]
    known = planned.get("cells", PAPER[kind]["cells"])
    expected = planned or names <= set(known)  # not in a folder of one's own that has other cells, too
    order = [cell for cell in known if expected or cell in names] + sorted(names.difference(known))
    seeds = sorted({int(path.name[1:]) for path in folders})
    cells = {cell: {s: found[path] for s in seeds if (path := root / cell / f"s{s}") in found} for cell in order}
    missing = [f"{cell}/s{seed}" if runs else cell for cell, runs in cells.items()
               for seed in (seeds if runs else seeds[:1]) if seed not in runs]
    missing += [f"seed {seed} of all cells" for seed in wanted if seed not in seeds]
    return kind, {cell: runs for cell, runs in cells.items() if runs}, missing


def label_of(kind: str, cell: str) -> str:
    """Name a cell; one that is named by its flags, reft+gae_lambda@0.5, becomes "ReFT, gae_lambda 0.5"."""
    if kind == "runs":  # named by load_runs
        return cell
    name, *flags = cell.split("+")
    return ", ".join([PAPER[kind]["cells"].get(name, name), *(flag.replace("@", " ") for flag in flags)])


def estimate(values: dict[int, float], low: float = -math.inf, high: float = math.inf) -> dict:
    """Return the mean over seeds and its 95 % Student interval, cut off at the value's bounds; one seed has none."""
    n, mean, half = len(values), fmean(values.values()), None
    if n > 1:
        half = quantile(LEVEL, n - 1) * math.dist(values.values(), [mean] * n) / math.sqrt(n * (n - 1))
    return {**interval(mean, half, low, high), "n": n, "values": values}


def estimates(found: dict[int, dict]) -> dict[str, dict]:
    """Turn seed -> record into an estimate per number.

    Where seeds do not differ, or there is one, they tell nothing of the draw of runs, and the interval is a run's own.
    """
    summary = {"seeds": len(found)}
    for key in dict.fromkeys(key for record in found.values() for key in record):
        if values := {s: record[key] for s, record in found.items() if isinstance(record.get(key), (int, float))}:
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
            if "accuracy" in models[name]:
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


# --- differences and claims ------------------------------------------------------------------------

def answers(run: Run, model: dict, name: str) -> dict[str, dict]:
    """question -> a model's answers in one of its files. Questions are told apart by their text and gold answer, too:
    ids of two data sets can be the same."""
    folder = run.path / f"iter{model['iteration']}"  # evaluate.py has none
    rows = read_jsonl((folder if folder.exists() else run.path) / f"{name}.jsonl", "id", "samples")
    return {json.dumps([row["id"], row.get("question"), row.get("gold")]): row for row in rows
            if isinstance(row["samples"], list) and row["samples"] and all(
                isinstance(one, dict) and one.keys() >= {"verdict", "text", "answer"} for one in row["samples"])}


def by_question(run: Run, model: dict, measure: str) -> dict[str, float]:
    """question -> value; {"": value} of what is no measure of questions, or where their answers are gone; {} of what
    was not measured."""
    for pattern, (name, value) in RIGHT.items():
        if (match := re.fullmatch(pattern, measure)) and (rows := answers(run, model, name)):
            return {question: value(row["samples"], *match.groups()) for question, row in rows.items()}
    return {"": model[measure]} if measure in model else {}


def pick(runs: dict[int, Run], name: str) -> dict[int, tuple[Run, dict]]:
    """seed -> run and its model of this name; "first" and "last" are names, too."""
    return {seed: (run, model) for seed, run in runs.items() for i, model in enumerate(run.models)
            if name in (model["name"], "first" * (i == 0), "last" * (i == len(run.models) - 1))}


def find_claims(kind: str, cells: dict) -> tuple[list[dict], list[str]]:
    """Judge the claims whose two sides were run, all with the same rule (tools/evidence.py); and name the others.

    A side is "CELL MODEL MEASURE", or the difference of two, "CELL MODEL MEASURE - CELL MODEL MEASURE".
    """
    def values(side: str) -> dict[int, dict[str, float]]:
        (cell, name, measure), *others = (what.split() for what in side.split(" - "))
        found = {seed: by_question(run, model, key) for seed, (run, model) in pick(cells.get(cell, {}), name).items()
                 for key in model if re.fullmatch(measure, key)}
        for less in (values(" ".join(other)) for other in others):
            found, less = by_same({seed: found[seed] for seed in found if seed in less}, less)
            found = {seed: {question: value - less[seed][question] for question, value in of_seed.items()
                            if question in less[seed]} for seed, of_seed in found.items()}
        return found

    found, unrun = [], []
    for text, high, low, unit in ([*claim, "points"][:4] for claim in PAPER[kind]["claims"]):
        if between := difference(values(high), values(low), unit, bound=200 if " - " in high + low else 100):
            found.append({"claim": text, "difference": between, "unit": unit, "questions": between["questions"],
                          "by_seed": ", ".join(f"{value:+.3g}" for value in between["values"].values())})
        else:
            unrun.append(text)
    judge([claim["difference"] for claim in found], len(unrun))
    return [claim | {"here": claim["difference"]["verdict"]} for claim in found], unrun


def compare(cells: dict[str, dict[int, Run]]) -> list[dict]:
    """Compare greedy test answers, paired by question and seed: the first group's last model with its first one, and
    its models with those of the other groups, by name, or else the last ones.

    A row has the counts and McNemar's p of each seed, and all questions that changed: only one answers them right.
    """
    names = {label: [*dict.fromkeys(model["name"] for run in runs.values() for model in run.models)]
             for label, runs in cells.items()}
    main, *others = names
    pairs = [(main, names[main][-1], main, names[main][0])] * (len(names[main]) > 1)
    for other in others:
        shared = [name for name in names[main] if name in names[other]]
        pairs += [(main, name, other, name) for name in shared[len(shared) > 1:]] or [(main, "last", other, "last")]

    rows = []
    for label, name, other, other_name in pairs:
        ends = (name, other_name) if label == other else (f"{label}, {name}", f"{other}, {other_name}")
        models = pick(cells[label], name), pick(cells[other], other_name)
        right = [{seed: by_question(*one, "accuracy") for seed, one in side.items()} for side in models]
        gone = any("" in values for side in right for values in side.values())  # the answers, not their share
        if gone or not (between := difference(*right, "points")):
            continue
        judge([between])
        changed, counts = [], []
        for seed in between["values"]:
            first, second = (answers(*side[seed], "eval_samples") for side in models)
            only = [[q for q in first if q in second and right[i][seed][q] > right[1 - i][seed][q]] for i in (0, 1)]
            counts.append([*map(len, only)])
            changed += [{"seed": seed, **{key: first[q].get(key) for key in ("id", "question", "prompt", "gold")},
                         "right": end, ends[0]: first[q]["samples"][0]["text"],
                         ends[1]: second[q]["samples"][0]["text"]} for end, found in zip(ends, only) for q in found]
        rows.append({"ends": ends, "with": other, "questions": between["questions"], "difference": between,
                     "here": between["verdict"],
                     "only_the_first_right": ", ".join(str(a) for a, _ in counts),
                     "only_the_second_right": ", ".join(str(b) for _, b in counts),
                     "McNemar_p": ", ".join(f"{mcnemar(*pair):.2g}" for pair in counts), "changed": changed})
    return rows


def changed_texts(rows: list[dict], limit: int) -> list[str]:
    """Show the first changed questions of each comparison, each way, with both responses and the gold answer."""
    texts = []
    for row in rows:
        first, second = row["ends"]
        for better, worse in ((first, second), (second, first)):
            changed = [one for one in row["changed"] if one["right"] == better]
            texts.append("### " + plain(f"Right in {better}, not in {worse}: {len(changed):,} questions"))
            for one in changed[:limit]:
                seed = "" if one["seed"] is None else f", seed {one['seed']}"
                texts.append("#### " + plain(one["question"] or one["prompt"] or one["id"]))
                texts.append(plain(f"{one['id']}{seed}; gold answer: {one['gold']}"))
                texts += [text for end in (better, worse) for text in (plain(end + ":"), fenced(one[end].strip()))]
    return ["## Questions that changed", *texts] if texts else []


# --- tables and pictures ---------------------------------------------------------------------------

def model_tables(summary: dict) -> list[str]:
    """Show every model, those of the best cell first; a first model with the figures of another's in the same seeds
    only once."""
    rows: dict[tuple, tuple[list[str], dict]] = {}
    for cell in summary.values():
        for i, (name, model) in enumerate(cell["models"].items()):
            values = [str(model[key]["values"]) for key in ("accuracy", "dev_accuracy") if key in model]
            start = i == 0 and len(cell["models"]) > 1
            known = rows.setdefault((name, *values) if start else (cell["label"], name), ([cell["label"], name], {}))
            known[1].update(model | known[1])
    last = {cell["label"]: [*cell["models"].values()][-1].get("accuracy", {"mean": 0}) for cell in summary.values()}
    ordered = sorted(rows.values(), key=lambda row: -max(0, last[row[0][0]]["mean"]))  # NaN comes last
    names = ("models", "responses", "errors", "samples", "training", "rollouts", "cost", "others")
    unknown = [(head, {key: value for key, value in record.items() if not re.fullmatch(KNOWN, key)})
               for head, record in ordered]
    return [make_table(TABLES[name], ["cell", "model"], unknown if name == "others" else ordered) for name in names]


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


def over_compute(summary: dict, steps: dict[str, list[list[dict]]]) -> dict[str, dict]:
    """Accuracy, dev accuracy and pass@k of the largest k, over the FLOPs that sampling and training have taken so far.

    The cells METHOD+FLAG@VALUE of a method are one line, and so are a run's models, from the base on, which has cost
    nothing. steps: what ReFT's runs of a cell recorded in training; dev accuracy in it is a point, too.
    A line with a single point after the base has only that: nothing is known of what lies between.
    """
    panels: dict[str, dict[str, dict]] = {}
    for name, cell in summary.items():
        spent, line = 0, label_of("compare", name.partition("+")[0])
        for model_name, model in cell["models"].items():
            before, spent = spent, spent + model.get("train_flops", {"mean": 0})["mean"]
            for key in model:
                if (spent or model_name in ("M0", "base")) and re.fullmatch(r"(dev_)?accuracy|pass@\d+", key):
                    panels.setdefault(key, {}).setdefault(line, {})[spent] = point(spent, model[key])
        length = max((len(records) for records in steps.get(name, [])), default=0)
        for step, *found in curve(steps.get(name, []), "dev"):
            x = before + (spent - before) * step / length
            panels.setdefault("dev_accuracy", {}).setdefault(line, {}).setdefault(x, (x, *found))
    k = max((int(key[5:]) for key in panels if key.startswith("pass@")), default=0)
    titles = {"accuracy": "test accuracy", "dev_accuracy": "dev accuracy", f"pass@{k}": f"pass@{k} on test questions"}
    return {title: {line: [points[x] for x in sorted(points) if x or len(points) != 2]
                    for line, points in panels[key].items()}
            for key, title in titles.items() if panels.get(key)}


def over_k(summary: dict) -> dict[str, dict]:
    """RFT's accuracy over k; that of SFT is k = 0."""
    models = {samples_of(cell): [*row["models"].values()] for cell, row in summary.items() if samples_of(cell)}
    points = [point(k, rows[-1]["accuracy"]) for k, rows in models.items()]
    starts = [point(0, rows[0]["accuracy"]) for k, rows in models.items() if len(rows) > 1 and k == max(models)]
    return {"": {"RFT": sorted(starts + points)}} if models else {}


def pictures(kind: str, cells: dict, summary: dict) -> dict:
    """Draw accuracy over M_t (RFT: over k), log-probs of pairs, ReFT's curves, and the measures that no table knows.

    A method has one colour and marker in all pictures of a paper, whichever of its cells were run.
    """
    labels = [*(label_of(kind, cell) for cell in PAPER[kind]["cells"]), *(row["label"] for row in summary.values())]
    order = list(dict.fromkeys(label.rpartition(": ")[2] for label in labels))
    runs = {row["label"]: [*cells[cell].values()] for cell, row in summary.items()}
    bars = "bars: 95% intervals, dots: seeds"
    if PAPER[kind]["name"] == "compare":
        steps = {cell: [run.steps for run in seeds.values() if run.kind == "reft"] for cell, seeds in cells.items()}
        drawn = {"compute": render(over_compute(summary, steps), bars, "FLOPs", order, "share")}
    elif ks := over_k(summary):
        drawn = {"accuracy": render(ks, f"test accuracy; {bars}", "k, samples per question", order, "share", "symlog")}
    else:
        drawn = {"accuracy": render(over_models(summary), f"test accuracy; {bars}", "iteration (0: the first model)",
                                    order, "share")}
    probes = {label: probe_lines(seeds[0].models) for label, seeds in runs.items()}
    drawn["logps"] = render(probes, "mean summed log-prob, nats, first seed", "optimizer steps")
    for name, (key, label, scale) in PAPER["curves"].items():
        lines = {cell: curve([run.steps for run in seeds if run.kind == "reft"], key) for cell, seeds in runs.items()}
        drawn[name] = render({"": lines}, label, "batches of questions", order, scale)
    unknown = dict.fromkeys(key for seeds in runs.values() for run in seeds for step in run.steps for key in step
                            if isinstance(step[key], (int, float)) and not re.fullmatch(KNOWN, f"train_{key}"))
    panels = {key: {cell: curve([run.steps for run in seeds], key) for cell, seeds in runs.items()} for key in unknown}
    return drawn | {"others": render(panels, "as in train.jsonl", "steps of the last iteration", order,
                                     "free")}


# --- the report ------------------------------------------------------------------------------------

def report(kind: str, cells: dict[str, dict[int, Run]], missing: list[str], out: Path, examples: int) -> None:
    """Write NAME.json, NAME.md, NAME.html and the pictures of cells and seeds."""
    card = read_card(run_card())  # before a written file makes the commit a dirty one
    name, runs = PAPER[kind]["name"], [run for seeds in cells.values() for run in seeds.values()]
    summary, (claims, unrun), paths = summarize(kind, cells), find_claims(kind, cells), estimate_paths(cells)
    labelled = {label_of(kind, cell): runs for cell, runs in cells.items()}
    compared = compare(labelled) if kind == "runs" or all(len(seeds) == 1 for seeds in cells.values()) else []
    write_json(out / f"{name}.json", {"missing": missing, "cells": summary, "claims": claims, "paths": paths,
                                      "compared": compared})
    facts = [f"Missing or unfinished: {', '.join(missing)}."] if missing else []
    facts += [f"Claims without runs, undecided: {'; '.join(unrun)}."] if unrun and claims else []
    facts += [f"{run.path} is unfinished: {run.models[-1]['name']} is the last model evaluated."
              for run in runs if not run.finished]
    for key, said in (("warnings", "Warnings of"), ("edited", "Continued after code was edited (--anyway),")):
        if told := [f"{'/'.join(run.path.parts[-2:])}: {run.card[key]}" for run in runs if key in run.card]:
            facts.append(f"{said} {'; '.join(told)}.")
    fewer = [f"{key} of {cell['label']}, {name}" for cell in summary.values() for name, model in cell["models"].items()
             for key, value in model.items() if re.fullmatch(r"accuracy|(maj|pass)@\d+", key)
             and value["n"] < model["seeds"]]
    facts += [f"Not of all seeds: {', '.join(fewer)}."] if fewer else []
    for label, seeds in labelled.items() if kind != "runs" else ():
        differing = not_alike([how_made(run) for run in seeds.values()])
        if differing := [key for key in differing if key != "problems"]:  # rft.py --train_fraction draws them by seed
            facts.append(f"Seeds of {label} were not made alike: they differ in {', '.join(differing)}.")
    bases = {(seed, run.config.get("model"), run.config.get("weights")) for seeds in cells.values()
             for seed, run in seeds.items()}
    if len(bases) > len({base[:2] for base in bases}):
        facts.append("Runs of one seed began at different models of the same name.")
    starts = {(seed, run.models[0].get("accuracy")) for seeds in cells.values() for seed, run in seeds.items()}
    if kind == "runs" and len(starts) > len({seed for seed, _ in starts}):
        facts.append("The runs differ in their first models already: not the same base, or not the same questions.")
    facts += ["The runs have different seeds."] if any(None in seeds for seeds in cells.values()) else []
    facts += [f"{run.path} has answers to {run.config['split']} questions at temperature {run.config['temperature']}."
              for run in runs if "split" in run.config and (run.config["split"] != "test" or run.config["temperature"])]
    facts += [f"{label} has no seed and question in common with {next(iter(cells))}, so they are not compared."
              for label in [*cells][1:] if kind == "runs" and label not in {row["with"] for row in compared}]

    models, *others = model_tables(summary)
    main = [models, make_table(TABLES["paths"], ["k"], [([str(k)], row) for k, row in paths.items()]),
            make_table(TABLES["compared"], ["compared"], [([" − ".join(row["ends"])], row) for row in compared]),
            make_table(TABLES["claims"], ["claim"], [([claim["claim"]], claim) for claim in claims])]
    cards = ["## How the runs were made", *(
        plain(f"{run.path}: " + "; ".join(f"{key} {value}" for key, value in run.card.items())) for run in runs)]
    heading = PAPER[kind].get("heading") or " against ".join(cells)
    facts.insert(0, f"{card['start'].split()[0]}, commit {card['commit']}: python -m tools.report "
                    f"{shlex.join(sys.argv[1:])}")
    publish(out, name, heading, facts, pictures(kind, cells, summary),
            [*main, *changed_texts(compared, examples), *others, *cards], [*changed_texts(compared[:1], 2), *main])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--table", type=Path, metavar="ROOT", help="folder of ROOT/CELL/sSEED")
    parser.add_argument("--seeds", type=int, nargs="+", default=(), help="of the table (default: those planned)")
    parser.add_argument("--out", type=Path, help="where to write (default: the first RUN, or ROOT)")
    parser.add_argument("--examples", type=int, default=3, metavar="N",
                        help="of the questions that changed, show the first N each way (default: 3)")
    args = parser.parse_args()
    if bool(args.runs) == bool(args.table):
        parser.error("give run directories, or --table ROOT")
    if args.seeds and not args.table:
        parser.error("--seeds chooses among those of a --table")
    if args.examples < 0:
        parser.error(f"--examples {args.examples}: give 0 or more")
    found = load_table(args.table, args.seeds) if args.table else ("runs", load_runs(args.runs), [])
    report(*found, args.out or args.table or args.runs[0], args.examples)


if __name__ == "__main__":
    run_script(main)
