"""What the benchmark compares is the same work, and what it prints is what it measured."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from infra import InputError
from model import ModelConfig
from runs import call
from tools import bench

TINY = ModelConfig(96, 64, 160, 2, 4, 2, 16, max_position_embeddings=256)
JOB = dict(shape="tiny", rows=[8], num_samples=[1, 4], prompt_tokens=20, new_tokens=5, dtype="fp32", threads=1,
           micro_batch_tokens=4096, trl_pairs=1, checkpoint_activations=False)


@pytest.fixture
def job(monkeypatch, tmp_path) -> dict:
    for name, value in dict(BATCH=2, STEPS=2).items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY)
    bench.write_model("tiny", tmp_path / "model")
    return JOB | {"model": str(tmp_path / "model")}


@pytest.mark.parametrize("half, engine", [(half, engine) for half in bench.ENGINES for engine in bench.ENGINES[half]])
def test_every_engine_does_all_of_the_work(half, engine, job):
    """An engine that stops at EOS, or answers fewer prompts, would seem the faster one; ticks that are missing, too."""
    for package in bench.ENGINES[half][engine].packages:
        pytest.importorskip(package)
    setting = [*bench.ENGINES[half][engine].settings.values()][0]
    results = bench.measure(setting | job | {"half": half, "engine": engine})
    tokens = sum(len(p.prompt + p.chosen) + len(p.prompt + p.rejected) for p in bench.random_pairs(job)) / 2
    assert [(r["num_samples"], r["rows"], r["tokens"]) for r in results] == {
        "sampling": [(1, 8, 40), (4, 8, 40)], "training": [("", 2, tokens)]}[half]
    for result in results:
        assert 0 < result["cpu"] < 60 and 0 < result["wall"] < 60 and 10 < result["peak_mb"] < 1e5
        assert set(result["versions"]) == {"torch", *bench.ENGINES[half][engine].packages}


def test_an_engine_that_samples_too_little_is_caught(job, monkeypatch):
    monkeypatch.setitem(bench.ENGINES["sampling"], "lazy", bench.Engine(lambda job: lambda prompts, n, new_tokens: 39))
    with pytest.raises(InputError, match="lazy sampled 39 tokens"):
        bench.measure(job | {"half": "sampling", "engine": "lazy"})


def test_more_rows_are_not_tried_after_a_long_measurement(job, monkeypatch):
    """1,024 rows of 135 million parameters would take an engine half an hour for each N."""
    engine = bench.Engine(lambda job: lambda prompts, n, new_tokens: len(prompts) * n * new_tokens)
    monkeypatch.setitem(bench.ENGINES["sampling"], "fast", engine)
    work = job | {"half": "sampling", "engine": "fast", "rows": [8, 16]}
    assert [r["rows"] for r in bench.measure(work)] == [8, 16, 8, 16]
    monkeypatch.setattr(bench, "ENOUGH", 0)
    assert [r["rows"] for r in bench.measure(work)] == [8, 8]


def test_prompts_do_not_depend_on_how_many_there_are(job):
    """Engines are timed on different numbers of rows: these must be the same prompts."""
    few, many = bench.random_prompts(job, 2), bench.random_prompts(job, 100)
    assert len(few) == 2 and len(many) == 100
    assert many[:2] == few and {len(prompt) for prompt in many} == {20}


def test_a_models_tokenizer_has_a_word_for_every_token(job):
    """CTranslate2 takes words, and TRL text: a word of two tokens, or of another, would be another prompt."""
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(f"{job['model']}/tokenizer.json")
    assert tokenizer.get_vocab_size() == TINY.vocab_size
    assert tokenizer.encode("<s> t3 t31 t95 </s>").ids == [1, 3, 31, 95, 2]


def test_the_parts_of_the_time_add_up(job):
    """Operators are counted once, by whoever called them: the draw's sums are not elementwise work of the model."""
    found = bench.time_parts(job)
    assert list(found) == ["sampling", "training"]
    for half, parts in found.items():
        assert sum(parts.values()) == pytest.approx(1) and min(parts.values()) >= 0
        assert (parts["drawing a token"] > 0, parts["optimizer"] > 0) == (half == "sampling", half == "training")
        assert parts["other products"] > 0 and parts["attention"] > 0


def test_busy_compares_what_each_run_chose(monkeypatch):
    """The ratio counts a step's seconds, each with the threads that --threads 0 chose, and the busy process ends."""
    started, made = [], iter([(6.0, 2), (12.0, 1)])

    def train(command: list[str], **options) -> None:
        run, (seconds, threads) = Path(command[-1]), next(made)
        run.mkdir()
        (run / "log.jsonl").write_text(f'{{"event": "start"}}\n{{"event": "train", "seconds": {seconds}}}\n')
        (run / "config.json").write_text(f'{{"threads": {threads}}}')
        started.append(len(spinning))

    spinning, Popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command: spinning.append(Popen(command)) or spinning[-1])
    monkeypatch.setattr(subprocess, "run", train)
    assert bench.busy() == (
        "a training step takes 0.100 s on the machine as it is (threads chosen: 2), 0.200 s beside one more busy "
        "process (threads chosen: 1), 2.00 times as long")
    assert started == [0, 1] and spinning[0].wait(10) < 0


def test_engines_take_turns_and_medians_are_printed(monkeypatch, tmp_path, capsys):
    """A mean, the best of each side, or a busy minute that one of them has alone would flatter the other; so would
    numbers of rows that do not suit one of them."""
    asked, speeds = [], {"ours": iter([400, 1000, 500]), "sdpa": iter([90, 800, 100]), "eager": iter([50, 60, 70])}

    def fake(python: str, job: dict) -> list[dict]:
        asked.append((job["engine"], python, job.get("attention")))
        speed = next(speeds[job.get("attention", "ours")])
        return [job | {"num_samples": "", "rows": rows, "tokens": 1000, "cpu": 1000 / speed * slower,
                       "wall": 4000 / speed, "peak_mb": 70.0} for rows, slower in ((8, 3), (32, 1), (64, 2))]

    monkeypatch.setattr(bench, "measure_elsewhere", fake)
    monkeypatch.setattr(bench, "pythons_of", lambda half, peers: {"ours": sys.executable, "trl": peers[0]})
    call(bench, "--halves", "training", "--shapes", "toy", "--peers", "/bin/true", "--out", tmp_path)
    assert asked == 3 * [("ours", sys.executable, None), ("trl", "/bin/true", "sdpa"), ("trl", "/bin/true", "eager")]
    text = (tmp_path / "bench.md").read_text()
    assert text in capsys.readouterr().out
    assert "| toy |  | ours |  | 32 | 3 | 500 (400 to 1,000) | 125 | 70 | **1.0** |" in text
    assert "| toy |  | trl | sdpa | 32 | 3 | 100 (90 to 800) | 25 | 70 | **5.0** |" in text
    assert "| toy |  | trl | eager | 32 | 3 | 60 (50 to 70) | 15 | 70 | **8.3** |" in text
    record = json.loads((tmp_path / "bench.json").read_text())
    assert len(record["training"]) == 27 and record["commit"] and record["machine"]


def test_an_engine_that_fails_is_said_and_nothing_measured_is_lost(monkeypatch, tmp_path):
    """A peer that broke after hours took all that was measured in its round with it, and all that came after it."""
    def fake(python: str, job: dict) -> list[dict]:
        asked.append(job["engine"])
        if job["engine"] == "trl" or asked.count("ours") > fine:
            raise InputError("the measurement failed:\nno such attention")
        return [job | {"num_samples": "", "rows": 32, "tokens": 1000, "cpu": 2, "wall": 4, "peak_mb": 70.0}]

    def text(*flags: object) -> str:
        call(bench, "--halves", "training", "--shapes", "toy", "--out", tmp_path, *flags)
        return (tmp_path / "bench.md").read_text()

    asked, fine, failed = [], 4, "\n- trl failed with the toy model: no such attention\n"
    monkeypatch.setattr(bench, "measure_elsewhere", fake)
    monkeypatch.setattr(bench, "pythons_of", lambda half, peers: {"ours": "", "trl": ""})
    assert text("--rounds", 1).count(failed) == 1, "the last to be measured"
    assert "| toy |  | ours |  | 32 | 3 | 500 (500 to 500) | 250 |" in text()
    assert (tmp_path / "bench.md").read_text().count(failed) == 1, "once for all rounds and settings"
    asked.clear()
    fine = 1
    with pytest.raises(InputError, match="the measurement failed"):
        text()
    assert "| toy |  | ours |  | 32 | 1 | 500 (500 to 500) | 250 |" in (tmp_path / "bench.md").read_text()


def test_parts_alone_are_written_and_nothing_to_measure_is_said(monkeypatch, tmp_path):
    """Minutes of measuring were lost, or the page of an earlier run was printed."""
    shares = {half: {"attention": 1.0} for half in ("sampling", "training")}
    monkeypatch.setattr(bench, "measure_elsewhere", lambda python, job: shares)
    call(bench, "--halves", "parts", "--shapes", "toy", "--out", tmp_path)
    assert "| attention | 100% | 100% |" in (tmp_path / "bench.md").read_text()
    with pytest.raises(InputError, match="nothing to measure: toy, 6.5m, 1b are trained"):
        call(bench, "--halves", "training", "--shapes", "135m", "--out", tmp_path)


def test_a_measurement_is_a_process_and_engines_without_packages_are_left_out(monkeypatch, tmp_path, capsys):
    """What is asked for and not there to measure, like the parts of the time of another model, is left out, too."""
    monkeypatch.setitem(bench.ENGINES, "sampling", {
        "ours": bench.Engine(bench.sample_ours),
        "absent": bench.Engine(bench.sample_ours, packages=("no_such_package",))})
    call(bench, "--halves", "sampling", "parts", "--shapes", "6.5m", "--rounds", 1, "--rows", 32,
             "--new_tokens", 2, "--out", tmp_path)
    assert "absent is left out: no Python with no_such_package" in capsys.readouterr().out
    results = json.loads((tmp_path / "bench.json").read_text())["sampling"]
    assert [(r["num_samples"], r["tokens"], r["engine"]) for r in results] == [(n, 64, "ours") for n in (1, 8, 16, 32)]


@pytest.mark.parametrize("flags", [["--rows", 31], ["--rounds", 0], ["--threads", 0], ["--shapes", "huge"],
                                   ["--trl_pairs", 5], ["--peers", sys.executable, "no/such/python"]], ids=str)
def test_what_cannot_be_measured_is_refused(monkeypatch, capsys, tmp_path, flags):
    """Before minutes of work, not after."""
    with pytest.raises((InputError, SystemExit)) as error:
        call(bench, "--out", tmp_path / "out", *flags)
    assert flags[0] in capsys.readouterr().err + str(error.value)
    assert not (tmp_path / "out").exists()
