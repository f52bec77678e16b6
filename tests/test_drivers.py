"""Drivers end to end on a tiny base model: what they write, interrupted or not, and what they
refuse."""
import dataclasses
import functools
import io
import json
import math
import os
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import pytest

import data
import evaluate
import irpo
import sample
import train
from checkpoint import load_model, weights_hash
from data import prompts, toy
from data.tokenizer import load_tokenizer
from infra.experiment import run_script

ROOT = Path(irpo.__file__).resolve().parent
SMALL = ["--preset", "smoke", "--num_questions", "10", "--num_samples", "3",
         "--max_new_tokens", "24", "--eval_questions", "6", "--eval_samples", "2",
         "--batch_size", "8", "--lr", "1e-3"]


WHOLE_WORLD = toy.problems


@pytest.fixture(autouse=True, scope="module")
def remembered_world():
    """The whole toy world is made once for all runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "problems", functools.cache(WHOLE_WORLD))
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A model directory: one layer, trained for a few seconds on a few hundred documents."""
    folder = tmp_path_factory.mktemp("base") / "model"
    rows = toy.corpus(0, size=240, practice=120, drills=60)
    config = train.Config(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1,
                          max_positions=192, epochs=2, lr=1e-2, warmup_steps=5,
                          lr_schedule="cosine")
    train.new_model(config, [f"{row['question']} {row['solution']}" for row in rows], folder)
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    examples = [train.Example(row["id"], prompts.encode_prompt(tokenizer, row["question"] + "\n"),
                              prompts.encode_solution(tokenizer, row["solution"])) for row in rows]
    records = train.fit(model, examples,
                        lambda model, batch: train.sft_loss(model, batch, 0.1, 40.0),
                        lambda example: example.tokens, config, seed=0)
    assert records[-1]["nll"] < 0.8 * records[0]["nll"]
    train.save_model(model, folder, source=folder)
    return folder


def call(module, *argv) -> None:
    """A driver's main in this process, with this command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
        module.main()


def refusal(capsys, module, *argv) -> str:
    """What a driver says as it stops; any other exception is a traceback to the user and fails
    here."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(module, *argv)
    assert stop.value.code not in (None, 0)
    said = capsys.readouterr().err if isinstance(stop.value.code, int) else stop.value.code
    assert "Traceback" not in said
    return said


def start(*argv) -> subprocess.Popen:
    """irpo.py as a shell starts it. A fork of this process would be faster, and now and then hang: the
    threads that torch has started do not live on in the child, but their locks do."""
    return subprocess.Popen([sys.executable, "irpo.py", *map(str, argv)], cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    """A finished run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    call(irpo, *SMALL, "--model", base, "--run_dir", folder)
    return folder


def read_lines(path: Path) -> list[dict]:
    """The records of a file, without the line of settings that a file of samples begins with."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if "settings" not in row]


# --- a whole run ----------------------------------------------------------------------------------

def test_a_run_writes_its_files(run):
    """Every step's file, under the names that reports and readers rely on; no temporary is left."""
    steps = ["samples.jsonl", "coverage.json", "pairs.jsonl", "train.jsonl", "probe.jsonl",
             "eval.json", "eval_samples.jsonl", "model/config.json", "model/model.safetensors",
             "model/tokenizer.model"]
    expected = ["config.json", "command.txt", "log.jsonl", "results.json", "source/irpo.py",
                "iter0/eval.json", *(f"iter{t}/{name}" for t in (1, 2) for name in steps)]
    assert [name for name in expected if not (run / name).is_file()] == []
    assert list(run.rglob("*.tmp")) == []
    assert not (run / "iter3").exists()


def test_results_are_those_of_the_files(run):
    """The record: M0 to M2 on dev and test, training rows between, numbers that the files bear
    out."""
    rows = json.loads((run / "results.json").read_text())
    assert [(row["name"], row["split"]) for row in rows] == [
        ("M0", "dev"), ("M0", "test"), ("M1", "train"), ("M1", "dev"), ("M1", "test"),
        ("M2", "train"), ("M2", "dev"), ("M2", "test")]
    for row in rows:
        if row["split"] != "train":
            low, high = row["ci95"]
            assert low - 1e-9 <= row["accuracy"] <= high + 1e-9
            assert row["n"] == 6 and high - low > 0.2
        if row["split"] == "test":
            graded = read_lines(run / f"iter{row['iteration']}" / "eval_samples.jsonl")
            right = [question["samples"][0]["verdict"] == "correct" for question in graded]
            assert row["accuracy"] == pytest.approx(fmean(right))
            assert row["num_samples"] == 2 and "pass@2" in row and "maj@2" in row
    for row in (rows[2], rows[5]):
        folder = run / f"iter{row['iteration']}"
        pairs, steps = read_lines(folder / "pairs.jsonl"), read_lines(folder / "train.jsonl")
        assert row["pairs"] == len(pairs) > 0
        assert row["steps"] == len(steps) == math.ceil(len(pairs) / 8)
        sampled = [s for q in read_lines(folder / "samples.jsonl") for s in q["samples"]]
        assert len(sampled) == 30
        assert row["tokens_sampled"] == sum(len(s["ids"]) for s in sampled)


def test_pairs_hold_sampled_ids_and_train_from_their_reference(run, base):
    """Token in, token out: what is trained on was sampled or is gold, id by id; and each iteration
    starts where policy = reference, so at a DPO loss of ln 2."""
    tokenizer = load_tokenizer(base)
    problems = data.load_problems("toy", "train")
    golds = {p.id: prompts.encode_solution(tokenizer, p.solution) for p in problems}
    for t in (1, 2):
        samples = {q["id"]: q for q in read_lines(run / f"iter{t}" / "samples.jsonl")}
        for pair in read_lines(run / f"iter{t}" / "pairs.jsonl"):
            question = samples[pair["id"]]
            ids = [s["ids"] for s in question["samples"]
                   if s["verdict"] == "correct" and s["finished"]]
            assert pair["chosen"] in [*ids, golds[pair["id"]]]
            assert pair["rejected"] in [s["ids"] for s in question["samples"]]
            assert pair["prompt"] == question["prompt_ids"]
            assert pair["prompt"].count(tokenizer.bos_id) == 1
            assert pair["chosen"].count(tokenizer.eos_id) == 1
            assert pair["ref_chosen"] < 0 and pair["ref_rejected"] < 0
        first = read_lines(run / f"iter{t}" / "train.jsonl")[0]
        assert first["dpo"] == pytest.approx(math.log(2), abs=0.05)
    assert samples.keys() == {p.id for p in problems[:10]}


def test_iterations_start_from_the_last_model(run, base):
    """The second iteration samples from M1, takes its reference from M1, and trains M1."""
    coverage = [json.loads((run / f"iter{t}" / "coverage.json").read_text()) for t in (1, 2)]
    assert coverage[0]["reference"] == weights_hash(load_model(base))
    assert coverage[1]["reference"] == weights_hash(load_model(run / "iter1" / "model"))
    references = [c["reference"] for c in coverage]
    assert weights_hash(load_model(run / "iter2" / "model")) not in references


def test_the_same_command_again_does_nothing_new(run, base):
    """Running it again after the end must neither train again nor change a byte of the record."""
    def state():
        return {path: path.stat().st_mtime_ns for path in run.rglob("*")
                if path.is_file() and path.name not in ("results.json", "command.txt")}
    before, results = state(), (run / "results.json").read_bytes()
    call(irpo, *SMALL, "--model", base, "--run_dir", run)
    assert state() == before
    assert (run / "results.json").read_bytes() == results


def test_two_runs_of_a_seed_write_the_same_bytes(run, base, tmp_path):
    """Neither time, nor directory, nor what ran before in the process may reach the record; and the
    seed must."""
    call(irpo, *SMALL, "--model", base, "--run_dir", tmp_path / "same")
    assert (tmp_path / "same" / "results.json").read_bytes() == (run / "results.json").read_bytes()
    call(irpo, *SMALL, "--model", base, "--run_dir", tmp_path / "other", "--seed", "1",
         "--iterations", "1")
    samples = [(folder / "iter1" / "samples.jsonl").read_bytes()
               for folder in (run, tmp_path / "other")]
    assert samples[0] != samples[1]


def test_killed_and_continued_equals_uninterrupted(run, base, tmp_path):
    """SIGKILL as each kind of file appears, junk under the temporary names, and the same command
    again: the record is that of the run which nobody disturbed, to the byte."""
    folder = tmp_path / "run"
    command = [*SMALL, "--model", base, "--run_dir", folder]
    for name in ("iter1/samples.jsonl", "iter1/pairs.jsonl", "iter1/model"):
        child = start(*command)
        while not (folder / name).exists():
            assert child.poll() is None, f"it ended before {name} was there"
            time.sleep(0.002)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        assert not (folder / "results.json").exists()
        for junk in ("iter1/pairs.jsonl.tmp", "iter2/samples.jsonl.tmp", "iter2/eval.json.tmp",
                     "results.json.tmp", "iter2/model.tmp/model.safetensors"):
            (folder / junk).parent.mkdir(parents=True, exist_ok=True)
            (folder / junk).write_text('{"half of a')
    assert start(*command).wait() == 0
    assert (folder / "results.json").read_bytes() == (run / "results.json").read_bytes()
    for name in ("iter1/samples.jsonl", "iter2/pairs.jsonl", "iter2/model/model.safetensors"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()


# --- rows of the paper's table, in a world cut small ----------------------------------------------

@pytest.fixture
def small_world(monkeypatch):
    monkeypatch.setattr(toy, "problems", WHOLE_WORLD)
    monkeypatch.setattr(toy, "SIZES", {"train": 12, "dev": 6, "test": 6})


@pytest.mark.parametrize("flags", [
    ["--method", "sft_gold"], ["--method", "sft_chosen"], ["--alpha", "0"], ["--no-dedupe"],
    ["--pairs_per_question", "8", "--max_pairs", "20"], ["--eval_samples", "0"]])
def test_every_row_of_the_table_is_a_flag(flags, base, tmp_path, small_world):
    """Each variant runs to its record, and is recorded under the flag that made it."""
    call(irpo, *SMALL, "--iterations", "1", *flags, "--model", base, "--run_dir", tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [row["name"] for row in rows] == ["M0", "M0", "M1", "M1", "M1"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    steps = read_lines(tmp_path / "run" / "iter1" / "train.jsonl")
    for flag, value in zip(flags[::2], flags[1::2]):
        assert str(config[flag[2:]]) in (value, f"{value}.0")
    if config["method"] != "irpo":
        assert steps[0]["loss"] > 0 and "dpo" not in steps[0]
    elif config["alpha"] == 0:
        assert steps[0]["loss"] == pytest.approx(steps[0]["dpo"])
    else:
        assert steps[0]["loss"] == pytest.approx(steps[0]["dpo"] + steps[0]["nll"], rel=1e-4)
    if config["method"] == "sft_gold":
        assert len(steps) == math.ceil(10 / 8)  # ten questions once, not their pairs
    if config["max_pairs"] == 20:
        assert rows[2]["pairs"] == 20


def test_start_from_another_model(base, run, tmp_path, small_world):
    """IRPO from SFT-on-chosen: pairs from M_0, reference and first weights from the other model."""
    other = run / "iter1" / "model"
    call(irpo, *SMALL, "--iterations", "1", "--model", base, "--start_from", other,
         "--run_dir", tmp_path / "a")
    call(irpo, *SMALL, "--iterations", "1", "--model", base, "--run_dir", tmp_path / "b")
    samples = [(tmp_path / name / "iter1" / "samples.jsonl").read_bytes() for name in "ab"]
    assert samples[0] == samples[1]
    coverage = json.loads((tmp_path / "a" / "iter1" / "coverage.json").read_text())
    assert coverage["reference"] == weights_hash(load_model(other))


def test_selection_trains_again_for_the_chosen_steps(base, tmp_path, small_world):
    """Dev accuracy chooses a number of steps; the model of the record trains just that long, with
    the dev questions among its pairs."""
    call(irpo, *SMALL, "--iterations", "1", "--select_every", "2", "--epochs", "3",
         "--lr_schedule", "constant", "--model", base, "--run_dir", tmp_path / "run")
    folder = tmp_path / "run" / "iter1"
    curve = json.loads((folder / "select.json").read_text())
    best = max(row["accuracy"] for row in curve)
    chosen = next(row["step"] for row in curve if row["accuracy"] == best)
    assert [row["step"] for row in curve] == list(range(2, 2 + 2 * len(curve), 2))
    assert len(read_lines(folder / "train.jsonl")) == chosen
    assert any(pair["id"].startswith("dev") for pair in read_lines(folder / "pairs.jsonl"))


# --- the other scripts ----------------------------------------------------------------------------

@pytest.fixture
def small_corpus(monkeypatch):
    rows = toy.corpus(0, size=120, practice=60, drills=30)
    monkeypatch.setattr(toy, "corpus", lambda seed, steps, world: rows)


TRAIN = ["--preset", "base", "--hidden_size", "32", "--num_layers", "1", "--num_heads", "2",
         "--num_kv_heads", "1", "--max_steps", "3"]


def test_train_makes_a_base_model_once(tmp_path, small_corpus, capsys):
    """`make base` is called by everything: it must train when its config is new, and only then."""
    call(train, *TRAIN, "--run_dir", tmp_path / "run")
    weights = tmp_path / "run" / "model" / "model.safetensors"
    assert len(read_lines(tmp_path / "run" / "train.jsonl")) == 3
    before = weights.stat().st_mtime_ns
    capsys.readouterr()
    call(train, *TRAIN, "--run_dir", tmp_path / "run")
    assert weights.stat().st_mtime_ns == before
    assert str(tmp_path / "run" / "model") in capsys.readouterr().out
    call(train, *TRAIN, "--run_dir", tmp_path / "again")
    assert (tmp_path / "again" / "model" / "model.safetensors").read_bytes() == weights.read_bytes()


def test_a_refused_training_leaves_the_model_alone(tmp_path, small_corpus, capsys):
    """The old model was deleted first and the other config refused afterwards: hours of training
    lost to a flag."""
    call(train, *TRAIN, "--run_dir", tmp_path / "run")
    message = refusal(capsys, train, *TRAIN, "--lr", "0.5", "--run_dir", tmp_path / "run")
    assert "lr: 0.003 there, 0.5 now" in message
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_evaluate_writes_its_summary(base, tmp_path, small_world, capsys):
    """As a script: samples, summary, and the interval on the last line."""
    call(evaluate, "--model", base, "--limit", "4", "--num_samples", "2", "--temperature", "1",
         "--max_new_tokens", "20", "--run_dir", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert summary["n"] == 4 and summary["num_samples"] == 2
    assert len(read_lines(tmp_path / "out" / "eval_samples.jsonl")) == 4
    assert "95 %" in capsys.readouterr().out


def test_rescoring_gives_the_same_number(base, tmp_path, small_world, capsys):
    """Settings, prompts, right answers and texts are in the file, so it needs nothing else; and a
    grader that has changed since is noticed."""
    samples = tmp_path / "out" / "eval_samples.jsonl"
    call(evaluate, "--model", base, "--limit", "12", "--max_new_tokens", "48",
         "--run_dir", tmp_path / "out")
    before = [line for line in capsys.readouterr().out.splitlines() if line.startswith("accuracy")]
    call(evaluate, "--rescore", samples)
    again = capsys.readouterr().out
    assert before[0] in again.splitlines() and " now;" not in again
    for question in read_lines(samples):
        assert question["prompt"].endswith("?\n") and question["gold"]

    settings, answered = evaluate.read_answered(samples)
    flipped = [dataclasses.replace(answered[0], gold="-1"), *answered[1:]]
    first = dataclasses.replace(answered[0].samples[0], verdict="correct")
    flipped[0] = dataclasses.replace(flipped[0], samples=[first])
    evaluate.save_answered(samples, flipped, evaluate.SampleOptions())
    call(evaluate, "--rescore", samples)
    assert f"{answered[0].id}: correct in the file" in capsys.readouterr().out


def test_rescore_refuses_what_it_cannot_read_or_use(base, tmp_path, small_world, capsys):
    (tmp_path / "x.jsonl").write_text("")
    for path in (tmp_path / "none.jsonl", tmp_path, tmp_path / "x.jsonl"):
        assert str(path) in refusal(capsys, evaluate, "--rescore", path)
    assert "--answer_format" in refusal(capsys, evaluate, "--rescore", tmp_path / "x.jsonl",
                                        "--answer_format", "boxed")


def test_a_model_says_how_it_was_asked(base, tmp_path, small_world, capsys):
    """rft.py's default prompt is not evaluate.py's: the same model was measured with another question."""
    model = tmp_path / "m"
    shutil.copytree(base, model)
    (model / "asked.json").write_text(json.dumps(train.TaskOptions(prompt="rft").asked))
    flags = ["--model", model, "--limit", "2", "--max_new_tokens", "4", "--run_dir"]
    call(evaluate, *flags, tmp_path / "a")
    assert "was trained with --prompt rft" in capsys.readouterr().out
    call(evaluate, *flags, tmp_path / "b", "--prompt", "rft")
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--limit", "-2"], ["--max_new_tokens", "0"], ["--batch_rows", "0"]])
def test_numbers_that_make_no_sense_are_refused(flags, base, tmp_path, capsys):
    assert flags[0] in refusal(capsys, evaluate, "--model", base, *flags, "--run_dir", tmp_path / "run")


@pytest.mark.parametrize("flags", [["--top_p", "0"], ["--temperature", "-1"], ["--num_samples", "0"],
                                   ["--max_new_tokens", "0"]])
def test_sample_refuses_numbers_that_make_no_sense(flags, base, capsys):
    assert flags[0] in refusal(capsys, sample, "--model", base, *flags)


def test_sample_reads_a_pipe(base):
    """Blank lines and bytes that are no text do not end it, a reader who leaves is no error."""
    question = b"Ben has 4 apples. How many apples does Ben have?\n"
    command = [sys.executable, "sample.py", "--model", str(base), "--max_new_tokens", "8"]
    piped = subprocess.run(command, input=question + b"\n\xff\xfe\n" + question, cwd=ROOT, capture_output=True)
    assert piped.returncode == 0 and piped.stdout.count(b"\n") >= 3 and b"Traceback" not in piped.stderr


def test_sample_answers_questions(base, monkeypatch, capsys):
    """Typed question in, response out, until an empty line."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(
        b"Ben has 4 apples. How many apples does Ben have?\n\n")))
    call(sample, "--model", base, "--num_samples", "2", "--temperature", "1",
         "--max_new_tokens", "8")
    assert len(capsys.readouterr().out.splitlines()) >= 2


# --- what is refused ------------------------------------------------------------------------------

@pytest.mark.parametrize("module", [irpo, evaluate, sample], ids=lambda module: module.__name__)
@pytest.mark.parametrize("kind", ["nowhere", "empty", "half"])
def test_a_missing_model_is_refused(module, kind, base, tmp_path, capsys):
    """Named with its path and the flag that gives it, before anything is sampled."""
    path = tmp_path / "model"
    if kind != "nowhere":
        path.mkdir()
    if kind == "half":  # a download that broke off after its small files
        for name in ("config.json", "tokenizer.model"):
            (path / name).write_bytes((base / name).read_bytes())
    where = [] if module is sample else ["--run_dir", tmp_path / "run"]
    message = refusal(capsys, module, "--model", path, *where)
    assert str(path) in message
    remedies = ["--model", "make base", "give ", *(["safetensors"] if kind == "half" else [])]
    assert any(remedy in message for remedy in remedies)


def test_no_model_at_all_is_refused(tmp_path, capsys):
    """The flag was left out: the message must name it, not a file that nobody asked for."""
    assert "--model" in refusal(capsys, irpo, *SMALL, "--run_dir", tmp_path / "run")
    assert "--model" in refusal(capsys, evaluate, "--run_dir", tmp_path / "run")


def test_prompts_that_leave_no_room_are_refused_before_anything_is_sampled(base, tmp_path, capsys):
    """With the numbers and the flag: 512 new tokens do not fit 192 positions."""
    message = refusal(capsys, evaluate, "--model", base, "--run_dir", tmp_path / "run")
    assert "--max_new_tokens 512" in message and "192 positions" in message
    assert not (tmp_path / "run").exists()


def gsm8k(folder: Path, train_rows: int, test_rows: int) -> Path:
    folder.mkdir()
    for name, rows in (("train", train_rows), ("test", test_rows)):
        lines = [json.dumps({"question": f"What is {i} + 1?",
                             "answer": f"It is {i + 1}.\n#### {i + 1}"})
                 for i in range(rows)]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("train_rows", [0, 3])
def test_too_few_questions_are_refused(train_rows, base, tmp_path, capsys):
    """An empty or short file of one's own; its dev split was drawn from 1,000 questions come what
    may, and Python's `Sample larger than population` told nobody why."""
    folder = gsm8k(tmp_path / "data", train_rows, 5)
    message = refusal(capsys, irpo, "--task", "gsm8k", "--path", folder, "--model", base,
                      "--run_dir", tmp_path / "run")
    assert "train" in message and ("gsm8k" in message or str(folder) in message)


def test_an_empty_test_file_is_refused(base, tmp_path, capsys):
    """Accuracy of nothing is a division by zero after everything was sampled."""
    folder = gsm8k(tmp_path / "data", 5, 0)
    message = refusal(capsys, evaluate, "--task", "gsm8k", "--path", folder, "--model", base,
                      "--run_dir", tmp_path / "out")
    assert "test" in message and ("gsm8k" in message or str(folder) in message)


@pytest.mark.parametrize("line", ["not json", '{"question": "q"}',
                                  '{"question": "q", "answer": "72"}', "[1]"])
def test_a_broken_line_of_data_is_refused_with_its_number(line, tmp_path, capsys):
    """Which file, which line, and what was expected there."""
    folder = gsm8k(tmp_path / "data", 3, 3)
    with open(folder / "test.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(SystemExit) as stop:
        data.load_problems("gsm8k", "test", folder)
    assert f"{folder / 'test.jsonl'}, line 4" in str(stop.value) and "####" in str(stop.value)


def test_every_line_of_data_is_one_question(tmp_path):
    """JSON allows U+2028 and U+0085 inside a string, and Python's splitlines() breaks lines
    there."""
    row = {"question": "One\u2028two\x85three?", "answer": "Yes.\n#### 3"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n",
                                         encoding="utf-8")
    [problem] = data.load_problems("gsm8k", "test", tmp_path)
    assert problem.question == row["question"] and problem.answer == "3"


def test_missing_data_is_refused_with_its_path(base, tmp_path, capsys):
    """And with the flag that names another folder."""
    message = refusal(capsys, irpo, "--task", "gsm8k", "--path", tmp_path / "nowhere",
                      "--model", base, "--run_dir", tmp_path / "run")
    assert str(tmp_path / "nowhere") in message and "--path" in message
    assert "toy" in refusal(capsys, irpo, "--task", "gsm9k", "--model", base,
                            "--run_dir", tmp_path / "run")


@pytest.mark.parametrize("module", [irpo, evaluate, train], ids=lambda module: module.__name__)
def test_an_unwritable_run_directory_is_refused(module, base, tmp_path, capsys):
    """A directory below a file cannot be made; said at once, with the flag to change."""
    (tmp_path / "file").write_text("in the way")
    arguments = {"irpo": SMALL, "evaluate": ["--limit", "1", "--max_new_tokens", "20"], "train": []}
    message = refusal(capsys, module, *arguments[module.__name__], "--model", base,
                      "--run_dir", tmp_path / "file" / "run")
    assert str(tmp_path / "file" / "run") in message and "--run_dir" in message


def test_another_config_in_the_run_directory_is_refused(run, base, capsys):
    """With the difference, and without touching the run."""
    before = (run / "results.json").read_bytes()
    message = refusal(capsys, irpo, *SMALL, "--model", base, "--run_dir", run, "--alpha", "0")
    assert "alpha: 1.0 there, 0.0 now" in message and str(run) in message and "--run_dir" in message
    assert (run / "results.json").read_bytes() == before


def copied(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder, dirs_exist_ok=True)
    return folder


def test_a_replaced_base_model_is_refused(base, run, tmp_path, small_world, capsys):
    """`make base` was run with other code between two starts: the samples on disk are not its
    own."""
    model = copied(base, tmp_path / "model")
    arguments = [*SMALL, "--iterations", "1", "--model", model, "--run_dir", tmp_path / "run"]
    call(irpo, *arguments)
    copied(run / "iter1" / "model", model)
    assert "weights: " in refusal(capsys, irpo, *arguments)


def test_a_stale_reference_is_refused(base, run, tmp_path, small_world, capsys):
    """The model that training starts from was replaced after its log-probabilities were stored."""
    other = copied(run / "iter1" / "model", tmp_path / "other")
    arguments = [*SMALL, "--iterations", "1", "--model", base, "--start_from", other,
                 "--run_dir", tmp_path / "run"]
    call(irpo, *arguments)
    shutil.rmtree(tmp_path / "run" / "iter1" / "model")
    copied(run / "iter2" / "model", other)
    message = refusal(capsys, irpo, *arguments)
    assert "reference" in message and str(tmp_path / "run" / "iter1" / "pairs.jsonl") in message


def test_an_interrupted_run_ends_with_a_sentence():
    """Ctrl-C is a way to stop, not an error with twenty lines of traceback."""
    def interrupted():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit, match="the same command"):
        run_script(interrupted)


def test_as_a_process_an_error_is_one_clear_sentence(tmp_path):
    """What a shell sees: exit code, message on stderr, no traceback, no directory left behind."""
    done = subprocess.run([sys.executable, "irpo.py", *SMALL, "--model", tmp_path / "nowhere",
                           "--run_dir", tmp_path / "run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert str(tmp_path / "nowhere") in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


# --- other data sets ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A small model with a tokenizer that can write anything below, untrained."""
    folder = tmp_path_factory.mktemp("reader") / "model"
    train.new_model(train.Config(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1,
                                 max_positions=1024, vocab_size=200),
                    [f"{text} {string.printable}" for text in prompts.TEMPLATES.values()], folder)
    return folder


def arc(folder: Path, count: int) -> Path:
    """ARC's files: questions with options, and no solutions."""
    folder.mkdir()
    for name in ("ARC-Challenge-Train", "ARC-Easy-Train", "ARC-Challenge-Dev", "ARC-Challenge-Test"):
        rows = [{"id": f"{name}-{i}", "answerKey": "AB"[i % 2], "question": {
            "stem": f"Which is {i}?", "choices": [{"text": str(i), "label": label} for label in "ABC"]}}
            for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_task_without_gold_solutions(reader, tmp_path, capsys):
    """ARC has none: refused with the flag that helps, not trained on empty responses; and --no-gold gets
    as far as samples and pairs, of which a random model has none."""
    flags = ["--task", "arc", "--path", arc(tmp_path / "arc", 4), "--prompt", "irpo", "--model", reader,
             "--select_every", "0", "--num_samples", "2", "--max_new_tokens", "8", "--run_dir",
             tmp_path / "run"]
    assert "--no-gold" in refusal(capsys, irpo, *flags)
    assert not (tmp_path / "run").exists()
    assert "has no pairs" in refusal(capsys, irpo, *flags, "--no-gold")
    [first, *_] = read_lines(tmp_path / "run" / "iter1" / "samples.jsonl")
    assert '"Final answer: (insert letter here)"\n\nQuestion: Which is 0?\n(A) 0\n' in first["prompt"]
    assert "no gold solutions" in refusal(capsys, train, "--task", "arc", "--path", tmp_path / "arc",
                                          "--model", reader, "--run_dir", tmp_path / "sft")


def test_programs_are_run_where_answers_are_programs(reader, tmp_path, capsys):
    """The gold programs pass through tokenizer and sandbox in the self-check; a random model's text is
    no program."""
    folder = tmp_path / "svamp"
    folder.mkdir()
    rows = [{"item_id": f"svamp_{i}", "question": f"What is {i} + 1?", "answer_value": f"{i + 1}.0",
             "answer_cot": f'def solution():\n    """What is {i} + 1?"""\n    return {i} + 1'}
            for i in range(10)]
    (folder / "svamp_python_sdp.json").write_text(json.dumps(rows))
    (folder / "svamp_test_set.json").write_text(json.dumps(rows))
    call(evaluate, "--task", "svamp", "--path", folder, "--prompt", "reft", "--answer_format", "python",
         "--model", reader, "--max_new_tokens", "8", "--run_dir", tmp_path / "out")
    said = capsys.readouterr().out
    assert "10 of 10 gold solutions are graded correct" in said and "accuracy 0.0%" in said
    rows[3]["answer_value"] = "5.0"
    (folder / "svamp_test_set.json").write_text(json.dumps(rows))
    message = refusal(capsys, evaluate, "--task", "svamp", "--path", folder, "--prompt", "reft",
                      "--answer_format", "python", "--model", reader, "--max_new_tokens", "8",
                      "--run_dir", tmp_path / "other")
    assert "return 3 + 1" in message and "gold answer 5.0" in message


def test_a_model_that_does_not_know_its_tokenizer(reader, base, tmp_path, capsys):
    """Weights of one model beside the tokenizer of another ended in an index error of CUDA."""
    shutil.copytree(reader, tmp_path / "mixed")
    shutil.copy(base / "tokenizer.model", tmp_path / "mixed")
    assert load_tokenizer(base).vocab_size > load_model(reader).config.vocab_size
    message = refusal(capsys, evaluate, "--model", tmp_path / "mixed", "--max_new_tokens", "8",
                      "--run_dir", tmp_path / "out")
    assert "do not belong together" in message
