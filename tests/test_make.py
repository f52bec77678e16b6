"""The Makefile: what its targets run, and what it refuses."""
import os
import re
import shlex
import subprocess

import pytest

from commands import ROOT, dry_run, make_faults


def test_runs_are_never_made_side_by_side(tmp_path):
    """Two with two threads each took ten times as long as one after the other; a -j must not start both."""
    python, seen = tmp_path / "python", tmp_path / "seen"
    python.write_text(f"#!/bin/sh\necho start >> {seen}\nsleep 0.3\necho end >> {seen}\n")
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    subprocess.run(["make", "-s", "-j2", "-o", ".venv/runtime", "rft", "reft", f"PY={python}"], cwd=ROOT,
                   check=True, env=environment)
    assert seen.read_text().split() == ["start", "end"] * 3  # the base model of both, and each one's runs


@pytest.mark.parametrize("arguments, remedy", [
    (f"{goal} TASK=gsm8k", f"make {goal} TASK=gsm8k MODEL=dir") for goal in ("irpo", "rft", "reft", "eval")] + [
    (f"{goal} MODEL=dir", "needs TASK") for goal in ("irpo", "rft", "reft")])
def test_make_refuses_a_task_without_a_model_and_a_model_without_a_task(arguments, remedy):
    dry = dry_run(arguments.split())
    assert dry.returncode and remedy in dry.stderr and not dry.stdout


@pytest.mark.parametrize("arguments, programs", [
    *((f"{name} TASK=gsm8k MODEL=dir", [name, "tools.report"]) for name in ("irpo", "rft", "reft")),
    *((f"{name} SEED=3 JOBS=2", ["train", "tools.sweep"]) for name in ("rft", "reft")),
    ("tables", ["tools.sweep"] * 3), ("eval TASK=gsm8k MODEL=dir", ["evaluate"]),
    ("eval MODEL=dir", ["evaluate"]), ("data TASK=gsm8k", ["data.download"])])
def test_make_runs_the_right_programs(arguments, programs):
    """Besides those that make the environment, if it is missing."""
    dry = dry_run(arguments.split())
    assert not dry.returncode, dry.stderr
    assert [name for name in re.findall(r"python (?:-m )?(\S+?)(?:\.py)? ", dry.stdout)
            if name not in ("pip", "venv")] == programs


@pytest.mark.parametrize("goal", ["irpo", "rft", "reft", "sft", "eval"])
def test_a_model_is_one_argument(goal):
    """MODEL="a b" was the model a and an argument b. And all GPUs are used."""
    dry = dry_run([goal, "TASK=gsm8k", "MODEL=models/it's a 7B", "GPUS=2"])
    script = {"sft": "train", "eval": "evaluate"}.get(goal, goal)
    assert "models/it's a 7B" in shlex.split(dry.stdout.replace("\n", " "))
    assert f"torchrun --standalone --nproc_per_node 2 {script}.py" in dry.stdout


@pytest.mark.parametrize("variables, folder", [
    (["TASK=gsm8k"], "runs/irpo-gsm8k-s0"), (["TASK=../my data.jsonl"], "runs/irpo-my data.jsonl-s0"),
    (["TASK=gsm8k", "ARGS=--alpha 0 --run_dir runs/dpo --beta 1"], "runs/dpo")])
def test_the_report_is_of_the_run_that_was_made(variables, folder):
    dry = dry_run(["irpo", "MODEL=dir", *variables]).stdout.strip().splitlines()
    train, report = map(shlex.split, dry[-2:])
    assert [train[i + 1] for i, word in enumerate(train) if word == "--run_dir"][-1] == report[-1] == folder
    assert train[train.index("--task") + 1] == variables[0][len("TASK="):]


def test_every_command_in_the_makefile_parses():
    """Recipes call scripts with flags, too: all targets that `make help` lists, as `make -n` shows them."""
    targets = re.findall(r"^([\w-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(targets) > 3
    for target in targets:
        assert make_faults([target]) == [], target
