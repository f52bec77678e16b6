"""The device, the precision and the threads that a run chooses, and keeps."""
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from infra import hardware, parallel
from infra import InputError
from infra.config import option, parse_config
from infra.hardware import ComputeOptions, dtype_of, faster_precision, idle_cores, usable_cores
from infra.run import ROOT, open_run
from train import autocast


@dataclass(frozen=True)
class Config(ComputeOptions):
    run_dir: str = option("", "directory of this run")


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Nothing of what a test chooses stays."""
    monkeypatch.setattr(parallel, "chosen", "")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_cores(monkeypatch):
    """A machine with two cores, both idle."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(hardware, "idle_cores", lambda: 2)


def gpu(monkeypatch, *, bf16: bool, count: int = 1) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)


def settled(capsys, *flags: str) -> tuple[Config, str]:
    capsys.readouterr()
    config = parse_config(Config, {}, "", list(flags))
    return config, capsys.readouterr().err


@pytest.mark.parametrize("speed, precision", [(0.25, "fp32"), (0.5, "fp32"), (1.1, "fp32"), (1.9, "bf16"), (8, "bf16")])
def test_a_cpu_computes_in_what_is_faster(speed, precision, monkeypatch, capsys, tmp_path):
    """A quarter of the speed: no bfloat16 in hardware. Half: a Xeon whose flags say avx512_bf16. Twice: an EPYC. Eight
    times: AMX. The sampler and autocast follow the same choice."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "bf16_speed", lambda: speed)
    config, said = settled(capsys, "--run_dir", str(tmp_path))
    assert config.precision == precision
    assert f"products in {precision} (a product in bf16 is {speed:.1f} times as fast as in fp32 here)" in said
    assert dtype_of("auto") == dtype_of(precision) == (torch.bfloat16 if precision == "bf16" else torch.float32)
    with autocast("auto"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype_of(precision)
    assert settled(capsys, "--precision", "bf16")[0].precision == "bf16"


@pytest.mark.parametrize("bf16, precision", [(True, "bf16"), (False, "fp32")])
def test_a_gpu_computes_in_bfloat16_if_it_can(bf16, precision, monkeypatch, capsys):
    """PyTorch emulates it on a T4 or V100, and says "supported" unless asked for more."""
    gpu(monkeypatch, bf16=bf16)
    assert faster_precision()[0] == precision
    if not bf16:
        with pytest.raises(SystemExit):
            settled(capsys, "--precision", "bf16")
        assert "this GPU does not support it; give fp32" in capsys.readouterr().err


def test_the_measurement_is_bfloat16_against_float32(monkeypatch):
    """By a clock where each product in bfloat16 takes 3 seconds, and one in float32 1."""
    clock = itertools.accumulate(itertools.cycle([0, 3, 0, 1]))
    monkeypatch.setattr(hardware, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    hardware.bf16_speed.cache_clear()
    assert hardware.bf16_speed() == pytest.approx(1 / 3)
    hardware.bf16_speed.cache_clear()


@pytest.mark.parametrize("flags, said", [
    ("--precision fp16", "choose from auto, bf16, fp32"), ("--device mps", "mps has no float64"),
    ("--device gpu", "give cpu, cuda or cuda:N"), ("--device cuda:2", "there are 2 GPUs, and the first is cuda:0")])
def test_what_cannot_be_computed_on_is_refused(flags, said, monkeypatch, capsys):
    gpu(monkeypatch, bf16=True, count=2)
    with pytest.raises(SystemExit):
        settled(capsys, *flags.split())
    assert said in capsys.readouterr().err


def test_a_device_is_used(monkeypatch, capsys, two_cores):
    gpu(monkeypatch, bf16=True, count=2)
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    settled(capsys)
    assert parallel.device() == "cuda" and used == []
    settled(capsys, "--device", "cuda:1")
    assert parallel.device() == "cuda" and used == [1]
    settled(capsys, "--device", "cpu")
    assert parallel.device() == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        settled(capsys, "--device", "cuda")
    assert "PyTorch finds no GPU here; give cpu" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_precision_and_its_threads(monkeypatch, capsys, two_cores, tmp_path):
    """On another machine, or on the same in another hour: otherwise its second half would be rounded differently."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "bf16_speed", lambda: 2.0)
    here = ["--run_dir", str(tmp_path / "run")]
    began, _ = settled(capsys, *here)
    open_run(began)
    monkeypatch.setattr(hardware, "bf16_speed", lambda: 0.5)
    monkeypatch.setattr(hardware, "idle_cores", lambda: 1)
    resumed, said = settled(capsys, *here)
    assert resumed == began and (began.precision, began.threads) == ("bf16", 2) and torch.get_num_threads() == 2
    assert "bf16 (as before), 2 threads; the machine is busy: 1 of 2 cores are idle" in said
    open_run(resumed)
    open_run(settled(capsys, *here, "--threads", "1")[0])  # that is free to change
    assert torch.get_num_threads() == 1
    with pytest.raises(InputError, match="precision: 'bf16' there, 'fp32' now"):
        open_run(settled(capsys, *here, "--precision", "fp32")[0])
    monkeypatch.chdir(tmp_path / "run")
    assert hardware.ComputeOptions().settled().precision == "fp32"  # a script without a run, in the folder of one
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"precision": "int4"}')  # not of a run
    other, said = settled(capsys, "--run_dir", str(tmp_path / "other"))
    assert (other.precision, other.threads) == ("fp32", 1) and "the machine is busy: 1 of 2 cores are idle" in said


@pytest.mark.parametrize("busy, idle", [(0.0, 2), (0.3, 2), (0.9, 1), (2.0, 1), (5.0, 1)])
def test_a_thread_for_each_idle_core(busy, idle, monkeypatch, two_cores):
    """Beside one busy process two threads on two cores were 30 times slower than one."""
    monkeypatch.undo()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    clock, ticks = iter([100.0, 100.2]), os.sysconf("SC_CLK_TCK")
    used, idles = iter([1000.0, 1000.0 + 0.1 * busy]), iter([99, 1099])

    def stat(path: Path) -> str:
        mine, rest = next(used) * ticks, next(idles)  # user and system, idle and iowait
        return f"cpu {mine:.0f} 0 {mine:.0f} {rest} {rest} 0 0 0 0 0\ncpu0 1\n"

    monkeypatch.setattr(hardware, "time", SimpleNamespace(perf_counter=lambda: next(clock), sleep=lambda seconds: None))
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", stat)
    assert idle_cores() == idle


def test_everything_imports_without_unix():
    """Windows has neither fcntl nor resource, nor os.fork: training and sampling do not need them."""
    code = ("import os, sys; sys.modules |= dict.fromkeys(('fcntl', 'resource', 'pwd', 'grp'))\n"
            "del os.fork, os.sched_getaffinity, os.killpg\n"
            "import irpo, rft, reft, evaluate, tools.sft, tools.chat, tools.report, tools.bench")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cores_that_may_not_be_used_do_not_count(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert usable_cores() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert usable_cores() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert idle_cores() == 1
