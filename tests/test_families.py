"""Real models: what transformers writes gives its logits here, and what is written here gives ours there.

Every family is a tiny random model of transformers' own class, with weights large enough that its
logits depend on positions, biases and epsilon: a field read under another name must show.
"""
import copy
import dataclasses
import json

import pytest
import torch

import checkpoint
from checkpoint import convert, load_config, load_model, save_model
from model import Llama, rotate
from sample import generate
from tiny import LLAMA3, random_prompts, random_tokens, tiny_model

transformers = pytest.importorskip("transformers")

CLOSE = dict(rtol=0, atol=2e-4)
COMMON = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
              bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6)
FAMILIES = {
    "llama 1": ("Llama", dict(num_key_value_heads=4, rms_norm_eps=1e-6)),
    "llama 2": ("Llama", dict(num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama 3.1": ("Llama", dict(rope_theta=500.0, rope_scaling=LLAMA3)),
    "llama 3.2": ("Llama", dict(rope_theta=500.0, rope_scaling=LLAMA3 | {"factor": 32.0},
                                tie_word_embeddings=True, head_dim=12)),
    "codellama": ("Llama", dict(rope_theta=1e6, vocab_size=67)),
    "tinyllama": ("Llama", dict(num_attention_heads=8, num_key_value_heads=1)),
    "smollm2": ("Llama", dict(tie_word_embeddings=True, rope_theta=100000.0, hidden_size=36,
                              num_attention_heads=9, num_key_value_heads=3)),
    "mistral 0.1": ("Mistral", dict(sliding_window=48)),
    "mistral 0.3": ("Mistral", dict(sliding_window=None, rope_theta=1e6, head_dim=16)),
    "qwen2": ("Qwen2", dict(rope_theta=1000.0, rms_norm_eps=1e-6)),
    "qwen2.5, small": ("Qwen2", dict(rope_theta=1e6, tie_word_embeddings=True)),
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
    """A field that is read under another name, or a bias that is missed, gives a model that runs and
    talks nonsense."""
    theirs = build(family)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens = random_tokens(8, 3, 48, vocab=60)
    expected = logits_of(theirs, tokens)
    torch.testing.assert_close(ours(tokens), expected, **CLOSE)
    assert expected.std() > 0.5  # logits of near zero would agree with anything
    prompts = random_prompts(9, [1, 7, 20], vocab=60)
    answers = generate(ours, prompts, num_samples=1, max_new_tokens=16, temperature=0, eos_id=-1, seed=0)
    for prompt, [answer] in zip(prompts, answers):
        whole = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16)
        assert prompt + answer.ids == whole[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_yardstick_sees_a_wrong_config(family, tmp_path):
    """With a field off, logits must differ by far more than the tolerance above; without that,
    agreement would say nothing about the field."""
    build(family).save_pretrained(tmp_path)
    right = load_model(tmp_path)
    config, tokens = right.config, random_tokens(8, 3, 48, vocab=60)
    wrong = {"rope_theta": 2 * config.rope_theta, "rms_norm_eps": config.rms_norm_eps + 1e-3}
    if config.rope_scaling:
        wrong["rope_scaling"] = None
        for field in LLAMA3.keys() - {"rope_type"}:
            wrong[field] = config.rope_scaling | {field: 1.5 * config.rope_scaling[field]}
    for field, value in wrong.items():
        field = "rope_scaling" if field in LLAMA3 else field
        model = Llama(dataclasses.replace(config, **{field: value}))
        model.load_state_dict(right.state_dict())
        assert (model(tokens) - right(tokens)).abs().max() > 20 * CLOSE["atol"], (field, value)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_both_versions_of_config_json_are_read(family, tmp_path):
    """transformers 5 put rope_theta and rope_scaling into one dictionary of another name: reading only
    one style leaves theta at 10,000 without a word."""
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
    """All of them, and only those that the index names: a stray one is of another model."""
    theirs = build("llama 3.1")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    (tmp_path / "model-extra.safetensors").write_bytes(b"of another model")
    tokens = random_tokens(8, 2, 30, vocab=60)
    torch.testing.assert_close(load_model(tmp_path)(tokens), logits_of(theirs, tokens), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_in_half_precision(dtype, tmp_path):
    """As real models are stored: to the bit in their own dtype, and in float32 with the logits that
    transformers has from the same file."""
    theirs = build("qwen2").to(dtype)
    theirs.save_pretrained(tmp_path)
    stored = load_model(tmp_path, dtype=dtype).state_dict()
    assert all(torch.equal(stored[name], weight) for name, weight in theirs.state_dict().items())
    tokens = random_tokens(8, 2, 30, vocab=60)
    exact = from_pretrained(tmp_path, torch.float32)
    torch.testing.assert_close(load_model(tmp_path)(tokens), logits_of(exact, tokens), **CLOSE)


def test_mistral_refuses_what_its_window_would_change(tmp_path):
    """Up to the window full attention is the same; beyond it transformers looks away and we would not."""
    theirs = build("mistral 0.1", sliding_window=20)
    theirs.save_pretrained(tmp_path)
    ours, tokens = load_model(tmp_path), random_tokens(8, 1, 30, vocab=60)
    torch.testing.assert_close(ours(tokens[:, :20]), logits_of(theirs, tokens[:, :20]), **CLOSE)
    with pytest.raises(ValueError, match=r"21 tokens.* 20 .*sliding_window 20"):
        ours(tokens[:, :21])
    with pytest.raises(ValueError, match="20"):
        generate(ours, [tokens[0, :18].tolist()], num_samples=1, max_new_tokens=4, temperature=0, eos_id=-1, seed=0)
    raw = read(tmp_path / "config.json")
    del raw["sliding_window"]  # then transformers takes 4096
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load_config(tmp_path).sliding_window == transformers.AutoConfig.from_pretrained(tmp_path).sliding_window


# --- saving --------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_saved_here_loads_in_transformers(family, tmp_path):
    """What is trained here must run elsewhere as it is: no weight missing, no field lost. A Mistral
    that is written as a Llama has lost its window, and a Llama 3 without its list of end tokens talks
    on and on."""
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
                                    dict(attention_bias=True), dict(sliding_window=40)], ids=str)
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
    build("llama 2").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    for dtype in (torch.float32, torch.bfloat16):
        save_model(load_model(tmp_path / "source", dtype=dtype), tmp_path / "saved", source=tmp_path / "source")
        assert from_pretrained(tmp_path / "saved").dtype == dtype


# --- Meta's files --------------------------------------------------------------------------------

SPLIT = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}  # dimension, from fairscale


def meta_tensors(model) -> dict[str, torch.Tensor]:
    """Meta's names and order of rows for the weights of a transformers Llama."""
    config, weights = model.config, dict(model.named_parameters())
    half = config.hidden_size // config.num_attention_heads // 2

    def neighbours(weight: torch.Tensor) -> torch.Tensor:
        rows = []
        for head in weight.split(2 * half):
            for i in range(half):
                rows += [head[i], head[i + half]]
        return torch.stack(rows)

    found = {"tok_embeddings.weight": weights["model.embed_tokens.weight"], "norm.weight": weights["model.norm.weight"],
             "output.weight": weights.get("lm_head.weight", weights["model.embed_tokens.weight"])}
    for n in range(config.num_hidden_layers):
        layer = {name.split(".", 3)[3].removesuffix(".weight"): weight for name, weight in weights.items()
                 if name.startswith(f"model.layers.{n}.")}
        mine = {"attention.wq": neighbours(layer["self_attn.q_proj"]),
                "attention.wk": neighbours(layer["self_attn.k_proj"]), "attention.wv": layer["self_attn.v_proj"],
                "attention.wo": layer["self_attn.o_proj"], "feed_forward.w1": layer["mlp.gate_proj"],
                "feed_forward.w2": layer["mlp.down_proj"], "feed_forward.w3": layer["mlp.up_proj"],
                "attention_norm": layer["input_layernorm"], "ffn_norm": layer["post_attention_layernorm"]}
        found |= {f"layers.{n}.{name}.weight": weight for name, weight in mine.items()}
    return {name: weight.detach().clone() for name, weight in found.items()}


def write_meta(model, folder, shards: int = 1, embedding: int = 1, tensors=None, **params) -> None:
    """The directory that Meta would distribute; `embedding` is the dimension that its shards split."""
    folder.mkdir()
    config = model.config
    for i in range(shards):
        part = {}
        for name, weight in (tensors or meta_tensors(model)).items():
            dim = SPLIT.get(name.split(".")[-2], embedding if name.startswith("tok") else None)
            part[name] = weight if dim is None else weight.chunk(shards, dim)[i].clone()
        torch.save(part | {"rope.freqs": torch.ones(4)}, folder / f"consolidated.{i:02}.pth")
    params = {"dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
              "norm_eps": config.rms_norm_eps, "vocab_size": -1, "multiple_of": 256} | params
    (folder / "params.json").write_text(json.dumps(params))


LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}
META = {  # fields of the transformers model, arguments of write_meta, what must come out
    "llama 1": (dict(num_key_value_heads=4, rms_norm_eps=1e-6), {}, dict(max_position_embeddings=2048)),
    "llama 2, two shards": (dict(num_key_value_heads=4, rms_norm_eps=1e-5), dict(shards=2, embedding=1),
                            dict(max_position_embeddings=4096)),
    "llama 2 70B": (dict(rms_norm_eps=1e-5), dict(shards=2, embedding=1, n_kv_heads=2, ffn_dim_multiplier=1.3),
                    dict(max_position_embeddings=4096)),
    "codellama": (dict(num_key_value_heads=4, rope_theta=1e6), dict(rope_theta=1e6),
                  dict(max_position_embeddings=16384)),
    "llama 3, two shards": (dict(rope_theta=500000.0), dict(shards=2, embedding=0, n_kv_heads=2, rope_theta=500000.0,
                                                            vocab_size=60), dict(max_position_embeddings=8192)),
    "llama 3.1": (dict(rope_theta=500000.0, rope_scaling=LLAMA31),
                  dict(shards=4, embedding=0, n_kv_heads=4, rope_theta=500000.0, use_scaled_rope=True),
                  dict(max_position_embeddings=131072, rope_scaling=LLAMA31)),
    "llama 3.2": (dict(rope_theta=500000.0, rope_scaling=LLAMA31 | {"factor": 32.0}, tie_word_embeddings=True),
                  dict(n_kv_heads=2, rope_theta=500000.0, use_scaled_rope=True),
                  dict(max_position_embeddings=131072, tie_word_embeddings=True,
                       rope_scaling=LLAMA31 | {"factor": 32.0})),
}


@pytest.mark.parametrize("model", META)
@torch.no_grad()
def test_metas_files_become_the_same_model(model, tmp_path, capsys):
    """Rows of q and k in the wrong order, a part on the wrong side or another theta: all load, all
    shapes fit, and the model talks nonsense."""
    fields, meta, expected = META[model]
    if meta.get("n_kv_heads"):
        fields = fields | {"num_key_value_heads": meta["n_kv_heads"]}
    theirs = build("llama 2", **{"vocab_size": 64, **fields})
    write_meta(theirs, tmp_path / "meta", **meta)
    convert(tmp_path / "meta", tmp_path / "hf", shard_bytes=30_000)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 2
    ours = load_model(tmp_path / "hf")
    tokens = random_tokens(8, 2, 60, vocab=60)
    torch.testing.assert_close(ours(tokens), logits_of(theirs, tokens), **CLOSE)
    assert {field: getattr(ours.config, field) for field in expected} == expected
    assert f"max_position_embeddings {expected['max_position_embeddings']}" in capsys.readouterr().out
    torch.testing.assert_close(logits_of(from_pretrained(tmp_path / "hf"), tokens), logits_of(theirs, tokens), **CLOSE)


def test_metas_rotary_embedding_is_the_one_that_is_converted():
    """The writer of Meta's files above is ours; this is Meta's own definition: neighbours as complex
    numbers, turned by their angle. Scores must be the same from reordered rows under `rotate`."""
    torch.manual_seed(0)
    heads, h, D, T = 3, 8, 16, 5
    wq, wk, x = torch.randn(heads * h, D), torch.randn(heads * h, D), torch.randn(T, D)
    angles = torch.outer(torch.arange(T), 100.0 ** (-torch.arange(0, h, 2) / h))  # (T, h/2)

    def turned(weight: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex((x @ weight.T).view(T, heads, h // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones(T, 1, h // 2), angles[:, None])).flatten(2)

    def ours(weight: torch.Tensor) -> torch.Tensor:
        x_heads = (x @ checkpoint.to_halves(weight, h).T).view(T, heads, h)
        cos, sin = angles[:, None].cos(), angles[:, None].sin()
        return rotate(x_heads, torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))

    expected = torch.einsum("thd,shd->hts", turned(wq), turned(wk))
    torch.testing.assert_close(torch.einsum("thd,shd->hts", ours(wq), ours(wk)), expected)


def test_max_positions_and_rope_factor_can_be_given(tmp_path):
    """params.json tells neither, and the rule knows only Meta's own models."""
    theirs = build("llama 2")
    write_meta(theirs, tmp_path / "meta", rope_theta=777.0, use_scaled_rope=False)
    with pytest.raises(SystemExit, match="777.*--max_positions"):
        convert(tmp_path / "meta", tmp_path / "hf")
    convert(tmp_path / "meta", tmp_path / "hf", max_positions=99)
    assert load_config(tmp_path / "hf").max_position_embeddings == 99
    write_meta(theirs, tmp_path / "scaled", use_scaled_rope=True)
    convert(tmp_path / "scaled", tmp_path / "hf3", rope_factor=4.0)
    assert load_config(tmp_path / "hf3").rope_scaling["factor"] == 4.0


def test_the_dtype_of_metas_files_stays(tmp_path):
    theirs = build("llama 2").to(torch.bfloat16)
    write_meta(theirs, tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "hf")
    assert from_pretrained(tmp_path / "hf").dtype == torch.bfloat16
    stored = load_model(tmp_path / "hf", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(stored[name], weight) for name, weight in theirs.state_dict().items())


@pytest.mark.parametrize("tokenizer, kept, said", [
    (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00", True, ""),
    (b"IQ== 0\nIg== 1\n", False, "tiktoken"), (None, False, "one directory up")])
def test_llama_3s_tokenizer_model_is_no_sentencepiece_model(tokenizer, kept, said, tmp_path, capsys):
    """It bears the same name, and would fail much later, inside sentencepiece."""
    write_meta(build("llama 2"), tmp_path / "meta")
    if tokenizer:
        (tmp_path / "meta/tokenizer.model").write_bytes(tokenizer)
    convert(tmp_path / "meta", tmp_path / "hf")
    out = capsys.readouterr().out
    assert (tmp_path / "hf/tokenizer.model").exists() == kept
    assert said in out and ("tokenizer.json" in out) != kept


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    """A .pth file is a pickle, and a plain load of one runs whatever it says."""
    theirs, trap = build("llama 2"), tmp_path / "was here"

    class Evil:
        def __reduce__(self):
            return open, (str(trap), "w")

    write_meta(theirs, tmp_path / "meta", tensors=meta_tensors(theirs) | {"x.norm.weight": Evil()})
    with pytest.raises(SystemExit, match="consolidated.00.pth is not a whole file of plain tensors"):
        convert(tmp_path / "meta", tmp_path / "hf")
    assert not trap.exists() and not (tmp_path / "hf").exists()
    torch.load(tmp_path / "meta/consolidated.00.pth", weights_only=False)
    assert trap.exists()  # the trap was a trap


BROKEN = {
    "missing shard": (lambda f: (f / "consolidated.00.pth").unlink(), "consolidated.00.pth"),
    "last shard missing": (lambda f: (f / "consolidated.01.pth").unlink(), r"\(60, 16\)\] do not make"),
    "cut": (lambda f: (f / "consolidated.01.pth").write_bytes((f / "consolidated.01.pth").read_bytes()[:900]),
            "consolidated.01.pth"),
    "no params": (lambda f: (f / "params.json").unlink(), "params.json"),
    "experts": (lambda f: (f / "params.json").write_text(json.dumps(read(f / "params.json") | {"moe_args": {}})),
                "moe_args"),
    "layers": (lambda f: (f / "params.json").write_text(json.dumps(read(f / "params.json") | {"n_layers": 1})),
               "unexpected: layers.1.attention"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_no_llama_of_metas_is_refused(fault, tmp_path):
    """By name, and without a half directory left behind."""
    write_meta(build("llama 2"), tmp_path / "meta", shards=2)
    spoil, named = BROKEN[fault]
    spoil(tmp_path / "meta")
    with pytest.raises(SystemExit, match=named):
        convert(tmp_path / "meta", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


def test_convert_never_writes_over_anything(tmp_path):
    write_meta(build("llama 2"), tmp_path / "meta")
    (tmp_path / "hf").mkdir()
    with pytest.raises(SystemExit, match="hf exists"):
        convert(tmp_path / "meta", tmp_path / "hf")
    assert list((tmp_path / "hf").iterdir()) == []


def test_metas_directory_is_recognised_where_a_model_is_expected(tmp_path):
    write_meta(build("llama 2"), tmp_path / "meta")
    with pytest.raises(SystemExit, match="checkpoint.py convert"):
        load_model(tmp_path / "meta")
