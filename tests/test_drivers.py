"""Scripts end to end on a tiny base model: what they write, interrupted or not, and what they refuse."""
import dataclasses
import errno
import io
import json
import os
import runpy
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest

import irpo
import runs
from data import toy
from data.fresh import fresh_model
from data.prompts import TEMPLATES
from evaluate import Answered
from infra.config import parse_config
from infra.run import derive_seed, once, open_run, read_json, read_records, run_script, write_json, write_records
from irpo import Config, Pair
from runs import SMALL, call, read_lines, refusal, settings
from tools import chat, evaluation, sft

base, remembered_world = runs.base, runs.remembered_world  # until all files take them from conftest.py
ROOT = Path(irpo.__file__).resolve().parent


@pytest.fixture(scope="module")
def run(base, small_world, tmp_path_factory) -> Path:
    """A finished run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    call(irpo, *SMALL, "--model", base, "--run_dir", folder)
    return folder


@pytest.fixture
def copy(run, base, tmp_path) -> list:
    """The command of a finished run that a test may damage, in tmp_path / "run"."""
    shutil.copytree(run, tmp_path / "run")
    return [*SMALL, "--model", base, "--run_dir", tmp_path / "run"]


# --- flags -----------------------------------------------------------------------------------------

def parsed(*argv: str) -> Config:
    return parse_config(Config, {"toy": irpo.TOY, "smoke": irpo.SMOKE}, "", ["--model", "somewhere", *argv])


def test_flags_win_over_presets_and_presets_over_defaults():
    """In whichever order they are given, and also with the default's value."""
    assert parsed("--preset", "toy").lr == irpo.TOY["lr"] != parsed().lr
    for argv in (["--preset", "toy", "--lr", "0.5"], ["--lr", "0.5", "--preset", "toy"]):
        assert parsed(*argv).lr == 0.5 and parsed(*argv).num_samples == irpo.TOY["num_samples"]
    assert parsed("--preset", "toy", "--max_steps", "5000").max_steps == 5000 != irpo.TOY["max_steps"]


def test_kinds_of_flags():
    """Tuples take several values, switches their negation, zero and empty are values like others."""
    config = parsed("--temperature", "0.7", "1.1", "--no-gold", "--dedupe", "--max_pairs", "0", "--alpha", "0",
                    "--warmup_share", "1", "--select_every", "0")
    assert (config.temperature, config.warmup_share) == ((0.7, 1.1), 1.0)
    assert (config.gold, config.dedupe, config.max_pairs, config.alpha) == (False, True, 0, 0.0)


@pytest.mark.parametrize("argv, named", [
    (["--alhpa", "0"], "--alhpa"), (["--alph", "0"], "--alph"), (["--pre", "toy"], "--pre"), (["stray"], "stray"),
    (["--preset", "huge"], "huge"), (["--alpha", "much"], "much"), (["--iterations", "2.5"], "2.5"),
    (["--iterations", "0"], "--iterations 0: must be at least 1"), (["--beta", "0"], "--beta 0.0: must be above 0"),
    (["--lr", "nan"], "--lr nan: must be finite"), (["--temperature", "0.8", "-1"], "--temperature -1.0"),
    (["--warmup_share", "1.1"], "--warmup_share 1.1: must be at most 1"), (["--prompt", "none"], "--prompt none"),
    (["--task", "gsm9k"], "--task gsm9k: choose from toy"),
    (["--method", "ppo"], "--method ppo: choose from irpo, sft_chosen, sft_gold"), (["--model", ""], "--model"),
    (["--start_from", "nowhere"], "--start_from nowhere"), (["--lr_schedule", "linear"], "--select_every 500")])
def test_unknown_abbreviated_or_impossible_flags_fail(argv, named, capsys):
    """A typo that is dropped runs the default for a day under the wrong name."""
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_run_directories_are_named_by_what_was_asked(monkeypatch):
    """Two runs under one name would refuse each other; the name must suit a shell, and speed is no part of it."""
    monkeypatch.setattr(sys, "argv", ["irpo.py"])
    commands = ["", "--preset smoke", "--alpha 0", "--seed 3", "--temperature 0.8 1.3"]
    names = [parsed(*command.split()).run_dir for command in commands]
    assert len(set(names)) == 5 and names[0] == "runs/irpo-s0"
    assert all(name.startswith("runs/irpo-") and not set(name) & set(" ()',") for name in names)
    assert parsed("--micro_batch_tokens", "7").run_dir == names[0]


# --- the run directory and its files ---------------------------------------------------------------

def test_a_run_directory_holds_one_config_and_one_base_model(tmp_path):
    """Files of two configs in one directory make a table of neither; the difference is shown. The same path with new
    weights is another model."""
    config = dataclasses.replace(parsed("--alpha", "0.5"), run_dir=str(tmp_path / "run"))
    assert open_run(config, weights="a1") == open_run(config, weights="a1") == tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        open_run(dataclasses.replace(config, alpha=2.0, temperature=(1.0,)), weights="a1")
    message = str(stop.value)
    for part in (str(tmp_path / "run"), "alpha: 0.5 there, 2.0 now", "temperature", "--run_dir"):
        assert part in message
    assert "beta" not in message and "weights" not in message
    with pytest.raises(SystemExit, match="weights: 'a1' there, 'b2' now"):
        open_run(config, weights="b2")
    open_run(dataclasses.replace(config, batch_rows=7), weights="a1")  # speed and memory only


def test_a_run_keeps_its_config_command_and_source(run):
    """What is recorded is what ran."""
    assert read_json(run / "config.json")["lr"] == 1e-3
    assert "torch" in (run / "command.txt").read_text()
    for name in ("irpo.py", "losses.py", "data/toy.py", "infra/run.py"):
        assert (run / "source" / name).read_text() == (ROOT / name).read_text()
    assert not (run / "source" / "tests").exists()


def test_seeds_are_a_function_of_names():
    """Python's own hash of a string changes from process to process: hence the number written out."""
    seeds = {derive_seed(s, t, *purpose) for s in range(5) for t in range(5) for purpose in ([], ["sample"], ["dev"])}
    assert len(seeds) == 75 and all(0 <= seed < 2 ** 63 for seed in seeds)
    assert derive_seed(0, 1, "sample") == 66096330860555056


def test_once_makes_a_file_once_and_refuses_one_with_other_settings(tmp_path):
    """Settings and a SHA-256 are in its first line; each setting counts, also one that is new or gone."""
    path, pairs, made = tmp_path / "pairs.jsonl", [Pair("q", [1], [5, 2], [6, 2], -1.5, -2.5)], []

    def get(**settings) -> list[Pair]:
        return once(path, lambda: made.append(1) or pairs, Pair, settings)

    assert get(seed=1, temperature=(0.8, 1.3)) == get(seed=1, temperature=(0.8, 1.3)) == pairs and len(made) == 1
    for other, said in ((dict(seed=2, temperature=(0.8, 1.3)), "seed: 1 there, 2 now"),
                        (dict(seed=1), "temperature: .* there, None now"),
                        (dict(seed=1, temperature=(0.8, 1.3), weights="w"), "weights: None there, 'w' now")):
        with pytest.raises(SystemExit, match=rf"pairs.jsonl was made with other settings:\n  {said}"):
            get(**other)
    assert len(made) == 1 and once(tmp_path / "x.json", lambda: {"a": 1}) == once(tmp_path / "x.json", dict) == {"a": 1}


@pytest.mark.parametrize("before", [None, {"a": 1}])
def test_a_file_that_cannot_be_written_is_as_it_was(before, tmp_path, monkeypatch):
    """A full disk: half a file under its name would be taken for a complete one when the run is resumed."""
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "eval.json"
    if before:
        write_json(path, before)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="eval.json cannot be written: No space left on device.*same command again"):
        write_json(path, {"a": 2})
    assert [*tmp_path.iterdir()] == ([path] if before else []) and (not before or read_json(path) == before)


# --- a run that is resumed -------------------------------------------------------------------------

def contents(run: Path) -> dict[str, bytes]:
    """Read all files of a run, apart from those that say when and where it ran."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*")
            if path.is_file() and path.name not in ("command.txt", "config.json", "lock", "log.jsonl")}


def test_the_same_command_again_does_nothing_new(copy, tmp_path):
    """It must neither train again nor change a byte."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}, contents(tmp_path / "run")
    call(irpo, *copy)
    assert before == ({path: path.stat().st_mtime_ns for path in before[0]}, contents(tmp_path / "run"))


def test_killed_and_resumed_equals_uninterrupted(run, base, tmp_path):
    """SIGKILL, half-written files under the temporary names, and the same command again: the files are those of the run
    which nobody disturbed, to the byte. It is another process, so neither time nor directory reaches the record."""
    folder = tmp_path / "run"
    command = [*SMALL, "--model", base, "--run_dir", folder]
    child = subprocess.Popen([sys.executable, "irpo.py", *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (folder / "iter1" / "pairs.jsonl").exists():
        assert child.poll() is None, "it ended before there were pairs"
        time.sleep(0.002)
    child.kill()
    assert child.wait() == -signal.SIGKILL and not (folder / "results.json").exists()

    junk = ["iter1/train.jsonl.tmp", "iter2/samples.jsonl.tmp", "results.json.tmp", "iter1/model.new.tmp/x"]
    for name in junk:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"half of a')
    call(irpo, *command)
    assert contents(folder).keys() - contents(run).keys() <= set(junk)
    assert {name: contents(folder).get(name) for name in contents(run)} == contents(run)


def test_a_damaged_file_of_samples_is_refused(copy, tmp_path, capsys):
    """A line that was lost or edited would change the pairs, or the accuracy, and nobody would know."""
    path = tmp_path / "run" / "iter1" / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for damaged in (lines[:-1], [*lines[:-1], lines[-1].replace('"finished": ', '"finished":  ').replace(
            '"verdict": "', '"verdict": "not ')], [*lines[:-1], lines[-1][:20]]):
        path.write_text("".join(damaged))
        assert str(path) in refusal(capsys, irpo, *copy)
    path.write_text("".join(lines))
    call(irpo, *copy)


@pytest.mark.parametrize("damage, said", [
    # `make base` was run with other code: the samples are not those of the new model
    (lambda run, flags: [*flags, "--model", copied(run / "iter1" / "model", run.parent / "other")], "weights: "),
    (lambda run, flags: [*flags, "--alpha", "0"], "alpha: 1.0 there, 0.0 now"),
    # M_1 was replaced after it was measured, or after iteration 2 had sampled from it
    (lambda run, flags: copied(run / "iter2" / "model", run / "iter1" / "model") and flags,
     "iter1/eval_dev.jsonl was made with other settings:\n  weights: "),
    (lambda run, flags: [path.unlink() for path in (run / "iter1").glob("eval*")]
     and copied(run / "iter2" / "model", run / "iter1" / "model") and flags,
     "iter2/samples.jsonl was made with other settings:\n  weights: ")])
def test_files_of_another_model_or_config_are_refused(damage, said, copy, tmp_path, capsys):
    """With the difference, before anything is sampled or trained from them, and without touching the record."""
    flags, before = damage(tmp_path / "run", copy), (tmp_path / "run" / "results.json").read_bytes()
    message = refusal(capsys, irpo, *flags)
    assert said in message and str(tmp_path / "run") in message
    assert (tmp_path / "run" / "results.json").read_bytes() == before


def copied(source: Path, target: Path) -> Path:
    return shutil.copytree(source, target, dirs_exist_ok=True)


def test_a_stale_reference_is_refused(run, base, tmp_path, capsys):
    """The model that training starts from was replaced after its log-probabilities were stored."""
    other = copied(run / "iter1" / "model", tmp_path / "other")
    flags = [*SMALL, "--iterations", "1", "--model", base, "--start_from", other, "--run_dir", tmp_path / "run"]
    call(irpo, *flags)
    shutil.rmtree(tmp_path / "run" / "iter1" / "model")
    copied(run / "iter2" / "model", other)
    message = refusal(capsys, irpo, *flags)
    assert "reference: " in message and str(tmp_path / "run" / "iter1" / "pairs.jsonl") in message


# --- python train.py: base models ------------------------------------------------------------------

TRAIN = ["--preset", "base", "--hidden_size", "32", "--num_layers", "1", "--max_steps", "3"]


def test_train_makes_a_base_model_once(tmp_path, monkeypatch, capsys):
    """Everything calls `make base`: it must train when its config is new, and only then, the same model each time. A
    config that is refused leaves the model alone."""
    rows = toy.corpus(0, size=120, practice=60, drills=30)
    monkeypatch.setattr(toy, "corpus", lambda seed, **options: rows)
    call(sft, *TRAIN, "--run_dir", tmp_path / "run")
    weights = tmp_path / "run" / "model" / "model.safetensors"
    assert len(read_lines(tmp_path / "run" / "train.jsonl")) == 3
    before = weights.stat().st_mtime_ns
    capsys.readouterr()
    call(sft, *TRAIN, "--run_dir", tmp_path / "run")
    assert str(tmp_path / "run" / "model") in capsys.readouterr().out
    assert "lr: 0.003 there, 0.5 now" in refusal(capsys, sft, *TRAIN, "--lr", "0.5", "--run_dir", tmp_path / "run")
    assert weights.stat().st_mtime_ns == before
    call(sft, *TRAIN, "--run_dir", tmp_path / "again")
    assert (tmp_path / "again" / "model" / "model.safetensors").read_bytes() == weights.read_bytes()


# --- python evaluate.py and python sample.py -------------------------------------------------------

def test_evaluate_writes_its_summary_and_rescores_its_file(base, tmp_path, small_world, capsys):
    """Questions, right answers, texts and settings are in the file, so grading again needs nothing else; and a grader
    that has changed since is noticed."""
    path = tmp_path / "out" / "eval_samples.jsonl"
    call(evaluation, "--model", base, "--split", "dev", "--limit", "4", "--num_samples", "2", "--temperature", "0.9",
         "--seed", "5", "--max_new_tokens", "20", "--run_dir", tmp_path / "out")
    [accuracy] = [line for line in capsys.readouterr().out.splitlines() if "95 % interval" in line]
    summary, said = read_json(tmp_path / "out" / "eval.json"), settings(path)
    assert summary["n"] == 4 and summary["num_samples"] == 2
    assert (said["split"], said["temperature"], said["num_samples"], said["seed"]) == ("dev", 0.9, 2, 5)
    assert [question["id"].split("-")[0] for question in read_lines(path)] == ["dev"] * 4

    call(evaluation, "--rescore", path)
    again = capsys.readouterr().out
    assert accuracy in again.splitlines() and " now;" not in again
    said, answered = read_records(path, Answered)
    question = answered[0]
    wrong = [dataclasses.replace(sample, verdict="timeout") for sample in question.samples]
    write_records(path, [dataclasses.replace(question, samples=wrong), *answered[1:]], said)
    call(evaluation, "--rescore", path)
    assert f"{question.id}: timeout in the file" in capsys.readouterr().out


def test_rescore_refuses_what_it_cannot_read_or_use(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"half')
    for path in (tmp_path / "none.jsonl", tmp_path, tmp_path / "x.jsonl"):
        assert str(path) in refusal(capsys, evaluation, "--rescore", path)
    assert "--answer_format" in refusal(capsys, evaluation, "--rescore", "x", "--answer_format", "boxed")


def test_sample_answers_questions(base, monkeypatch, capsys):
    """A line in, responses out, until the input ends; blank lines and bytes that are no text do not end it."""
    question = b"Ben has 4 apples. How many apples does Ben have?\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(question + b"\n\xff\xfe\n" + question)))
    call(chat, "--model", base, "--num_samples", "2", "--temperature", "1", "--max_new_tokens", "8")
    assert len(capsys.readouterr().out.splitlines()) >= 6


@pytest.mark.parametrize("script", ["evaluate.py", "sample.py", "train.py"])
@pytest.mark.filterwarnings("ignore:'tools")  # runpy warns of what is imported already
def test_scripts_at_the_top_run_their_tools(script, tmp_path, monkeypatch):
    """These are the commands that the README shows."""
    monkeypatch.setattr(sys, "argv", [script, "--model", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=str(tmp_path / "nowhere")):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_as_a_process_an_error_is_one_clear_sentence(tmp_path):
    """What a shell sees: exit code, message on stderr, no traceback, no directory left behind."""
    done = subprocess.run([sys.executable, "irpo.py", *SMALL, "--model", tmp_path / "nowhere", "--run_dir",
                           tmp_path / "run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and str(tmp_path / "nowhere") in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


# --- what is refused -------------------------------------------------------------------------------

@pytest.mark.parametrize("module", [irpo, evaluation, chat, sft], ids=lambda module: module.__name__)
@pytest.mark.parametrize("kind", ["nowhere", "empty", "half"])
def test_a_missing_model_is_refused(module, kind, base, tmp_path, capsys, small_world):
    """Named with its path, before anything is sampled."""
    path = tmp_path / "model"
    if kind != "nowhere":
        path.mkdir()
    if kind == "half":  # a download that broke off after its small files
        for name in ("config.json", "tokenizer.model"):
            shutil.copy(base / name, path / name)
    flags = {irpo: SMALL, evaluation: ["--max_new_tokens", "8"]}.get(module, [])
    where = [] if module is chat else ["--run_dir", tmp_path / "run"]
    assert str(path) in refusal(capsys, module, *flags, "--model", path, *where)


def test_no_model_at_all_is_refused(tmp_path, capsys):
    """The flag was left out: the message must name it, not a file that nobody asked for."""
    for module in (irpo, evaluation):
        assert "--model is missing" in refusal(capsys, module, "--run_dir", tmp_path / "run")
    assert "--model is missing" in refusal(capsys, chat)


@pytest.mark.parametrize("module", [irpo, evaluation], ids=lambda module: module.__name__)
def test_inputs_are_checked_before_anything_is_written(module, base, tmp_path, capsys, small_world):
    """With the numbers and the flag: 512 new tokens do not fit 192 positions."""
    message = refusal(capsys, module, "--preset", "toy", "--max_new_tokens", "512", "--model", base, "--run_dir",
                      tmp_path / "run")
    assert "--max_new_tokens 512" in message and "192 positions" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", [irpo, evaluation, sft], ids=lambda module: module.__name__)
def test_an_unwritable_run_directory_is_refused(module, base, tmp_path, capsys, small_world):
    """A directory below a file cannot be made; said at once, with the flag to change."""
    (tmp_path / "file").write_text("in the way")
    flags = {irpo: SMALL, evaluation: ["--limit", "1", "--max_new_tokens", "20"], sft: []}[module]
    message = refusal(capsys, module, *flags, "--model", base, "--run_dir", tmp_path / "file" / "run")
    assert str(tmp_path / "file" / "run") in message and "--run_dir" in message


def test_an_interrupted_run_ends_with_a_sentence():
    """Ctrl-C is a way to stop, not an error with twenty lines of traceback."""
    def interrupted():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit, match="the same command"):
        run_script(interrupted)


# --- other data sets -------------------------------------------------------------------------------

def reader(folder: Path) -> Path:
    """Make a small untrained model with a tokenizer that can write anything below."""
    return Path(fresh_model([f"{text} {string.printable}" for text in TEMPLATES.values()], folder / "reader", 200,
                            hidden_size=32, num_layers=1, max_positions=1024, seed=0))


def test_a_task_without_gold_solutions(tmp_path, capsys):
    """ARC has none: refused with the flag that helps, not trained on empty responses; and --no-gold gets as far as
    samples, none of which a model without training ends."""
    (tmp_path / "arc").mkdir()
    for name in ("ARC-Challenge-Train", "ARC-Easy-Train", "ARC-Challenge-Dev", "ARC-Challenge-Test"):
        rows = [{"id": f"{name}-{i}", "answerKey": "AB"[i % 2], "question": {
            "stem": f"Which is {i}?", "choices": [{"text": str(i), "label": label} for label in "ABC"]}}
            for i in range(4)]
        (tmp_path / "arc" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--task", "arc", "--path", tmp_path / "arc", "--model", reader(tmp_path)]
    flags = [*data, "--select_every", "0", "--num_samples", "2", "--max_new_tokens", "8", "--run_dir", tmp_path / "run"]
    assert "--no-gold" in refusal(capsys, irpo, *flags)
    assert not (tmp_path / "run").exists()
    assert "none of 16 responses ended" in refusal(capsys, irpo, *flags, "--no-gold")
    [first, *_] = read_lines(tmp_path / "run" / "iter1" / "samples.jsonl")
    assert '"Final answer: (insert letter here)"\n\nQuestion: Which is 0?\n(A) 0\n' in first["prompt"]
    assert "no gold solutions" in refusal(capsys, sft, *data, "--run_dir", tmp_path / "sft")


def test_programs_are_run_where_answers_are_programs(tmp_path, capsys):
    """The gold programs pass through tokenizer and sandbox before anything is sampled."""
    rows = [{"item_id": f"svamp_{i}", "question": f"What is {i} + 1?", "answer_value": f"{i + 1}.0",
             "answer_cot": f'def solution():\n    """What is {i} + 1?"""\n    return {i} + 1'} for i in range(10)]
    (tmp_path / "svamp_test_set.json").write_text(json.dumps(rows))
    call(evaluation, "--task", "svamp", "--path", tmp_path, "--prompt", "reft", "--answer_format", "python", "--model",
         reader(tmp_path), "--max_new_tokens", "8", "--run_dir", tmp_path / "out")
    assert "10 of 10 gold solutions are graded correct" in capsys.readouterr().out
