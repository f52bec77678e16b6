"""Reranking: labels, the head's loss, and which sample is picked."""
import json
import math

import pytest
import torch
from tiny import random_tokens, tiny_model

from tools import rerank
from checkpoint import save_model
from evaluate import Answered, Sample
from infra import InputError
from infra.run import write_records
from runs import call
from tools.rerank import Config, Labelled, RewardModel, best, classification_loss, label, scores

FILES = dict(model="m", labelled="l", candidates="c", run_dir="r", precision="fp32")


def settings(split: str) -> dict:
    return {"task": "toy", "marks": "hash", "split": split}


def sample(ids: list[int], right: bool, answer: str | None = "1") -> Sample:
    return Sample(ids, True, "text", "correct" if right else "wrong", answer)


def test_equal_responses_of_a_question_count_once():
    """Those that are neither right nor wrong, such as a timeout, count not at all."""
    first = Answered("a", "p", [1, 5], "1", [sample([3, 2], True), sample([3, 2], True), sample([4, 2], False)])
    second = Answered("b", "p", [1, 6], "1", [sample([3, 2], False), Sample([7, 2], True, "text", "timeout", None)])
    assert label([first, second]) == [
        Labelled("a", [1, 5], [3, 2], True), Labelled("a", [1, 5], [4, 2], False),
        Labelled("b", [1, 6], [3, 2], False)]


def test_the_head_reads_the_last_token_of_each_response():
    """Padding and company change nothing; an untrained head gives one half and a loss of ln 2."""
    model = RewardModel(tiny_model())
    responses = [Labelled(str(i), random_tokens(i, 2 + i).tolist(), random_tokens(9 + i, 1 + 3 * i).tolist(),
                          bool(i % 2)) for i in range(5)]
    start = classification_loss(model, responses)["loss"]
    torch.testing.assert_close(start, torch.full((5,), math.log(2)))
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    together = classification_loss(model, responses)["loss"]
    alone = torch.cat([classification_loss(model, [r])["loss"] for r in responses])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    for r, value in zip(responses, scores(model, responses, Config(**FILES, micro_batch_tokens=16))):
        tokens = torch.tensor([r.prompt + r.response])
        logits = model.head(model.model(tokens)[0, -1])
        assert value == pytest.approx(float(logits.detach().softmax(-1)[1]), abs=1e-5)
        other = classification_loss(model, [r])["loss"].item()
        assert other == pytest.approx(-math.log(value if r.right else 1 - value), rel=1e-3)


def test_only_samples_with_an_answer_are_picked():
    """The authors leave out invalid answers; where all are, the best of all stands."""
    def question(*answers):
        return Answered("q", "p", [1], "1", [sample([3], False, answer) for answer in answers])
    assert best(question("1", None, "2"), [0.2, 0.9, 0.3]) == 2
    assert best(question(None, None), [0.2, 0.9]) == 1
    assert best(question("1", "2", "3"), [0.5, 0.7, 0.7]) == 1


def test_reranking_finds_a_visible_difference(tmp_path, capsys):
    """Right responses begin with token 7: a reward model that learns so picks right ones in nearly every
    question, where one sample in four is right."""
    save_model(tiny_model(), tmp_path / "m")
    def question(i: int) -> Answered:
        rows = [sample([7 if n == i % 4 else 8, *random_tokens(100 * i + n, 3).tolist(), 2], n == i % 4)
                for n in range(4)]
        return Answered(f"q{i}", "p", [1, *random_tokens(i, 4).tolist()], "1", rows)
    write_records(tmp_path / "train.jsonl", [question(i) for i in range(60)], settings("train"))
    write_records(tmp_path / "test.jsonl", [question(i) for i in range(100, 140)], settings("test"))
    flags = ["--preset", "toy", "--model", tmp_path / "m", "--labelled", tmp_path / "train.jsonl",
             "--candidates", tmp_path / "test.jsonl", "--run_dir", tmp_path / "run", "--lr", "1e-3"]
    call(rerank, *flags)
    [row] = json.loads((tmp_path / "run" / "results.json").read_text())
    assert row["pass@1"] == 0.25 and row["accuracy"] > 0.9 and row["n"] == 40
    assert "best of 4 by reward" in capsys.readouterr().out
    before = (tmp_path / "run" / "picked.jsonl").stat().st_mtime_ns
    call(rerank, *flags)  # shows the same, and trains nothing
    assert "best of 4 by reward" in capsys.readouterr().out
    assert (tmp_path / "run" / "picked.jsonl").stat().st_mtime_ns == before
    picked = [json.loads(line) for line in (tmp_path / "run" / "picked.jsonl").read_text().splitlines()]
    assert sum(p["picked"] == (i + 100) % 4 for i, p in enumerate(picked)) == row["accuracy"] * 40


def test_what_cannot_be_learned_from_is_refused(tmp_path):
    """Before anything is written: labels that are all alike; the two files swapped, where labels of test questions
    would pick among answers to them; and a train file as both."""
    save_model(tiny_model(), tmp_path / "m")
    rows = [Answered("a", "p", [1], "1", [sample([3], True), sample([4], False)])]
    write_records(tmp_path / "alike.jsonl", [Answered("a", "p", [1], "1", [sample([3], True)])], settings("train"))
    write_records(tmp_path / "train.jsonl", rows, settings("train"))
    write_records(tmp_path / "test.jsonl", rows, settings("test"))
    write_records(tmp_path / "other.jsonl", rows, settings("test") | {"task": "gsm8k"})
    for labelled, candidates, said in (("alike", "test", "nothing to tell apart"), ("test", "train", "must be train"),
                                       ("train", "train", "the second dev or test"),
                                       ("train", "other", "of the same task")):
        with pytest.raises(InputError, match=said):
            call(rerank, "--model", tmp_path / "m", "--labelled", tmp_path / f"{labelled}.jsonl",
                 "--candidates", tmp_path / f"{candidates}.jsonl", "--run_dir", tmp_path / "run")
        assert not (tmp_path / "run").exists()
