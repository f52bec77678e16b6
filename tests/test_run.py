"""Run directories, files of steps, and the command line made from a dataclass."""
import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra import run
from infra.config import Options, option, parse_config
from infra.run import hash_of, log, once, open_run, read_records, write_text

ROOT = Path(run.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Config(Options):
    run_dir: str = option("", "directory of this run")
    seed: int = option(0, "of everything")
    lr: float = option(0.5, "learning rate", above=0)
    share: float = option(0.1, "of the steps", low=0, high=1)
    steps: tuple[int, ...] = option((2, 3), "how many", low=1)
    kind: str = option("a", "which", ("a", "b"))
    gold: bool = option(True, "with gold")
    save_every: int = option(5, "steps between states", low=1, free=True)
    model: str = option("", "model directory", required=True)


@dataclass(frozen=True)
class Record:
    id: str
    value: float


def config(path: Path, **values) -> Config:
    return Config(run_dir=str(path), model="m", **values)


# --- the command line -----------------------------------------------------------------------------

def parsed(*argv: str) -> Config:
    return parse_config(Config, {"small": dict(lr=0.1, seed=7)}, "A script.", ["--model", "m", *argv])


def test_defaults_then_preset_then_flags():
    assert parsed().lr == 0.5 and parsed("--preset", "small").lr == 0.1
    found = parsed("--preset", "small", "--lr", "2", "--steps", "4", "5", "6", "--no_gold")
    assert (found.lr, found.seed, found.steps, found.gold) == (2.0, 7, (4, 5, 6), False)
    assert parsed("--no-gold").gold is False and parsed("--gold").gold is True


@pytest.mark.parametrize("flags, said", [
    ("--lr 0", "--lr 0.0: must be above 0"), ("--lr nan", "--lr nan: must be finite"), ("--lr inf", "must be finite"),
    ("--share 1.5", "--share 1.5: must be at most 1"), ("--share -1", "--share -1.0: must be at least 0"),
    ("--steps 2 0", "--steps 0: must be at least 1"), ("--kind c", "--kind c: choose from a, b"),
    ("--save_every 0", "--save_every 0: must be at least 1"), ("--sed 3", "--sed"), ("--see 3", "--see"),
    ("--preset large", "--preset"), ("--seed x", "--seed")])
def test_impossible_flags_are_refused_with_their_value(flags, said, capsys):
    """Unknown and abbreviated flags, too: a typo must not run an hour with a default."""
    with pytest.raises(SystemExit) as refused:
        parsed(*flags.split())
    assert refused.value.code == 2 and said in capsys.readouterr().err


def test_a_missing_model_is_told_with_its_help(capsys):
    with pytest.raises(SystemExit):
        parse_config(Config, {}, "", [])
    assert "--model is missing: model directory" in capsys.readouterr().err


@pytest.mark.parametrize("argv, name", [
    ([], "runs/script-s0"), (["--seed", "3", "--kind", "b"], "runs/script-kindb-s3"),
    (["--save_every", "9", "--lr", "1"], "runs/script-lr1.0-s0"), (["--preset", "small"], "runs/script-small-s0"),
    (["--steps", "2", "4"], "runs/script-steps2_4-s0"), (["--run_dir", "here"], "here")])
def test_a_run_is_named_by_its_flags(argv, name, monkeypatch):
    """But not by its model, nor by flags that may change when it is resumed."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    assert parsed(*argv).run_dir == name


# --- the run directory ----------------------------------------------------------------------------

HOLD = """import sys, time, pathlib
from infra.run import lock
lock(pathlib.Path(sys.argv[1]))
print('held', flush=True)
time.sleep(60)"""


def test_two_runs_in_one_directory(tmp_path):
    """The second is told who has it; once the first is dead, whatever killed it, the directory is free."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(SystemExit) as refused:
        open_run(config(tmp_path))
    assert f"process {other.pid} on " in refused.value.code and "--run_dir" in refused.value.code
    assert not (tmp_path / "config.json").exists()
    other.kill()
    other.wait()
    open_run(config(tmp_path))
    assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()
    open_run(config(tmp_path))  # it is this process's own


def test_changed_flags_and_inputs_are_refused_but_free_ones_are_not(tmp_path):
    open_run(config(tmp_path), problems="abc")
    with pytest.raises(SystemExit, match="problems: 'abc' there, 'abd' now"):
        open_run(config(tmp_path), problems="abd")
    with pytest.raises(SystemExit, match="lr: 0.5 there, 0.25 now"):
        open_run(config(tmp_path, lr=0.25), problems="abc")
    open_run(config(tmp_path, save_every=1), problems="abc")
    assert (tmp_path / "command.txt").read_text().count("command  ") == 2
    assert (tmp_path / "source" / "irpo.py").is_file() and not (tmp_path / "source" / "tests").exists()


def test_a_model_that_no_run_made_is_left_alone(tmp_path):
    """With --run_dir . in a folder of the user's own, its model/ was once deleted and trained anew."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="was not made by a run"):
        open_run(config(tmp_path))
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine" and not (tmp_path / "config.json").exists()


# --- steps and files ------------------------------------------------------------------------------

def test_a_step_is_made_once(tmp_path):
    """What comes back from the file is what was made, and its time is in the run's log."""
    open_run(config(tmp_path))
    path, records = tmp_path / "iter1" / "some.jsonl", [Record("a", 0.1), Record("b", float("1e-17"))]
    assert once(path, lambda: records, Record, dict(weights="x", t=(1, 2))) == records
    assert once(path, lambda: pytest.fail("made again"), Record, dict(weights="x", t=(1, 2))) == records
    assert once(tmp_path / "n.json", lambda: {"a": [1]}) == once(tmp_path / "n.json", lambda: 0) == {"a": [1]}
    log(path.parent, event="more", seconds=1)
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(e["folder"], e["event"]) for e in events] == [("iter1", "some"), (tmp_path.name, "n"), ("iter1", "more")]


def test_a_file_of_other_settings_is_refused(tmp_path):
    """Such as samples of another model, copied from another run."""
    path = tmp_path / "some.jsonl"
    once(path, lambda: [Record("a", 1.0)], Record, dict(weights="x"))
    with pytest.raises(SystemExit, match="weights: 'x' there, 'y' now"):
        once(path, lambda: [], Record, dict(weights="y"))


@pytest.mark.parametrize("damage, said", [
    (lambda text: text.replace("1.0", "1.5"), "SHA-256"), (lambda text: text[:-9], "does not hold records"),
    (lambda text: text.replace("value", "worth"), "does not hold records")])
def test_a_damaged_file_is_refused(tmp_path, damage, said):
    path = tmp_path / "some.jsonl"
    once(path, lambda: [Record("a", 1.0)], Record, dict(weights="x"))
    path.write_text(damage(path.read_text()))
    with pytest.raises(SystemExit, match=said):
        read_records(path, Record)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    """A full disk: the reason is named, the old file stays, and no half of the new one."""
    path = tmp_path / "results.json"
    write_text(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.os, "fsync", full)
    with pytest.raises(SystemExit, match="results.json cannot be written: No space left on device"):
        write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_hashes_see_values_and_contents(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    before = hash_of(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"2")
    assert hash_of(tmp_path / "a") != before
    assert hash_of([Record("a", 1.0)]) == hash_of([Record("a", 1.0)]) != hash_of([Record("a", 1.0 + 1e-15)])
    assert dataclasses.asdict(Record("a", 1.0)) == {"id": "a", "value": 1.0}
