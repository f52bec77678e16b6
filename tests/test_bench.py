"""What the benchmark compares is the same work, and what it prints is what it measured."""
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tools import bench
from tools import bench_train
from model import Llama, ModelConfig

TINY = ModelConfig(96, 64, 160, 2, 4, 2, 16, max_position_embeddings=256)
JOB = dict(shape="tiny", dtype="float32", num_samples=4, rows=8, prompt_tokens=20, new_tokens=5, device="cpu",
           threads=1)


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY)


@pytest.mark.parametrize("side", bench.SIDES)
def test_both_sides_draw_all_that_was_asked(side):
    """A side that stops at EOS, or answers fewer prompts, would seem the faster one."""
    if side == "transformers":
        pytest.importorskip("transformers")
    result = bench.measure({**JOB, "side": side})
    assert result["tokens"] == 8 * 5
    assert all(0 < seconds < 60 for seconds in result["seconds"].values())
    assert result["peak_mb"] > 0


def test_prompts_do_not_depend_on_how_many_there_are():
    """`generate` is timed on fewer rows: these must be the same prompts, of about the length asked for."""
    few, many = bench.random_prompts(JOB), bench.random_prompts({**JOB, "rows": 400})
    assert len(few) == 2 and len(many) == 100
    assert many[:2] == few
    assert {len(prompt) for prompt in many} == set(range(18, 23))


def test_work_is_what_the_sampler_does():
    """The share of the limit rests on this count: counted by torch, products are the same up to masked
    attention and lengths rounded up, which are a tenth of a model this wide. Weights are read once a step."""
    job = {**JOB, "side": "ours", "rows": 16, "prompt_tokens": 32, "new_tokens": 17}
    model = Llama(TINY).initialize(0)
    with FlopCounterMode(display=False) as counter:
        bench.run_ours(job, model)(17)
    flops, moved = bench.work_of(job)
    assert 0.85 * counter.get_total_flops() < flops < 1.03 * counter.get_total_flops()
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    cache = 2 * 2 * 32 * (4 * 32 + 16 * 17 / 2)  # keys and values, 2 layers, 2 heads of 16
    assert moved == pytest.approx(4 * 16 * (weights + cache))


def made_up_runs() -> dict:
    runs = []
    for n in bench.SAMPLES:
        for side, rates in (("ours", (400, 500, 1000)), ("transformers", (90, 100, 800))):
            runs += [{**JOB, "side": side, "num_samples": n, "tokens": 1000, "peak_mb": 70.0, "before_mb": 50.0,
                      "seconds": {"wall": 1000 / rate, "cpu": 1.0}} for rate in rates]
    return {"runs": runs, "growth": [{**runs[0], "num_samples": 16, "new_tokens": 10}],
            "limits": {"flops": {"float32": 1e9}, "copy": 1e9}}


def test_table_has_medians_and_their_ratio(tmp_path):
    """Means, the best of each side, or the wrong clock would flatter."""
    text = bench.sampling_table(made_up_runs(), "wall")
    assert text.count("| 500 (400 to 1,000) | 100 (90 to 800) | **5.0** | 70 | 70 |") == len(bench.SAMPLES)
    assert "**1.0**" in bench.sampling_table(made_up_runs(), "cpu")
    assert "| tiny | 20 | 10 | 400 | 25.00 |" in text
    pytest.importorskip("matplotlib")
    bench.plot(made_up_runs(), "wall", tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000


@pytest.mark.parametrize("flags", [["--rows", "31"], ["--rounds", "0"], ["--new_tokens", "1"],
                                   ["--clock", "cpu", "--threads", "2"], ["--shapes", "huge"]])
def test_flags_that_cannot_be_measured_are_refused(monkeypatch, capsys, tmp_path, flags):
    """Before minutes of work, not after."""
    monkeypatch.setattr(sys, "argv", ["bench.py", "--out", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit) as error:
        bench.main()
    assert error.value.code == 2
    assert flags[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_limits_are_measured():
    """Rates of zero, or in other units, would make any share look fine: a CPU does between 1 GFLOP/s and
    10 TFLOP/s, and copies between 0.1 and 1,000 GB/s."""
    threads = torch.get_num_threads()
    limits = bench.measure_limits({"device": "cpu", "threads": 1, "clock": "wall"})
    torch.set_num_threads(threads)
    assert set(limits["flops"]) == {"float32", "bfloat16"}
    assert all(1e9 < rate < 1e13 for rate in limits["flops"].values())
    assert 1e8 < limits["copy"] < 1e12


def test_our_training_is_measured(tmp_path, monkeypatch):
    """Two batches, as the bench's processes take many."""
    monkeypatch.setattr(bench_train, "STEPS", 2)
    monkeypatch.setattr(bench_train, "BATCH", 2)
    bench_train.save_model(Llama(TINY).initialize(0), tmp_path / "model")
    result = bench_train.ours(str(tmp_path / "model"), "fp32", "4096")
    assert 0 < result["seconds"] < 60 and result["peak_mb"] > 0


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--budgets", "4096", "0"], ["--peer_python", "no/such/python"],
                                   ["--sizes", "huge"]])
def test_training_that_cannot_be_measured_is_refused(monkeypatch, capsys, tmp_path, flags):
    """Before minutes of work, not after."""
    monkeypatch.setattr(sys, "argv", ["bench_train.py", "--out", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit) as error:
        bench_train.main()
    assert error.value.code == 2
    assert flags[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
