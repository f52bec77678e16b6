"""Runs of reft.py and rerank.py -> tables by method, the paper's claims, curves of reward, KL and dev accuracy.

Reads RUNS/CELL/sSEED, as `make reft` and `make reft-table` lay them out, or one run. From several seeds
come means with 95 % Student intervals, from one seed the Wilson interval over test questions.

    python -m tools.report_reft runs/reft --out results/reft
"""
import json
import re
from pathlib import Path
from statistics import fmean

from tools.report import (COLORS, Table, estimate, estimates, find_runs, mean_text, models_table, parse_runs, picture,
                    publish, read_json, read_jsonl, run_script, timed_card, write)

CELLS = {  # folder -> row of the tables
    "reft": "ReFT", "nokl": "ReFT, no KL", "nopartial": "ReFT, no partial reward",
    "separate": "ReFT, separate critic", "group": "group advantage, no critic", "sft": "SFT",
    "offline_st": "Offline-ST", "online_st": "Online-ST", "letters": "ReFT, graded by letter",
    "rerank-reft": "ReFT, reranked", "rerank-sft": "SFT, reranked"}
CLAIMS = [  # of the paper: text, (row, beginning of a measure's name), more or the same, (row, measure)
    ("R1: ReFT beats SFT", ("ReFT", "accuracy"), ">", ("SFT", "accuracy")),
    ("R2: ReFT beats Offline-ST", ("ReFT", "accuracy"), ">", ("Offline-ST", "accuracy")),
    ("R2: ReFT beats Online-ST", ("ReFT", "accuracy"), ">", ("Online-ST", "accuracy")),
    ("R4: graded by letter, it gets fewer numbers right", ("ReFT", "accuracy"), ">",
     ("ReFT, graded by letter", "accuracy")),
    ("R5: without KL it is worse", ("ReFT", "accuracy"), ">", ("ReFT, no KL", "accuracy")),
    ("R5: without KL it falls below the warm-up", ("warm-up", "accuracy"), ">", ("ReFT, no KL", "accuracy")),
    ("R6: the partial reward helps", ("ReFT", "accuracy"), ">", ("ReFT, no partial reward", "accuracy")),
    ("R7: a shared value head is as good as a critic of its own", ("ReFT", "accuracy"), "=",
     ("ReFT, separate critic", "accuracy")),
    ("R8: its vote beats its greedy answer", ("ReFT", "maj@"), ">", ("ReFT", "accuracy")),
    ("R8: its vote beats SFT's", ("ReFT", "maj@"), ">", ("SFT", "maj@")),
    ("R8: reranked, it beats its greedy answer", ("ReFT, reranked", "accuracy"), ">", ("ReFT", "accuracy")),
    ("R8: reranked, it beats SFT reranked", ("ReFT, reranked", "accuracy"), ">", ("SFT, reranked", "accuracy")),
    ("R10: dev accuracy still rises in the second half", ("ReFT", "dev_accuracy"), ">", ("ReFT", "dev_halfway")),
    ("R11: dev accuracy first dips below the warm-up's", ("warm-up", "dev_accuracy"), ">", ("ReFT", "dev_lowest"))]
TRAINED = {"reward": ".2f", "accuracy": ".1%", "kl": ".2f", "kl_k3": ".2f", "entropy": ".3f",
           "length": ".1f", "eos_rate": ".1%", "explained_variance": ".2f", "ratio_max": ".2f",
           "clip_fraction": ".1%", "grad_norm": ".2f"}  # of the rollouts, last quarter of the steps
CURVES = {  # measure of a batch -> title of its picture
    "dev": "dev accuracy", "reward": "reward of the rollouts", "accuracy": "accuracy of the rollouts",
    "kl": "KL per response, nats", "entropy": "entropy per token, nats", "length": "response length, tokens",
    "eos_rate": "responses that end in EOS", "ratio_max": "largest ratio", "clip_fraction": "clipped tokens",
    "explained_variance": "explained variance of V", "value_loss": "value loss", "grad_norm": "gradient norm"}


def load_runs(root: Path) -> dict[str, dict[int, Path]]:
    """Cell -> seed -> directory of a finished run, in the tables' order."""
    runs = find_runs(root)
    return {cell: runs[cell] for cell in [*CELLS, *sorted(runs.keys() - CELLS.keys())] if cell in runs}


def title(cell: str) -> str:
    """The row of a cell; of "reft+gae_lambda@0.5", as sweeps name theirs, "ReFT, gae_lambda 0.5"."""
    name, *flags = cell.split("+")
    return ", ".join([CELLS.get(name, name), *(flag.replace("@", " ") for flag in flags)])


def measures(rows: list[dict], iteration: int | None) -> dict:
    """What results.json says of one model; measures of dev and of its making are dev_X and train_X."""
    found = {}
    for row in rows:
        if row.get("iteration") == iteration:
            prefix = {"dev": "dev_", "train": "train_"}.get(row["split"], "")
            found |= {prefix + key: value for key, value in row.items() if isinstance(value, float)}
            found |= {"ci95": row["ci95"]} if row["split"] == "test" else {}
    return found


def dev_on_the_way(run: Path) -> dict[str, float]:
    """The lowest dev accuracy during a training, and the first one from its middle on."""
    points = curve({0: run}, "dev")
    if not points:
        return {}
    return {"dev_lowest": min(mean for _, mean, _, _ in points),
            "dev_halfway": next(mean for step, mean, _, _ in points if 2 * step >= points[-1][0])}


def option_of(answer: str | None, num_choices: int) -> int | None:
    """Which of num_choices options a number is; None if it is no whole number. "203.0" and "1,203" are."""
    whole = re.fullmatch(r"(-?\d[\d,]*)(\.0*)?", answer or "")
    return int(whole[1].replace(",", "")) % num_choices if whole else None


def letter_accuracy(run: Path, t: int, num_choices: int) -> float:
    """Of greedy test answers: how many equal the right one modulo num_choices."""
    rows = [row for row in read_jsonl(run / f"iter{t}" / "eval_samples.jsonl") if "id" in row]
    options = [(option_of(row["samples"][0]["answer"], num_choices), option_of(row["gold"], num_choices))
               for row in rows]
    return fmean(chosen is not None and chosen == right for chosen, right in options)


def summarize(runs: dict[str, dict[int, Path]]) -> dict[str, dict]:
    """Row of the tables -> estimates over seeds of all that was measured: warm-ups first, then each cell."""
    models: dict[str, dict] = {}
    warmed: dict[int, dict[int, dict]] = {}  # epochs of warm-up -> seed -> measures
    for cell, by_seed in runs.items():
        found = {}
        for seed, run in by_seed.items():
            rows = read_json(run / "results.json")
            if "iteration" not in rows[0]:  # of rerank.py, which trains no policy
                found[seed] = measures(rows, None)
                continue
            found[seed] = measures(rows, 1) | dev_on_the_way(run)
            warmed.setdefault(read_json(run / "config.json")["warmup_epochs"], {})[seed] = measures(rows, 0)
        models[title(cell)] = estimates(found)
    warm_ups = {"warm-up" if len(warmed) == 1 else f"warm-up, warmup_epochs {epochs}": estimates(found)
                for epochs, found in sorted(warmed.items())}
    return warm_ups | models


def add_letters(models: dict[str, dict], runs: dict[str, dict[int, Path]]) -> None:
    """Letters right, beside numbers right: before, and with either way of grading."""
    num_choices = read_json(next(iter(runs["letters"].values())) / "config.json")["num_choices"]
    for row, cell, t in (("warm-up", "letters", 0), ("ReFT", "reft", 1), (CELLS["letters"], "letters", 1)):
        if cell in runs and row in models:
            models[row]["letter_accuracy"] = estimate(
                {seed: letter_accuracy(run, t, num_choices) for seed, run in runs[cell].items()})


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
    return models_table(models, specs, "Greedy; reranked: the one of k samples that a reward model picks. Mean ± half "
                        "of its 95% interval over n seeds (Student t), or the Wilson interval of one. pass@1 and "
                        "maj@k: samples at T = 1.")


def difference(models: dict[str, dict], high: tuple[str, str], low: tuple[str, str]) -> dict | None:
    """Estimate, in points, of what `high` has more than `low` with the same seed; None if one is not there."""
    values = [next((x["values"] for key, x in models.get(row, {}).items() if key.startswith(measure)), {})
              for row, measure in (high, low)]
    both = sorted(values[0].keys() & values[1].keys())
    return estimate({seed: 100 * (values[0][seed] - values[1][seed]) for seed in both}) if both else None


def verdict(found: dict, relation: str) -> str:
    """Whether the interval of a difference says more, less or neither, and whether that was claimed."""
    if found["half_width"] is None:
        return "one seed, no interval"
    if abs(found["mean"]) <= found["half_width"]:
        return "no difference shown" if relation == "=" else "not shown"
    return "yes" if relation == ">" and found["mean"] > 0 else "no"


def claims_table(models: dict[str, dict]) -> Table:
    """Of the claims whose two sides are there: the difference, and what it says."""
    rows = []
    for text, high, relation, low in CLAIMS:
        if found := difference(models, high, low):
            seeds = ", ".join(f"{x:+.1f}" for x in found["values"].values())
            rows.append([text, mean_text({"points": found}, "points", "+.1f"), seeds, verdict(found, relation)])
    return Table("The paper's claims", "Differences in points between models of the same seed: mean ± half of its 95% "
                 "interval over seeds, and one by one. Not shown: the interval holds 0. Claims that need other runs "
                 "are left out.", ["claim", "difference", "by seed", "here"], rows)


def training_table(models: dict[str, dict]) -> Table:
    """How the rollouts looked at the end of training."""
    rows = [[name, *(mean_text(row, f"train_{key}", spec) for key, spec in TRAINED.items())]
            for name, row in models.items() if "train_kl" in row]
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
    root, out = parse_runs(__doc__)
    runs = load_runs(root)
    models = summarize(runs)
    if "letters" in runs:
        add_letters(models, runs)
    tables = [table for table in (accuracy_table(models), claims_table(models), training_table(models))
              if table.rows]
    cards = {f"{cell}/s{seed}": timed_card(run) for cell, by_seed in runs.items()
             for seed, run in by_seed.items()}
    write(out / "reft.json", json.dumps({"models": models, "runs": cards}, indent=1) + "\n")
    pngs = {}
    for key, label in CURVES.items():
        curves = {title(cell): curve(by_seed, key) for cell, by_seed in runs.items()}
        if any(curves.values()):
            pngs[f"{key}.png"] = picture({label: curves}, draw_curves, label, "batches of questions",
                                         "{x:.0%}" if key in ("dev", "accuracy", "eos_rate") else "{x:g}")
    publish(out, "reft", warnings(runs), tables, pngs)


if __name__ == "__main__":
    run_script(main)
