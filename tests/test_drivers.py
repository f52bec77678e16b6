"""Scripts end to end on a tiny base model: what they write, interrupted or not, and what they refuse."""
import dataclasses
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

import numpy
import pytest

import irpo
import reft
import rft
from data.fresh import fresh_model
from data.prompts import TEMPLATES
from evaluate import Answered
from infra.config import parse_config
from infra.run import derive_seed, read_json, read_records, write_records, write_text
from irpo import Config
from runs import PROCESS, SMALL, call, read_lines, refusal, settings
from tools import chat, evaluation, sft

ROOT = Path(irpo.__file__).resolve().parent


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
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
    return parse_config(Config, {"toy": irpo.TOY, "bad": dict(alpha=-2.0)}, "", ["--model", "somewhere", *argv])


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


@pytest.mark.parametrize("flags, said", [
    ("--alhpa 0", "no flag --alhpa; did you mean --alpha?"), ("--alph=0", "did you mean --alpha?"),
    ("--presets toy", "did you mean --preset?"), ("--no-dedup", "did you mean --no-dedupe?"), ("stray", "stray; see"),
    ("--preset huge", "huge"), ("--alpha much", "much"), ("--iterations 2.5", "2.5"), ("--model=", "--model"),
    ("--iterations 0", "--iterations 0: must be at least 1"), ("--beta 0", "--beta 0.0: must be above 0"),
    ("--lr nan", "--lr nan: must be finite"), ("--lr inf", "--lr inf: must be finite"), ("--lr 0", "must be above 0"),
    ("--temperature 0.8 -1", "--temperature -1.0: must be at least 0"), ("--batch_size 0", "--batch_size 0"),
    ("--warmup_share 1.1", "--warmup_share 1.1: must be at most 1"), ("--epochs 0", "--epochs 0"),
    ("--max_steps -1", "--max_steps -1"), ("--save_every 0", "--save_every 0"), ("--max_pairs -1", "--max_pairs -1"),
    ("--micro_batch_tokens -1", "--micro_batch_tokens -1"), ("--precision fp16", "--precision fp16: choose from auto"),
    ("--lr_schedule step", "--lr_schedule step"), ("--prompt none", "--prompt none"), ("--preset bad", "--alpha -2"),
    ("--task gsm9k", "--task gsm9k: choose from toy"), ("--start_from nowhere", "--start_from nowhere"),
    ("--method ppo", "--method ppo: choose from irpo, sft_chosen, sft_gold"),
    (f"--start_from {'x' * 5000}", "there is no such directory"),
    ("--lr_schedule linear", "--select_every 500")], ids=lambda text: text[:30])
def test_unknown_abbreviated_or_impossible_flags_fail(flags, said, capsys):
    """A typo that is dropped runs the default for a day under the wrong name, and one in a schedule must not fail as a
    KeyError after an hour of sampling. Values of a preset count, too. One line says it: it stood below 28 of usage."""
    with pytest.raises(SystemExit) as stop:
        parsed(*flags.split())
    assert stop.value.code == 2
    assert said in (message := capsys.readouterr().err) and message.count("\n") == 1


def test_help_is_in_the_order_of_the_steps_and_shows_what_would_be_used(capsys):
    """It began with flags of the engine, and with --preset it showed the paper's values. Each flag is there once."""
    with pytest.raises(SystemExit):
        parsed("--preset", "toy", "--help")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith(":") and line[0] != " "] == [
        "options:", "step 1:", "steps 2 and 3:", "step 5:", "step 6:", "training:", "sampling:", "data:", "engine:"]
    flags = [line.split()[0].strip(",") for line in lines if line.startswith("  --")]
    assert sorted(flags) == sorted(["--preset", *(f"--{field.name}" for field in dataclasses.fields(Config))])
    assert flags.index("--model") < flags.index("--alpha") < flags.index("--device")
    text = " ".join(" ".join(lines).split())
    assert "--num_samples INT N, responses per question (default: 8)" in text  # of the preset; the paper's is 30
    assert "--temperature FLOAT [FLOAT ...] of sampling, per iteration; the last repeats (default: 1.0)" in text
    assert "--method {irpo,sft_chosen,sft_gold} " in text and "(default: )" not in text


@pytest.mark.parametrize("module, more", [(irpo, "iterations eval_samples"), (rft, "eval_samples"),
                                          (reft, "eval_samples offload_reference")])
def test_what_may_change_when_a_run_is_resumed(module, more):
    """Nothing that results follow from: half of a run would be of one setting, half of another."""
    free = {field.name for field in dataclasses.fields(module.Config) if field.metadata["free"]}
    assert free == {*more.split(), "device", "threads", "batch_rows", "tensor_parallel", "micro_batch_tokens",
                    "checkpoint_activations", "compile", "save_every", "track", "anyway", "skip_nonfinite",
                    "shard_within_node", "cpu_offload"}


@pytest.mark.parametrize("values", [{"beta": "0.1"}, {"iterations": None}, {"gold": "no"}])
def test_a_config_made_by_hand_needs_numbers_where_numbers_belong(values):
    """Config(beta="0.1") ended in a traceback of the first training step, and Config(gold="no") meant yes."""
    with pytest.raises(ValueError, match=rf"--{[*values][0]} .*: must be a number"):
        Config(model="DIR", task="toy", **values)
    assert Config(model="DIR", task="toy", beta=1, lr=numpy.float32(1e-4)).beta == 1


# --- the run directory and its files ---------------------------------------------------------------

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


# --- a run that is resumed -------------------------------------------------------------------------

def contents(run: Path) -> dict[str, bytes]:
    """Read all files of a run, apart from those that say when and where it ran."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*")
            if path.is_file() and path.name not in ("command.txt", "config.json", "lock", "log.jsonl")}


@pytest.mark.parametrize("module", [irpo, rft, reft], ids=lambda module: module.__name__)
def test_a_finished_run_can_add_samples_of_the_test_questions(module, base, tmp_path):
    """Nothing is trained or measured again, and no greedy result changes."""
    found = []
    for k in ("0", "2"):
        call(module, *SMALL, "--eval_samples", k, "--model", base, "--run_dir", tmp_path)
        made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("iter*/**/*") if path.name != "eval.json"}
        found.append((read_json(tmp_path / "results.json"), made))
    (greedy, before), (rows, after) = found
    assert after.keys() - before.keys() == {path.with_name("eval_sampled.jsonl") for path in before
                                            if path.name == "eval_samples.jsonl"}
    assert before.items() <= after.items()
    assert [row.get("num_samples", 0) for row in rows] == [2 * (row["split"] == "test") for row in rows]
    assert [{key: row[key] for key in old} for old, row in zip(greedy, rows)] == greedy


def test_edited_code_is_refused_or_recorded(copy, tmp_path, capsys):
    """The loss was changed and the same command given again: "results.json is written", the old numbers, no word. It is
    refused before anything is computed; with --anyway, what is missing is made, and the run keeps both versions. Tools
    may change."""
    run = tmp_path / "run"
    for name in ("losses.py", "data/toy.py", "tools/report.py"):
        write_text(run / "source" / name, "# as it was")
    (run / "source" / "grading" / "latex.py").unlink()
    before = contents(run)
    message = refusal(capsys, irpo, *copy)
    assert f"differs from {run / 'source'}: data/toy.py, grading/latex.py, losses.py. " in message
    assert "--run_dir" in message and "--anyway" in message and contents(run) == before

    (run / "iter2" / "eval.json").unlink()
    for _ in range(2):
        call(irpo, *copy, "--anyway")
    call(irpo, *copy)  # the newest copy counts
    assert contents(run).items() >= before.items() and not (run / "source-3").exists()
    assert (run / "source-2" / "losses.py").read_text() == (ROOT / "losses.py").read_text()
    [edited] = [line for line in read_lines(run / "log.jsonl") if line["event"] == "edited"]
    assert edited["files"] == ["data/toy.py", "grading/latex.py", "losses.py"]


def test_killed_and_resumed_equals_uninterrupted(run, base, tmp_path):
    """SIGKILL, half-written files under the temporary names, and the same command again: the files are those of the run
    which nobody disturbed, to the byte. It is another process, so neither time nor directory reaches the record."""
    folder = tmp_path / "run"
    command = [*SMALL, "--model", base, "--run_dir", folder]
    child = subprocess.Popen([*PROCESS, "irpo.py", *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL,
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


def test_samples_of_another_model_are_refused(copy, tmp_path, capsys):
    """M_1 was replaced after iteration 2 had sampled from it: nothing is trained on them, and the record stays."""
    run = tmp_path / "run"
    before = (run / "results.json").read_bytes()
    for path in (run / "iter1").glob("eval*"):
        path.unlink()
    shutil.copytree(run / "iter2" / "model", run / "iter1" / "model", dirs_exist_ok=True)
    said = refusal(capsys, irpo, *copy)
    assert f"{run}/iter2/samples.jsonl was made with other settings:\n  weights: " in said
    assert (run / "results.json").read_bytes() == before


# --- python evaluate.py and python sample.py -------------------------------------------------------

def test_evaluate_writes_its_summary_and_rescores_its_file(base, tmp_path, capsys):
    """Questions, right answers, texts and settings are in the file, so grading again needs nothing else; and a grader
    that has changed since is noticed."""
    path = tmp_path / "out" / "eval_samples.jsonl"
    call(evaluation, "--task", "toy", "--model", base, "--split", "dev", "--limit", "4", "--num_samples", "2",
         "--temperature", "0.9", "--seed", "5", "--max_new_tokens", "20", "--run_dir", tmp_path / "out")
    [accuracy] = [line for line in capsys.readouterr().out.splitlines() if "95 % interval" in line]
    [summary], said = read_json(tmp_path / "out" / "results.json"), settings(path)
    assert summary["n"] == 4 and summary["num_samples"] == 2
    assert (said["split"], said["temperature"], said["num_samples"], said["seed"]) == ("dev", 0.9, 2, 5)
    assert [question["id"] for question in read_lines(path)] == [f"toy-dev-{i}" for i in range(4)]

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


@pytest.mark.parametrize("script", ["evaluate.py", "sample.py", "train.py"])
@pytest.mark.filterwarnings("ignore:'tools")  # runpy warns of what is imported already
def test_scripts_at_the_top_run_their_tools(script, tmp_path, monkeypatch):
    """These are the commands that the README shows."""
    task = [] if script == "sample.py" else ["--task", "toy"]
    monkeypatch.setattr(sys, "argv", [script, *task, "--model", str(tmp_path / "nowhere")])
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
def test_a_missing_model_is_refused(module, kind, base, tmp_path, capsys):
    """Named with its path, before anything is sampled."""
    path = tmp_path / "model"
    if kind != "nowhere":
        path.mkdir()
    if kind == "half":  # a download that broke off after its small files
        for name in ("config.json", "tokenizer.model"):
            shutil.copy(base / name, path / name)
    toy_task = ["--task", "toy"]
    flags = {irpo: SMALL, evaluation: [*toy_task, "--max_new_tokens", "8"], sft: toy_task}.get(module, [])
    where = [] if module is chat else ["--run_dir", tmp_path / "run"]
    assert str(path) in refusal(capsys, module, *flags, "--model", path, *where)


# --- other data sets -------------------------------------------------------------------------------

def reader(folder: Path) -> Path:
    """Make a small untrained model with a tokenizer that can write anything below."""
    return Path(fresh_model([f"{text} {string.printable}" for text in TEMPLATES.values()], folder / "reader", 220,
                            hidden_size=32, num_layers=1, max_positions=1024, seed=0))


def test_a_task_without_gold_solutions(tmp_path, capsys):
    """ARC has none: refused with the flag that helps, not trained on empty responses; and --no-gold gets as far as
    samples, where a model without training hardly ever ends."""
    (tmp_path / "arc").mkdir()
    for name in ("ARC-Challenge-Train", "ARC-Easy-Train", "ARC-Challenge-Dev", "ARC-Challenge-Test"):
        rows = [{"id": f"{name}-{i}", "answerKey": "AB"[i % 2], "question": {
            "stem": f"Which is {i}?", "choices": [{"text": str(i), "label": label} for label in "ABC"]}}
            for i in range(4)]
        (tmp_path / "arc" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--task", "arc", "--path", tmp_path / "arc", "--model", reader(tmp_path)]
    flags = [*data, "--select_every", "0", "--num_samples", "2", "--max_new_tokens", "1",
             "--temperature", "0.1", "--run_dir", tmp_path / "run"]
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
