"""A training run that is stopped, killed or robbed of its files resumes to the same bits, or says why not."""
import dataclasses
import importlib.util
import io
import os
import resource
import signal
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import infra.state
import torture
from test_checkpoint import change_a_bit as flip
from infra import InputError
from infra.progress import Progress, iterations, print_above
from infra.run import read_jsonl, stop_asked
from infra.state import load_state, save_state, states
from infra.track import TRACKERS, numbers
from test_train import FP32, examples, nll
from tiny import tiny_model
from train import TrainOptions, fit, new_optimizer

OPTIONS = dataclasses.replace(FP32, lr=1e-2, batch_size=3, epochs=4, save_every=2, clip_norm=1.0)  # 12 steps


def run(folder: Path, options: TrainOptions = OPTIONS, after_step=lambda step: None, seed: int = 0,
        items=None) -> tuple[dict, list[dict]]:
    """Final weights and records of a small training run; every third record holds something that was measured."""
    model = tiny_model()

    def measured(step: int) -> dict:
        after_step(step)
        return {"dev": step / 3} if step % 3 == 0 else {}

    records = fit(model, items or examples(), nll, options, seed, folder, measured)
    assert read_jsonl(folder / "train.jsonl") == records
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}, records


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What comes out where nothing happens."""
    weights, records = run(tmp_path_factory.mktemp("whole"))
    assert [record["step"] for record in records if "dev" in record] == [2, 5, 8, 11]
    return weights, records


def assert_same(one, other) -> None:
    """Weights and records, which `run` has compared with train.jsonl."""
    assert one[1] == other[1]
    assert all(torch.equal(weight, other[0][name]) for name, weight in one[0].items())


class Killed(Exception):
    pass


def killed_after(step: int):
    """An after_step that ends a training run without warning in that step, before it could be saved."""
    def after_step(done: int) -> None:
        if done == step:
            raise Killed
    return after_step


@pytest.mark.parametrize("steps", [(1,), (2,), (12,), (3, 4, 5, 11), tuple(range(3, 13))], ids=str)
def test_killed_and_resumed_equals_uninterrupted(whole, tmp_path, steps):
    """Weights, moments, rates, batches, records: one of them forgotten or repeated shows in the last bit. A state is
    saved every second step, and two are kept. Each step has its line at once: once, an iteration's came at its end."""
    for step in steps:
        with pytest.raises(Killed):
            run(tmp_path, after_step=killed_after(step))
        assert [record["step"] for record in read_jsonl(tmp_path / "train.jsonl")] == [*range(step - 1)]
        with open(tmp_path / "train.jsonl", "a") as file:
            file.write('{"step": 99, "lo')  # a line of which only a part has reached the disk
        saved = [path.name for path in states(tmp_path / "state")]
        assert saved == [f"step-{n:08}" for n in range((step - 1) // 2 * 2, 0, -2)][:2]
    assert_same(run(tmp_path), whole)


def test_a_bar_that_nobody_reads_any_more_stops_no_training(monkeypatch):
    """Ctrl-C on `train.py | tee log` ends tee first: the next bar raised, before the state was saved."""
    bar = Progress("train", 3, "step")
    monkeypatch.setattr(bar, "sp", lambda text: (_ for _ in ()).throw(BrokenPipeError), raising=False)
    monkeypatch.setattr(bar, "mininterval", 0)
    for _ in range(2):
        bar.advance(1, 9, loss=0.5)
    assert bar.disable

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    print_above("dev accuracy 50.0%")  # nor does a line between the bars


@pytest.mark.parametrize("number, last", [(signal.SIGINT, 5), (signal.SIGTERM, 5), (signal.SIGTERM, 12)])
def test_asked_to_stop_it_finishes_the_step_and_says_how_to_resume(whole, tmp_path, number, last):
    """Also in the last step: it is not taken again."""
    before, taken = signal.getsignal(number), []
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, after_step=lambda step: step == last and os.kill(os.getpid(), number))
    assert f"stopped after step {last} of 12" in stopped.value.code and "same command" in stopped.value.code
    assert states(tmp_path / "state")[0].name == f"step-{last:08}"
    assert signal.getsignal(number) is before
    assert_same(run(tmp_path, after_step=taken.append), whole)
    assert taken == list(range(last + 1, 13))


def test_a_second_ctrl_c_does_not_wait():
    with pytest.raises(KeyboardInterrupt), stop_asked() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        pytest.fail("it waited")


def test_ctrl_c_that_nobody_saw_is_not_lost():
    """Between the last step's look and the end of the loop, it was forgotten, and the run went on."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_asked() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


# --- files that are not as they were ---------------------------------------------------------------

@pytest.fixture
def saved(tmp_path) -> list[Path]:
    """The states after 6 and after 4 steps of a run in tmp_path that was killed in its seventh. No file is a pickle,
    which can run code as it is loaded."""
    with pytest.raises(Killed):
        run(tmp_path, after_step=killed_after(7))
    found = states(tmp_path / "state")
    assert len(found) == 2
    assert {file.suffix for path in found for file in path.iterdir()} == {".json", ".safetensors"}
    return found


@pytest.mark.parametrize("file, spoil", [
    ("*.safetensors", flip), ("*.safetensors", lambda path: os.truncate(path, path.stat().st_size // 2)),
    ("*.safetensors", Path.unlink), ("state.json", lambda path: path.write_text("{"))],
    ids=["bit", "cut", "missing", "json"])
def test_a_damaged_state_is_passed_over_for_the_one_before(whole, saved, tmp_path, file, spoil, capsys):
    [path] = saved[0].glob(file)
    spoil(path)
    after = run(tmp_path)
    assert f"{saved[0]} is damaged and is skipped" in capsys.readouterr().out
    assert_same(after, whole)


def test_without_an_intact_state_it_stops_with_the_remedy(saved, tmp_path):
    """Beginning again in silence would throw hours away that a copy of the file may save."""
    for path in saved:
        flip(next(path.glob("*.safetensors")))
    with pytest.raises(InputError, match="no intact state. Remove it"):
        run(tmp_path)
    assert states(tmp_path / "state") == saved


@pytest.mark.parametrize("spoil", [
    lambda lines: lines[:5], lambda lines: lines[:2] + lines[3:] + lines[:1], lambda lines: ["{\n"] + lines[1:],
    lambda lines: ["1\n"] + lines[1:], lambda lines: []], ids=["lost", "moved", "damaged", "no record", "empty"])
def test_a_state_without_the_lines_of_its_steps_is_refused(whole, saved, tmp_path, spoil):
    """A summary of half of the steps would look like one of all. The file is left as it is, and put back it serves."""
    path = tmp_path / "train.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(bad := "".join(spoil(lines)))
    with pytest.raises(InputError, match=f"{path} does not have all of the 6 steps.*remove {tmp_path / 'state'} "):
        run(tmp_path)
    assert path.read_text() == bad
    path.write_text("".join(lines))
    assert_same(run(tmp_path), whole)


def test_a_state_of_another_run_is_refused_but_one_at_another_speed_is_not(saved, tmp_path):
    for change in (dict(seed=1), dict(options=dataclasses.replace(OPTIONS, lr=2e-2)), dict(items=examples(seed=5)),
                   dict(options=dataclasses.replace(OPTIONS, epochs=5)),
                   dict(options=dataclasses.replace(OPTIONS, batch_size=4, max_steps=12, epochs=6)),
                   dict(options=dataclasses.replace(OPTIONS, lr=20.01, max_steps=1))):  # "12" "0.01" and "1" "20.01"
        with pytest.raises(InputError, match="is from another training run.*Remove"):
            run(tmp_path, **change)
    options = dataclasses.replace(OPTIONS, save_every=5, micro_batch_tokens=30, skip_nonfinite=True)
    assert len(run(tmp_path, options)[1]) == 12


def test_a_full_disk_or_a_kill_while_saving_leaves_the_state_before(whole, saved, tmp_path):
    """Here a limit on the size of a file, which the weights exceed and small files do not."""
    before, model = resource.getrlimit(resource.RLIMIT_FSIZE), tiny_model()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(InputError, match="cannot be written: .*File too large.*intact: free"):
            save_state(tmp_path / "state", model, new_optimizer(model, OPTIONS), 8, "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert states(tmp_path / "state") == saved
    half = tmp_path / "state" / "step-00000008.new.tmp"
    half.mkdir(exist_ok=True)
    (half / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half of a")
    assert_same(run(tmp_path), whole)


def test_saving_copies_a_part_of_the_state_at_a_time(tmp_path, monkeypatch):
    """All was one file, of which the writer made two copies in memory: 3.2 GB of a model with 135 M parameters."""
    monkeypatch.setattr(infra.state, "FILE_BYTES", 2**20)
    model, again = (tiny_model(seed, vocab_size=4000, hidden_size=256, intermediate_size=2000) for seed in (0, 1))
    tracemalloc.start()
    save_state(tmp_path, model, new_optimizer(model, OPTIONS), 3, "")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < sum(weight.nbytes for weight in model.parameters())  # a third of the state
    assert load_state(tmp_path, again, new_optimizer(again, OPTIONS), "") == 3
    assert all(map(torch.equal, model.parameters(), again.parameters()))


# --- live metrics ----------------------------------------------------------------------------------

@pytest.fixture
def trackers(tmp_path, monkeypatch) -> dict[str, list]:
    """Stand-ins for both packages; what each was told."""
    told = {"tensorboard": [], "wandb": []}

    def init(**options):
        done = [step for _, step in told["wandb"]]
        return SimpleNamespace(step=max(done, default=-1) + 1, finish=lambda: None,
                               log=lambda row, step: told["wandb"].append((options["id"], step)))

    def writer(folder, purge_step, flush_secs):
        del told["tensorboard"][purge_step:]
        return SimpleNamespace(add_scalar=lambda *row: row[0] in ("loss", "dev") and told["tensorboard"].append(row),
                               close=lambda: None)

    for name, module in (("tensorboard", {}), ("torch.utils.tensorboard", {"SummaryWriter": writer}),
                         ("wandb", {"init": init})):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__spec__=True, **module))
    return told


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_has_each_step_once_however_often_the_run_was_killed(whole, trackers, tmp_path, name):
    """The steps between the state and the kill are taken again. A step may bring a column that is new."""
    options = dataclasses.replace(OPTIONS, track=name)
    for step in (2, 4, 8):
        with pytest.raises(Killed):
            run(tmp_path, options, killed_after(step))
    assert_same(run(tmp_path, options), whole)
    if name == "csv":
        head, *rows = [line.split(",") for line in (tmp_path / "train.csv").read_text().splitlines()]
        assert head == ["step", "lr", "loss", "tokens_counted", "grad_norm", "tokens", "dev"]
        assert rows == [[str(record.get(column, "")) for column in head] for record in whole[1]]
    elif name == "tensorboard":
        assert trackers[name] == [(column, record[column], record["step"]) for record in whole[1]
                                  for column in ("loss", "dev") if column in record]
    else:
        assert trackers[name] == [((tmp_path / "wandb_id").read_text(), step) for step in range(12)]


def test_what_is_tracked_is_numbers():
    assert numbers({"step": 3, "dev": {"accuracy": 0.5, "tags": {"style": 1}}, "warnings": {"kl": "high"}}) == {
        "step": 3, "dev/accuracy": 0.5, "dev/tags/style": 1}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_at_once(name, monkeypatch):
    """Not after an hour of sampling, by a traceback."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"--track {name} needs a package: pip install {name}"):
        TrainOptions(track=name)


def test_bars_say_the_iteration_and_the_time_left(capsys):
    for _ in iterations(2):
        with Progress("sample", 4, "sample") as bar:
            bar.advance(2, 10)
    with Progress("train", 4, "step") as bar:
        pass
    first, second, last = (text.split("\r")[-1] for text in capsys.readouterr().err.strip().split("\n"))
    assert first.startswith("iteration 1 of 2, sample:") and second.startswith("iteration 2 of 2, sample:")
    assert " 2/4 [" in first and " left, " in first and last.startswith("train:")


# --- make torture ----------------------------------------------------------------------------------

def test_a_script_killed_at_a_random_moment(base, tmp_path, capsys, monkeypatch):
    """One of the kills of `make torture`; and it sees what differs or is left over."""
    monkeypatch.setattr(sys, "argv", ["torture.py", "--out", str(tmp_path / "out"), "--kills", "1", "--methods", "sft"])
    monkeypatch.setitem(torture.RUNS, "sft", ["train.py", "--task", "toy", "--toy_steps", "1", "--model", str(base),
                                               "--max_steps", "20", "--save_every", "3"])
    with pytest.raises(SystemExit) as ended:
        torture.main()
    printed = capsys.readouterr().out
    assert not ended.value.code and "| sft | 1 | 1 |" in printed, printed

    whole, killed = tmp_path / "out" / "sft" / "whole" / "run", tmp_path / "out" / "sft" / "killed-0" / "run"
    assert torture.faults(whole, killed) == []
    flip(killed / "train.jsonl")
    (killed / "results.json.tmp").write_text("half")
    (whole / "model" / "config.json").unlink()
    assert [fault.split(":")[0].rpartition("/")[2] for fault in torture.faults(whole, killed)] == [
        "config.json", "results.json.tmp", "train.jsonl", "results.json.tmp"]
