"""The report of ReFT runs: every number in it is a number of the runs, or a mean or interval of them."""
import json
import os
import re
import subprocess
import sys

import pytest

from tools import report_reft
from tools.report import T_975
from tables import line, report


def write(root, cell: str, seed: int, accuracy: float, warm_up: float = 0.5, steps: int = 4, epochs: int = 2) -> None:
    """A finished run with a training record whose reward and dev accuracy grow."""
    folder = root / cell / f"s{seed}"
    (folder / "iter1").mkdir(parents=True)
    def rows(name, t, value):
        return [{"name": name, "iteration": t, "split": split, "accuracy": value, "n": 100,
                 "ci95": [value - 0.1, value + 0.1], "pass@1": value - 0.05, "maj@8": value + 0.01}
                for split in ("dev", "test")]
    train = {"name": "ReFT", "iteration": 1, "split": "train", "reward": 0.7, "kl": 1.0 + seed, "steps": steps}
    (folder / "results.json").write_text(json.dumps(
        [*rows("warm-up", 0, warm_up), train, *rows("ReFT", 1, accuracy)]))
    (folder / "config.json").write_text(json.dumps(
        {"method": "reft", "seed": seed, "warmup_epochs": epochs, "num_choices": 2}))
    (folder / "command.txt").write_text("command  python reft.py\ncommit   abc1234\n")
    (folder / "log.jsonl").write_text('{"event": "train", "seconds": 60.0}\n')
    (folder / "iter1" / "train.jsonl").write_text("".join(json.dumps(
        {"step": s, "reward": 0.1 * s + seed, "kl": 1.0, "entropy": 0.1,
         **({"dev": {"accuracy": 0.2 * s}} if s % 2 else {})}) + "\n" for s in range(steps)))


def test_seeds_methods_and_reranking(tmp_path):
    root = tmp_path / "reft"
    for seed, value in enumerate([0.8, 0.9, 1.0]):
        write(root, "reft", seed, value, warm_up=0.5 + 0.1 * seed)
        write(root, "nokl", seed, 0.3, warm_up=0.5 + 0.1 * seed)
    folder = root / "rerank-reft" / "s0"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps([
        {"name": "best of 8 by reward", "split": "test", "accuracy": 0.95, "ci95": [0.9, 1.0], "pass@1": 0.7}]))
    (folder / "command.txt").write_text("command  python rerank.py\n")
    (folder / "log.jsonl").write_text("")
    text, record = report(report_reft, root, tmp_path / "out")
    half = T_975[3] * 0.1 / 3 ** 0.5
    assert line(text, "ReFT")[0] == f"90.0% ± {half:.1%}" and line(text, "ReFT")[3].startswith("90.0%")
    assert line(text, "warm-up")[0].startswith("60.0%") and line(text, "ReFT, no KL")[0] == "30.0% ± 0.0%"
    assert line(text, "ReFT, reranked")[0] == "95.0% (90.0% to 100.0%)"
    assert "2.00 ± 2.48" in text  # KL 1, 2, 3
    assert record["runs"]["reft/s2"] == {"command": "python reft.py", "commit": "abc1234", "minutes": 1.0}
    for name in ("reward.png", "kl.png", "dev.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_curves_are_means_with_the_range_of_seeds(tmp_path):
    for seed in (0, 2):
        write(tmp_path, "reft", seed, 0.8)
    runs = report_reft.load_runs(tmp_path)["reft"]
    assert report_reft.curve(runs, "reward")[:2] == [(1, 1.0, 0.0, 2.0), (2, 1.1, 0.1, 2.1)]
    assert report_reft.curve(runs, "dev") == [(2, 0.2, 0.2, 0.2), (4, pytest.approx(0.6), *[pytest.approx(0.6)] * 2)]


def test_one_run_alone(tmp_path):
    write(tmp_path, "x", 3, 0.8)
    text, _ = report(report_reft, tmp_path / "x" / "s3", tmp_path / "out")
    assert line(text, "s3")[0] == "80.0% (70.0% to 90.0%)"


def test_claims_follow_from_the_numbers(tmp_path):
    """Differences are of models with the same seed; what is said of a claim turns with them."""
    for seed in (0, 1, 2):
        write(tmp_path, "reft", seed, 0.5 + 0.1 * seed, warm_up=0.9)
        write(tmp_path, "sft", seed, 0.4 + 0.1 * seed, warm_up=0.9)
        write(tmp_path, "offline_st", seed, 0.6 + 0.1 * seed, warm_up=0.9)
        write(tmp_path, "online_st", seed, 0.6, warm_up=0.9)
        write(tmp_path, "separate", seed, 0.5 + 0.1 * seed, warm_up=0.9)
    write(tmp_path, "nokl", 1, 0.5, warm_up=0.9)
    text, _ = report(report_reft, tmp_path, tmp_path / "out")
    assert line(text, "R1: ReFT beats SFT") == ["+10.0 ± 0.0", "+10.0, +10.0, +10.0", "yes"]
    assert line(text, "R2: ReFT beats Offline-ST")[2] == "no"
    half = 100 * T_975[3] * 0.1 / 3 ** 0.5
    assert line(text, "R2: ReFT beats Online-ST") == [f"+0.0 ± {half:.1f}", "-10.0, +0.0, +10.0", "not shown"]
    assert line(text, "R7: a shared value head is as good as a critic of its own")[2] == "no difference shown"
    assert line(text, "R5: without KL it is worse") == ["+10.0", "+10.0", "one seed, no interval"]
    assert line(text, "R8: its vote beats SFT's")[0] == "+10.0 ± 0.0"
    assert line(text, "R11: dev accuracy first dips below the warm-up's")[0] == "+70.0 ± 0.0"  # 90 to 20
    assert "R6" not in text, "a claim without its runs"
    write(tmp_path / "other", "reft", 0, 0.5)
    write(tmp_path / "other", "reft", 1, 0.5)
    for seed, value in enumerate((0.75, 0.7501)):
        write(tmp_path / "other", "separate", seed, value)
    text, _ = report(report_reft, tmp_path / "other", tmp_path / "out")
    assert line(text, "R7: a shared value head is as good as a critic of its own")[2] == "no"


def test_letters_of_whole_numbers_only(tmp_path):
    """Gold may be written 203.0 or 1,203; an answer that is missing or no whole number is no letter."""
    pairs = [("5", "203.0"), ("4", "203.0"), ("7", "1,203"), (None, "2"), ("1/2", "3"), ("-1", "1"), ("1/2", "1.5")]
    for cell in ("letters", "reft"):
        write(tmp_path, cell, 0, 0.5)
        for t in (0, 1):
            folder = tmp_path / cell / "s0" / f"iter{t}"
            folder.mkdir(exist_ok=True)
            (folder / "eval_samples.jsonl").write_text('{"settings": {}}\n' + "".join(json.dumps(
                {"id": "q", "gold": gold, "samples": [{"answer": answer}]}) + "\n" for answer, gold in pairs))
    assert report_reft.letter_accuracy(tmp_path / "reft" / "s0", 1, 2) == pytest.approx(3 / 7)
    text, record = report(report_reft, tmp_path, tmp_path / "out")
    assert record["models"]["warm-up"]["letter_accuracy"]["values"] == {"0": pytest.approx(3 / 7)}
    assert "42.9%" in line(text, "ReFT, graded by letter")


def test_sweeps_are_named_by_their_flags_and_keep_their_warm_ups_apart(tmp_path):
    write(tmp_path, "reft", 0, 0.8, warm_up=0.5)
    write(tmp_path, "reft+gae_lambda@0.5", 0, 0.7, warm_up=0.5)
    write(tmp_path, "reft+warmup_epochs@4+lr@1e-4", 0, 0.9, warm_up=0.6, epochs=4)
    text, _ = report(report_reft, tmp_path, tmp_path / "out")
    assert line(text, "ReFT, gae_lambda 0.5")[0].startswith("70.0%")
    assert line(text, "ReFT, warmup_epochs 4, lr 1e-4")[0].startswith("90.0%")
    assert line(text, "warm-up, warmup_epochs 2")[0].startswith("50.0%")
    assert line(text, "warm-up, warmup_epochs 4")[0].startswith("60.0%")


def test_dev_accuracy_on_the_way(tmp_path):
    """Dev is 0, 0.4, 0.8 after 2, 4, 6 steps: the lowest, and the first from step 3 on."""
    write(tmp_path, "reft", 0, 0.8, steps=6)
    found = report_reft.dev_on_the_way(tmp_path / "reft" / "s0")
    assert found == {"dev_lowest": pytest.approx(0.2), "dev_halfway": pytest.approx(0.6)}


@pytest.mark.parametrize("cells", [1, 150])  # less than a buffer, which is seen at the end only, and more
def test_a_reader_who_leaves_early_is_no_error(tmp_path, cells):
    """`report_reft.py RUNS | head -1`: no traceback, and the files are there all the same."""
    for i in range(cells):
        write(tmp_path / "runs", f"cell{i}", 0, 0.8)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen([sys.executable, report_reft.__file__, tmp_path / "runs", "--out", tmp_path / "out"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered)
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and not re.search("Traceback|BrokenPipe", errors)
    assert (tmp_path / "out" / "reft.html").exists() and (tmp_path / "out" / "reward.png").exists()
