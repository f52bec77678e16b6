"""What a terminal is shown: texts of models and of data sets, as they are, but none that it would obey."""
import io
import json
import sys
from types import SimpleNamespace

import pytest

from data import __main__ as show
from evaluate import Answered, Sample
from infra import InputError
from infra.progress import printable
from infra.run import run_script, write_records
from runs import call, refusal
from tiny import tiny_model
from tools import chat, evaluation

HOSTILE = "\x1b]0;title\x07\x1b[2J\x00\x9b1m\r\x7f\u202e\u2066\ud800"
SEEN = r"\x1b]0;title\x07\x1b[2J\x00\x9b1m\r\x7f\u202e\u2066\ud800"


def test_only_what_is_obeyed_is_escaped():
    assert printable(HOSTILE) == SEEN
    assert printable(usual := "x\u00b2 \u2264 \u6570\u3000\U0001f600\n\ta\u00a0b \\x1b") == usual


def test_problems_are_shown_as_text(tmp_path, monkeypatch, capsys):
    hostile = HOSTILE[:-1]  # a file cannot hold a lone surrogate
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": f"a{hostile}b", "answer": f"{hostile} #### 4"}) + "\n")
    monkeypatch.setenv("NO_COLOR", "1")
    call(show, "--task", "gsm8k", "--split", "test", "--path", tmp_path)
    shown = capsys.readouterr().out
    assert f"a{SEEN[:-6]}b" in shown and all(c.isprintable() or c == "\n" for c in shown)


def test_a_chat_streams_text(monkeypatch, capsys):
    """ESC, BEL and NUL of a response went to the terminal as they were drawn."""
    monkeypatch.setattr(chat, "load_sampler", lambda path, precision: tiny_model())
    tokenizer = SimpleNamespace(eos_ids=(2,), bos_id=1, encode=lambda text: [5], chat_template="")
    monkeypatch.setattr(chat, "load_tokenizer", lambda path: tokenizer)
    monkeypatch.setattr(chat, "pieces", lambda tokenizer, ids: zip([7] * 99, HOSTILE))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"how?")))
    call(chat, "--model", "m")
    assert capsys.readouterr().out == f"{SEEN} [truncated]\n"


def test_a_chat_refuses_token_ids_that_its_model_does_not_know(monkeypatch, capsys):
    """It ended in an IndexError."""
    model = tiny_model()
    monkeypatch.setattr(chat, "load_sampler", lambda path, precision: model)
    tokenizer = SimpleNamespace(eos_ids=(2,), bos_id=1, encode=lambda text: [model.config.vocab_size], chat_template="")
    monkeypatch.setattr(chat, "load_tokenizer", lambda path: tokenizer)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"how?")))
    said = refusal(capsys, chat, "--model", "m")
    assert f"gives token {model.config.vocab_size}, and the model in m knows {model.config.vocab_size}: they" in said


def test_a_verdict_that_changed_is_shown_as_text(tmp_path, capsys):
    samples = [Sample([3, 2], True, f"#### 5{HOSTILE}", "correct", f"{HOSTILE}4")]
    write_records(tmp_path / "samples.jsonl", [Answered(f"q{HOSTILE}", "p", [1], f"4{HOSTILE}", samples)],
                  dict(task="gsm8k", marks="hash"))
    call(evaluation, "--rescore", tmp_path / "samples.jsonl")
    shown = capsys.readouterr().out
    assert f"q{SEEN}: correct in the file" in shown and f"gold 4{SEEN}" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)


def test_an_error_message_is_text():
    def main():
        raise InputError(f"no answer in\n{HOSTILE}")
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == f"no answer in\n{SEEN}"
