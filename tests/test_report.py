"""Reports of hand-made run directories: every number is one of the runs', or a mean, difference or interval of them."""
import base64
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from infra import InputError
from infra.run import read_json, write_json
from runs import call
from tools import page, report
from tools.evidence import quantile

HALF = quantile(0.05, 2) * 0.1 / 3 ** 0.5  # half the interval of three values that are 0.1 apart


def measured(name: str, t: int, accuracy: float, dev: float | None = None) -> list[dict]:
    """What evaluate writes of 100 questions; intervals are simply 0.05 to both sides."""
    rows = [{"name": name, "iteration": t, "split": split, "n": 100, "accuracy": value,
             "ci95": [value - 0.05, value + 0.05], "finished": 1.0, "length": 30.0,
             "tags": {"depth": {"3": {"share": 0.25, "accuracy": 0.9}},
                      "first wrong": {"gap misread": {"share": 0.6, "accuracy": 0.1},
                                      "nothing": {"share": 0.4, "accuracy": 1.0}}}}
            for split, value in (("dev", accuracy if dev is None else dev), ("test", accuracy))]
    rows[1] |= {"pass@1": accuracy - 0.1, "pass@2": accuracy, "pass@1_ci95": [0.1, 0.2], "maj@8": accuracy + 0.01}
    return rows


def write_run(path: Path, rows: list[dict], steps: list[dict] = (), finished: bool = True) -> Path:
    """A run directory with these rows, and the greedy answers that they count: in M0 the first questions are right, in
    later models the last ones."""
    path.mkdir(parents=True)
    for t in {row["iteration"] for row in rows} - {None}:
        folder = path / f"iter{t}"
        folder.mkdir()
        evaluated = [row for row in rows if row["iteration"] == t and row["split"] != "train"]
        (folder / "eval.json").write_text(json.dumps(evaluated))
        for name, split in (("eval_samples", "test"), ("eval_dev", "dev")):
            accuracy = next((row["accuracy"] for row in evaluated if row["split"] == split), math.nan)
            if math.isnan(accuracy):
                continue
            right = round(100 * accuracy)
            order = range(100) if not t else range(99, -1, -1)
            verdicts = ["correct" if i in order[:right] else "wrong" for i in range(100)]
            (folder / f"{name}.jsonl").write_text('{"settings": {}, "sha256": ""}\n' + "".join(json.dumps(
                {"id": f"q-{i}", "question": f"question {i}?", "gold": "3", "samples": [
                    {"text": f"text {t} of q-{i}", "verdict": verdict, "answer": "5"}]}) + "\n"
                for i, verdict in enumerate(verdicts)))
        (folder / "train.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    if finished:
        (path / "results.json").write_text(json.dumps(rows))
    (path / "config.json").write_text("{}")
    (path / "command.txt").write_text("command  python irpo.py --seed 0\ncommit   abc123\n\ncommand  a second start\n")
    (path / "log.jsonl").write_text('{"folder": "iter0", "event": "eval", "seconds": 30.0}\n'
                                    '{"folder": "iter1", "event": "train", "seconds": 40.0}\n'
                                    '{"folder": "iter1", "event": "train", "seconds": 20.0}\n')  # resumed
    return path


def irpo_run(path: Path, accuracies: list[float], fall: float = 1.0, finished: bool = True) -> Path:
    """A run with a model for each accuracy, M0, M1, ..., of which the chosen log-prob falls by `fall`."""
    rows = []
    for t, accuracy in enumerate(accuracies):
        probe = [{"step": 0, "chosen": -2.0, "rejected": -3.0}, {"step": 8, "chosen": -2.0 - fall, "rejected": -6.0}]
        train = {"name": f"M{t}", "iteration": t, "split": "train", "questions": 50, "all_right": 0.2, "mixed": 0.7,
                 "all_wrong": 0.1, "pairs": 140, "steps": 9, "loss": 0.7, "flops": 10**12, "probe": probe}
        rows += [train] if t else []
        rows += measured(f"M{t}", t, accuracy, dev=0.33)
    return write_run(path, rows, finished=finished)


def rft_run(path: Path, accuracy: float, sft: float | None = 0.5, exclusive=(1.0,), kept=10, paths=0.5) -> Path:
    """A run with samples for k = 1 and 6; sft: None for a run whose paths are pooled."""
    over_k = [{"k": k, "correct_paths": paths * k, "distinct_paths": 0.1 * k, "solved": 0.5,
               "distinct_paths_and_gold": 1 + 0.1 * k} for k in (1, 6)]
    train = {"name": "RFT", "iteration": 1, "split": "train", "kept": kept, "steps": 40, "over_k": over_k,
             "exclusive": list(exclusive), "distinct_paths": 0.6}
    return write_run(path, [*(measured("SFT", 0, sft) if sft else []), train, *measured("RFT", 1, accuracy)])


def reft_run(path: Path, accuracy: float, warm_up: float = 0.5, seed: int = 0, steps: int = 4) -> Path:
    """A run whose reward and dev accuracy grow."""
    train = {"name": "ReFT", "iteration": 1, "split": "train", "reward": 0.7, "kl": 1.0 + seed, "steps": steps}
    records = [{"step": s, "reward": 0.1 * s + seed, "kl": 1.0, "warnings": {"kl": "high"} if s == 3 else {},
                **({"dev": {"accuracy": 0.2 * s}} if s % 2 else {})} for s in range(steps)]
    return write_run(path, [*measured("warm-up", 0, warm_up), train, *measured("ReFT", 1, accuracy)], records)


def table(root: Path, name: str) -> tuple[str, dict]:
    call(report, "--table", root, "--out", root / "out")
    return (root / "out" / f"{name}.md").read_text(), json.loads((root / "out" / f"{name}.json").read_text())


def table_cell(text: str, row: str, column: str) -> str:
    """A cell of the first Markdown table that has this column, in the row that begins so."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    header = next(line for line in lines if column in line)
    found = next(line for line in lines[lines.index(header):] if " ".join(line).startswith(row))
    return found[header.index(column)]


def claim(text: str, name: str) -> list[str]:
    return [cell.strip() for cell in re.search(rf"^\| {re.escape(name)}.*$", text, re.M)[0].strip("|").split("|")][1:]


# --- a few runs ------------------------------------------------------------------------------------

def test_report_shows_the_numbers_of_the_run(tmp_path, capsys):
    run = irpo_run(tmp_path / "run", [0.5, 0.7, 0.9])
    call(report, run)
    text, screen = (run / "report.md").read_text(), capsys.readouterr().out
    for row, column, shown in [
            ("M2", "accuracy", "90.0% (85.0% to 95.0%)"), ("M2", "pass@1", "80.0% (10.0% to 20.0%)"),
            ("M2", "dev accuracy", "33.0% (28.0% to 38.0%)"), ("M1", "depth=3", "90.0%"),
            ("M1", "sound", "40.0%"), ("M1", "misread gap", "60.0%"), ("M1", "misread rest", "0.0%"),
            ("M1", "other errors", "0.0%"), ("M1", "all wrong", "10.0%"), ("M1", "pairs", "140"),
            ("M1", "chosen change", "-1.00"), ("M1", "flops", "1.00e+12"), ("M1", "seconds train", "60.0")]:
        assert table_cell(text, f"{run} {row}", column) == shown, (row, column)
    assert "commit abc123; minutes 1.5" in text and "a second start" not in text and "unfinished" not in screen
    assert max(line.count("|") for line in text.splitlines()) <= 9, "a table of more than 8 columns"
    card = report.read_card(report.run_card())
    assert text.startswith(f"# {run}\n\n") and re.search(
        rf"^{card['start'][:10]}, commit {card['commit']}: python -m tools.report {run}$", text, re.M)


def test_an_unfinished_run_is_shown_and_called_so(tmp_path, capsys):
    run = irpo_run(tmp_path / "run", [0.5, 0.7], finished=False)
    (run / "iter2").mkdir()  # under way, not evaluated
    call(report, run)
    said = capsys.readouterr().out
    assert f"{run} is unfinished: M1 is the last model evaluated" in said
    assert table_cell(said, f"{run} M1", "accuracy").startswith("70.0%")


@pytest.mark.parametrize("files, reason", [
    ({}, "no config.json"), ({"config.json": {}}, "no evaluated model"),
    ({"config.json": {}, "iter_old/eval.json": []}, "no evaluated model"),
    ({"config.json": {}, "results.json": {"accuracy": 0.5}}, "cannot be read as a run .*TypeError"),
    ({"config.json": {}, "results.json": [{"model": "M0"}]}, "cannot be read as a run .*'name'")], ids=str)
def test_what_is_no_run_is_refused_with_the_reason(tmp_path, files, reason):
    """Files of another program, or of another version of this one, were a KeyError without a path."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=reason):
        call(report, tmp_path)


def test_runs_of_all_methods_in_one_report(tmp_path):
    """And one of who knows what: no log, no command, no accuracy, a split and a measure that nobody knows."""
    others = [irpo_run(tmp_path / "irpo", [0.5]), rft_run(tmp_path / "rft", 0.6), reft_run(tmp_path / "reft", 0.8)]
    bare = write_run(tmp_path / "bare", [{"name": "X", "iteration": None, "maj@2": 0.5, "new": [1], "split": "odd"}])
    for name in ("command.txt", "log.jsonl"):
        (bare / name).unlink()
    call(report, bare, *others)
    text = (bare / "report.md").read_text()
    for row, column, shown in [
            (f"{bare} X", "accuracy", ""), (f"{bare} X", "maj@2", "50.0%"),
            ("irpo M0", "accuracy", "50.0% (45.0% to 55.0%)"), ("rft RFT", "kept", "10"),
            (f"{tmp_path}/reft ReFT", "reward", "0.70")]:
        assert table_cell(text, row, column) == shown, (row, column)
    assert {file.stem for file in bare.glob("*.png")} == {"accuracy", "dev", "reward", "kl"}


def test_a_torn_line_is_passed_over_and_named(tmp_path, capsys):
    run = reft_run(tmp_path / "run", 0.8)
    for file in (run / "iter1" / "train.jsonl", run / "iter1" / "eval_samples.jsonl", run / "log.jsonl"):
        with open(file, "a") as torn:
            torn.write('{"step": 4, "reward": 9')
    call(report, run)
    assert report.curve([report.load_run(run).steps], "reward")[-1] == (4, *[pytest.approx(0.3)] * 3, [])
    assert "train.jsonl: line 5 is cut short" in capsys.readouterr().err


def test_runs_from_different_bases_are_pointed_out(tmp_path, capsys):
    a, b, c = (irpo_run(tmp_path / name, [start, 0.9]) for name, start in (("a", 0.5), ("b", 0.5), ("c", 0.6)))
    for other, pointed_out in ((b, False), (c, True)):
        call(report, a, other)
        assert ("differ in their first models" in capsys.readouterr().out) == pointed_out


# --- runs compared ---------------------------------------------------------------------------------

def named(path: Path, accuracy: float, source: str = "loss = dpo", **flags) -> Path:
    """A run with these flags and this source."""
    run = irpo_run(path, [0.5, accuracy])
    (run / "config.json").write_text(json.dumps({"run_dir": str(run), "eval_samples": len(str(path)),
                                                 "weights": f"{flags.get('seed', 0):064x}", **flags}))
    (run / "source").mkdir()
    (run / "source" / "losses.py").write_text(source)
    return run


def test_two_runs_are_compared_question_by_question(tmp_path, capsys):
    """M1 has the last questions right, 70 of 100 here and 60 there, M0 the first 50. Texts came without question and
    gold answer, so that nobody could judge them; which run was better, nobody tested."""
    a, b = named(tmp_path / "a", 0.7, alpha=1.0), named(tmp_path / "b", 0.6, alpha=0.0)
    call(report, a, b)
    text, screen = (a / "report.md").read_text(), capsys.readouterr().out
    head = "alpha 1.0, M1 − alpha 0.0, M1"
    for row, column, shown in [
            (head, "questions", "100"), (head, "only the first right", "10"), (head, "only the second right", "0"),
            (head, "McNemar p", "0.002"), ("M1 − M0", "only the first right", "50"),
            ("M1 − M0", "only the second right", "30"), ("M1 − M0", "McNemar p", "0.033")]:
        assert table_cell(text, row, column) == shown, (row, column)
    assert re.match(r"\+10 ± 5\.[89]", table_cell(text, head, "difference")), "1.98 sqrt(0.1 * 0.9 / 100), in points"
    for shown in (text, screen):
        first = "#### question 50?\n\nq-50, seed 0; gold answer: 3\n\nM1:\n\n```\ntext 1 of q-50\n```\n\nM0:\n\n```\n"
        assert f"### Right in M1, not in M0: 50 questions\n\n{first}" in shown
        assert "### Right in M0, not in M1: 30 questions\n\n#### question 0?" in shown
    assert "### Right in alpha 1.0, M1, not in alpha 0.0, M1: 10 questions\n\n#### question 30?" in text
    record = json.loads((a / "report.json").read_text())["compared"][1]["changed"]
    assert [row["id"] for row in record] == [f"q-{i}" for i in range(30, 40)]
    assert record[0] == {"seed": 0, "id": "q-30", "question": "question 30?", "prompt": None, "gold": "3",
                         "right": "alpha 1.0, M1", "alpha 1.0, M1": "text 1 of q-30",
                         "alpha 0.0, M1": "text 1 of q-30"}
    page = (a / "report.html").read_text()
    assert "<details><summary>question 50?</summary>\n<p>q-50, seed 0; gold answer: 3</p>" in page
    assert page.count("<details>") == page.count("</details>") == 9 and "<h4>" not in page
    call(report, a, b, "--examples", 12)
    assert (a / "report.md").read_text().count("#### question") == 12 + 12 + 10


def test_seeds_and_questions_of_single_runs_are_named(tmp_path, capsys):
    """Two runs of seed 3 were said to be of seed 0, and answers to dev questions to be greedy, to test questions."""
    a, b, c = (named(tmp_path / name, 0.7, alpha=alpha, seed=seed) for name, alpha, seed in (
        ("a", 0.0, 3), ("b", 1.0, 3), ("c", 2.0, 4)))
    d = named(tmp_path / "d", 0.7, seed=3, split="dev", temperature=0.7)
    for runs, seed, said in (((a, b), ", seed 3", ""), ((a, c), "", "The runs have different seeds."), (
            (a, d), ", seed 3", f"{d} has answers to dev questions at temperature 0.7.")):
        call(report, *runs)
        text = (a / "report.md").read_text()
        assert f"q-50{seed}; gold" in text
        assert said in text and text.count("different seeds") + text.count("dev questions") == bool(said)


@pytest.mark.parametrize("name, text", [
    ("config.json", "[]"), ("iter1/eval_samples.jsonl", '{"id": "q", "samples": 3}'),
    ("iter1/eval_samples.jsonl", '{"id": "q", "samples": ["text"]}')])
def test_files_of_another_program_are_passed_over(name, text, tmp_path):
    """And so is a row among others: the questions that both runs have are compared."""
    a, b = named(tmp_path / "a", 0.7), named(tmp_path / "b", 0.6, alpha=0.5)
    lines = (b / name).read_text()
    (b / name).write_text(text if name == "config.json" else f"{lines.rstrip()}\n{text}\n")
    call(report, a, b)
    compared = read_json(a / "report.json")["compared"]
    assert len({row["with"] for row in compared}) == 2 and {row["questions"] for row in compared} == {100}


@pytest.mark.parametrize("runs, groups", [
    ([dict(method="irpo", loss="hinge"), dict(method="irpo", loss="dpo")], {"loss hinge": [0], "loss dpo": [0]}),
    ([dict(loss="hinge"), {}], {"loss hinge": [0], "r1": [0]}),
    ([dict(seed=0), dict(seed=0, source="loss = hinge")], {"r0": [0], "r1": [0]}),
    ([dict(seed=0), dict(seed=1)], {"r0": [None], "r1": [None]}),
    ([dict(seed=s, alpha=a) for a in (0, 1) for s in (3, 4)], {"alpha 0": [3, 4], "alpha 1": [3, 4]}),
    ([dict(seed=s, alpha=a, model=f"runs/base-s{s}/model") for a in (0, 1) for s in (3, 4)],
     {"alpha 0": [3, 4], "alpha 1": [3, 4]}),
    ([dict(seed=0, model="small"), dict(seed=1, model="large")], {"model small": [None], "model large": [None]}),
    ([dict(seed=s, source=x) for x in ("a", "b") for s in (0, 1)], {"r0": [0, 1], "r2": [0, 1]}),
    ([dict(a=i, b=i, c=i, d=i, e=i) for i in (0, 1)], {"r0": [0], "r1": [0]})])
def test_runs_are_named_by_what_differs(tmp_path, runs, groups):
    """A run with a hinge loss was titled "IRPO", one with SimPO's "DPO only (α=0)"."""
    paths = [named(tmp_path / f"r{i}", 0.6, **flags) for i, flags in enumerate(runs)]
    found = {name.removeprefix(f"{tmp_path}/"): [*seeds] for name, seeds in report.load_runs(paths).items()}
    assert found == groups


def test_seeds_of_a_folder_that_were_made_in_two_ways_are_two_groups(tmp_path):
    """The second of two groups with the folder's name took the place of the first."""
    for seed in range(4):
        named(tmp_path / f"s{seed}", 0.6, seed=seed, source="ab"[seed > 1])
    found = report.load_runs([tmp_path])
    assert {name: [*seeds] for name, seeds in found.items()} == {
        f"{tmp_path}": [0, 1], f"{tmp_path}, seeds 2 3": [2, 3]}


def test_groups_of_seeds_are_compared(tmp_path):
    """A folder of sSEED is a group; a run with other questions under the same ids is not compared."""
    for seed in (0, 1, 2):
        named(tmp_path / "a" / f"s{seed}", 0.9, seed=seed, alpha=1.0)
        named(tmp_path / "b" / f"s{seed}", 0.2 + 0.1 * seed, seed=seed, alpha=0.0)
    other = named(tmp_path / "c", 0.6, seed=0, alpha=0.5)
    file = other / "iter1" / "eval_samples.jsonl"
    file.write_text(file.read_text().replace("question ", "another question "))
    call(report, tmp_path / "a", tmp_path / "b", other)
    text, head = (tmp_path / "a" / "report.md").read_text(), "alpha 1.0, M1 − alpha 0.0, M1"
    assert table_cell(text, head, "only the first right") == "70, 60, 50"
    assert table_cell(text, head, "difference").startswith("+60 ± 2")
    assert "− alpha 0.5, M1" not in text
    assert "alpha 0.5 has no seed and question in common with alpha 1.0, so they are not compared." in text
    file.unlink()  # an accuracy alone is not compared with answers
    call(report, tmp_path / "a", other)
    assert "alpha 0.5 has no seed and question in common" in (tmp_path / "a" / "report.md").read_text()


def test_measures_that_no_table_knows_are_shown(tmp_path):
    """A new loss's figures were in train.jsonl and nowhere else; those of an evaluation in results.json."""
    run = reft_run(tmp_path / "run", 0.8)
    rows = json.loads((run / "results.json").read_text())
    new = {"train": {"hinge_margin": 0.125}, "test": {"luck": 0.25}}
    (run / "results.json").write_text(json.dumps([row | new.get(row["split"], {}) for row in rows]))
    steps = [{"step": i, "hinge_margin": float(i), "lr": 0.1} for i in range(3)]
    (run / "iter1" / "train.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    call(report, run)
    text = (run / "report.md").read_text()
    assert table_cell(text, f"{run} ReFT", "hinge margin") == "0.125"
    head = re.search(r"## Other measures\n\n.*\n\n\| (.*) \|\n", text)[1]
    assert re.split(r" +\| +", head) == ["cell", "model", "luck", "hinge margin"], "and nothing else"
    assert (run / "others.svg").exists() and not (run / "reward.png").exists()


# --- the page --------------------------------------------------------------------------------------

class Page(HTMLParser):
    """Collects the elements and attributes of a page, and the texts of its elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements, self.texts, self.inside = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, *[name for name, _ in attributes if name != "style"]))
        self.inside = tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.inside, data.strip()))


@pytest.mark.parametrize("text", [
    "<script>alert(1)</script>", "a\n\n<img src=x onerror=alert(1)>", "```\n<script>x</script>\n````\n<b>bold</b>",
    "~~~\n<script>x</script>\n~~~", "a\r\r<script>x</script>\r\u2028<b>", "[a](javascript:alert(1)) <a@b.c>",
    "![accuracy.png](accuracy.png)", '<img src="accuracy.png">', "    ```\n<svg/onload=x>", "\x02wzxhzdk:0\x03<b>",
    "</code></pre><script>x</script>", "| a |\n| --- |\n| <i>x</i> |", "&lt;b&gt; <!-- <script> -->", "a|b\\|c\\",
    "# head\n- item", "`code` ``` *bold*", "runs/__x__/a_b_c _y_",
    "\x1b]0;title\x07\x1b[2J\x00\x9b1m", "\u202eleft", "\ud800"])
def test_text_of_a_model_is_shown_as_text(text, tmp_path, capsys):
    """In a fence, a sentence and a cell: nothing may run, be fetched, change the page or reach a terminal as a command.
    Here <script> in a cell reached report.md, and a lone surrogate ended the report."""
    table = page.make_table(["Title", "note", "x:.1f"], ["name"], [([text], {"x": 1.5}), (["b"], {"x": 2.5})])
    sections = [page.fenced(text), table]
    page.publish(tmp_path, "report", text, [f"before {text}"], {"accuracy": Figure()}, sections, [table])
    markdown, seen = (tmp_path / "report.md").read_text(), Page((tmp_path / "report.html").read_text())
    for shown in (markdown, capsys.readouterr().out):
        assert all(c.isprintable() or c == "\n" for c in shown)
    assert "<" not in re.sub(r"^(```+)\n.*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    plain = "html meta title meta style h1 p p img pre code h2 p table thead tr th th tbody tr td td tr td td"
    assert " ".join(tag for tag, *_ in seen.elements) == plain
    assert {name for _, *names in seen.elements for name in names} <= {
        "lang", "charset", "http-equiv", "content", "src", "alt"}
    assert [data for tag, data in seen.texts if tag == "td"][1:] == ["1.5", "b", "2.5"]
    escaped = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    assert "".join(data for tag, data in seen.texts if tag == "code") == escaped.strip()


def test_a_method_has_one_colour_and_marker_in_all_pictures(tmp_path, monkeypatch):
    """Also where other cells are missing: IRPO was dark blue in one picture and light blue in another."""
    drawn = []
    monkeypatch.setattr(page, "draw", lambda axis, lines, labels, *scales: drawn.append(
        {label: labels.index(label) for label in lines if lines[label]}) or {label: None for label in lines})
    monkeypatch.setattr(Figure, "legend", lambda self, *lines, **options: None)
    for cells in (("reft", "sft"), ("sft", "offline_st")):
        for cell in cells:
            reft_run(tmp_path / cells[1] / cell / "s0", 0.8)
        call(report, "--table", tmp_path / cells[1], "--out", tmp_path / "out")
    places = {}
    for label, place in (item for labels in drawn for item in labels.items()):
        assert places.setdefault(label, place) == place, label
    assert places == {"ReFT": 0, "SFT": 4, "Offline-ST": 5}


def test_accuracy_over_compute(tmp_path):
    """The FLOPs of a run's iterations add up; runs of one method with other budgets are one line, which begins at the
    base, though not at a first model that was trained, nor before a single point. Dev accuracy during PPO is a point,
    too. Runs of all three drivers may be in this table."""
    root = tmp_path / "compare"
    irpo_run(root / "irpo" / "s0", [0.4, 0.5, 0.6])
    irpo_run(root / "random" / "s0", [0.4, 0.3])
    for steps, accuracy in ((55, 0.7), (28, 0.65)):
        path = reft_run(root / f"grpo+max_steps@{steps}" / "s0", accuracy)
        rows = json.loads((path / "results.json").read_text())
        rows = [row | ({"flops": steps * 10**11} if row.get("split") == "train" else {}) for row in rows]
        (path / "results.json").write_text(json.dumps(rows))
    _, record = table(root, "compare")
    kind, cells, _ = report.load_table(root)
    steps = {"grpo+max_steps@55": [[{"step": 0}, {"step": 1, "dev": {"accuracy": share}}, {"step": 2}, {"step": 3}]
                                   for share in (0.4, 0.5)]}
    panels = report.over_compute(report.summarize(kind, cells), steps)
    assert [*panels] == ["test accuracy", "dev accuracy", "pass@2 on test questions"], "the largest k alone"
    assert panels["dev accuracy"]["GRPO"][0] == (55 * 10**11 / 2, 0.45, 0.45, 0.45, [0.4, 0.5])
    lines = panels["test accuracy"]
    assert {label: [point[:2] for point in points] for label, points in lines.items()} == {
        "IRPO": [(0, 0.4), (10**12, 0.5), (2 * 10**12, 0.6)], "IRPO with winners at random": [(10**12, 0.3)],
        "GRPO": [(28 * 10**11, 0.65), (55 * 10**11, 0.7)]}
    assert len({*map(line_of, report.PAPER["compare"]["cells"])}) == len(report.PAPER["compare"]["cells"])
    assert (root / "out" / "compute.png").exists() and not (root / "out" / "accuracy.png").exists()
    irpo_run(tmp_path / "compare-long" / "irpo" / "s0", [0.4, 0.5])
    table(tmp_path / "compare-long", "compare")
    assert (tmp_path / "compare-long" / "out" / "compute.png").exists(), "a table of the same name, of other cells"
    assert {"dpo", "separate"} < {*record["missing"]}, "planned, and never begun"


def line_of(cell: str) -> str:
    """The name of a cell's line in the picture of accuracy over compute."""
    models = {"M0": {"accuracy": report.estimate({0: 0.5})}}
    summary = {cell: {"label": report.label_of("compare", cell), "models": models}}
    [line] = report.over_compute(summary, {})["test accuracy"]
    return line


def test_lines_show_their_intervals_and_seeds_within_0_and_100_percent():
    """KL is on a logarithmic axis that shows 0, too."""
    points, styles = [(0, 0.0, 0.0, 0.0, []), (1, 0.5, 0.25, 1.0, [0.3, 0.7])], []
    for lines in ({"a": points, "b": points}, {"b": points}):
        axis = Figure().subplots()
        [line, _, [bars]] = page.draw(axis, lines, ["a", "b"], "symlog", "linear")["b"]
        styles.append((line.get_color(), line.get_marker()))
        assert [list(segment[:, 1]) for segment in bars.get_segments() if len(segment)][-1] == [0.25, 1.0]
        assert [list(dots.get_ydata()) for dots in axis.lines if dots.get_marker() == "."][-1] == [0.3, 0.7]
        assert axis.get_yscale() == "symlog" and axis.get_ylim()[0] == 0
    assert styles == [(page.COLORS[1], page.MARKERS[1])] * 2
    assert report.PAPER["curves"]["kl"][2] == "symlog"
    [_, _, [bars]] = page.draw(Figure().subplots(), {"a": [(0, 0.9, -0.1, 1.3, [])]}, ["a"], "share", "linear")["a"]
    assert list(bars.get_segments()[0][:, 1]) == [0.0, 1.0], "error bars went to 115 and 130 %"


def test_numbers_at_an_axis_do_not_overlap():
    """A run's last step is often next to the one before it; on a logarithmic axis k = 1 and 3 are far apart."""
    for xs, scale, shown in (([0, 4, 8, 100, 102], "linear", ["0", "8", "100"]),
                             ([1, 3, 100], "log", ["1", "3", "100"])):
        axis = page.render({"a": {"b": [(x, 0.5, 0.4, 0.6, []) for x in xs]}}, "y", "x", [], x_scale=scale).axes[0]
        assert [tick.get_text() for tick in axis.get_xticklabels()] == shown


@pytest.mark.parametrize("name", ["$x_$ $\\frac{$", "_hidden", ""])
def test_pictures_show_any_name(name):
    """A $ begins a formula for matplotlib, which raises where it is none, and _ at the start hides a line."""
    figure = page.render({name: {name: [(0, 0.5, 0.4, 0.6, [])]}, "b": {name: []}}, "y", "x", [name])
    assert page.picture(figure, "png").startswith(b"\x89PNG")
    assert b"<svg" in (svg := page.picture(figure, "svg")) and svg == page.picture(figure, "svg"), "other bytes"


def test_the_best_cell_comes_first_whatever_its_name(tmp_path):
    """By its last model, not by its best one."""
    for cell, accuracies in dict(dpo=[0.5, 0.9, 0.6], irpo=[0.5, 0.7, 0.8], sft_chosen=[0.5, 0.6, 0.7]).items():
        irpo_run(tmp_path / "table" / cell / "s0", accuracies)
    call(report, "--table", tmp_path / "table", "--seeds", 0, "--out", tmp_path / "out")
    labels = re.findall(r"^\| (\S.*?) +\| +M2 ", (tmp_path / "out" / "table.md").read_text(), re.MULTILINE)
    assert labels[:3] == ["IRPO", "SFT on chosen (STaR)", "DPO"]


def test_html_carries_its_pictures_and_needs_nothing_else(tmp_path):
    run = irpo_run(tmp_path / "run", [0.5, 0.7, 0.9])
    call(report, run, "--out", tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    files = sorted((tmp_path / "out").glob("*.png"))
    assert [path.stem for path in files] == ["accuracy", "logps"]
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert {base64.b64decode(data) for data in pictures} == {path.read_bytes() for path in files}
    assert text.count("src=") == 2 and not re.search(r"https?://|<link|<script|url\(", text)
    for line in re.findall(r"^\| .*$", (tmp_path / "out" / "report.md").read_text(), re.M):  # the same cells
        assert "---" in line or all(f">{cell.strip()}</t" in text for cell in line.strip("|").split("|"))


@pytest.mark.parametrize("absent, there", [("matplotlib", "report.html"), ("markdown", "accuracy.png")])
def test_without_an_optional_package_the_rest_is_written(tmp_path, monkeypatch, capsys, absent, there):
    monkeypatch.setitem(sys.modules, absent, None)  # now importing it raises
    run = irpo_run(tmp_path / "run", [0.5, 0.7, 0.9])
    call(report, run)
    assert f"pip install {absent}`" in capsys.readouterr().out
    assert {file.name for file in run.iterdir()} >= {"report.md", there}
    assert not [*run.glob("*.??g" if absent == "matplotlib" else "*.html")]
    assert table_cell((run / "report.md").read_text(), f"{run} M2", "accuracy").startswith("90.0%")


@pytest.mark.parametrize("cells", [1, 20])  # less than the buffer, which is seen at the end only, and more
def test_a_reader_who_leaves_early_is_no_error(tmp_path, cells):
    """`python -m tools.report ... | head -1`: no traceback, and the files are there all the same."""
    for i in range(cells):
        reft_run(tmp_path / "runs" / f"cell{i}" / "s0", 0.8)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen([sys.executable, "-m", "tools.report", "--table", tmp_path / "runs"], env=buffered,
                               cwd=report.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 141 and not re.search("Traceback|BrokenPipe", errors), "as SIGPIPE ends a program"
    assert (tmp_path / "runs" / "reft.html").exists() and (tmp_path / "runs" / "reward.png").exists()


# --- estimates -------------------------------------------------------------------------------------

def test_mean_and_interval_over_seeds():
    """0.6, 0.7, 0.9: deviation 0.152753, half-width 4.303 * 0.152753 / sqrt(3) = 0.37949; shares end at 0 and 1."""
    three = report.estimate({0: 0.6, 1: 0.7, 2: 0.9})
    assert three["mean"] == pytest.approx(2.2 / 3) and three["n"] == 3
    assert three["ci95"] == [pytest.approx(2.2 / 3 - 0.37949, abs=1e-4), pytest.approx(2.2 / 3 + 0.37949, abs=1e-4)]
    assert report.estimate({0: 0.6, 1: 0.7, 2: 0.9}, 0.0, 1.0)["ci95"] == [three["ci95"][0], 1.0]
    assert report.estimate({0: 0.5, 4: 0.7})["ci95"][1] == pytest.approx(0.6 + 1.27062)  # 12.706 * 0.141421 / sqrt(2)
    assert report.estimate({7: 0.6}) == {"mean": 0.6, "half_width": None, "ci95": None, "n": 1, "values": {7: 0.6}}


def test_no_interval_of_a_share_leaves_0_to_100_percent(tmp_path):
    """A table said 59.6 ± 58.8 %. Neither do differences leave ±100 points; seeds that are all right do not show that
    every run would be; and NaN proves nothing: statistics.stdev raised for it, and a claim became "the other way"."""
    for seed, value in enumerate((0.99, 0.2, 0.6)):
        reft_run(tmp_path / "reft" / f"s{seed}", value)
        reft_run(tmp_path / "sft" / f"s{seed}", 0.2)
        reft_run(tmp_path / "nokl" / f"s{seed}", math.nan)
    text, record = table(tmp_path, "reft")
    assert table_cell(text, "ReFT ReFT", "accuracy") == "59.7% (0.0% to 100.0%)"
    assert table_cell(text, "SFT ReFT", "accuracy") == "20.0% (15.0% to 25.0%)", "that of a run, about test questions"
    assert table_cell(text, "ReFT, no KL ReFT", "accuracy").startswith("nan%")
    assert re.fullmatch(r"\+39\.7 \(-\d\S+ to \+100\)", claim(text, "R1: ReFT beats SFT")[0])
    assert claim(text, "R5: without KL it is worse")[4] == "not shown"
    assert all(0 <= y <= 1 for point in report.over_models(record["cells"])["here"]["ReFT"] for y in point[1:4])


# --- cells and seeds -------------------------------------------------------------------------------

def test_table_has_means_the_paper_and_what_is_missing(tmp_path, capsys):
    for seed, accuracy in enumerate((0.6, 0.7, 0.9)):
        irpo_run(tmp_path / "irpo" / f"s{seed}", [0.5, accuracy, 0.8])
    irpo_run(tmp_path / "dpo" / "s1", [0.5, 0.4], fall=5.0)
    irpo_run(tmp_path / "dpo" / "s2", [0.5], finished=False)
    text, record = table(tmp_path, "table")
    assert table_cell(text, "IRPO M1", "accuracy") == "73.3% (35.4% to 100.0%) [73.1%]"
    assert table_cell(text, "DPO M1", "accuracy") == "40.0% (35.0% to 45.0%) [61.8%]"
    assert table_cell(text, "IRPO M1", "dev accuracy") == "33.0% (28.0% to 38.0%)"
    assert table_cell(text, "DPO M1", "chosen change") == "-5.00"
    cell = record["cells"]["irpo"]
    assert cell["models"]["M1"]["accuracy"]["values"] == {"0": 0.6, "1": 0.7, "2": 0.9}
    assert cell["models"]["M2"]["worst_fall"]["values"] == pytest.approx({"0": 0, "1": 0, "2": 0.1})
    assert "worst_fall" not in record["cells"]["dpo"]["models"]["M1"], "one training run cannot fall back"
    assert cell["runs"]["2"] == {"command": "python irpo.py --seed 0", "commit": "abc123", "minutes": 1.5}
    absent = report.PAPER["irpo"]["cells"].keys() - {"irpo", "dpo"}
    assert sorted(record["missing"]) == sorted(["dpo/s0", "dpo/s2", *absent])
    assert "Missing or unfinished: dpo/s0, dpo/s2, sft_chosen, " in capsys.readouterr().out
    assert claim(text, "I10: DPO without NLL lowers it") == ["+5", "nats", "+5", "1", "not shown (one seed)"]
    kind, cells, _ = report.load_table(tmp_path)
    panels = report.over_models(report.summarize(kind, cells))
    assert panels["the paper"]["IRPO"] == [(t, y, y, y, []) for t, y in enumerate((0.556, 0.731, 0.78))]
    assert [y for _, y, *_ in panels["here"]["IRPO"]] == pytest.approx([0.5, 2.2 / 3, 0.8])


def test_a_table_of_one_seed_compares_its_runs(tmp_path):
    """Which is what `make irpo` shows: claims need more seeds than one."""
    for cell, accuracies in (("irpo", [0.5, 0.9]), ("dpo", [0.5, 0.4])):
        irpo_run(tmp_path / cell / "s3", accuracies)
    text, record = table(tmp_path, "table")
    assert [row["ends"] for row in record["compared"]] == [["M1", "M0"], ["IRPO, M1", "DPO, M1"]]
    assert "### Right in IRPO, M1, not in DPO, M1: 50 questions" in text


def test_a_panel_per_part_of_a_label_and_missing_cells_are_named(tmp_path):
    for name, fall in (("near-exact-a0", 8.0), ("near-exact-a1", -0.5), ("far-mod4-a0", 2.0)):
        for seed in (0, 1):
            irpo_run(tmp_path / "nll" / name / f"s{seed}", [0.5, 0.7 + seed / 10], fall + seed)
    text, record = table(tmp_path / "nll", "nll")
    assert "far-mod4-a1" in record["missing"] and len(record["missing"]) == 14
    assert record["missing"][11:] == [f"seed {seed} of all cells" for seed in (2, 3, 4)], "planned"
    assert table_cell(text, "alike, no luck: α = 0 M1", "accuracy") == "75.0% (11.5% to 100.0%)"  # 12.706 * 0.05
    assert table_cell(text, "alike, no luck: α = 1 M1", "chosen change") == "+0.00 ± 6.35"
    falls = "alike, no luck: without the term, the chosen log-prob falls"
    assert claim(text, falls)[1:] == ["nats", "+8, +9", "1", "not shown"]
    kind, cells, _ = report.load_table(tmp_path / "nll")
    panels = report.over_models(report.summarize(kind, cells))
    assert {name: [*lines] for name, lines in panels.items() if any(lines.values())} == {
        "alike, no luck": ["α = 0", "α = 1"], "unlike, modulo 4": ["α = 0"]}


def test_rft_over_k_and_the_pool(tmp_path):
    for seed, value in enumerate([0.6, 0.7, 0.8]):
        rft_run(tmp_path / "k40" / f"s{seed}", value, sft=0.5 + 0.01 * seed, kept=10 * seed, paths=1.5)
        rft_run(tmp_path / "k1" / f"s{seed}", 0.55, sft=None)
        rft_run(tmp_path / "pool" / f"s{seed}", 0.9, sft=None, exclusive=(0.2, 0.3 + 0.1 * seed))
        rft_run(tmp_path / "half" / f"s{seed}", 0.5, sft=0.4)
    text, record = table(tmp_path, "rft")
    assert table_cell(text, "RFT, k = 40 RFT", "accuracy") == f"70.0% ± {HALF:.1%}"
    assert table_cell(text, "RFT, k = 40 RFT", "kept").startswith("10 ±")
    assert table_cell(text, "RFT, k = 40 SFT", "accuracy").startswith("51.0%")
    assert table_cell(text, "1/2 of the questions, k = 40 SFT", "accuracy") == "40.0% (35.0% to 45.0%)"
    assert table_cell(text, "6", "correct paths") == "9.00 ± 0.00", "of the largest k"
    assert table_cell(text, "6", "distinct paths and gold") == "1.60 ± 0.00 [1.74]"
    assert table_cell(text, "RFT, paths of 3 models, k = 40 each RFT", "only model 1").startswith("40.0%")
    assert "SFT" not in record["cells"]["pool"]["models"], "a pooled run has no SFT of its own"
    assert claim(text, "F3: RFT beats SFT")[1:] == ["points", "+10, +19, +28", "100", "not shown"]
    kind, cells, _ = report.load_table(tmp_path)
    summary = report.summarize(kind, cells)
    for row_order in summary, dict(reversed(summary.items())):  # a line that turned back was drawn once
        points = report.over_k(row_order)[""]["RFT"]
        assert [(x, pytest.approx(y)) for x, y, *_ in points] == [(0, 0.51), (1, 0.55), (40, 0.7)], "SFT is k = 0"


def test_claims_follow_from_the_numbers(tmp_path):
    """Differences are of runs with the same seed and, where a claim is about answers, of the same questions; what is
    said of a claim turns with them."""
    for seed in (0, 1, 2):
        for cell, value in (("reft", 0.8), ("sft", 0.1), ("offline_st", 0.9), ("separate", 0.8)):
            reft_run(tmp_path / cell / f"s{seed}", value + 0.05 * seed - 0.05, warm_up=0.99)
        reft_run(tmp_path / "online_st" / f"s{seed}", 0.8, warm_up=0.99)
        reft_run(tmp_path / "letters" / f"s{seed}", 0.99, warm_up=0.99)
    reft_run(tmp_path / "nokl" / "s1", 0.5, warm_up=0.99)
    for file in tmp_path.glob("letters/*/iter1/eval_samples.jsonl"):
        file.unlink()
    text, record = table(tmp_path, "reft")
    assert claim(text, "R1: ReFT beats SFT")[1:] == ["points", "+70, +70, +70", "100", "shown"]
    assert claim(text, "R2: ReFT beats Offline-ST")[1:] == ["points", "-10, -10, -10", "100", "shown the other way"]
    assert claim(text, "R2: ReFT beats Online-ST")[2:] == ["-5, +0, +5", "100", "not shown"]
    assert claim(text, "R4: graded by letter")[2:] == ["-24, -19, -14", "1", "not shown"], "answers are gone"
    assert claim(text, "R5: without KL it is worse")[1:] == ["points", "+30", "100", "not shown (one seed)"]
    assert claim(text, "R5: without KL it falls")[4] == "not shown (one seed)"
    assert claim(text, "R7: a critic of its own")[4] == "not shown", "an interval that contains 0"
    assert claim(text, "R8: its vote beats SFT's") == ["+70", "points", "+70, +70, +70", "1", "not shown"], "no spread"
    assert claim(text, "R11: dev accuracy first dips")[0] == "+79"  # 99 to 20, the first on the way
    before, _, claims = text.partition("## Claims")
    assert "R6" not in claims and "R6: " in before.partition("undecided: ")[2], "without runs"
    assert "; nokl/s1: kl at 1 batches;" in text and "nokl/s0" in record["missing"]
    levels = [row["difference"]["level"] for row in record["claims"] if len(row["difference"]["values"]) > 1]
    assert min(levels) < max(levels) and 0.05 / min(levels) == pytest.approx(len(report.PAPER["reft"]["claims"]))


def test_a_claim_can_be_about_a_difference_of_differences(tmp_path):
    """By question, too: where the term helps by 20 points in one cell and by 5 in the other, it is 15."""
    for cell, accuracy in {"near-exact-a1": 0.8, "near-exact-a0": 0.6, "far-exact-a1": 0.7,
                           "far-exact-a0": 0.65}.items():
        for seed in (0, 1):
            irpo_run(tmp_path / "nll" / cell / f"s{seed}", [0.5, 0.5, accuracy + seed / 100 * (cell[-1] == "1")])
    text, record = table(tmp_path / "nll", "nll")
    row = claim(text, "without luck it helps more where responses are alike")
    assert row[1:4] == ["points", "+15, +15", "100"] and "near-mod4-a0" in record["missing"]


def test_only_planned_seeds_count_in_a_planned_table_unless_named(tmp_path):
    """One that `make irpo SEED=7` had left was averaged in, with a base, flags and code of its own."""
    for seed, accuracy in ((0, 0.6), (1, 0.8), (7, 0.1)):
        irpo_run(tmp_path / "table" / "irpo" / f"s{seed}", [0.5, accuracy])
    _, record = table(tmp_path / "table", "table")
    assert record["cells"]["irpo"]["models"]["M1"]["accuracy"]["values"] == {"0": 0.6, "1": 0.8}
    assert {"seed 2 of all cells", "dpo"} < {*record["missing"]} and "irpo/s7" not in record["missing"]
    _, cells, missing = report.load_table(tmp_path / "table", only=(7,))
    assert [*cells["irpo"]] == [7] and not any("seed" in name for name in missing)
    with pytest.raises(SystemExit):
        call(report, tmp_path / "table" / "irpo" / "s0", "--seeds", "0")
    with pytest.raises(InputError, match="no finished run of seeds 3 .others: --seeds. in "):
        report.load_table(tmp_path / "table", only=(3,))


def test_seeds_made_in_two_ways_and_other_models_of_the_same_name_are_told(tmp_path):
    for cell, seed, values in (("irpo", 0, {}), ("irpo", 1, {}), ("dpo", 0, {"weights": "b" * 64}),
                               ("dpo", 1, {"lr": 1e-3})):
        path = irpo_run(tmp_path / cell / f"s{seed}", [0.5, 0.7])
        config = read_json(path / "config.json") | {
            "model": f"runs/base-s{seed}/model", "weights": "a" * 64, "problems": f"{seed:064x}"}  # drawn by seed
        write_json(path / "config.json", config | values)
    text, _ = table(tmp_path, "table")
    assert "\nSeeds of DPO were not made alike: they differ in lr.\n" in text and "Seeds of IRPO" not in text
    assert "\nRuns of one seed began at different models of the same name.\n" in text


def test_what_is_not_of_all_seeds_or_not_of_one_code_is_named(tmp_path):
    for seed in (0, 1):
        path = irpo_run(tmp_path / "irpo" / f"s{seed}", [0.5, 0.7])
        if seed:
            rows = json.loads((path / "results.json").read_text())
            rows = [{key: value for key, value in row.items() if key != "maj@8"} for row in rows]
            (path / "results.json").write_text(json.dumps(rows))
            with open(path / "log.jsonl", "a") as log:
                log.write('{"folder": "s1", "event": "edited", "files": ["losses.py"]}\n')
    text, _ = table(tmp_path, "table")
    assert "\nNot of all seeds: maj@8 of IRPO, M0, maj@8 of IRPO, M1.\n" in text
    assert "Continued after code was edited (--anyway), irpo/s1: losses.py." in text


def test_rerank_rows_starts_and_ranges_over_seeds(tmp_path):
    for seed, value in enumerate([0.8, 0.9, 1.0]):
        reft_run(tmp_path / "reft" / f"s{seed}", value, warm_up=0.5 + 0.1 * seed, seed=seed)
        reft_run(tmp_path / "nokl" / f"s{seed}", 0.3, warm_up=0.5 + 0.1 * seed, seed=seed)
    row = {"name": "best of 8 by reward", "iteration": None, "split": "test", "accuracy": 0.95, "ci95": [0.9, 1.0]}
    write_run(tmp_path / "rerank-reft" / "s0", [row])
    text, _ = table(tmp_path, "reft")
    assert table_cell(text, "ReFT ReFT", "accuracy") == "90.0% (65.2% to 100.0%)"
    assert table_cell(text, "ReFT warm-up", "accuracy").startswith("60.0%")
    assert len(re.findall(r"warm-up \| +60.0%", text.split("\n## ")[1])) == 1, "all cells start from the same models"
    assert table_cell(text, "ReFT, reranked best of 8", "accuracy") == "95.0% (90.0% to 100.0%)"
    assert table_cell(text, "ReFT ReFT", "kl") == "2.00 ± 2.48"
    runs = [run.steps for run in report.load_table(tmp_path)[1]["reft"].values()]
    assert report.curve(runs, "reward")[0] == (1, 1.0, 1.0, 1.0, [0.0, 1.0, 2.0])
    assert [point[:2] for point in report.curve(runs[:1], "dev")] == [(2, 0.2), (4, pytest.approx(0.6))]


def test_cells_are_named_by_their_flags_and_keep_their_warm_ups_apart(tmp_path):
    for cell, accuracy, warm_up in (("reft", 0.8, 0.5), ("sft+sft_lr@2e-5", 0.7, 0.5),
                                    ("reft+lr@1e-4+seed@1", 0.9, 0.6)):
        reft_run(tmp_path / cell / "s0", accuracy, warm_up)
    text, record = table(tmp_path, "reft")
    assert table_cell(text, "SFT, sft_lr 2e-5 ReFT", "accuracy").startswith("70.0%")
    assert table_cell(text, "ReFT, lr 1e-4, seed 1 ReFT", "accuracy").startswith("90.0%")
    assert table_cell(text, "ReFT warm-up", "accuracy").startswith("50.0%")
    assert table_cell(text, "ReFT, lr 1e-4, seed 1 warm-up", "accuracy").startswith("60.0%")
    assert "SFT, sft_lr 2e-5 | warm-up" not in re.sub(" +", " ", text), "the same models as ReFT's"
    assert record["missing"] == []


def test_dev_accuracy_on_the_way(tmp_path):
    """Dev is 0.2, 0.6, 1.0 after 2, 4, 6 steps: the lowest, and the first from step 3 on."""
    last = report.load_run(reft_run(tmp_path / "run", 0.8, steps=6)).models[-1]
    assert (last["dev_early"], last["dev_halfway"]) == (pytest.approx(0.2), pytest.approx(0.6))


def test_tables_that_cannot_be_made_are_refused_with_the_reason(tmp_path):
    with pytest.raises(InputError, match="no finished run"):
        call(report, "--table", tmp_path)
    rft_run(tmp_path / "k40" / "s0", 0.6)
    reft_run(tmp_path / "reft" / "s0", 0.6)
    with pytest.raises(InputError, match="runs of reft, rft"):
        call(report, "--table", tmp_path)
