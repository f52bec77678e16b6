"""A chat streams the responses that generate gives, and says where one was cut off."""
import io
import json
import shutil
import sys

import pytest
import torch
from tiny import tiny_model

from checkpoint import load_model
from data.prompts import encode_prompt, prompt_text
from data.tokenizer import load_tokenizer
from runs import call
from sample import generate
from tools import chat

QUESTION = "Ben has 4 apples. How many apples does Ben have?"


@pytest.mark.parametrize("temperature, top_p, top_k", [(0.0, 1.0, 0), (1.0, 1.0, 0), (1.0, 0.8, 5)])
@pytest.mark.parametrize("max_new_tokens", [1, 20])
def test_a_stream_is_what_generate_draws(temperature, top_p, top_k, max_new_tokens):
    """Token by token, the same responses, with EOS if they have one."""
    model, prompt = tiny_model(), [1, 5, 9, 4]
    options = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=7)
    [responses] = generate(model, [prompt], num_samples=3, eos_ids=(2,), **options)
    streams = [[*chat.stream(model, prompt, n, [2], chat.Config(model="m", **options))] for n in range(3)]
    assert streams == [response.ids for response in responses]
    assert torch.is_grad_enabled()


def test_a_stream_ends_where_the_model_has_no_more_positions_or_no_finite_logits():
    config = chat.Config(model="m", max_new_tokens=50)
    assert len([*chat.stream(tiny_model(), [5] * 120, 0, [], config)]) == 8
    broken = tiny_model()
    broken.lm_head.weight.data[9] = torch.nan
    with pytest.raises(SystemExit, match="logits are not finite"):
        next(chat.stream(broken, [5], 0, [], config))


def test_a_chat_prints_the_responses(base, tmp_path, monkeypatch, capsys):
    """As the flags ask for them, one finished and one not, by an end token that only generation_config.json declares;
    neither a question that is too long ends it, nor blank lines, nor broken UTF-8."""
    model, tokenizer = shutil.copytree(base, tmp_path / "model"), load_tokenizer(base)
    prompt = encode_prompt(tokenizer, prompt_text("rft", "", QUESTION))
    options = dict(num_samples=2, temperature=1.2, top_k=9, top_p=0.9, seed=3, max_new_tokens=8)
    [[first, second]] = generate(load_model(base), [prompt], eos_ids=(), **options)
    end = next(token for token in first.ids if token not in second.ids)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    first = first.ids[:first.ids.index(end) + 1]

    lines = f"{QUESTION}\n\n\xff\n{QUESTION * 20}\n{QUESTION}\n".encode("latin1")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    call(chat, "--model", model, "--precision", "fp32", "--prompt", "rft",
         *(f"--{name}={value}" for name, value in options.items()))
    said = capsys.readouterr().out
    shown = f"{tokenizer.decode(first)}\n{tokenizer.decode(second.ids)} [truncated]\n"
    assert said.startswith(shown) and said.endswith(shown)
    assert "tokens are too long for this model's 192 positions]\n" in said
