"""The report of ReFT runs: every number in it is a number of the runs, or a mean or interval of them."""
import json
import re

import pytest

import report_reft
from report import T_975


def write(root, cell: str, seed: int, accuracy: float, warm_up: float = 0.5, steps: int = 4) -> None:
    """A finished run with a training record whose reward and KL grow."""
    folder = root / cell / f"s{seed}"
    (folder / "iter1").mkdir(parents=True)
    def rows(name, t, value):
        return [{"name": name, "iteration": t, "split": split, "accuracy": value, "n": 100,
                 "ci95": [value - 0.1, value + 0.1], "pass@1": value - 0.05, "maj@8": value + 0.01}
                for split in ("dev", "test")]
    train = {"name": "ReFT", "iteration": 1, "split": "train", "reward": 0.7, "kl": 1.0 + seed, "steps": steps}
    (folder / "results.json").write_text(json.dumps(
        [*rows("warm-up", 0, warm_up), train, *rows("ReFT", 1, accuracy)]))
    (folder / "config.json").write_text(json.dumps({"method": "reft", "seed": seed}))
    (folder / "command.txt").write_text("command  python reft.py\ncommit   abc1234\n")
    (folder / "log.jsonl").write_text('{"event": "train", "seconds": 60.0}\n')
    (folder / "iter1" / "train.jsonl").write_text("".join(json.dumps(
        {"step": s, "reward": 0.1 * s + seed, "kl": 1.0, "entropy": 0.1,
         **({"dev": {"accuracy": 0.2 * s}} if s % 2 else {})}) + "\n" for s in range(steps)))


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    def make(root) -> tuple[str, dict]:
        monkeypatch.setattr("sys.argv", ["report_reft.py", str(root), "--out", str(tmp_path / "out")])
        report_reft.main()
        assert "Test accuracy" in capsys.readouterr().out
        return ((tmp_path / "out" / "reft.md").read_text(),
                json.loads((tmp_path / "out" / "reft.json").read_text()))
    return make


def line(text: str, name: str) -> list[str]:
    return [cell.strip() for cell in re.search(rf"^\| {re.escape(name)} \|(.*)$", text, re.M)[1].split("|")]


def test_seeds_methods_and_reranking(tmp_path, report):
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
    text, record = report(root)
    half = T_975[3] * 0.1 / 3 ** 0.5
    assert line(text, "ReFT")[0] == f"90.0% ± {half:.1%}" and line(text, "ReFT")[3].startswith("90.0%")
    assert line(text, "warm-up")[0].startswith("60.0%") and line(text, "ReFT, no KL")[0] == "30.0% ± 0.0%"
    assert line(text, "ReFT, best of 8 by reward")[0] == "95.0% (90.0% to 100.0%)"
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


def test_one_run_alone(tmp_path, report):
    write(tmp_path, "x", 3, 0.8)
    text, _ = report(tmp_path / "x" / "s3")
    assert line(text, "s3")[0] == "80.0% (70.0% to 90.0%)"
