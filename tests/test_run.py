"""Run directories and the files of their steps. (Flags, configs and runs that are resumed: see test_drivers.py.)"""
import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

import infra.run
from infra import parallel
from infra import InputError
from infra.config import Options, option, parse_config
from infra.run import (Pieces, hash_of, log, once, open_run, read_json, read_jsonl, read_records, run_card, run_script,
                       write_json)

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Config(Options):
    run_dir: str = option("", "directory of this run")
    lr: float = option(0.5, "learning rate", above=0)
    share: float = option(0.1, "of the steps", low=0, high=1)
    steps: tuple[int, ...] = option((2, 3), "how many", low=1)
    save_every: int = option(5, "steps between states", low=1, free=True)
    model: str = option("", "model directory", required=True)
    anyway: bool = option(False, "whatever the code", free=True)


@dataclass(frozen=True)
class Record:
    id: str
    value: float


def config(path: Path, **values) -> Config:
    return Config(run_dir=str(path), model="m", **values)


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
    assert f"process {other.pid} on " in (message := refused(config(tmp_path))) and "--run_dir" in message
    assert not (tmp_path / "config.json").exists()
    other.kill()
    other.wait()
    open_run(config(tmp_path))
    assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()
    open_run(config(tmp_path, save_every=1))  # it is this process's own
    assert (tmp_path / "command.txt").read_text().count("command  ") == 2


def test_a_run_directory_holds_one_config_and_one_base_model(tmp_path):
    """Files of two configs in one directory make a table of neither; the difference is shown. The same path with new
    weights is another model. Flags of speed may change."""
    for _ in range(2):
        assert open_run(config(tmp_path / "run", lr=0.5), weights="a1") == tmp_path / "run"
    message = refused(config(tmp_path / "run", lr=2.0, steps=(1,)), weights="a1")
    for part in (str(tmp_path / "run"), "lr: 0.5 there, 2.0 now", "steps: [2, 3] there, [1] now", "--run_dir"):
        assert part in message
    assert "share" not in message and "weights" not in message
    assert "weights: 'a1' there, 'b2' now" in refused(config(tmp_path / "run"), weights="b2")
    open_run(config(tmp_path / "run", save_every=7), weights="a1")


def test_a_flag_that_is_added_to_the_code_had_its_default_before(tmp_path):
    """`--anyway` was no help: no run could be resumed once a fork had a new flag, and make base refused its model."""
    @dataclass(frozen=True)
    class New(Config):
        decay: float = option(0.2, "share of the steps", low=0)

    open_run(config(tmp_path))
    open_run(New(run_dir=str(tmp_path), model="m"))
    assert "decay: 0.2 there, 0.5 now" in refused(New(run_dir=str(tmp_path), model="m", decay=0.5))


def refused(config: Config, **inputs) -> str:
    with pytest.raises(InputError) as stop:
        open_run(config, **inputs)
    return str(stop.value)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_text()
            for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


@pytest.mark.parametrize("make", [
    lambda folder: write(folder / "model" / "notes.txt"), lambda folder: write(folder / "model"),
    lambda folder: (folder / "model").symlink_to(folder / "gone"), lambda folder: write(folder / "source" / "train.py"),
    lambda folder: write(folder / "state" / "step-1" / "x"), lambda folder: write(folder / "results.json"),
    lambda folder: write(folder / "config.json", '{"model_type": "llama"}'),  # a model directory
    lambda folder: write(folder / "config.json", '["run_dir'), lambda folder: write(folder / "picked.jsonl", "{}")])
def test_what_no_run_made_is_left_alone(tmp_path, make, monkeypatch):
    """With --run_dir . in a folder of the user's own, its model/ was once deleted and trained anew. Nor is anything
    else written over that has the name of a run's file, or added."""
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    for run in (tmp_path, Path(".")):
        assert "no run made that" in (message := refused(config(run))) and next(iter(before)).split("/")[0] in message
    assert contents(tmp_path) == before


def write(path: Path, text: str = "mine") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_other_files_may_lie_in_a_run_directory_but_no_other_run(tmp_path, monkeypatch):
    """Output of a scheduler, and first steps that a sweep has copied. In the state or the model of another run, a run
    would be deleted with it, or taken for it."""
    for name in ("output.txt", "iter0/eval.json", ".keep", "source_notes.md", "sources/a.py"):
        write(tmp_path / "run" / name)
    open_run(config(tmp_path / "run"))
    open_run(config(tmp_path / "run"))  # notes are no copy of the code
    assert (tmp_path / "run" / "output.txt").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "run" / "iter0")
    monkeypatch.chdir(tmp_path / "run" / "iter0")
    for inner in (tmp_path / "run" / "state", tmp_path / "run" / "model" / "b", Path("model"), tmp_path / "link" / "b"):
        assert f"is inside {tmp_path / 'run'}" in refused(config(inner))
        assert not inner.exists()


@pytest.mark.parametrize("place, reason", [("file/run", "Not a directory"), ("file", "File exists"),
                                           ("x" * 300, "File name too long")])
def test_a_directory_that_cannot_be_is_refused_with_the_reason(tmp_path, place, reason):
    write(tmp_path / "file")
    assert f"cannot write to {tmp_path / place}: {reason}. Give another --run_dir" in refused(config(tmp_path / place))


# --- full disks and lines that are cut short -------------------------------------------------------

@pytest.fixture
def full_disk(tmp_path):
    """A disk of 256 kB, and a function that leaves so many bytes of it free."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a disk needs root")

    def fill(free: int) -> Path:
        with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"x" * 4096):
                pass
        os.truncate(disk / "filler", (disk / "filler").stat().st_size - free)
        return disk

    yield fill
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # locks are held until the process ends


@pytest.mark.parametrize("free", [0, 8192, 65536])
def test_a_run_that_finds_the_disk_full_says_so_and_can_be_started_later(full_disk, free):
    """It said "cannot write to DIR: None": shutil.copytree has no reason of its own."""
    disk = full_disk(free)
    assert "No space left on device" in refused(config(disk / "run"))
    (disk / "filler").unlink()
    assert not (disk / "run" / "source").exists()


def test_a_step_that_finds_the_disk_full_keeps_what_was_there(full_disk):
    """Half a file under its name would be taken for a complete one when the run is resumed; and a half line of
    log.jsonl had the next one glued to it, which no reader could parse."""
    disk = full_disk(65536)
    write(disk / "config.json", "{}")
    write_json(disk / "some.json", {"a": 1})
    log(disk, event="first", seconds=1)
    full_disk(0)
    for act in (lambda: write_json(disk / "some.json", ["x" * 9999]), lambda: once(disk / "more.json", lambda: [1]),
                lambda: log(disk, event="x" * 9999, seconds=2)):
        with pytest.raises(InputError, match="json.? cannot be written: No space left on device.*same command again"):
            act()
    assert not list(disk.rglob("*.tmp")) and not (disk / "more.json").exists()
    assert read_json(disk / "some.json") == {"a": 1}
    (disk / "filler").unlink()
    log(disk, event="second", seconds=2)
    assert [line["event"] for line in read_jsonl(disk / "log.jsonl")] == ["first", "more", "second"]


@pytest.mark.parametrize("torn", ["", '{"time": 1, "eve', '{"time": 1}\n{"ti', "\n"])
def test_a_last_line_that_is_cut_short_goes(tmp_path, torn):
    write(tmp_path / "config.json", "{}")
    write(tmp_path / "log.jsonl", torn)
    log(tmp_path / "iter1", event="next")
    *before, last = (tmp_path / "log.jsonl").read_text().split("\n")[:-1]
    assert before == torn.split("\n")[:-1] and json.loads(last)["event"] == "next"


def test_a_run_needs_no_git(tmp_path, monkeypatch):
    """Without it the run directory was said to be missing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    open_run(config(tmp_path / "run"))
    assert "\ncommit   unknown\n" in (tmp_path / "run" / "command.txt").read_text()


def test_the_card_of_a_module_has_its_command(monkeypatch):
    """sys.argv has the file of a module that was run with -m, which as a script finds no imports."""
    monkeypatch.setattr("sys.orig_argv", [sys.executable, "-m", "tools.rerank", "--seed", "3"])
    monkeypatch.setattr("sys.argv", [str(ROOT / "tools" / "rerank.py"), "--seed", "3"])
    assert run_card().partition("\n")[0] == f"command  {Path(sys.executable).name} -m tools.rerank --seed 3"


def test_a_place_that_cannot_be_written_is_named_with_the_reason(tmp_path):
    """A file in the place of a folder, a folder in the place of a file, and a name that is too long."""
    write(tmp_path / "iter1")
    (tmp_path / "results.json").mkdir()
    for name, reason in (("iter1/x.json", "File exists|Not a directory"), ("results.json", "Is a directory"),
                         ("x" * 255, "File name too long")):
        with pytest.raises(InputError, match=f"{name} cannot be written: ({reason}).*same command"):
            write_json(tmp_path / name, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter1", "results.json"]


@pytest.mark.parametrize("error, said", [
    (OSError(28, "No space left on device", "runs/a"), "No space left on device: 'runs/a'"),
    (KeyboardInterrupt(), "run the same command again"), (BrokenPipeError(), "^141$"),
    (ModuleNotFoundError("get x by y"), "error: get x by y"),
    (InputError("no such model"), "^no such model$")])
def test_a_script_ends_with_a_sentence(error, said, tmp_path, monkeypatch):
    """Not with twenty lines of traceback; and a second Ctrl-C, as it ends, ends it at once, without one either."""
    monkeypatch.setattr(sys, "stdout", open(tmp_path / "stdout", "w"))  # a broken pipe puts /dev/null in its place

    def failing():
        raise error

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit, match=said):
            run_script(failing)
        assert {signal.getsignal(number) for number in before} == {signal.SIG_DFL}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- the files of steps ----------------------------------------------------------------------------

def test_a_step_comes_back_from_its_file_and_its_time_is_in_the_log(tmp_path):
    """What fails while it is made leaves no file. Settings and a SHA-256 are in its first line; each setting counts,
    also one that is new or gone."""
    open_run(config(tmp_path))
    path, records = tmp_path / "iter1" / "some.jsonl", [Record("a", 0.1), Record("b", float("1e-17"))]
    with pytest.raises(ZeroDivisionError):
        once(path, lambda: 1 / 0, Record, dict(weights="x"))
    assert not path.exists()
    assert once(path, lambda: records, Record, dict(weights="x", t=(1, 2))) == records

    def again(**settings) -> list[Record]:
        return once(path, lambda: pytest.fail("made again"), Record, settings)

    assert again(weights="x", t=(1, 2)) == records
    for other, said in ((dict(weights="y", t=(1, 2)), "weights: 'x' there, 'y' now"),
                        (dict(weights="x"), "t: .* there, None now"),
                        (dict(weights="x", t=(1, 2), seed=0), "seed: None there, 0 now")):
        with pytest.raises(InputError, match=rf"some.jsonl was made with other settings:\n  {said}"):
            again(**other)
    assert once(tmp_path / "x.json", lambda: {"a": 1}) == once(tmp_path / "x.json", dict) == {"a": 1}
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(e["folder"], e["event"]) for e in events] == [*[("iter1", "some")] * 2, (tmp_path.name, "x")]


@pytest.mark.parametrize("damage, said", [
    (lambda text: text.replace("1.0", "1.5"), "SHA-256"), (lambda text: text.replace('"x"', '"y"'), "SHA-256"),
    (lambda text: text[:text.rindex("{")], "SHA-256"), (lambda text: text[:-9], "cannot be read: Unterminated string"),
    (lambda text: text.replace("value", "worth"), "does not hold records")])
def test_a_damaged_file_is_refused(tmp_path, damage, said):
    """A line that was lost or edited would change the pairs, or the accuracy, and nobody would know."""
    path = tmp_path / "some.jsonl"
    once(path, lambda: [Record("a", 1.0)], Record, dict(weights="x"))
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=f"{path}.*{said}"):
        once(path, list, Record, dict(weights="x"))


def test_pieces_of_all_ranks_count(tmp_path, monkeypatch):
    """A rule that only rank 0 appends to files once lost those of the others. A line that a kill cut short does not
    spoil the next."""
    ours = Pieces(tmp_path / "a.jsonl", "seed 0")
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        ours.add([rank, "x"])
        with open(tmp_path / f"a.jsonl.part{rank}", "a") as file:
            file.write('0f [1, "half')
        ours.add([rank, "y"])
        Pieces(tmp_path / "a.jsonl", "seed 1").add("of another run")
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    Pieces(tmp_path / "a.jsonl.part", "seed 0").add("of another file")
    assert sorted(ours.read()) == [[0, "x"], [0, "y"], [1, "x"], [1, "y"]]
    Pieces(tmp_path / "a.jsonl").remove()
    assert not ours.read()


def test_time_before_a_stop_counts(tmp_path, monkeypatch):
    """A run of hours that was resumed for its last minute was said to have taken a minute."""
    write(tmp_path / "config.json", "{}")
    clock = iter([0, 7200, 7300, 7360])
    monkeypatch.setattr(infra.run, "time", SimpleNamespace(perf_counter=lambda: next(clock), time=lambda: 0.0))

    def stopped() -> list:
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        once(tmp_path / "iter1" / "a.json", stopped)
    once(tmp_path / "iter1" / "a.json", list)
    once(tmp_path / "iter1" / "a.json", list)
    lines = read_jsonl(tmp_path / "log.jsonl")
    assert [(line["folder"], line["event"], line["seconds"]) for line in lines] == [("iter1", "a", 7200),
                                                                                    ("iter1", "a", 60)]


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    """The checksum is of the JSON text of [settings, rows], for good: sample files outlive the code that wrote them."""
    digest = "ebf9f2518282a193ef01274c6da334baf1e1812eb24e02d719b509c9af2d8b03"
    write(tmp_path / "some.jsonl",
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
