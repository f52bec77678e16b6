"""Runs of the scripts in this process, on a toy world and a base model that are small enough for tests."""
import json
import shutil
import sys
from pathlib import Path

import pytest

from checkpoint import load_model, save_model
from data import toy
from data.fresh import fresh_model
from data.prompts import encode_prompt, encode_solution
from data.tokenizer import load_tokenizer
from infra import InputError
from infra.parallel import device
from small import SIZES
from train import Example, TrainOptions, fit_sft

SMALL = ["--preset", "smoke", "--num_questions", "10", "--num_samples", "3", "--max_new_tokens", "24",
         "--eval_questions", "6", "--eval_samples", "2", "--batch_size", "8", "--lr", "1e-3", "--epochs", "1",
         "--precision", "fp32"]  # auto is measured, and on a busy machine it can differ from run to run
PROCESS = [sys.executable, str(Path(__file__).with_name("small.py"))]


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A model directory: one layer, trained for a few seconds on a few hundred documents. Half of them give the answer
    alone, so that samples are short, and some are right."""
    folder = tmp_path_factory.mktemp("base") / "model"
    rows = toy.corpus(0, size=400)
    for row in rows[::2]:
        row["solution"] = f"#### {row['answer']}"
    fresh_model([f"{row['question']} {row['solution']}" for row in rows], folder, vocab_size=288, hidden_size=32,
                num_layers=1, max_positions=224, seed=0)
    model, tokenizer = load_model(folder, device()), load_tokenizer(folder)
    examples = [Example(row["id"], encode_prompt(tokenizer, row["question"] + "\n"),
                        encode_solution(tokenizer, row["solution"])) for row in rows]
    options = TrainOptions(epochs=2, lr=1e-2, warmup_steps=5, lr_schedule="cosine", precision="fp32")
    records = fit_sft(model, examples, options, 0, folder)
    assert records[-1]["nll"] < 0.8 * records[0]["nll"]
    save_model(model, folder, source=folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def small_world():
    """A few questions; the first questions of the full world are the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "SIZES", SIZES)
        yield


def call(module, *argv) -> None:
    """Run the main of a script in this process, with this command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
        module.main()


def narrower(model: Path, copy: Path, positions: int) -> Path:
    """Copy a model directory as one with fewer positions."""
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    return copy


def refusal(capsys, module, *argv) -> str:
    """Return what a script says as it stops; any other exception is a traceback to the user and fails here."""
    capsys.readouterr()
    with pytest.raises((InputError, SystemExit)) as stop:
        call(module, *argv)
    said = getattr(stop.value, "code", str(stop.value))
    assert said not in (None, 0)
    return capsys.readouterr().err if isinstance(said, int) else said


def read_lines(path: Path) -> list[dict]:
    """Read the records of a file, without the line of settings that some files begin with."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if "settings" not in row]


def settings(path: Path) -> dict:
    """Read the settings in the first line of a file."""
    with open(path, encoding="utf-8") as file:
        return json.loads(next(file))["settings"]
