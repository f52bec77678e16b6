"""report.py on run directories made by hand: the numbers it computes, and what it says of gaps."""
import base64
import json
import math
import re
import sys
from pathlib import Path

import pytest

from tools import report

CONFIG = {"method": "irpo", "alpha": 1.0, "beta": 0.1, "start_from": "", "seed": 0, "iterations": 2,
          "run_dir": ""}


def test_row(t: int, split: str, accuracy: float) -> dict:
    """What evaluate writes of 100 questions; intervals are simply 0.05 to both sides."""
    return {"name": f"M{t}", "iteration": t, "split": split, "n": 100, "accuracy": accuracy,
            "ci95": [accuracy - 0.05, accuracy + 0.05], "finished": 1.0, "length": 30.0,
            "tags": {"style": {"careful": {"share": 0.25, "accuracy": 0.9},
                               "hasty": {"share": 0.75, "accuracy": 0.4}}},
            "pass@1": accuracy - 0.1, "pass@2": accuracy, "pass@1_ci95": [0.1, 0.2],
            "maj@2": accuracy}


test_row.__test__ = False  # a helper, whatever its name says


def train_row(t: int, fall: float) -> dict:
    """What the driver writes of an iteration in which the chosen log-prob falls by `fall`."""
    return {"name": f"M{t}", "iteration": t, "split": "train", "questions": 50, "all_right": 0.2,
            "mixed": 0.7, "all_wrong": 0.1, "pairs": 140, "steps": 9, "loss": 0.7, "flops": 10**12,
            "tokens_sampled": 5000, "tokens_trained": 20000,
            "probe": [{"step": 0, "chosen": -2.0, "rejected": -3.0, "gold": -2.5},
                      {"step": 8, "chosen": -2.0 - fall, "rejected": -6.0, "gold": -2.0}]}


def sample(id: str, text: str, verdict: str) -> str:
    return json.dumps({"id": id, "samples": [{"text": text, "verdict": verdict}]}) + "\n"


def make_run(path: Path, accuracies: list[float], fall: float = 1.0, finished: bool = True,
             **config) -> Path:
    """A run directory with a model for each accuracy: M0, M1, ..."""
    rows = []
    for t, accuracy in enumerate(accuracies):
        evaluated = [test_row(t, "dev", 0.33), test_row(t, "test", accuracy)]
        rows += ([train_row(t, fall)] if t else []) + evaluated
        folder = path / f"iter{t}"
        folder.mkdir(parents=True)
        (folder / "eval.json").write_text(json.dumps(evaluated))
        if t:
            train = train_row(t, fall)
            (folder / "probe.jsonl").write_text(
                "".join(json.dumps(point) + "\n" for point in train["probe"]))
            coverage = ("questions", "all_right", "mixed", "all_wrong", "pairs")
            (folder / "coverage.json").write_text(json.dumps({key: train[key] for key in coverage}))
        better, worse = ("correct", "wrong") if t else ("wrong", "correct")
        verdicts = {"q-0": better, "q-1": worse, "q-2": better}
        (folder / "eval_samples.jsonl").write_text(sample("q-3", "same", "correct") + "".join(
            sample(id, f"text {t} of {id}", verdict) for id, verdict in verdicts.items()))
    if finished:
        (path / "results.json").write_text(json.dumps(rows))
    (path / "config.json").write_text(json.dumps({**CONFIG, "run_dir": str(path), **config}))
    (path / "command.txt").write_text("command  python irpo.py --seed 0\ncommit   abc123\n"
                                      "machine  two cores\n")
    (path / "log.jsonl").write_text(
        '{"event": "evaluate", "iteration": 0, "seconds": 30.0}\n'
        '{"event": "train", "iteration": 1, "seconds": 999.0, "tokens": 1}\n'
        '{"event": "train", "iteration": 1, "seconds": 60.0, "tokens": 6000}\n')
    return path


def table_cell(text: str, row: str, column: str) -> str:
    """A cell of a Markdown table, found by its row's beginning and its column's name."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    header = next(line for line in lines if column in line)
    found = next(line for line in lines[lines.index(header):] if " ".join(line).startswith(row))
    return found[header.index(column)]


def call(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    report.main()


def test_report_shows_the_numbers_of_the_record(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", [0.5, 0.7, 0.9])
    call(monkeypatch, run)
    text, screen = (run / "report.md").read_text(), capsys.readouterr().out
    assert table_cell(text, "IRPO M2", "accuracy") == "90.0%"
    assert table_cell(text, "IRPO M2", "95% interval") == "85.0% to 95.0%"
    assert table_cell(text, "IRPO M2", "pass@1") == "80.0%"
    assert table_cell(text, "IRPO M1", "style=careful") == "90.0% of 25%"
    assert table_cell(text, "IRPO M1", "all wrong") == "10.0%"
    assert table_cell(text, "IRPO M1", "chosen change") == "-1.00"
    assert table_cell(text, "IRPO M1", "flops") == "1.00e+12"
    assert table_cell(text, "IRPO M1", "train tokens/s") == "100", "the last of two lines counts"
    assert "1.5 minutes" in text and "commit abc123" in text
    assert "M2 answers 90.0% of 100 test questions" in screen and "unfinished" not in screen


def test_screen_shows_what_changed_between_first_and_last_model(tmp_path, monkeypatch, capsys):
    call(monkeypatch, make_run(tmp_path / "run", [0.5, 0.7, 0.9]))
    screen = capsys.readouterr().out
    shown = re.findall(r"text \d of q-\d", screen)
    assert shown == ["text 0 of q-0", "text 2 of q-0", "text 0 of q-2", "text 2 of q-2"]
    assert "same" not in screen
    assert "From M0 to M2, 2 questions went from wrong to right and 1 from right to wrong" in screen


def test_an_unfinished_run_is_shown_and_called_so(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", [0.5, 0.7], finished=False)
    (run / "iter2").mkdir()  # under way, not evaluated
    call(monkeypatch, run)
    assert f"{run} is unfinished: 1 of 2 iterations are evaluated" in capsys.readouterr().out
    assert table_cell((run / "report.md").read_text(), "IRPO M1", "pairs") == "140"


@pytest.mark.parametrize("files, reason", [([], "no config.json"),
                                           (["config.json"], "no evaluated model")])
def test_what_is_no_run_is_refused_with_the_reason(tmp_path, monkeypatch, files, reason):
    for name in files:
        (tmp_path / name).write_text(json.dumps(CONFIG))
    with pytest.raises(SystemExit, match=reason):
        call(monkeypatch, tmp_path)


def test_labels_name_the_method_and_what_differs(tmp_path):
    flags = [{}, {"beta": 0.5}, {"alpha": 0.0}, {"method": "sft_gold"},
             {"method": "sft_chosen", "start_from": "runs/a/iter1/model"}]
    runs = report.load_runs([make_run(tmp_path / str(i), [0.5], **f) for i, f in enumerate(flags)])
    assert [run.label for run in runs] == ["IRPO, β=0.1", "IRPO, β=0.5", "DPO only (α=0)",
                                           "SFT on gold", "SFT on chosen from runs/a/iter1"]
    twice = report.load_runs([make_run(tmp_path / name, [0.5]) for name in ("same", "again")])
    assert twice[0].label != twice[1].label, "labels are keys: one of the runs would be lost"


def test_runs_are_compared_by_their_intervals(tmp_path):
    best, close, far = report.load_runs([
        make_run(tmp_path / "a", [0.5, 0.90]), make_run(tmp_path / "b", [0.5, 0.81], alpha=0.0),
        make_run(tmp_path / "c", [0.5, 0.79], method="sft_gold")])
    assert ("At M1 IRPO is the most accurate; its interval overlaps that of DPO only (α=0)."
            in report.findings([far, close, best]))
    assert "its interval overlaps no other" in " ".join(report.findings([best, far]))
    assert not any("differ in M0" in line for line in report.findings([best, far]))
    other = report.load_runs([make_run(tmp_path / "d", [0.6])])
    assert "most accurate" not in " ".join(report.findings([best, *other])), "M0 is no result"
    assert any("differ in M0" in line for line in report.findings([best, *other]))


def test_html_carries_its_pictures_and_needs_nothing_else(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", [0.5, 0.7, 0.9])
    call(monkeypatch, run, "--out", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    files = sorted((tmp_path / "out").glob("*.png"))
    assert [path.stem for path in files] == ["accuracy", "coverage", "logps", "passk"]
    assert {base64.b64decode(data) for data in pictures} == {path.read_bytes() for path in files}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    assert page.count("src=") == 4 and not re.search(r"https?://|<link|<script|url\(", page)


def test_without_matplotlib_tables_are_written_and_the_remedy_said(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # now `import matplotlib` raises
    run = make_run(tmp_path / "run", [0.5, 0.7, 0.9])
    call(monkeypatch, run)
    assert "pip install matplotlib" in capsys.readouterr().out
    assert not list(run.glob("*.png")) and "<img" not in (run / "report.html").read_text()
    assert table_cell((run / "report.md").read_text(), "IRPO M2", "accuracy") == "90.0%"


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.md"
    report.write(path, "old")

    def interrupted(source, target):
        assert Path(source).read_text() == "half of the new" and path.read_text() == "old"
        raise KeyboardInterrupt

    monkeypatch.setattr(report.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write(path, "half of the new")
    assert path.read_text() == "old"


def test_mean_and_interval_over_seeds():
    """0.6, 0.7, 0.9: deviation 0.152753, half-width 4.303 * 0.152753 / sqrt(3) = 0.37949."""
    three = report.estimate({0: 0.6, 1: 0.7, 2: 0.9})
    assert three["mean"] == pytest.approx(2.2 / 3) and three["n"] == 3
    assert three["half_width"] == pytest.approx(0.37949, abs=1e-5)
    two = report.estimate({0: 0.5, 4: 0.7})  # 12.706 * 0.141421 / sqrt(2)
    assert two["half_width"] == pytest.approx(1.2706)
    one = report.estimate({7: 0.6})
    assert (one["mean"], one["half_width"], one["n"]) == (0.6, None, 1)


def test_quantiles_are_those_of_student():
    """Simpson's rule over the density of t with n - 1 degrees of freedom gives 0.475 from 0 on."""
    for n, t in report.T_975.items():
        df, steps = n - 1, 2000
        scale = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
        density = [scale * (1 + (i * t / steps) ** 2 / df) ** (-(df + 1) / 2)
                   for i in range(steps + 1)]
        area = t / steps / 3 * (density[0] + density[-1] + 4 * sum(density[1:-1:2])
                                + 2 * sum(density[2:-1:2]))
        assert area == pytest.approx(0.475, abs=2e-5), n


def test_table_has_means_the_paper_and_what_is_missing(tmp_path, monkeypatch, capsys):
    for seed, accuracy in enumerate((0.6, 0.7, 0.9)):
        make_run(tmp_path / "runs" / "irpo" / f"s{seed}", [0.5, accuracy, 0.8], seed=seed)
    make_run(tmp_path / "runs" / "dpo" / "s1", [0.5, 0.4, 0.3], alpha=0.0, fall=5.0)
    make_run(tmp_path / "runs" / "dpo" / "s2", [0.5], finished=False, alpha=0.0)
    call(monkeypatch, "--table", tmp_path / "runs", "--out", tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    assert table_cell(text, "IRPO ", "M1") == "73.3% ± 37.9% [73.1]"
    assert table_cell(text, "DPO ", "M1") == "40.0% [61.8]"
    assert table_cell(text, "DPO ", "M2") == "30.0%"
    record = json.loads((tmp_path / "out" / "table.json").read_text())
    m1, seed2 = record["cells"]["irpo"]["models"]["M1"], record["cells"]["irpo"]["runs"]["2"]
    assert m1["accuracy"]["values"] == {"0": 0.6, "1": 0.7, "2": 0.9}
    assert m1["chosen_change"]["mean"] == pytest.approx(-1.0)
    assert seed2["command"] == "python irpo.py --seed 0" and seed2["commit"] == "abc123"
    assert seed2["machine"] == "two cores" and seed2["minutes"] == 1.5
    absent = [f"{cell}/s{s}" for cell in report.PAPER.keys() - {"irpo", "dpo"} for s in range(3)]
    assert sorted(record["missing"]) == sorted(["dpo/s0", "dpo/s2", *absent])
    assert "Missing or unfinished: sft_gold/s0" in capsys.readouterr().out
    assert (tmp_path / "out" / "accuracy.png").exists()


def test_sweep_reads_the_grid_from_the_runs_and_names_missing_cells(tmp_path, monkeypatch):
    for alpha, beta, fall in ((0.0, 0.1, 8.0), (1.0, 0.1, -0.5), (0.0, 0.5, 2.0)):
        for seed in (0, 1):
            make_run(tmp_path / "runs" / f"alpha{alpha}-beta{beta}" / f"s{seed}",
                     [0.5, 0.7 + seed / 10], fall + seed, alpha=alpha, beta=beta, seed=seed)
    call(monkeypatch, "--sweep", tmp_path / "runs", "--out", tmp_path / "out")
    text = (tmp_path / "out" / "sweep.md").read_text()
    assert "Missing or unfinished: alpha1-beta0.5/s0, alpha1-beta0.5/s1." in text
    assert table_cell(text, "alpha0.0-beta0.1", "M1") == "75.0% ± 63.5%"  # 12.706 * 0.05
    changes = text[text.index("## Change"):]
    assert table_cell(changes, "alpha0.0-beta0.1", "M1") == "-8.50 ± 6.35"
    assert table_cell(changes, "alpha1.0-beta0.1", "M1") == "+0.00 ± 6.35"
    assert (tmp_path / "out" / "logps.png").exists() and (tmp_path / "out" / "sweep.json").exists()
