"""Tables of many runs: which commands, in which order, and what happens when one fails."""
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
from commands import command_faults

import irpo
import reft
import rft
from infra import InputError
from infra.run import ROOT, copy_source, read_json, write_json
from tools import sweep, tune


class Process:
    """Stands for a run: it has written its last file at the first look, and ends at the second."""
    log: list[tuple[str, str]] = []  # ("start" or "end" or "stop", run)
    failing: set[str] = set()

    def __init__(self, words, env, start_new_session, **options):
        assert words[0] == sys.executable and start_new_session  # in the same one it would hear of Ctrl-C twice
        self.run, self.env, self.looks, self.returncode = words[words.index("--run_dir") + 1], env, 0, None
        self.log.append(("start", self.run))

    def poll(self):
        self.looks += 1
        if self.run not in self.failing:
            write(self.run, "eval_samples.jsonl" if "labelled" in self.run else
                  "model" if "base" in self.run else "results.json")
        if self.looks == 2:
            self.log.append(("end", self.run))
            self.returncode = int(self.run in self.failing)
        return self.returncode

    def terminate(self):
        self.log.append(("stop", self.run))

    def wait(self):
        pass


def write(run: str, name: str, text: str = "") -> None:
    Path(run, name).parent.mkdir(parents=True, exist_ok=True)
    Path(run, name).write_text(text)


@pytest.fixture(autouse=True)
def tuned(monkeypatch):
    """The best settings of every tuning, whatever has been tuned."""
    for name, tuning in sweep.ALL["tune"].items():
        for method in tuning["methods"]:
            monkeypatch.setitem(sweep.ALL["parts"], f"BEST_{name}_{method}", "--lr 1e-4")


@pytest.fixture
def log(tmp_path, monkeypatch) -> list:
    """A folder without runs, and processes that are not real."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Process, "log", [])
    monkeypatch.setattr(Process, "failing", set())
    monkeypatch.setattr(sweep.subprocess, "Popen", Process)
    monkeypatch.setattr(sweep.subprocess, "call", lambda words: Process.log.append(("report", words[-1])) or 0)
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sweep, "copy_shared", lambda run: None)
    return Process.log


def call(monkeypatch, *arguments: str):
    """The exit status of the command line."""
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
    with pytest.raises(SystemExit) as stop:
        sweep.main()
    return stop.value.code


@pytest.mark.parametrize("run, words", [
    ("runs/base-w96-s2", "train.py --preset base --hidden_size 96 --seed 12 --run_dir runs/base-w96-s2"),
    ("runs/table/dpo_from_sft_chosen/s0", "irpo.py --preset toy --model runs/base-s0/model --seed 0 --run_dir "
     "runs/table/dpo_from_sft_chosen/s0 --alpha 0 --lr 1e-4 --iterations 1 "
     "--start_from runs/table/sft_chosen/s0/iter1/model"),
    ("runs/rft/pool/s1", "rft.py --preset toy --model runs/base-s1/model --seed 1 --run_dir runs/rft/pool/s1 "
     "--eval_samples 0 --pool runs/rft/k40/s1 runs/rft/w96/s1 runs/rft/w160/s1"),
    ("runs/reft/rerank-sft/s2", "-m tools.rerank --preset toy --model runs/reft/sft/s2/iter1/model --labelled "
     "runs/labelled-s2/eval_samples.jsonl --candidates runs/reft/sft/s2/iter1/eval_sampled.jsonl --seed 2 "
     "--run_dir runs/reft/rerank-sft/s2")])
def test_commands(run, words):
    assert sweep.command(run) == words


def test_every_command_parses(tmp_path, monkeypatch):
    """A flag that is renamed in a script and not in a table would be seen only after an hour of other cells."""
    for name in sweep.ALL["tune"]:
        monkeypatch.setitem(sweep.TABLES, f"tune-{name}", tune.table_of(name))
        for method, [first, *_] in tune.settings(name).items():
            monkeypatch.setitem(sweep.ALL["parts"], f"BEST_{name}_{method}", first)
    runs = [f"{table['folder']}/{cell}/s0" for table in sweep.TABLES.values() for cell in table["cells"]]
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    shutil.copy(ROOT / "results" / "controls.py", "results")
    commands = {sweep.command(run) for run in sweep.missing(runs)}
    commands -= {run for run in commands if run.startswith("runs/")}  # a link to another table's run
    assert {command: fault for command in commands if (fault := command_faults(command))} == {}


@pytest.mark.parametrize("run, others", [
    ("rft/pool/s2", {"base-s2", "base-w96-s2", "base-w160-s2", "rft/k40/s2", "rft/w96/s2", "rft/w160/s2"}),
    ("table/irpo_from_sft_chosen/s0", {"base-s0", "table/irpo/s0", "table/sft_chosen/s0"}),
    ("reft/rerank-sft/s1", {"base-s1", "reft/reft/s1", "reft/sft/s1", "labelled-s1"}),
    ("reft/nokl/s0", {"base-s0", "reft/reft/s0"}),
    ("compare/ppo/s0", {"base-s0"})])
@pytest.mark.parametrize("jobs", [1, 3])
def test_runs_start_after_those_that_they_need(run, others, jobs, log):
    """Without whatever is done, and never more than --jobs at a time."""
    runs = sweep.missing([f"runs/{run}"])
    assert sweep.work(runs, jobs) == [] == sweep.missing([f"runs/{run}"])
    assert sorted(log) == sorted((what, f"runs/{name}") for name in others | {run} for what in ("start", "end"))
    for i, (what, started) in enumerate(log):
        assert what == "end" or all(("end", other) in log[:i] for other in sweep.needs(started))
    counts = [sum({"start": 1, "end": -1}[what] for what, _ in log[:i]) for i in range(len(log))]
    assert max(counts) <= jobs


def test_a_failing_run_stops_only_those_that_need_it(log, monkeypatch, capsys):
    Process.failing.add("runs/rft/k40/s0")
    status = call(monkeypatch, "rft", "--seeds", "0", "--cells", "k40", "k1", "pool", "half")
    assert status == "no report, since these are missing: runs/rft/k40/s0 runs/rft/k1/s0 runs/rft/pool/s0"
    assert {run for what, run in log if what == "start"} == {f"runs/{name}" for name in (
        "base-s0", "rft/k40/s0", "rft/half/s0", "base-w96-s0", "rft/w96/s0", "base-w160-s0", "rft/w160/s0")}
    assert "FAILED  runs/rft/k40/s0, 0.0 minutes, see runs/rft/k40/s0/output.txt\n" in capsys.readouterr().out


@pytest.mark.parametrize("cells, out", [((), "results/rft"), (("--cells", "k1"), "runs/rft-report"),
                                        (("--seeds", "0"), "runs/rft-report")])
def test_done_runs_are_not_run_again_and_a_part_is_reported_elsewhere(cells, out, log, monkeypatch):
    for cell in sweep.TABLES["rft"]["cells"]:
        for seed in range(5):
            write(f"runs/rft/{cell}/s{seed}", "results.json")
    assert call(monkeypatch, "rft", *cells) == 0
    assert log == [("report", out)]


def test_done_runs_of_edited_code_are_refused(log, monkeypatch):
    """With the loss changed, `make rft` printed the table of the old one. Other methods' files may change."""
    for cell, file in (("k1", "losses.py"), ("k40", "irpo.py"), ("k12", "data/toy.py")):
        write(f"runs/rft/{cell}/s0", "results.json")
        copy_source(Path(f"runs/rft/{cell}/s0/source"))
        write(f"runs/rft/{cell}/s0/source", file, "# as it was")
    flags = ["rft", "--seeds", "0", "--cells", "k1", "k40", "k12"]
    refused = call(monkeypatch, *flags)
    assert "  runs/rft/k1/s0: losses.py\n  runs/rft/k12/s0: data/toy.py\n" in refused and "k40" not in refused
    assert not log and call(monkeypatch, *flags, "--anyway") == 0


def test_done_runs_with_other_flags_are_refused(log, monkeypatch):
    """After another tuning, runs with the old settings would have been the new table."""
    for cell in ("k1", "k4"):
        write(f"runs/rft/{cell}/s0", "results.json")
        copy_source(Path(f"runs/rft/{cell}/s0/source"))
        flags = sweep.command(f"runs/rft/{cell}/s0") + " --anyway" + " --lr 9" * (cell == "k4")
        write(f"runs/rft/{cell}/s0", "command.txt", f"command  python {flags}\ncommit   a\n")
    refused = call(monkeypatch, "rft", "--seeds", "0", "--cells", "k1", "k4")
    assert "\n  runs/rft/k4/s0: other flags\n" in refused and "/k1/" not in refused and not log


def test_a_damaged_record_of_a_tuning_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    write(str(tmp_path / "results" / "tune"), "x.json", "{}")
    with pytest.raises(InputError, match="x.json is no record of tools/tune.py"):
        sweep.best_settings.__wrapped__()


def test_pairs_of_the_nll_map_are_made_by_irpo_and_its_own_files(log):
    run = "runs/nll/near-exact-a0/s0"
    own = [ROOT / "results" / name for name in ("pairs.py", "controls.py")]
    copy_source(Path(run, "source"), *own)
    assert sweep.edited(run) == []
    for name in ("rft.py", "irpo.py", "own/controls.py"):
        write(run, f"source/{name}", "# as it was")
    assert sweep.edited(run) == ["irpo.py", "results/controls.py"]


@pytest.mark.parametrize("flags, said", [
    ("--cells k41", "--cells k41: choose from k40"), ("--jobs 0", "--jobs and --gpus start at 1"),
    ("--seeds -1", "--seeds at 0")])
def test_what_cannot_be_run_is_refused(flags, said, log, monkeypatch, capsys):
    assert call(monkeypatch, "rft", *flags.split()) == 2
    assert said in capsys.readouterr().err and not log


@pytest.mark.parametrize("jobs, threads", [(1, os.environ["OMP_NUM_THREADS"] + "0"), (2, "1")])
def test_runs_at_the_same_time_have_one_thread_each(jobs, threads, log, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ["OMP_NUM_THREADS"] + "0")
    assert sweep.start("runs/base-s0", jobs, 1).env["OMP_NUM_THREADS"] == threads


def test_runs_of_several_gpus_are_started_by_torchrun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "copy_shared", lambda run: None)
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda words, **options: words)
    words = "-m torch.distributed.run --standalone --nproc_per_node 2 irpo.py --preset toy".split()
    assert sweep.start("runs/table/irpo/s0", 1, 2)[1:9] == words


def test_ctrl_c_stops_every_run_once(log, monkeypatch):
    """A second signal would not let them save."""
    def interrupt(seconds):
        raise KeyboardInterrupt
    monkeypatch.setattr(sweep.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):  # which run_script turns into a sentence
        call(monkeypatch, "irpo", "--jobs", "2")
    assert log == [(what, f"runs/base-s{seed}") for what in ("start", "stop") for seed in (0, 1)]


def test_a_cell_of_two_tables_is_run_once(tmp_path, monkeypatch):
    """The second table links to it, also where it did so before."""
    monkeypatch.chdir(tmp_path)
    cell = "runs/compare/irpo_gold/s0"
    assert sweep.missing([cell])[-2:] == ["runs/table/irpo/s0", cell]
    write("runs/table/irpo/s0", "results.json", "all of it")
    for _ in range(2):
        assert sweep.work([cell], 1) == []
    assert {path.name: path.read_text() for path in Path(cell).iterdir()} == {"results.json": "all of it"}
    assert [path.name for path in Path("runs/table/irpo/s0").iterdir()] == ["results.json"]


@pytest.mark.parametrize("complete", [0, 1])
def test_shared_files_are_copied_only_when_complete(complete, tmp_path, monkeypatch):
    """A copy that is cut off must not look like a file of the run."""
    monkeypatch.chdir(tmp_path)
    for name in ("iter0/eval.json", "iter1/pairs.jsonl", "iter1/samples.jsonl"):
        write("runs/table/irpo/s0", name, name)
    copyfile, copied, count = sweep.shutil.copyfile, Path("runs/table/dpo/s0"), iter(range(9))

    def cut(source, target, **options):
        if next(count) == complete:
            Path(target).write_text("half")
            raise KeyboardInterrupt
        return copyfile(source, target, **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sweep.shutil, "copyfile", cut)
        sweep.copy_shared(str(copied))
    assert (copied / "iter0").exists() == bool(complete) and not (copied / "iter1/samples.jsonl").exists()

    sweep.copy_shared(str(copied))
    assert {str(file.relative_to(copied)): file.read_text() for file in copied.rglob("*") if file.is_file()} == {
        name: name for name in ("iter0/eval.json", "iter1/samples.jsonl")}


@pytest.mark.parametrize("run", ["table/irpo/s0", "compare/ppo/s0", "base-s0", "rft/k1/s0", "gold/half/s0"])
def test_runs_that_share_nothing_copy_nothing(run, tmp_path, monkeypatch):
    """Another length of the warm-up makes another model in iter0, and files there name the kind of gold."""
    monkeypatch.chdir(tmp_path)
    sweep.copy_shared(f"runs/{run}")
    assert not list(tmp_path.iterdir())


# --- tuning ----------------------------------------------------------------------------------------

def test_settings_are_drawn_from_all_parts_of_their_ranges():
    """Twelve draws at random can leave out the half of a range in which a method is at its best."""
    space = {"lr": {"low": 1e-6, "high": 1e-2}, "epochs": [1, 2]}
    settings = [flags.split() for flags in tune.drawn(space, 4, "irpo")]
    assert sorted(math.floor(math.log10(float(rate))) for _, rate, _, _ in settings) == [-6, -5, -4, -3]
    assert sorted(epochs for *_, epochs in settings) == ["1", "1", "2", "2"]
    assert tune.drawn(space, 4, "irpo") == tune.drawn(space, 4, "irpo") != tune.drawn(space, 4, "dpo")


def test_methods_that_are_compared_are_tuned_on_the_same_draws():
    """Where a tuning says so, and the methods have the same ranges."""
    for name, tuning in sweep.ALL["tune"].items():
        drawn: dict[str, list] = {}
        for method, flags in tune.settings(name).items() if tuning.get("same_draws") else ():
            assert drawn.setdefault(repr(tuning["methods"][method]["space"]), flags) == flags, method
    assert any("same_draws" in tuning for tuning in sweep.ALL["tune"].values())


def test_the_best_setting_is_that_with_the_highest_mean_dev_accuracy(tmp_path, monkeypatch):
    """On dev, after the last iteration, over all seeds; a run that failed counts as 0."""
    monkeypatch.chdir(tmp_path)
    method = {"command": "{IRPO}", "space": {"lr": [1e-4, 2e-4, 3e-4]}}
    monkeypatch.setitem(sweep.ALL, "tune", {"x": {"seeds": [8, 9], "draws": 3, "methods": {"irpo": method}}})
    accuracies = {(0, 8): 0.9, (0, 9): 0.2, (1, 8): 0.6, (1, 9): 0.7, (2, 8): 1.0}
    for (i, seed), accuracy in accuracies.items():
        rows = [{"split": split, "iteration": t, "accuracy": found} for split, t, found in (
            ("dev", 1, 1.0), ("test", 2, 1.0), ("dev", 2, accuracy))]
        write_json(tmp_path / f"runs/tune-x/irpo-{i}/s{seed}/results.json", rows)
    found = tune.record("x")
    assert [one["dev"] for one in found["methods"]["irpo"]["tried"]] == [[0.9, 0.2], [0.6, 0.7], [1.0, 0.0]]
    assert found["methods"]["irpo"]["best"] == tune.settings("x")["irpo"][1] and found["seeds"] == [8, 9]


@pytest.mark.parametrize("failing", [False, True])
def test_the_better_half_of_the_settings_goes_on(failing, tmp_path, monkeypatch, log):
    """Of three settings, the two that are best after two iterations have four, and the best of these two is chosen.
    One that fails on the way to four has been among the two all the same."""
    monkeypatch.chdir(tmp_path)
    method = {"command": "{IRPO}", "space": {"lr": [1e-4, 2e-4, 3e-4]}}
    tuning = {"seeds": [8], "draws": 3, "iterations": [2, 4], "methods": {"irpo": method}}
    monkeypatch.setitem(sweep.ALL, "tune", {"x": tuning})
    accuracies, started = {0: [0.5, 0.5], 1: [0.9, 0.6], 2: [0.8, 0.7]}, []

    def work(runs, jobs):
        for run in runs:
            if not sweep.done(run):
                started.append((run, words := sweep.command(run).split()[-1]))
                if failing and started[-1] == ("runs/tune-x/irpo-1/s8", "4"):
                    continue
                rows = [{"split": "dev", "iteration": t, "accuracy": found}
                        for t, found in zip((2, 4), accuracies[int(run.split("-")[2][0])]) if t <= int(words)]
                for row in rows:
                    write_json(tmp_path / run / f"iter{row['iteration']}" / "eval.json", [row])
                write_json(tmp_path / run / "results.json", rows)
        return []
    monkeypatch.setattr(sweep, "work", work)
    for _ in range(1 if failing else 2):  # the second time there is nothing left to do
        monkeypatch.setattr(sys, "argv", ["tune", "x"])
        (tmp_path / "results" / "tune").mkdir(parents=True, exist_ok=True)
        tune.main()
    assert started == [(f"runs/tune-x/irpo-{i}/s8", t) for i, t in ((0, "2"), (1, "2"), (2, "2"), (1, "4"), (2, "4"))]
    found = read_json(tmp_path / "results" / "tune" / "x.json")["methods"]["irpo"]
    assert [(one["iterations"], one["dev"]) for one in found["tried"]] == [
        (2, [0.5]), (4, [0.0 if failing else 0.6]), (4, [0.7])]
    assert found["best"] == tune.settings("x")["irpo"][2]


@pytest.mark.parametrize("flags", [[], ["--failed_as_zero"]])
def test_a_tuning_with_failed_runs_leaves_no_record_unless_asked(flags, tmp_path, monkeypatch):
    """A full disk had given every setting accuracy 0, and the first one was called the best."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "work", lambda runs, jobs: runs)
    monkeypatch.setattr(sys, "argv", ["tune", "toy", *flags])
    if flags:
        Path("results/tune").mkdir(parents=True)
        tune.main()
    else:
        with pytest.raises(SystemExit, match="no record, since these failed: runs/tune-toy/irpo-0/s8 "):
            tune.main()
    assert Path("results/tune/toy.json").exists() == bool(flags)


def test_tuning_does_not_mix_runs_of_other_code_or_settings(log, monkeypatch):
    """With another range of rates, old runs were recorded under the newly drawn flags."""
    monkeypatch.setitem(sweep.TABLES, "tune-toy", tune.table_of("toy"))
    other = "runs/tune-toy/irpo-0/s8", "runs/tune-toy/dpo-1/s9"
    for run, flags in zip(other, ("", " --lr 9")):
        write(run, "results.json", "[]")
        copy_source(Path(run, "source"))
        write(run, "command.txt", f"command  python {sweep.command(run)}{flags}\n")
    write(other[0], "source/losses.py", "# as it was")
    monkeypatch.setattr(sys, "argv", ["tune", "toy"])
    with pytest.raises(SystemExit, match=f"  {other[0]}: losses.py\n  {other[1]}: other flags\n"):
        tune.main()
    assert not log


@pytest.mark.parametrize("name, method, preset", [("toy", "irpo", irpo.TOY), ("rft", "rft", rft.TOY),
                                                  ("warmup", "sft", reft.TOY), ("reft", "reft", reft.TOY)])
def test_the_toy_presets_have_the_tuned_values(name, method, preset):
    words = read_json(ROOT / "results" / "tune" / f"{name}.json")["methods"][method]["best"].split()
    tuned = {flag[2:]: float(value) for flag, value in zip(words[::2], words[1::2])}
    assert tuned == {flag: preset[flag] for flag in tuned} and tuned
