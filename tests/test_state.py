"""A training run that is stopped, killed or robbed of its files resumes to the same bits, or says why not."""
import dataclasses
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import torture
from infra.run import StopAsked
from infra.state import load_state, save_state, states
from runs import SMALL, base  # noqa: F401 (one is a fixture)
from test_train import FP32, examples, nll
from tiny import tiny_model
from train import TrainOptions, fit, new_optimizer

OPTIONS = dataclasses.replace(FP32, lr=1e-2, batch_size=3, epochs=4, save_every=2, clip_norm=1.0)  # 12 steps


def run(folder: Path, options: TrainOptions = OPTIONS, after_step=lambda step: {}, seed: int = 0,
        items=None) -> tuple[dict, list[dict]]:
    """Final weights and records of a small training."""
    model = tiny_model()
    records = fit(model, items or examples(), nll, options, seed, folder, after_step)
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}, records


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What comes out where nothing happens."""
    return run(tmp_path_factory.mktemp("whole"))


def assert_same(one, other) -> None:
    assert one[1] == other[1]
    assert all(torch.equal(weight, other[0][name]) for name, weight in one[0].items())


class Killed(Exception):
    pass


def killed_after(step: int):
    """An after_step that ends a training without warning in that step, before it could be saved."""
    def after_step(done: int) -> dict:
        if done == step:
            raise Killed
        return {}
    return after_step


@pytest.mark.parametrize("steps", [(1,), (2,), (5,), (12,), (3, 4, 5, 11), tuple(range(3, 13))], ids=str)
def test_killed_and_continued_equals_uninterrupted(whole, tmp_path, steps):
    """Weights, moments, rates, batches, records: one of them forgotten or repeated shows in the last bit."""
    for step in steps:
        with pytest.raises(Killed):
            run(tmp_path, after_step=killed_after(step))
        saved = [path.name for path in states(tmp_path / "state")]
        assert saved == [f"step-{n:08}" for n in range((step - 1) // 2 * 2, 0, -2)][:2]
    assert_same(run(tmp_path), whole)


def test_what_a_step_adds_to_the_record_survives(tmp_path):
    """The probes of IRPO and the dev accuracies of a selection are measured along the way."""
    def measured(step: int) -> dict:
        return {"dev": step / 3} if step % 3 == 0 else {}

    with pytest.raises(Killed):
        run(tmp_path, after_step=lambda step: measured(step) | killed_after(8)(step))
    _, records = run(tmp_path, after_step=measured)
    assert [(record["step"], record["dev"]) for record in records if "dev" in record] == [
        (2, 1.0), (5, 2.0), (8, 3.0), (11, 4.0)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_finishes_the_step_and_says_how_to_go_on(whole, tmp_path, number):
    def stop(step: int) -> dict:
        if step == 5:
            os.kill(os.getpid(), number)
        return {}

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, after_step=stop)
    assert "stopped after step 5 of 12" in stopped.value.code and "same command" in stopped.value.code
    assert states(tmp_path / "state")[0].name == "step-00000005"
    assert signal.getsignal(number) is before
    assert_same(run(tmp_path), whole)


def test_asked_in_the_last_step_nothing_is_lost(whole, tmp_path):
    def stop(step: int) -> dict:
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(SystemExit, match="12 of 12"):
        run(tmp_path, after_step=stop)
    assert_same(run(tmp_path, after_step=killed_after(1)), whole)  # no step is taken again


def test_a_second_ctrl_c_does_not_wait():
    with pytest.raises(KeyboardInterrupt), StopAsked() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


# --- files that are not as they were --------------------------------------------------------------

def two_states(tmp_path: Path) -> list[Path]:
    with pytest.raises(Killed):
        run(tmp_path, after_step=killed_after(7))
    return states(tmp_path / "state")  # after 6 and after 4 steps


def spoil(path: Path, how: str) -> None:
    [weights] = path.glob("*.safetensors")
    if how == "bit":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
    elif how == "cut":
        os.truncate(weights, weights.stat().st_size // 2)
    elif how == "shard":
        weights.unlink()
    elif how == "record":
        (path / "records.jsonl").write_text("")
    else:
        (path / "state.json").write_text("{")


@pytest.mark.parametrize("how", ["bit", "cut", "shard", "record", "json"])
def test_a_spoiled_state_is_passed_over_for_the_one_before(whole, tmp_path, how, capsys):
    newest, _ = two_states(tmp_path)
    spoil(newest, how)
    after = run(tmp_path)
    assert f"{newest} is damaged and is skipped" in capsys.readouterr().out
    assert_same(after, whole)


def test_without_a_whole_state_it_stops_with_the_remedy(tmp_path):
    """Beginning again in silence would throw hours away that a copy of the file may save."""
    for path in two_states(tmp_path):
        spoil(path, "bit")
    with pytest.raises(SystemExit, match="no intact state. Remove it"):
        run(tmp_path)
    assert len(states(tmp_path / "state")) == 2


@pytest.mark.parametrize("change", [
    dict(seed=1), dict(options=dataclasses.replace(OPTIONS, lr=2e-2)), dict(items=examples(seed=5)),
    dict(options=dataclasses.replace(OPTIONS, epochs=5))], ids=["seed", "lr", "items", "steps"])
def test_a_state_of_another_run_is_refused(tmp_path, change):
    two_states(tmp_path)
    with pytest.raises(SystemExit, match="the state of another training run.*Remove"):
        run(tmp_path, **change)


def test_what_changes_speed_and_memory_only_may_change(tmp_path):
    two_states(tmp_path)
    options = dataclasses.replace(OPTIONS, save_every=5, micro_batch_tokens=30, skip_nonfinite=True)
    assert len(run(tmp_path, options)[1]) == 12


def test_a_full_disk_leaves_the_state_before(whole, tmp_path):
    """Here a limit on the size of a file, which the weights exceed and small files do not."""
    two_states(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = tiny_model()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(SystemExit, match="cannot be written: .*File too large.*intact: free"):
            save_state(tmp_path / "state", model, new_optimizer(model, OPTIONS), [{}] * 8, "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in states(tmp_path / "state")] == ["step-00000006", "step-00000004"]
    assert_same(run(tmp_path), whole)


def test_a_kill_while_saving_leaves_the_state_before(whole, tmp_path):
    two_states(tmp_path)
    half = tmp_path / "state" / "step-00000008.new.tmp"
    half.mkdir()
    (half / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half of a")
    assert_same(run(tmp_path), whole)


def test_states_hold_no_pickles(tmp_path):
    """A pickle can run code as it is loaded."""
    newest, _ = two_states(tmp_path)
    assert sorted(path.suffix for path in newest.iterdir()) == [".json", ".jsonl", ".safetensors"]


def test_an_empty_folder_is_a_beginning(tmp_path):
    model = tiny_model()
    assert load_state(tmp_path / "state", model, new_optimizer(model, OPTIONS), "") == []


# --- guards ---------------------------------------------------------------------------------------

def infinite_in_item_3(model, batch) -> dict:
    found = nll(model, batch)
    return found | {"loss": found["loss"] * found["loss"].new_tensor(
        [math.inf if example.id == "item-3" else 1.0 for example in batch])}


def test_a_step_that_is_not_finite_is_skipped_and_counted_if_asked(tmp_path):
    """Once an epoch here. Without --skip_nonfinite the run stops: see test_train."""
    model = tiny_model()
    options = dataclasses.replace(OPTIONS, epochs=2, skip_nonfinite=True)
    records = fit(model, examples(), infinite_in_item_3, options, 0, tmp_path)
    assert [record["skipped"] for record in records].count(1.0) == 2
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())


def test_a_killed_driver(base, tmp_path, capsys, monkeypatch):  # noqa: F811
    """One of the kills of `make torture`, at a moment drawn from the length of the run."""
    monkeypatch.setitem(torture.RUNS, "irpo", ["irpo.py", *SMALL, "--iterations", "1", "--save_every", "1"])
    monkeypatch.setattr(sys, "argv", ["torture.py", "--out", str(tmp_path / "out"), "--kills", "1",
                                      "--methods", "irpo", "--model", str(base)])
    with pytest.raises(SystemExit) as ended:
        torture.main()
    printed = capsys.readouterr().out
    assert not ended.value.code, printed
    assert "| irpo | 1 | 1 |" in printed
