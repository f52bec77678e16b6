"""What the benchmark compares is the same work, and what it prints is what it measured."""
import json
import sys

import pytest

from checkpoint import save_model
from data.fresh import initialize
from model import Llama, ModelConfig
from tools import bench

TINY = ModelConfig(96, 64, 160, 2, 4, 2, 16, max_position_embeddings=256)
JOB = dict(shape="tiny", rows=8, num_samples=4, prompt_tokens=20, new_tokens=5, dtype="fp32", threads=1,
           micro_batch_tokens=4096)


@pytest.fixture
def job(monkeypatch, tmp_path) -> dict:
    for name, value in dict(BATCH=2, STEPS=2).items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY)
    save_model(initialize(Llama(TINY), 0), tmp_path / "model")
    return JOB | {"model": str(tmp_path / "model")}


@pytest.mark.parametrize("half, engine", [(half, engine) for half in bench.ENGINES for engine in bench.ENGINES[half]])
def test_every_engine_does_all_of_the_work(half, engine, job):
    """An engine that stops at EOS, or answers fewer prompts, would seem the faster one; ticks that are missing, too."""
    for package in bench.ENGINES[half][engine].packages:
        pytest.importorskip(package)
    setting = [*bench.ENGINES[half][engine].settings.values()][0]
    result = bench.measure(setting | job | {"half": half, "engine": engine})
    pairs = bench.random_pairs(job)
    expected = {"sampling": 8 * 5, "training": sum(
        len(p.prompt + p.chosen) + len(p.prompt + p.rejected) for p in pairs) / 2}
    assert result["tokens"] == expected[half]
    assert 0 < result["wall"] < 60 and 10 < result["peak_mb"] < 1e5
    assert set(result["versions"]) == {"torch", *bench.ENGINES[half][engine].packages}


def test_an_engine_that_samples_too_little_is_caught(job, monkeypatch):
    lazy = bench.Engine(lambda job, tick: [tick(), tick(), tick()] and 39)
    monkeypatch.setitem(bench.ENGINES["sampling"], "lazy", lazy)
    with pytest.raises(SystemExit, match="lazy sampled 39 tokens"):
        bench.measure(job | {"half": "sampling", "engine": "lazy"})


def test_prompts_do_not_depend_on_how_many_there_are(job):
    """Engines are timed on different numbers of rows: these must be the same prompts."""
    few, many = bench.random_prompts(job), bench.random_prompts(job | {"rows": 400})
    assert len(few) == 2 and len(many) == 100
    assert many[:2] == few and {len(prompt) for prompt in many} == {20}


def run_main(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, flags)])
    bench.main()


def test_engines_take_turns_and_medians_are_printed(monkeypatch, tmp_path, capsys):
    """A mean, the best of each side, or a busy minute that one of them has alone would flatter the other."""
    asked, speeds = [], {"ours": iter([400, 1000, 500]), "sdpa": iter([90, 800, 100]), "eager": iter([50, 60, 70])}

    def fake(python: str, job: dict) -> dict:
        asked.append((job["engine"], python, job.get("attention")))
        return job | {"tokens": 1000, "wall": 1000 / next(speeds[job.get("attention", "ours")]), "peak_mb": 70.0}

    monkeypatch.setattr(bench, "measure_elsewhere", fake)
    monkeypatch.setattr(bench, "pythons_of", lambda half, peer: {"ours": sys.executable, "trl": peer})
    run_main(monkeypatch, "--halves", "training", "--shapes", "toy", "--peer_python", "/bin/true", "--out", tmp_path)
    assert asked == 3 * [("ours", sys.executable, None), ("trl", "/bin/true", "sdpa"), ("trl", "/bin/true", "eager")]
    text = (tmp_path / "bench.md").read_text()
    assert text in capsys.readouterr().out
    assert "| toy |  | ours |  | 500 (400 to 1,000) | 70 | **1.0** |" in text
    assert "| toy |  | trl | sdpa | 100 (90 to 800) | 70 | **5.0** |" in text
    assert "| toy |  | trl | eager | 60 (50 to 70) | 70 | **8.3** |" in text
    record = json.loads((tmp_path / "bench.json").read_text())
    assert len(record["training"]) == 9 and record["commit"] and record["machine"]


def test_a_measurement_is_a_process_and_engines_without_packages_are_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench.ENGINES, "sampling", {
        "ours": bench.Engine(bench.sample_ours),
        "absent": bench.Engine(bench.sample_ours, packages=("no_such_package",))})
    monkeypatch.setitem(bench.SAMPLES, "sampling", (4,))
    run_main(monkeypatch, "--halves", "sampling", "--shapes", "toy", "--rounds", 1, "--rows", 32, "--new_tokens", 2,
             "--threads", 1, "--out", tmp_path)
    assert "absent is left out: no Python with no_such_package" in capsys.readouterr().out
    [result] = json.loads((tmp_path / "bench.json").read_text())["sampling"]
    assert result["tokens"] == 64 and result["engine"] == "ours"


@pytest.mark.parametrize("flags", [["--rows", 31], ["--rounds", 0], ["--threads", 0], ["--shapes", "huge"],
                                   ["--peer_python", "no/such/python"]], ids=str)
def test_what_cannot_be_measured_is_refused(monkeypatch, capsys, tmp_path, flags):
    """Before minutes of work, not after."""
    with pytest.raises(SystemExit) as error:
        run_main(monkeypatch, "--out", tmp_path / "out", *flags)
    assert flags[0] in capsys.readouterr().err + str(error.value)
    assert not (tmp_path / "out").exists()
