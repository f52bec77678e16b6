"""Real models: what transformers writes gives its logits here, and what is written here gives ours there.

Every family is a tiny random model of transformers' own class, with weights large enough that its logits depend on
positions, biases and epsilon: a field that is read under another name must show.
"""
import copy
import json

import pytest
import torch

from checkpoint import load_config, load_model, num_parameters, save_model
from sample import generate
from tiny import LLAMA3, random_prompts, random_tokens, tiny_model

transformers = pytest.importorskip("transformers")

CLOSE = dict(rtol=0, atol=2e-4)
COMMON = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
              bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6)
FAMILIES = {
    "llama 1": ("Llama", dict(num_key_value_heads=4, rms_norm_eps=1e-6)),
    "llama 3.1": ("Llama", dict(rope_theta=500.0, rope_scaling=LLAMA3)),
    "llama 3.2": ("Llama", dict(rope_theta=500.0, rope_scaling=LLAMA3 | {"factor": 32.0},
                                tie_word_embeddings=True, head_dim=12)),
    "tinyllama": ("Llama", dict(num_attention_heads=8, num_key_value_heads=1)),
    "smollm2": ("Llama", dict(tie_word_embeddings=True, rope_theta=100000.0, hidden_size=36,
                              num_attention_heads=9, num_key_value_heads=3)),
    "mistral 0.1": ("Mistral", dict(sliding_window=48)),
    "mistral 0.3": ("Mistral", dict(sliding_window=None, rope_theta=1e6, head_dim=16)),
    "qwen2": ("Qwen2", dict(rope_theta=1000.0, rms_norm_eps=1e-6)),
    "qwen2.5, small": ("Qwen2", dict(rope_theta=1e6, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(rope_theta=1e6, rms_norm_eps=1e-6, head_dim=16)),
    "qwen3, small": ("Qwen3", dict(rope_theta=1e6, tie_word_embeddings=True, head_dim=12)),
}


def build(family: str, **fields):
    """A random model of transformers, float32."""
    kind, own = FAMILIES[family]
    config = getattr(transformers, kind + "Config")(**copy.deepcopy({**COMMON, **own, **fields}))  # it writes to them
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 1.5 / weight.shape[-1] ** 0.5 if weight.dim() == 2 else 0.5)
            if name.endswith("norm.weight"):
                weight.add_(1)
    model.generation_config.eos_token_id = None  # so that greedy answers run to their full length
    return model


@torch.no_grad()
def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits.float()


def from_pretrained(directory, dtype="auto"):
    name = "dtype" if int(transformers.__version__.split(".")[0]) > 4 else "torch_dtype"
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **{name: dtype})


def read(path) -> dict:
    return json.loads(path.read_text())


# --- loading -------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_and_greedy_answers_are_those_of_transformers(family, tmp_path):
    """A field that is read under another name, or a bias that is missed, gives a model that runs and talks nonsense."""
    theirs = build(family)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens = random_tokens(8, 3, 48, vocab=60)
    expected = logits_of(theirs, tokens)
    torch.testing.assert_close(ours(tokens), expected, **CLOSE)
    assert expected.std() > 0.5  # logits of near zero would agree with anything
    assert num_parameters(tmp_path) == theirs.num_parameters()
    prompts = random_prompts(9, [1, 7, 20], vocab=60)
    answers = generate(ours, prompts, num_samples=1, max_new_tokens=16, temperature=0, eos_ids=(), seed=0)
    for prompt, [answer] in zip(prompts, answers):
        sequence = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16)
        assert prompt + answer.ids == sequence[0].tolist()


def as_transformers_4(raw: dict) -> dict:
    raw = dict(raw)
    rope = dict(raw.pop("rope_parameters", None) or raw.get("rope_scaling") or {})
    raw["rope_theta"] = rope.pop("rope_theta", raw.get("rope_theta"))
    raw["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    return raw | {"torch_dtype": "float32", "transformers_version": "4.40.0"}


def as_transformers_5(raw: dict) -> dict:
    raw = as_transformers_4(raw)
    rope = raw.pop("rope_scaling") or {"rope_type": "default"}
    return raw | {"rope_parameters": rope | {"rope_theta": raw.pop("rope_theta")}, "dtype": "float32"}


def test_the_context_before_rope_scaling_may_stand_at_the_top(tmp_path):
    """As transformers writes it for some models; max_position_embeddings in its place moved logits by 7."""
    theirs = build("llama 3.1")
    theirs.save_pretrained(tmp_path)
    raw = as_transformers_5(read(tmp_path / "config.json"))
    raw["original_max_position_embeddings"] = raw["rope_parameters"].pop("original_max_position_embeddings")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tokens = random_tokens(8, 2, 48, vocab=60)
    torch.testing.assert_close(load_model(tmp_path)(tokens), logits_of(from_pretrained(tmp_path), tokens), **CLOSE)
    torch.testing.assert_close(load_model(tmp_path)(tokens), logits_of(theirs, tokens), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_versions_of_config_json_are_read(family, tmp_path):
    """transformers 5 put rope_theta and rope_scaling into one dictionary of another name: reading only one style leaves
    theta at 10,000 without a word."""
    theirs = build(family)
    theirs.save_pretrained(tmp_path)
    path, configs = tmp_path / "config.json", []
    raw = read(path)
    for rewrite in (as_transformers_4, as_transformers_5):
        path.write_text(json.dumps(rewrite(raw)))
        assert ("rope_theta" in read(path)) == (rewrite is as_transformers_4)
        configs.append(load_config(tmp_path))
    kind, fields = FAMILIES[family]
    assert configs[0] == configs[1]
    assert configs[0].rope_theta == fields.get("rope_theta", 10000.0)
    assert configs[0].rope_scaling == fields.get("rope_scaling")
    assert configs[0].sliding_window == fields.get("sliding_window")


def test_shards_written_by_transformers(tmp_path):
    """All of them are read, and only those that the index names: a stray one belongs to another model."""
    theirs = build("llama 3.1")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    (tmp_path / "model-extra.safetensors").write_bytes(b"of another model")
    tokens = random_tokens(8, 2, 30, vocab=60)
    torch.testing.assert_close(load_model(tmp_path)(tokens), logits_of(theirs, tokens), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_in_half_precision(dtype, tmp_path):
    """Real models are stored so: they load to the bit in their own dtype, and in float32 with the logits that
    transformers gets from the same file."""
    theirs = build("qwen2").to(dtype)
    theirs.save_pretrained(tmp_path)
    stored = load_model(tmp_path, dtype=dtype).state_dict()
    assert all(torch.equal(stored[name], weight) for name, weight in theirs.state_dict().items())
    tokens = random_tokens(8, 2, 30, vocab=60)
    exact = from_pretrained(tmp_path, torch.float32)
    torch.testing.assert_close(load_model(tmp_path)(tokens), logits_of(exact, tokens), **CLOSE)


def test_mistral_refuses_what_its_window_would_change(tmp_path):
    """Up to the window full attention is the same; beyond it, transformers masks tokens that we would attend to."""
    theirs = build("mistral 0.1", sliding_window=20)
    theirs.save_pretrained(tmp_path)
    ours, tokens = load_model(tmp_path), random_tokens(8, 1, 30, vocab=60)
    torch.testing.assert_close(ours(tokens[:, :20]), logits_of(theirs, tokens[:, :20]), **CLOSE)
    with pytest.raises(ValueError, match=r"21 tokens.* 20 .*sliding_window 20"):
        ours(tokens[:, :21])
    with pytest.raises(ValueError, match="20"):
        generate(ours, [tokens[0, :18].tolist()], num_samples=1, max_new_tokens=4, temperature=0, eos_ids=(), seed=0)
    raw = read(tmp_path / "config.json")
    del raw["sliding_window"]  # then transformers takes 4096
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load_config(tmp_path).sliding_window == transformers.AutoConfig.from_pretrained(tmp_path).sliding_window


def test_a_qwen3_that_does_not_say_how_wide_a_head_is(tmp_path):
    """transformers takes 128, whatever hidden_size and the number of heads are."""
    build("qwen3").save_pretrained(tmp_path)
    raw = read(tmp_path / "config.json")
    del raw["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load_config(tmp_path).head_dim == transformers.AutoConfig.from_pretrained(tmp_path).head_dim == 128


# --- saving --------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_saved_here_loads_in_transformers(family, tmp_path):
    """What is trained here must run elsewhere as it is: no weight missing, no field lost. A Mistral that is written as
    a Llama has lost its window, and a Llama 3 without its list of end tokens never stops talking."""
    build(family).save_pretrained(tmp_path / "source")
    ours = load_model(tmp_path / "source")
    for weight in ours.parameters():
        weight.mul_(1.01)  # "training"
    save_model(ours, tmp_path / "saved", source=tmp_path / "source")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = random_tokens(9, 2, 48, vocab=60)
    torch.testing.assert_close(ours(tokens), logits_of(theirs, tokens), **CLOSE)
    assert type(theirs).__name__.startswith(FAMILIES[family][0])
    old, new = read(tmp_path / "source/config.json"), read(tmp_path / "saved/config.json")
    assert {field for field in old if new[field] != old[field]} <= {"dtype", "torch_dtype"}


@pytest.mark.parametrize("fields", [{}, dict(rope_scaling=LLAMA3), dict(tie_word_embeddings=True), dict(head_dim=12),
                                    dict(attention_bias=True), dict(qk_norm=True), dict(sliding_window=40)],
                         ids=str)
@torch.no_grad()
def test_a_model_made_here_loads_in_transformers(fields, tmp_path):
    """Without a source the config.json is all ours."""
    ours = tiny_model(**fields)
    save_model(ours, tmp_path / "model")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = random_tokens(9, 2, 40)
    torch.testing.assert_close(ours(tokens), logits_of(theirs, tokens), **CLOSE)
    assert getattr(theirs.config, "sliding_window", None) == ours.config.sliding_window
    assert load_config(tmp_path / "model") == ours.config


def test_the_dtype_in_config_json_is_that_of_the_weights(tmp_path):
    """transformers loads in the dtype that config.json names: float32 there doubles a bfloat16 model."""
    build("llama 1").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    for dtype in (torch.float32, torch.bfloat16):
        save_model(load_model(tmp_path / "source", dtype=dtype), tmp_path / "saved", source=tmp_path / "source")
        assert from_pretrained(tmp_path / "saved").dtype == dtype
