"""The number of ranks changes the order of additions, and nothing else."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint import model_hash, save_model
from infra import parallel
from runs import SMALL, base  # noqa: F401 (one is a fixture)
from tiny import tiny_model

ROOT = Path(__file__).resolve().parent.parent
RANKS = (1, 2)


def started(*command) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """What came of it; if it hangs, no rank of it stays."""
    try:
        stdout, stderr = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def under_torchrun(ranks: int, *command) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return ended(started(*launcher, *command))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, tuple[Path, dict]]:
    """ranks -> folder and findings of tests/ranks.py, all from the same weights."""
    model = tmp_path_factory.mktemp("model") / "m"
    save_model(tiny_model(num_key_value_heads=2), model)
    save_model(tiny_model(9), f"{model}-reference")
    found = {}
    for ranks in RANKS:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        done = under_torchrun(ranks, "tests/ranks.py", folder, model)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "abort" not in done.stderr.lower(), done.stderr[-3000:]
        found[ranks] = folder, json.loads((folder / "found.json").read_text())
    found["model"] = model
    return found


def assert_near(one: Path, other: Path, **tolerance) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_gradients(results, ranks):
    """Averages of averages, a division too many by the number of ranks, or a micro-batch that is computed again and
    counted: each is far outside 1e-6."""
    (one, before), (many, now) = results[1], results[ranks]
    assert_near(one / "gradients.safetensors", many / "gradients.safetensors", rtol=1e-5, atol=1e-6)
    assert now["losses"] == pytest.approx(before["losses"], rel=1e-6)


def test_gradients_sharded_within_nodes(results, tmp_path):
    """Two nodes of two ranks, both on this machine: weights are sharded within a node, and a gradient is summed
    within and across."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    nodes = [started("-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=2",
                     "--master_addr=localhost", f"--master_port={port}", "tests/ranks.py", tmp_path, results["model"])
             for node in range(2)]
    for done in map(ended, nodes):
        assert done.returncode == 0, done.stderr[-3000:]
    assert_near(results[1][0] / "gradients.safetensors", tmp_path / "gradients-shard_within_node.safetensors",
                rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_training(results, ranks):
    """Five steps with clipping and AdamW."""
    (one, before), (many, now) = results[1], results[ranks]
    assert_near(one / "trained-from-0.safetensors", many / "trained-from-0.safetensors", rtol=1e-3, atol=1e-4)
    assert [r["grad_norm"] for r in now["records"]] == pytest.approx([r["grad_norm"] for r in before["records"]],
                                                                     rel=1e-4)


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_ppo(results, ranks):
    """The advantages are whitened over the responses of all ranks, and the first ratio is 1 to the last bit
    since a rank trains on the responses that it measured."""
    (one, before), (many, now) = results[1], results[ranks]
    assert_near(one / "ppo.safetensors", many / "ppo.safetensors", rtol=1e-3, atol=1e-5)
    assert now["ppo"]["first_ratio_error"] == 0
    assert before["ppo"]["kl"] != 0
    for name, value in before["ppo"].items():
        assert now["ppo"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("written, read", [(2, 2), (1, 2), (2, 1)])
def test_a_state_resumes_on_any_number_of_ranks(results, written, read, tmp_path):
    """With the same number to the bit."""
    shutil.copytree(results[written][0] / "state", tmp_path / "state")
    done = under_torchrun(read, "tests/ranks.py", tmp_path, results["model"])
    assert done.returncode == 0, done.stderr[-3000:]
    before = load_file(results[written][0] / "trained-from-0.safetensors")
    after = load_file(tmp_path / "trained-from-3.safetensors")
    for name, weight in before.items():
        if written == read:
            assert torch.equal(after[name], weight), name
        torch.testing.assert_close(after[name], weight, rtol=1e-3, atol=1e-4)
    records = json.loads((tmp_path / "found.json").read_text())["records"]
    assert records[:3] == results[written][1]["records"][:3]


@pytest.mark.parametrize("ranks", RANKS)
def test_samples(results, ranks):
    """A model split over ranks gives the same responses; so does a copy of one in training."""
    found = results[ranks][1]["samples"]
    assert found["whole"] == results[1][1]["samples"]["whole"]
    for name in ("split", "of training"):
        assert found[name] == found["whole"]
        assert found[f"logits {name}"] == pytest.approx(found["logits whole"], abs=1e-4)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_sharded_model_is_saved_whole(results, ranks):
    assert model_hash(results[ranks][0] / "saved") == model_hash(results["model"])


@pytest.mark.parametrize("ranks", RANKS)
def test_agreements(results, ranks):
    """Every item is counted once; where items do not divide evenly, the first one is computed again."""
    found = results[ranks][1]["agreements"]
    assert found["seen"] == list(range(ranks)) and found["first"] == "rank 0"
    assert found["said by all"] == ["no"] * ranks
    for count, computed in found["dealt"].items():
        count = int(count)
        assert {len(items) for items in computed} == {-(-count // ranks)}
        assert sorted(sum(computed, [])) == sorted([*range(count), *[0] * (-count % ranks)])


@pytest.mark.parametrize("ranks", RANKS)
def test_all_ranks_leave_a_step_out_together(results, ranks):
    untouched, count = results[ranks][1]["skipped"]
    assert untouched is True and count == 1.0


def test_a_driver_with_two_ranks(base, tmp_path):  # noqa: F811
    """IRPO as a user starts it: the first samples are those of one rank, byte for byte, and the accuracies too; only
    rank 0 speaks."""
    arguments = [*SMALL, "--batch_rows", "6", "--precision", "fp32", "--model", base, "--iterations", "1"]
    runs = {ranks: tmp_path / str(ranks) for ranks in (1, 2)}
    outputs = {ranks: under_torchrun(ranks, "irpo.py", *arguments, "--run_dir", run) for ranks, run in runs.items()}
    for done in outputs.values():
        assert done.returncode == 0, done.stderr[-3000:]
    assert outputs[2].stdout == outputs[1].stdout.replace(str(runs[1]), str(runs[2]))
    for name in ("iter0/eval_samples.jsonl", "iter1/samples.jsonl"):
        assert (runs[1] / name).read_bytes() == (runs[2] / name).read_bytes(), name
    # one iteration of Adam's steps: every weight must have come the same way
    assert_near(runs[1] / "iter1/model/model.safetensors", runs[2] / "iter1/model/model.safetensors",
                rtol=1e-2, atol=1e-3)
    one, two = (json.loads((run / "results.json").read_text()) for run in runs.values())
    assert [row for row in one if row["iteration"] == 0] == [row for row in two if row["iteration"] == 0]
    assert [row.keys() for row in one] == [row.keys() for row in two]
    assert "2 ranks" in (runs[2] / "command.txt").read_text()
    assert not list(runs[2].rglob("*.tmp"))


def test_an_error_is_told_once_and_ends_all_ranks(base, tmp_path):  # noqa: F811
    done = under_torchrun(2, "irpo.py", *SMALL, "--model", base, "--run_dir", tmp_path / "run", "--max_new_tokens",
                          "4000")
    assert done.returncode != 0
    assert done.stderr.count("the longest prompt has") == 1, done.stderr[-3000:]


@pytest.mark.parametrize("ranks, shape", [(3, {}), (2, dict(num_key_value_heads=1)), (2, dict(intermediate_size=41))])
def test_a_model_that_cannot_be_split_is_refused(monkeypatch, ranks, shape):
    """Over ranks that do not divide the others, its heads or its hidden units."""
    monkeypatch.setattr(parallel, "world", lambda: 2)
    with pytest.raises(SystemExit, match=f"--tensor_parallel {ranks} must divide"):
        parallel.split_over_ranks(tiny_model(**shape), ranks)
