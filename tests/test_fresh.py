"""A base model is made from nothing but flags and a seed: once, and the same again from the same."""
import json
import math
from pathlib import Path

import pytest
import torch

from checkpoint import load_config, load_model, model_hash
from data import toy
from data.fresh import initialize
from data.tokenizer import load_tokenizer
from infra.run import read_jsonl
from model import Llama, ModelConfig
from tiny import tiny_model
from tools import sft

ROWS = toy.corpus(0, 200)
SMALL = ["--preset", "base", "--hidden_size", 32, "--num_layers", 1, "--max_steps", 25, "--lr", 1e-2,
         "--batch_size", 8, "--warmup_steps", 2, "--max_positions", 200, "--vocab_size", 260]


def call(run: Path, *flags) -> Path:
    """Run tools.sft on a small corpus; return the model directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "corpus", lambda seed, steps: ROWS)
        patch.setattr("sys.argv", ["train.py", *map(str, flags), "--run_dir", str(run)])
        sft.main()
    return run / "model"


def weights_of(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return call(tmp_path_factory.mktemp("base") / "run", *SMALL)


def test_a_base_model_has_the_shape_that_was_asked_for_and_has_learned(base):
    tokenizer, fresh = load_tokenizer(base), load_model(base.parent / "start").state_dict()
    assert load_config(base) == ModelConfig(260, 32, 80, 1, 8, 8, 4, max_position_embeddings=200, qk_norm=True)
    assert fresh["lm_head.weight"].std().item() == pytest.approx(0.08, rel=0.05) and tokenizer.vocab_size == 260
    for row in ROWS:  # of which the solutions have several lines
        assert tokenizer.decode(tokenizer.encode(row["solution"])) == row["solution"]
    records = read_jsonl(base.parent / "train.jsonl")
    assert len(records) == 25
    assert records[0]["nll"] == pytest.approx(math.log(260), abs=0.3)  # fresh weights know nothing
    assert records[-1]["nll"] < 0.8 * records[0]["nll"]
    assert weights_of(base) != weights_of(base.parent / "start")
    assert all(weight.isfinite().all() for weight in load_model(base).parameters())


def test_it_is_made_once_and_the_same_flags_make_the_same(base, tmp_path, capsys):
    """`make base` is called by everything: it must train when its config is new, and only then."""
    before = (base / "model.safetensors").stat().st_mtime_ns
    assert call(base.parent, *SMALL, "--micro_batch_tokens", 2048, "--save_every", 7) == base
    assert str(base) in capsys.readouterr().out
    assert (base / "model.safetensors").stat().st_mtime_ns == before
    assert model_hash(call(tmp_path / "again", *SMALL)) == model_hash(base)
    other = call(tmp_path / "other", *SMALL, "--max_steps", 1, "--seed", 1)
    assert weights_of(other.parent / "start") != weights_of(base.parent / "start")


def test_a_wrong_width_is_refused_before_anything_is_written(tmp_path, capsys):
    """A run directory with a config.json that can never work would refuse the right flags, too."""
    with pytest.raises(SystemExit):
        call(tmp_path / "run", *SMALL, "--hidden_size", 36)
    assert "--hidden_size 36: must be a multiple of 16" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_kill_while_the_fresh_model_is_made_does_not_end_the_run(tmp_path, monkeypatch, base):
    """Its directory exists as soon as it has a tokenizer, and then holds no model yet."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data.fresh.save_model", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        call(tmp_path / "run", *SMALL)
    assert (tmp_path / "run" / "start" / "tokenizer.model").exists()
    assert weights_of(call(tmp_path / "run", *SMALL)) == weights_of(base)


def test_a_given_model_is_tuned_on_the_training_questions(base, tmp_path, monkeypatch):
    """It starts from that model (its weights at a learning rate of almost nothing, its tokenizer), not from a fresh
    one, and learns the task's own solutions, not the corpus, with the seed and the weights that were asked for."""
    asked, given, load, fit = [], [], sft.Config.problems, sft.fit_sft
    monkeypatch.setattr(sft.Config, "problems", lambda *args: asked.append(args[1:]) or load(*args))
    monkeypatch.setattr(sft, "fit_sft", lambda *args: given.extend(args) or fit(*args))
    tuned = call(tmp_path / "run", "--task", "toy", "--model", base, "--max_steps", 1, "--lr", 1e-9, "--seed", 5,
                 "--prompt_weight", 0.3)
    assert asked == [("train",)] and len(given[1]) == 12
    assert given[3:] == [5, tmp_path / "run", 0.3]
    for weight, before in zip(load_model(tuned).parameters(), load_model(base).parameters(), strict=True):
        torch.testing.assert_close(weight, before, rtol=0, atol=1e-6)
    assert (tuned / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    assert not (tmp_path / "run" / "start").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["weights"] == model_hash(base)


def test_fresh_weights_have_their_spread_and_depend_on_the_seed_alone():
    """0.02, and divided by sqrt(2 * 8 layers) = 4 where a block writes its output, so that depth adds no variance."""
    shape = tiny_model(vocab_size=300, hidden_size=64, num_hidden_layers=8, attention_bias=True,
                       qk_norm=True).config
    model = initialize(Llama(shape), seed=0)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            expected = 0.005 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert weight.std().item() == pytest.approx(expected, rel=0.1), name
            assert weight.mean().abs() < expected / 5, name
        else:
            assert (weight == (0 if name.endswith("bias") else 2 if "q_norm" in name else 1)).all(), name
    again, other = (initialize(Llama(shape), seed).state_dict() for seed in (0, 1))
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())
    assert not torch.equal(other["lm_head.weight"], model.lm_head.weight)
