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

from infra import InputError
import irpo
import ranks as computed_by
from checkpoint import model_hash, save_model
from infra import parallel
from infra.run import read_jsonl
from runs import SMALL, call
from tiny import tiny_model

ROOT = Path(__file__).resolve().parent.parent
RANKS = (1, 2, 4)


def started(*command) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *map(str, command)], cwd=ROOT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """What came of it; if it hangs, no rank of it stays."""
    try:
        stdout, stderr = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def two_ranks(*command) -> subprocess.CompletedProcess:
    return ended(started("--standalone", "--nproc_per_node=2", *command))


def two_nodes(*command) -> list[subprocess.CompletedProcess]:
    """Two nodes of two ranks, both on this machine."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    nodes = [started("--nnodes=2", f"--node_rank={node}", "--nproc_per_node=2", "--master_addr=localhost",
                     f"--master_port={port}", *command) for node in range(2)]
    return [ended(node) for node in nodes]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, tuple[Path, dict]]:
    """ranks -> folder and findings of tests/ranks.py, all from the same weights, with a tied head: 1 in this process,
    2, and 4 on two nodes, where weights are sharded within a node, and a gradient is summed within and across."""
    model, found = tmp_path_factory.mktemp("model") / "m", {}
    save_model(tiny_model(num_key_value_heads=2, tie_word_embeddings=True), model)
    save_model(tiny_model(9), f"{model}-reference")
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}-") for ranks in RANKS}
    computed_by.compute(folders[1], model, None)
    done = [two_ranks("tests/ranks.py", folders[2], model, folders[1])]
    done += two_nodes("tests/ranks.py", folders[4], model, folders[2])
    for process in done:
        assert process.returncode == 0, process.stderr[-3000:]
        assert "abort" not in process.stderr.lower(), process.stderr[-3000:]
    for ranks, folder in folders.items():
        found[ranks] = folder, json.loads((folder / "found.json").read_text())
    return found | {"model": model}


def assert_near(one: Path, other: Path, **tolerance) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_training(results, ranks):
    """Averages of averages, a division too many by the number of ranks, or a micro-batch that is computed again and
    counted: each is far outside 1e-6 in the gradients. Then five steps with clipping and AdamW."""
    (one, before), (many, now) = results[1], results[ranks]
    assert_near(one / "gradients.safetensors", many / "gradients.safetensors", rtol=1e-5, atol=1e-6)
    assert now["losses"] == pytest.approx(before["losses"], rel=1e-6)
    assert_near(one / "trained.safetensors", many / "trained.safetensors", rtol=1e-3, atol=1e-4)
    assert [r["grad_norm"] for r in now["records"]] == pytest.approx([r["grad_norm"] for r in before["records"]],
                                                                     rel=1e-4)


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_probe(results, ranks):
    """One rank's pairs have gold solutions, the others' have none: were those scored on the way, ranks would wait for
    each other without end."""
    assert results[ranks][1]["probe"] == pytest.approx(results[1][1]["probe"], rel=1e-5)
    assert results[1][1]["probe"].keys() == {"chosen", "rejected", "gold"}


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


def test_a_state_resumes_on_any_number_of_ranks(results, tmp_path):
    """With the same number to the bit; from 1 to 2 and from 2 to 4 up to rounding, and back to 1."""
    for ranks in RANKS:
        folder, found = results[ranks]
        before, after = (load_file(folder / name) for name in (
            "trained.safetensors", f"resumed-{folder.name}.safetensors"))
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
        assert found["resumed"][0] == found["records"][3:]
    for written, read in ((1, 2), (2, 4)):
        folder, found = results[read]
        assert_near(results[written][0] / "trained.safetensors",
                    folder / f"resumed-{results[written][0].name}.safetensors", rtol=1e-3, atol=1e-4)
    computed_by.trained(tmp_path, results["model"], results[4][0] / "state")
    assert_near(results[4][0] / "trained.safetensors", tmp_path / f"resumed-{results[4][0].name}.safetensors",
                rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ranks", RANKS)
def test_samples(results, ranks):
    """A model split over ranks gives the same responses; so does a copy of one in training. It is saved complete."""
    found = results[ranks][1]["samples"]
    assert found["complete"] == results[1][1]["samples"]["complete"]
    for name in ("split", "of training"):
        assert found[name] == found["complete"]
        assert found[f"logits {name}"] == pytest.approx(found["logits complete"], abs=1e-4)
    assert model_hash(results[ranks][0] / "saved") == model_hash(results["model"])


@pytest.mark.parametrize("ranks", RANKS)
def test_agreements(results, ranks):
    """Every item is counted once; where items do not divide evenly, the first one is computed again. A step whose loss
    is not finite on one rank is left out by all."""
    found = results[ranks][1]["agreements"]
    assert found["seen"] == list(range(ranks)) and found["first"] == "rank 0"
    assert found["said by all"] == ["no"] * ranks
    assert ranks == 1 or found["settled"] == [["fp32", 3]] * ranks
    for count, computed in found["dealt"].items():
        count = int(count)
        assert {len(items) for items in computed} == {-(-count // ranks)}
        assert sorted(sum(computed, [])) == sorted([*range(count), *[0] * (-count % ranks)])
    assert results[ranks][1]["skipped"] == [True, 1.0]


@pytest.mark.parametrize("hands", [4, 1, 2])
def test_ranks_that_hold_a_model_together_work_on_the_same_items(hands, monkeypatch):
    """Neighbours with different prompts would wait for each other for ever. Every item is collected once, in order."""
    monkeypatch.setattr(parallel, "world", lambda: 4)
    mine = []
    for rank in range(4):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        mine.append([item for item, counts in parallel.dealt([*range(7)], hands) if counts])
    together = 4 // hands
    assert all(mine[rank] == mine[rank - rank % together] for rank in range(4)) and len({*map(tuple, mine)}) == hands
    monkeypatch.setattr(parallel, "gather", lambda value: mine)
    assert parallel.collected(mine[0], hands) == [*range(7)]


def test_more_ranks_than_gpus_are_refused_with_the_remedy(monkeypatch):
    """A rank died of "invalid device ordinal", and torchrun waited for the others."""
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel, "device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "platform", "other")  # where no signal is asked for
    with pytest.raises(InputError, match="2 ranks, but 1 GPUs here: start as many ranks as GPUs"):
        parallel.start()


def test_ranks_start_under_a_torchrun_that_is_process_1(tmp_path):
    """As it is in a container; they took it for dead, and killed themselves. unshare needs rights that not all have."""
    alone = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("unshare --pid is not allowed here")
    (tmp_path / "a.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom infra import parallel\n"
                                   "parallel.start()\nprint('rank', parallel.rank())\nparallel.finish()\n")
    done = subprocess.run([*alone, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           tmp_path / "a.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "rank 0\n", done.stderr[-3000:]


def test_a_script_with_two_ranks(base, tmp_path, capsys):
    """IRPO as a user starts it: the first samples are those of one rank, byte for byte, and the accuracies too; only
    rank 0 speaks. An error is told once and ends both ranks."""
    arguments = [*SMALL, "--batch_rows", "6", "--precision", "fp32", "--model", base, "--iterations", "1"]
    one, two = tmp_path / "1", tmp_path / "2"
    call(irpo, *arguments, "--run_dir", one)
    done = two_ranks("tests/small.py", "irpo.py", *arguments, "--run_dir", two)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == capsys.readouterr().out.replace(str(one), str(two))
    for name in ("iter0/eval_samples.jsonl", "iter1/samples.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    # one iteration of Adam's steps: every weight must have come the same way, by the same losses
    assert_near(*(run / "iter1/model/model.safetensors" for run in (one, two)), rtol=1e-2, atol=1e-3)
    steps, others = ([[step[name] for name in ("loss", "dpo", "nll", "grad_norm")]
                      for step in read_jsonl(run / "iter1/train.jsonl")] for run in (one, two))
    assert len(steps) > 3 and sum(others, []) == pytest.approx(sum(steps, []), rel=1e-3)
    rows, others = (json.loads((run / "results.json").read_text()) for run in (one, two))
    assert [row for row in rows if row["iteration"] == 0] == [row for row in others if row["iteration"] == 0]
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    assert "2 ranks" in (two / "command.txt").read_text() and not [*two.rglob("*.tmp"), *two.rglob("*.part*")]

    done = two_ranks("irpo.py", *SMALL, "--model", base, "--run_dir", tmp_path / "3", "--max_new_tokens", "4000")
    assert done.returncode != 0
    assert done.stderr.count("the longest prompt has") == 1, done.stderr[-3000:]


@pytest.mark.parametrize("ranks, shape", [(3, {}), (2, dict(num_key_value_heads=1)), (2, dict(intermediate_size=41))])
def test_a_model_that_cannot_be_split_is_refused(monkeypatch, ranks, shape):
    """Over ranks that do not divide the others, its heads or its hidden units."""
    monkeypatch.setattr(parallel, "world", lambda: 2)
    with pytest.raises(InputError, match=f"--tensor_parallel {ranks} must divide"):
        parallel.split_over_ranks(tiny_model(**shape), ranks)
