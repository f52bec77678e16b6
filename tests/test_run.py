"""Run directories and the files of their steps. (Flags, configs and runs that are resumed: see test_drivers.py.)"""
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.config import Options, option, parse_config
from infra.run import hash_of, log, once, open_run, read_records

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Config(Options):
    run_dir: str = option("", "directory of this run")
    lr: float = option(0.5, "learning rate", above=0)
    share: float = option(0.1, "of the steps", low=0, high=1)
    steps: tuple[int, ...] = option((2, 3), "how many", low=1)
    save_every: int = option(5, "steps between states", low=1, free=True)
    model: str = option("", "model directory", required=True)


@dataclass(frozen=True)
class Record:
    id: str
    value: float


def config(path: Path, **values) -> Config:
    return Config(run_dir=str(path), model="m", **values)


@pytest.mark.parametrize("flags, said", [
    ("--lr 0", "--lr 0.0: must be above 0"), ("--lr nan", "--lr nan: must be finite"), ("--lr inf", "must be finite"),
    ("--share 1.5", "--share 1.5: must be at most 1"), ("--share -1", "--share -1.0: must be at least 0"),
    ("--steps 2 0", "--steps 0: must be at least 1"), ("--model=", "--model is missing: model directory")])
def test_values_that_a_rule_excludes_are_refused(flags, said, capsys):
    """Also those of a preset. The ends of a range are allowed unless they are `above`."""
    with pytest.raises(SystemExit) as refused:
        parse_config(Config, {}, "", ["--model", "m", *flags.split()])
    assert refused.value.code == 2 and said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_config(Config, {"bad": dict(share=1.5)}, "", ["--model", "m", "--preset", "bad"])
    assert parse_config(Config, {}, "", "--model m --share 1 --steps 1".split()).share == 1


@pytest.mark.parametrize("flags, name", [
    ("", "runs/script-s0"), ("--save_every 9 --lr 1", "runs/script-lr1.0-s0"), ("--run_dir here", "here"),
    ("--preset small", "runs/script-small-s0"), ("--steps 2 4 --model a/b", "runs/script-steps2_4-s0")])
def test_a_run_is_named_by_its_flags(flags, name, monkeypatch):
    """But not by its model, nor by flags that may change when it is resumed."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    assert parse_config(Config, {"small": dict(lr=0.1)}, "", ["--model", "m", *flags.split()]).run_dir == name


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
    open_run(config(tmp_path, save_every=1))  # it is this process's own
    assert (tmp_path / "command.txt").read_text().count("command  ") == 2


def test_a_model_that_no_run_made_is_left_alone(tmp_path):
    """With --run_dir . in a folder of the user's own, its model/ was once deleted and trained anew."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="was not made by a run"):
        open_run(config(tmp_path))
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine" and not (tmp_path / "config.json").exists()


def test_a_step_comes_back_from_its_file_and_its_time_is_in_the_log(tmp_path):
    """What fails while it is made leaves no file."""
    open_run(config(tmp_path))
    path, records = tmp_path / "iter1" / "some.jsonl", [Record("a", 0.1), Record("b", float("1e-17"))]
    with pytest.raises(ZeroDivisionError):
        once(path, lambda: 1 / 0, Record, dict(weights="x"))
    assert not path.exists()
    assert once(path, lambda: records, Record, dict(weights="x", t=(1, 2))) == records
    assert once(path, lambda: pytest.fail("made again"), Record, dict(weights="x", t=(1, 2))) == records
    log(path.parent, event="more", seconds=1)
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(e["folder"], e["event"]) for e in events] == [("iter1", "some"), ("iter1", "more")]


@pytest.mark.parametrize("damage, said", [
    (lambda text: text.replace("1.0", "1.5"), "SHA-256"), (lambda text: text.replace('"x"', '"y"'), "SHA-256"),
    (lambda text: text[:-9], "does not hold records"),
    (lambda text: text.replace("value", "worth"), "does not hold records")])
def test_a_damaged_file_is_refused(tmp_path, damage, said):
    path = tmp_path / "some.jsonl"
    once(path, lambda: [Record("a", 1.0)], Record, dict(weights="x"))
    path.write_text(damage(path.read_text()))
    with pytest.raises(SystemExit, match=said):
        read_records(path, Record)


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    """The checksum is of the JSON text of [settings, rows], for good: sample files outlive the code that wrote them."""
    digest = "ebf9f2518282a193ef01274c6da334baf1e1812eb24e02d719b509c9af2d8b03"
    (tmp_path / "some.jsonl").write_text(
        f'{{"settings": {{"seed": 0}}, "sha256": "{digest}"}}\n{{"id": "a", "value": 1.5}}\n')
    assert read_records(tmp_path / "some.jsonl", Record) == ({"seed": 0}, [Record("a", 1.5)])


def test_hashes_see_values_and_contents(tmp_path):
    """And not the names of files."""
    for name, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).write_bytes(content)
    assert hash_of(tmp_path / "a") == hash_of(tmp_path / "c") != hash_of(tmp_path / "b")
    assert hash_of([Record("a", 1.0)]) == hash_of([Record("a", 1.0)]) != hash_of([Record("a", 1.0 + 1e-15)])
    assert hash_of(12, 0.01) != hash_of(1, 20.01)
    assert hash_of("a", "b") != hash_of("ab") and hash_of("a", "b") != hash_of("b", "a")
