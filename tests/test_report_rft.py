"""The report of RFT runs: every number in it is a number of the runs, or a mean or interval of them."""
import json

import pytest

from tools import report_rft
from tools.report import T_975
from tables import line, report


def results(accuracy: float, sft: float = 0.5, kept: int = 10, exclusive=(1.0,)) -> list[dict]:
    """results.json of a run, with two ks."""
    def rows(name, value):
        return [{"name": name, "iteration": 0, "split": split, "accuracy": value, "ci95": [value - 0.1, value + 0.1],
                 "n": 100, "maj@8": value + 0.05, "pass@1": value - 0.1} for split in ("dev", "test")]
    over_k = [{"k": k, "correct_paths": 0.5 * k, "distinct_paths": 0.1 * k, "solved": 0.5,
               "distinct_paths_and_gold": 1 + 0.1 * k, "exclusive": list(exclusive),
               "histogram": {"0": 5, str(k): 5}} for k in (1, 6)]
    train = {"name": "RFT", "iteration": 1, "split": "train", "kept": kept, "steps": 40,
             "tokens_trained": 1000, **over_k[-1], "over_k": over_k}
    return [*rows("SFT", sft), train, *rows("RFT", accuracy)]


def write(root, cell: str, seed: int, rows: list[dict]) -> None:
    folder = root / cell / f"s{seed}"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(rows))
    (folder / "command.txt").write_text("command  python rft.py --seed 0\ncommit   abc1234\n")
    (folder / "log.jsonl").write_text('{"event": "SFT", "seconds": 90.0}\n')
    (folder / "config.json").write_text(json.dumps({"num_samples": 6, "seed": seed}))


def test_three_seeds_give_means_and_student_intervals(tmp_path):
    root = tmp_path / "rft"
    for seed, value in enumerate([0.6, 0.7, 0.8]):
        write(root, "k50", seed, results(value, sft=0.5 + 0.01 * seed, kept=10 * seed))
        write(root, "k1", seed, results(0.55))
        write(root, "pool", seed, results(0.9, exclusive=(0.2, 0.3 + 0.1 * seed)))
    text, record = report(report_rft, root, tmp_path / "out")
    half = T_975[3] * 0.1 / 3 ** 0.5
    assert line(text, "RFT, k = 50")[0] == f"70.0% ± {half:.1%}"
    assert line(text, "RFT, k = 50")[-1] == "3"
    assert line(text, "SFT")[0].startswith("51.0%") and "10" in line(text, "RFT, k = 50")[4]
    assert line(text, "RFT, k = 1")[0] == "55.0% ± 0.0%"
    assert line(text, "6")[:2] == ["3.00 ± 0.00", "0.60 ± 0.00"] and line(text, "6")[4] == "1.74"
    assert line(text, "model 1")[0].startswith("40.0%")
    assert record["models"]["RFT, k = 50"]["accuracy"]["values"] == {"0": 0.6, "1": 0.7, "2": 0.8}
    assert record["runs"]["k50/s1"] == {"command": "python rft.py --seed 0", "commit": "abc1234",
                                        "minutes": 1.5}
    for name in ("accuracy.png", "paths.png", "solved.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_one_run_alone_shows_its_own_interval(tmp_path):
    """`make rft TASK=gsm8k` has one run: the Wilson interval of its test questions, never ± 0."""
    write(tmp_path, "x", 0, results(0.6))
    text, _ = report(report_rft, tmp_path / "x" / "s0", tmp_path / "out")
    assert line(text, "RFT, k = 6")[0] == "60.0% (50.0% to 70.0%)" and "±" not in line(text, "SFT")[0]


def test_a_pool_without_its_own_sft(tmp_path):
    """A pooled run has no SFT row; the table must not invent one."""
    write(tmp_path, "pool", 0, [row for row in results(0.6) if row["name"] != "SFT"])
    text, record = report(report_rft, tmp_path, tmp_path / "out")
    assert "SFT" not in record["models"]


def test_nothing_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["report_rft.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="no finished run"):
        report_rft.main()
