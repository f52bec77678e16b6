"""Run directories -> tables, pictures and a last screen; many seeds -> means with intervals.

Every number is read from what a driver wrote, or is a mean, difference or interval of such numbers.
A run without results.json is shown as far as it is evaluated, and called unfinished. Left out:
tests of significance (intervals of one run are about the draw of test questions, those of a mean
over seeds about the draw of runs) and the questions, of which runs hold token ids only.

    python -m tools.report RUN [RUN ...] [--out DIR]              # runs from one base, the main one first
    python -m tools.report --table RUNS --out results/irpo-table  # RUNS/<key of PAPER>/s<seed>
    python -m tools.report --sweep RUNS --out results/ablate-nll  # RUNS/alpha<a>-beta<b>/s<seed>
"""
import argparse
import base64
import html
import importlib.util
import io
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

# Table 1 of the paper: directory of a cell -> (row, accuracy on GSM8K in %, Llama-2-70B-chat)
PAPER = {
    "sft_gold": ("SFT on gold", {"M0": 55.6, "M1": 63.5}),
    "sft_chosen": ("SFT on chosen (STaR)", {"M0": 55.6, "M1": 65.2}),
    "sft_chosen_2x": ("SFT on chosen, 2x data", {"M0": 55.6, "M1": 66.9}),
    "dpo": ("DPO", {"M0": 55.6, "M1": 61.8}),
    "dpo_from_sft_chosen": ("DPO from SFT on chosen", {"M0": 55.6, "M1": 60.3}),
    "irpo": ("IRPO", {"M0": 55.6, "M1": 73.1, "M2": 78.0, "M3": 81.1, "M4": 81.6}),
    "irpo_from_sft_chosen": ("IRPO from SFT on chosen", {"M0": 55.6, "M1": 73.1}),
    "irpo_2x": ("IRPO, 2x pairs", {"M0": 55.6, "M1": 74.8}),
}
# 97.5 % quantiles of Student's t with n - 1 degrees of freedom, by n
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
          "#7F7F7F")  # Okabe and Ito's, which colour-blind readers can tell apart, and grey
MARKERS = "osD^vPX<>"  # one more than colours, so that no two curves share both

# columns of the tables: KEY|FORMAT of a model's record
COVERAGE = ("questions|, all_right|.1% mixed|.1% all_wrong|.1% sample_accuracy|.1% unfinished|, "
            "pairs_made|, pairs_overlong|, pairs_capped|, pairs|,").split()
TRAINING = ("steps|, loss|.3f nll|.3f dpo|.3f logps/chosen|.2f logps/rejected|.2f "
            "rewards/chosen|.3f rewards/rejected|.3f rewards/margins|.3f rewards/accuracies|.1% "
            "length/chosen|.1f length/rejected|.1f grad_norm|.2f "
            "chosen_change|+.2f rejected_change|+.2f gold_change|+.2f").split()
COST = ("tokens_sampled|, sample_tokens/s|,.0f tokens_trained|, train_tokens/s|,.0f flops|.2e "
        "sample_seconds|.1f reference_seconds|.1f train_seconds|.1f evaluate_seconds|.1f").split()
AVERAGED = r"accuracy|dev_accuracy|pass@1|maj@\d+|careful|pairs|\w+_change"  # over seeds

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto }
table { border-collapse: collapse; font-size: 13px } tr { border-bottom: 1px solid #ddd }
td, th { padding: .2em .6em; text-align: right } :is(td, th):first-child { text-align: left }
img { max-width: 100%; display: block; margin: 1em 0 } div { overflow-x: auto }"""


@dataclass(frozen=True)
class Run:
    """models[t] is the record of M_t: what was measured on it and how it was made, in one dict."""
    path: Path
    label: str
    config: dict
    models: list[dict]
    finished: bool


@dataclass(frozen=True)
class Table:
    """Cells are text already, so that Markdown, HTML and the screen show the same."""
    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


# ---- reading and writing

def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, content: str | bytes) -> None:
    """Write a file so that it exists if and only if it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def load_rows(path: Path) -> list[dict]:
    """results.json; of an unfinished run, what its evaluated iterations would have put there."""
    if (path / "results.json").exists():
        return read_json(path / "results.json")
    rows = []
    for file in path.glob("iter*/eval.json"):
        rows += read_json(file)
        if (t := int(file.parent.name.removeprefix("iter"))) > 0:
            rows.append({"iteration": t, "split": "train",
                         **read_json(file.with_name("coverage.json")),
                         "probe": read_jsonl(file.with_name("probe.jsonl"))})
    return rows


def model_record(t: int, rows: list[dict], log: list[dict]) -> dict:
    """M_t's test and train rows in one dict, with what follows from them and from the log."""
    splits = {row["split"]: row for row in rows if row["iteration"] == t}
    record = splits.get("train", {}) | splits["test"] | {"dev_accuracy": splits["dev"]["accuracy"]}
    for key, name in (("ci95", "95%_interval"), ("pass@1_ci95", "pass@1_95%_interval")):
        if key in record:
            record[name] = "{:.1%} to {:.1%}".format(*record[key])
    for tag, values in record["tags"].items():
        for value, cell in values.items():
            record[f"{tag}={value}"] = f"{cell['accuracy']:.1%} of {cell['share']:.0%}"
    if "style" in record["tags"]:
        record["careful"] = record["tags"]["style"].get("careful", {"share": 0.0})["share"]
    if "probe" in record:
        first, last = record["probe"][0], record["probe"][-1]
        record |= {f"{name}_change": last[name] - first[name] for name in first if name != "step"}
    # a step stopped between its line in the log and its file is logged twice: the last line counts
    events = {line["event"]: line for line in log if line["iteration"] == t}
    for event, line in events.items():
        record[f"{event}_seconds"] = line["seconds"]
        if "tokens" in line and not line.get("resumed"):  # else the seconds are those of a part
            record[f"{event}_tokens/s"] = line["tokens"] / line["seconds"]
    return record | {"seconds": sum(line["seconds"] for line in events.values())}


def method(config: dict) -> str:
    """The method's name, from the flags that make it."""
    name = {"irpo": "IRPO" if config["alpha"] else "DPO only (α=0)",
            "sft_chosen": "SFT on chosen", "sft_gold": "SFT on gold"}[config["method"]]
    return name + (f" from {Path(config['start_from']).parent}" if config["start_from"] else "")


def label(config: dict, configs: list[dict]) -> str:
    """The method, and whatever tells this run from the other runs of that method."""
    peers = [peer for peer in configs if method(peer) == method(config)]
    differing = [name for name in config if name not in ("start_from", "run_dir")
                 and any(peer.get(name) != config[name] for peer in peers)]
    if not differing and len(peers) > 1:  # the same twice; labels are keys, so must differ
        differing = ["run_dir"]
    symbols = {"alpha": "α", "beta": "β"}
    return ", ".join([method(config), *(f"{symbols.get(n, n)}={config[n]}" for n in differing)])


def load_runs(paths: list[Path]) -> list[Run]:
    """Runs in the order given; one of which nothing is evaluated yet is an error."""
    for path in paths:
        if not (path / "config.json").exists():
            raise SystemExit(f"{path} is no run directory: it has no config.json")
        if not (path / "iter0" / "eval.json").exists() and not (path / "results.json").exists():
            raise SystemExit(f"{path} has no evaluated model yet: wait for its iter0/eval.json")
    configs, runs = [read_json(path / "config.json") for path in paths], []
    for path, config in zip(paths, configs):
        if "alpha" not in config:
            raise SystemExit(f"{path} is no run of irpo.py: report_rft.py draws those of rft.py")
    for path, config in zip(paths, configs):
        finished = (path / "results.json").exists()
        rows, log = load_rows(path), read_jsonl(path / "log.jsonl")
        models = [model_record(t, rows, log) for t in sorted({row["iteration"] for row in rows})]
        runs.append(Run(path, label(config, configs), config, models, finished))
    return runs


def run_card(run: Run) -> dict:
    """command.txt as a dict, and the minutes in the log."""
    minutes = sum(model["seconds"] for model in run.models) / 60
    return command_card(run.path) | {"minutes": round(minutes, 1)}


def command_card(path: Path) -> dict:
    """What a run directory's command.txt says of its first start: command, commit, torch, machine."""
    lines = (path / "command.txt").read_text(encoding="utf-8").splitlines()
    card = dict(line.split(maxsplit=1) for line in reversed(lines) if line)
    return dict(reversed(card.items()))


def timed_card(path: Path) -> dict:
    """command_card, and the minutes that the run's log adds up to."""
    log = path / "log.jsonl"
    seconds = sum(line["seconds"] for line in read_jsonl(log)) if log.exists() else 0.0
    return command_card(path) | {"minutes": round(seconds / 60, 1)}


# ---- tables

def record_table(title: str, note: str, records: list[tuple], columns: list[str]) -> Table:
    """A line per (run label, model record); columns that no record knows are dropped."""
    split = [column.split("|") for column in columns]
    used = [(key, spec) for key, spec in split if any(key in record for _, record in records)]
    rows = [[name, record["name"],
             *(format(record[key], spec) if key in record else "" for key, spec in used)]
            for name, record in records]
    return Table(title, note, ["run", "model", *(key.replace("_", " ") for key, _ in used)], rows)


def columns_like(pattern: str, records: list[tuple], spec: str) -> list[str]:
    """Columns whose keys depend on the task or on the number of samples, in the record's order."""
    keys = dict.fromkeys(key for _, record in records for key in record)
    return [f"{key}|{spec}" for key in keys if re.fullmatch(pattern, key)]


def report_tables(runs: list[Run]) -> list[Table]:
    """Everything that report.md and report.html show of a few runs."""
    records = [(run.label, model) for run in runs for model in run.models]
    made = [(name, record) for name, record in records if record["iteration"] > 0]
    accuracy = ["n|,", "accuracy|.1%", "95%_interval|", "pass@1|.1%", "pass@1_95%_interval|",
                *columns_like(r"maj@\d+|pass@(?!1$)\d+", records, ".1%"), "dev_accuracy|.1%",
                "finished|.1%", "length|.1f"]
    tags = sorted(columns_like(r"\w+=\w+", records, ""))
    tables = [
        record_table("Accuracy", "Test questions; intervals are about their draw. Greedy, except "
                     "pass@k and maj@k: samples at T=1, of which pass@1 is the accuracy.",
                     records, accuracy),
        record_table("Accuracy by kind", "Of greedy responses: accuracy within a kind, and the "
                     "kind's share of all.", records, tags),
        record_table("Coverage and pairs", "Training questions by whether their samples are right.",
                     made, COVERAGE),
        record_table("Training", "Means over the last quarter of an iteration's steps; change: of "
                     "the mean summed log-prob of the same pairs within it.", made, TRAINING),
        record_table("Cost", "FLOPs: of sampling and training. Seconds: of the steps in "
                     "the log.", records, COST)]
    return [table for table in tables if len(table.header) > 2 and table.rows]


def markdown(table: Table) -> str:
    lines = [table.header, ["---"] + ["---:"] * (len(table.header) - 1), *table.rows]
    grid = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"## {table.title}\n\n{table.note}\n\n{grid}"


def html_section(table: Table) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
    body = "\n".join([line(table.header, "th"), *(line(row, "td") for row in table.rows)])
    return (f"<h2>{html.escape(table.title)}</h2><p>{html.escape(table.note)}</p>"
            f"<div><table>\n{body}\n</table></div>")


def plain(table: Table) -> str:
    """Aligned columns for a terminal: the first to the left, the others to the right."""
    lines = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join([f"{table.title}: {table.note}", *(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines)])


# ---- pictures

def picture(panels: dict, draw, y_label: str, x_label: str = "", y_format="{x:.0%}") -> bytes:
    """PNG of panels (title -> what `draw` puts there) with one y axis; b"" without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return b""
    from matplotlib.figure import Figure
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(6.4, 4.2 * columns), 1 + 3.3 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    legend = {}
    for axis, (title, content) in zip(axes, panels.items()):
        draw(axis, content)
        axis.set_title(textwrap.fill(title, 50), fontsize=10)
        axis.set_xlabel(x_label)
        axis.yaxis.set_major_formatter(y_format)
        axis.set_axisbelow(True)
        axis.grid(alpha=0.3)
        legend |= {text: handle for handle, text in zip(*axis.get_legend_handles_labels())}
    for axis in axes[len(panels):]:
        axis.remove()
    figure.supylabel(y_label, fontsize=10)
    labels = [textwrap.fill(text, 60) for text in legend]
    entry_inches = 0.6 + 0.08 * max(len(text) for text in labels)
    figure.legend(legend.values(), labels, loc="outside lower center", frameon=False,
                  ncols=max(1, int(figure.get_figwidth() / entry_inches)))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def draw_curves(axis, curves: dict[str, list[tuple]]) -> None:
    """Label -> [(t, y, low, high), ...] over M_t, moved sideways so that no bar hides another."""
    for i, (name, points) in enumerate(curves.items()):
        if points:  # a cell that is missing keeps its colour in the other panels
            t, y, low, high = zip(*points)
            axis.errorbar([value + 0.05 * (i - (len(curves) - 1) / 2) for value in t], y,
                          [[b - a for a, b in zip(low, y)], [b - a for a, b in zip(y, high)]],
                          label=name, color=COLORS[i % len(COLORS)], linewidth=1.5, capsize=2,
                          marker=MARKERS[i % len(MARKERS)], markersize=4.5)
    models = sorted({point[0] for points in curves.values() for point in points})
    axis.set_xticks(models, [f"M{t}" for t in models])


def draw_probe(axis, models: list[dict]) -> None:
    """The paper's figures 2 and 3, all iterations in a row; at a grey line the pairs change."""
    offset = 0
    for model in models:
        steps = [offset + point["step"] for point in model["probe"]]
        names = [name for name in ("chosen", "rejected", "gold") if name in model["probe"][0]]
        for name, style, color in zip(names, ("-", "--", ":"), COLORS):
            axis.plot(steps, [point[name] for point in model["probe"]], style, color=color,
                      linewidth=2, label=name)
        offset += model.get("steps", model["probe"][-1]["step"])
        axis.axvline(offset, color="#999999", linewidth=0.8)


def draw_coverage(axis, models: list[dict]) -> None:
    """A bar per iteration; its middle is the questions that can still teach something."""
    base, x = [0.0] * len(models), range(1, len(models) + 1)
    for key, color in (("all_right", COLORS[0]), ("mixed", COLORS[4]), ("all_wrong", COLORS[1])):
        shares = [model[key] for model in models]
        axis.bar(x, shares, 0.7, base, color=color, label=key.replace("_", " "))
        base = [a + b for a, b in zip(base, shares)]
    axis.set_xticks(x)


def run_pictures(runs: list[Run]) -> dict[str, bytes]:
    """File name -> PNG of what was measured."""
    first = runs[0]
    accuracy = {run.label: [(t, model["accuracy"], *model["ci95"])
                            for t, model in enumerate(run.models)] for run in runs}
    passk = {key: [(t, *[model[key]] * 3) for t, model in enumerate(first.models)]
             for key in first.models[0] if re.fullmatch(r"pass@\d+", key)}
    made = {run.label: run.models[1:] for run in runs if len(run.models) > 1}
    pngs = {"accuracy.png": picture({"": accuracy}, draw_curves, "test accuracy, 95% interval")}
    if made:
        pngs["logps.png"] = picture(made, draw_probe, "mean summed log-prob", "step", "{x:g}")
        pngs["coverage.png"] = picture(made, draw_coverage, "training questions", "iteration")
    if passk:
        pngs["passk.png"] = picture({first.label: passk}, draw_curves, "test questions")
    return pngs


# ---- a few runs

def findings(runs: list[Run]) -> list[str]:
    """Plain sentences, each computed from the record."""
    first_and_last = runs[0].models[:1] + runs[0].models[1:][-1:]
    lines = [f"{runs[0].label}: " + "; ".join(
        f"{model['name']} answers {model['accuracy']:.1%} of {model['n']:,} test questions "
        f"(95% interval {model['95%_interval']})" for model in first_and_last) + "."]
    trained = [run for run in runs if len(run.models) > 1]
    if len(trained) > 1:
        t = min(len(run.models) for run in trained) - 1  # the last iteration that all of them have
        best, *others = sorted(trained, key=lambda run: -run.models[t]["accuracy"])
        close = [run.label for run in others
                 if run.models[t]["ci95"][1] >= best.models[t]["ci95"][0]]
        lines.append(f"At M{t} {best.label} is the most accurate; its interval overlaps "
                     f"{'that of ' + ' and '.join(close) if close else 'no other'}.")
    if len({run.models[0]["accuracy"] for run in runs}) > 1:
        lines.append("The runs differ in M0 already: not the same base, or not the same questions.")
    return lines + [
        f"{run.path} is unfinished: {len(run.models) - 1} of {run.config['iterations']} iterations "
        "are evaluated." for run in runs if not run.finished]


def before_and_after(run: Run) -> str:
    """Three greedy answers of M0 and of the last model where the verdict became correct."""
    T = run.models[-1]["iteration"]
    answers = {t: {row["id"]: row["samples"][0] for row in
                   read_jsonl(run.path / f"iter{t}" / "eval_samples.jsonl") if "id" in row}
               for t in (0, T)}
    right = {id: [answers[t][id]["verdict"] == "correct" for t in (0, T)] for id in answers[0]}
    better = [id for id, change in right.items() if change == [False, True]]
    worse = [id for id, change in right.items() if change == [True, False]]
    texts = [f"{id}, M{t}, {answers[t][id]['verdict']}:\n"
             + textwrap.indent(answers[t][id]["text"].strip(), "    ")
             for id in better[:3] for t in (0, T)]
    return "\n".join([*texts, f"From M0 to M{T}, {len(better):,} questions went from wrong to "
                      f"right and {len(worse):,} from right to wrong."])


def screen(runs: list[Run]) -> str:
    """The first run in short; if there are several, a line for each; and what the numbers say."""
    first = runs[0]
    records = [(first.label, model) for model in first.models]
    columns = ["accuracy|.1%", "95%_interval|", "pass@1|.1%",
               *columns_like(r"maj@\d+", records, ".1%"), "careful|.0%", "pairs|,",
               "chosen_change|+.2f"]
    table = record_table(first.label, "greedy accuracy; pass@1 (accuracy) and maj@k at T=1; change "
                         "of the chosen log-prob within the iteration", records, columns)
    parts = [before_and_after(first)] if len(first.models) > 1 else []
    parts.append(plain(replace(table, header=table.header[1:],
                               rows=[row[1:] for row in table.rows])))
    if len(runs) > 1:
        T = max(len(run.models) for run in runs) - 1
        rows = [[run.label, *(f"{model['accuracy']:.1%}" for model in run.models),
                 *[""] * (T + 1 - len(run.models)),
                 " ".join(f"{model['chosen_change']:+.2f}" for model in run.models[1:])]
                for run in runs]
        parts.append(plain(Table("All runs", "accuracy, and chosen change in each iteration",
                                 ["run", *(f"M{t}" for t in range(T + 1)), "chosen change"], rows)))
    return "\n\n".join([*parts, "\n".join(findings(runs))])


def report(runs: list[Run], out: Path) -> None:
    """report.md, report.html and the pictures in `out`, and the last screen."""
    cards = ["{}: {command}; commit {commit}; {machine}; {minutes} minutes".format(
        run.label, **run_card(run)) for run in runs]
    publish(out, "report", findings(runs) + cards, report_tables(runs), run_pictures(runs), screen(runs))


def publish(out: Path, name: str, facts: list[str], tables: list[Table], pngs: dict,
            shown: str = "") -> None:
    """NAME.md, NAME.html (pictures inside) and the pictures into `out`; then `shown`, or tables and facts.

    Files come first, so that they are there whatever becomes of the screen (`| head`).
    """
    pngs = {file: data for file, data in pngs.items() if data}
    for file, data in pngs.items():
        write(out / file, data)
    write(out / f"{name}.md", "\n\n".join(
        [*facts, *(f"![{file}]({file})" for file in pngs), *map(markdown, tables)]) + "\n")
    images = [f'<img alt="{file}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
              for file, data in pngs.items()]
    write(out / f"{name}.html", "\n".join([
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>',
        f"<style>{STYLE}</style>", *(f"<p>{html.escape(fact)}</p>" for fact in facts), *images,
        *map(html_section, tables), "</html>\n"]))
    print(shown or "\n\n".join([*map(plain, tables), "\n".join(facts)]).strip(), end="\n\n")
    if not pngs:
        print("no pictures: `pip install matplotlib` and the same command again draw them")
    print(f"written to {out}: " + ", ".join([f"{name}.html", f"{name}.md", *pngs]))


# ---- many seeds

def find_runs(root: Path) -> dict[str, dict[int, Path]]:
    """Cell -> seed -> directory of a finished run; one run alone is a cell of its own name."""
    if (root / "results.json").exists():
        return {root.name: {read_json(root / "config.json")["seed"]: root}}
    found: dict = {}
    for file in sorted(root.glob("*/s[0-9]*/results.json")):
        found.setdefault(file.parent.parent.name, {})[int(file.parent.name[1:])] = file.parent
    if not found:
        raise SystemExit(f"no finished run in {root}: expected {root}/CELL/sSEED/results.json")
    return found


def load_cells(root: Path) -> dict[str, dict[int, Run]]:
    """Cell -> seed -> run of irpo.py."""
    return {cell: {seed: load_runs([path])[0] for seed, path in paths.items()}
            for cell, paths in find_runs(root).items()}


def estimate(values: dict[int, float]) -> dict:
    """Mean over seeds and half the width of its 95% Student interval; no interval from one seed."""
    n = len(values)
    assert n <= max(T_975), f"{n} seeds: T_975 ends at {max(T_975)}"
    half = T_975[n] * stdev(values.values()) / math.sqrt(n) if n > 1 else None
    return {"mean": fmean(values.values()), "half_width": half, "n": n, "values": values}


def estimates(found: dict[int, dict]) -> dict:
    """Seed -> measures of its run, to measure -> estimate; a single run keeps its "ci95" beside them."""
    first = next(iter(found.values()), {})
    summary = {key: estimate({seed: row[key] for seed, row in found.items() if key in row})
               for key in first if key != "ci95"}
    return summary | ({"ci95": first["ci95"]} if len(found) == 1 and "ci95" in first else {})


def summarize(cell: str, runs: dict[int, Run]) -> dict:
    """Estimates for every M_t of a cell, the paper's accuracies, and what each seed's run was."""
    label_of_cell, paper = PAPER.get(cell, (cell, {}))
    models = {}
    for t in range(max(len(run.models) for run in runs.values())):
        records = {seed: run.models[t] for seed, run in runs.items() if t < len(run.models)}
        keys = [key for key in next(iter(records.values())) if re.fullmatch(AVERAGED, key)]
        models[f"M{t}"] = {key: estimate({seed: record[key] for seed, record in records.items()})
                           for key in keys}
    return {"label": label_of_cell, "paper": paper, "models": models,
            "runs": {seed: run_card(run) for seed, run in runs.items()}}


def mean_text(model: dict, measure: str, spec: str) -> str:
    """mean ± half-width; the mean alone of a single seed, "" of what was not measured."""
    if measure not in model:
        return ""
    mean, half = model[measure]["mean"], model[measure]["half_width"]
    return f"{mean:{spec}}" if half is None else f"{mean:{spec}} ± {half:{spec.lstrip('+')}}"


def models_table(models: dict[str, dict], specs: dict[str, str], note: str) -> Table:
    """A line per model of its estimates, a column per measure in `specs` (name -> format), and n."""
    rows = []
    for name, row in models.items():
        texts = {key: mean_text(row, key, spec) for key, spec in specs.items()}
        if "ci95" in row:
            texts["accuracy"] += " ({:.1%} to {:.1%})".format(*row["ci95"])
        rows.append([name, *texts.values(), str(row["accuracy"]["n"])])
    return Table("Test accuracy", note, ["model", *(key.replace("_", " ") for key in specs), "n"], rows)


def seeds_table(title: str, cells: dict, measure: str, spec: str) -> Table:
    """A line per cell, a column per M_t; the paper's accuracy, where it has one, in brackets."""
    names = sorted({name for cell in cells.values() for name, model in cell["models"].items()
                    if measure in model})
    over_seeds = "Mean ± half of its 95% interval over n seeds (Student t)."
    rows, note = [], over_seeds
    for cell in cells.values():
        texts = [mean_text(cell["models"].get(name, {}), measure, spec) for name in names]
        if measure == "accuracy" and cell["paper"]:
            note = f"{over_seeds} In brackets: the paper, Llama-2-70B-chat on GSM8K, %."
            texts = [f"{text} [{cell['paper'][name]}]" if name in cell["paper"] else text
                     for name, text in zip(names, texts)]
        rows.append([cell["label"], *texts, str(len(cell["runs"]))])
    return Table(title, note, ["cell", *names, "n"], rows)


def seeds_curve(cell: dict, measure: str) -> list[tuple]:
    """(t, mean, low, high) of a cell, for draw_curves."""
    found = [(t, model[measure]["mean"], model[measure]["half_width"] or 0.0)
             for t, model in enumerate(cell["models"].values()) if measure in model]
    return [(t, mean, mean - half, mean + half) for t, mean, half in found]


def aggregate(cells: dict, layout: dict, beside: dict, out: Path, name: str) -> None:
    """NAME.json, tables and pictures of the cells in `layout`, which is panel -> curve -> cell."""
    seeds = sorted({seed for runs in cells.values() for seed in runs})
    order = [cell for panel in layout.values() for cell in panel.values()]
    gaps = [f"{cell}/s{s}" for cell in order for s in seeds if s not in cells.get(cell, {})]
    facts = [f"Missing or unfinished: {', '.join(gaps)}."] if gaps else []
    summary = {cell: summarize(cell, cells[cell]) for cell in order if cell in cells}
    write(out / f"{name}.json", json.dumps({"missing": gaps, "cells": summary}, indent=1) + "\n")

    def panels(measure: str) -> dict:
        return {title: {curve: seeds_curve(summary[cell], measure) if cell in summary else []
                        for curve, cell in panel.items()} for title, panel in layout.items()}

    tables = [seeds_table("Test accuracy", summary, "accuracy", ".1%"),
              seeds_table("Change of the chosen log-prob in the iteration that makes M_t", summary,
                          "chosen_change", "+.2f")]
    publish(out, name, facts, tables, {
        "accuracy.png": picture(panels("accuracy") | beside, draw_curves, "test accuracy"),
        "logps.png": picture(panels("chosen_change"), draw_curves, "change of chosen log-prob",
                             y_format="{x:g}")})


def paper_table(root: Path, out: Path) -> None:
    """The paper's table 1 and whatever other cells there are: ours, and theirs beside it."""
    cells = load_cells(root)
    ours = {PAPER.get(cell, (cell,))[0]: cell for cell in [*PAPER, *sorted(cells.keys() - PAPER)]}
    theirs = {title: [(t, *[accuracy / 100] * 3) for t, accuracy in enumerate(paper.values())]
              for title, paper in PAPER.values()}
    aggregate(cells, {"here": ours}, {"paper: Llama-2-70B-chat, GSM8K": theirs}, out, "table")


def sweep(root: Path, out: Path) -> None:
    """The grid of all α and all β found: a panel per β, a curve per α."""
    cells = load_cells(root)
    configs = {cell: next(iter(runs.values())).config for cell, runs in cells.items()}
    names = {(config["alpha"], config["beta"]): cell for cell, config in configs.items()}
    alphas, betas = (sorted(set(values)) for values in zip(*names))
    layout = {f"β={b:g}": {f"α={a:g}": names.get((a, b), f"alpha{a:g}-beta{b:g}") for a in alphas}
              for b in betas}
    aggregate(cells, layout, {}, out, "sweep")


# ---- the command line

def run_script(main: Callable[[], None]) -> None:
    """Run a report's main; that whoever reads its screen has seen enough (`| head`) is no error."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse_runs(doc: str) -> tuple[Path, Path]:
    """RUNS and --out of a command line; `doc` is its help."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS", help="RUNS/CELL/sSEED, or one run")
    parser.add_argument("--out", type=Path, help="where to write (default: RUNS)")
    args = parser.parse_args()
    return args.runs, args.out or args.runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--table", type=Path, metavar="RUNS", help="RUNS/<key of PAPER>/s<seed>")
    parser.add_argument("--sweep", type=Path, metavar="RUNS", help="RUNS/alpha<a>-beta<b>/s<seed>")
    parser.add_argument("--out", type=Path, help="where to write (default: the first of the above)")
    args = parser.parse_args()
    if sum(map(bool, (args.runs, args.table, args.sweep))) != 1:
        parser.error("give run directories, or --table, or --sweep")
    sys.stdout.reconfigure(errors="replace")  # responses may hold what a terminal cannot show
    if args.table:
        paper_table(args.table, args.out or args.table)
    elif args.sweep:
        sweep(args.sweep, args.out or args.sweep)
    else:
        report(load_runs(args.runs), args.out or args.runs[0])


if __name__ == "__main__":
    run_script(main)
