"""A model directory is there whole or not at all, and gives back the same bits."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import load_model, save_model, weights_hash
from tiny import LLAMA3, random_tokens, tiny_model

SHAPES = {"plain": {}, "tied": dict(tie_word_embeddings=True), "llama3": dict(rope_scaling=LLAMA3),
          "bias": dict(attention_bias=True), "wide heads": dict(head_dim=12)}


def same_bits(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape, tmp_path):
    """Weights to the bit and every field of the config: a default in place of one changes the
    logits."""
    model = tiny_model(rms_norm_eps=3e-4, **SHAPES[shape])
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == model.config
    assert same_bits(loaded, model)
    tokens = random_tokens(1, 2, 9)
    assert torch.equal(loaded(tokens), model(tokens))
    assert all(p.requires_grad for p in loaded.parameters())


def test_tied_embeddings_stay_tied(tmp_path):
    """Loaded as two tensors, training would move them apart, and saving would drop one."""
    save_model(tiny_model(tie_word_embeddings=True), tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    loaded = load_model(tmp_path / "model")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert len(list(loaded.parameters())) == len(loaded.state_dict()) - 1
    with torch.no_grad():
        loaded.model.embed_tokens.weight[3] += 1
    save_model(loaded, tmp_path / "again")
    assert same_bits(load_model(tmp_path / "again"), loaded)


def test_dtype_is_as_asked(tmp_path):
    """bfloat16 to sample on a GPU, float32 to train."""
    save_model(tiny_model(), tmp_path / "model")
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_model(tmp_path / "model", dtype=dtype)
        assert {p.dtype for p in loaded.parameters()} == {dtype}


def write_shards(directory, model, shards: int = 3) -> None:
    """As large models come: weights dealt to several files, and an index."""
    save_model(model, directory)
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    index = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {key: weights[key] for key in sorted(weights)[i::shards]}
        save_file(part, directory / name)
        index |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_shards_with_an_index(tmp_path):
    """All files, not the first one."""
    write_shards(tmp_path / "model", tiny_model())
    assert same_bits(load_model(tmp_path / "model"), tiny_model())


def test_tables_in_old_files_are_left_out(tmp_path):
    """The first Llama files carry rotary_emb.inv_freq, which is no weight."""
    save_model(tiny_model(), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    old = load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(old, path)
    assert same_bits(load_model(tmp_path / "model"), tiny_model())


@pytest.mark.parametrize("fields, named", [
    ({"model_type": "gpt2"}, "gpt2"), ({"model_type": None}, "None"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear")])
def test_models_that_cannot_be_computed_are_refused(fields, named, tmp_path):
    """Another architecture, or another rotary scaling, under weights of the same names and shapes
    would load and talk nonsense."""
    save_model(tiny_model(), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(SystemExit) as stop:
        load_model(tmp_path / "model")
    assert str(path) in str(stop.value) and named in str(stop.value)


@pytest.mark.parametrize("missing", ["config.json", "model-00002-of-00003.safetensors",
                                     "model-0000*.safetensors"])
def test_a_directory_with_a_file_missing_is_refused(missing, tmp_path):
    """A download that broke off: some weights would keep whatever memory held."""
    write_shards(tmp_path / "model", tiny_model())
    for path in (tmp_path / "model").glob(missing):
        path.unlink()
    with pytest.raises((SystemExit, RuntimeError)) as stop:
        load_model(tmp_path / "model")
    assert isinstance(stop.value, RuntimeError) or str(tmp_path / "model") in str(stop.value)


def test_half_written_directories_are_never_seen(tmp_path, monkeypatch):
    """Killed while the weights are written: under its name there is nothing, or still the old
    model; the next save starts afresh and leaves no litter."""
    def broken(weights, path, metadata):
        path.write_bytes(b"half of the wei")
        raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny_model(), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert list(tmp_path.iterdir()) != []  # it was under way
    monkeypatch.undo()
    save_model(tiny_model(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny_model(seed=1), tmp_path / "model")
    assert same_bits(load_model(tmp_path / "model"), tiny_model())


def test_saving_over_a_model_leaves_no_file_of_the_old_one(tmp_path):
    """Shards of an old model beside the new file would be merged into it at the next load."""
    write_shards(tmp_path / "model", tiny_model())
    save_model(tiny_model(seed=1), tmp_path / "model")
    assert same_bits(load_model(tmp_path / "model"), tiny_model(seed=1))
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["config.json", "model.safetensors"]


def test_the_tokenizer_travels_with_the_model(tmp_path):
    """A model directory without it cannot be sampled from."""
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "tokenizer.model").write_bytes(b"pieces")
    save_model(tiny_model(), tmp_path / "model", tokenizer_from=tmp_path / "start")
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == b"pieces"
    save_model(tiny_model(seed=1), tmp_path / "model",
               tokenizer_from=tmp_path / "model")  # onto itself
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == b"pieces"


def test_weights_hash_knows_every_weight():
    """Stored log-probabilities are trusted because of it: one changed number anywhere must show."""
    model = tiny_model(attention_bias=True)
    hashes = {weights_hash(model)}
    assert weights_hash(tiny_model(attention_bias=True)) in hashes
    for weight in model.state_dict().values():
        last = weight.view(-1)[-1:]
        before = last.clone()
        last.copy_(torch.nextafter(last, last + 1))
        hashes.add(weights_hash(model))
        last.copy_(before)
    assert len(hashes) == 1 + len(model.state_dict())
    swapped = tiny_model(attention_bias=True)
    a, b = swapped.model.layers[0].mlp, swapped.model.layers[1].mlp
    a.up_proj.weight.data, b.up_proj.weight.data = b.up_proj.weight.data, a.up_proj.weight.data
    assert weights_hash(swapped) not in hashes


def test_hash_survives_the_file(tmp_path):
    """The reference of an iteration is checked against the model that is loaded from disk."""
    for tied in (False, True):
        model = tiny_model(tie_word_embeddings=tied)
        save_model(model, tmp_path / "model")
        assert weights_hash(load_model(tmp_path / "model")) == weights_hash(model)
        shutil.rmtree(tmp_path / "model")


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_a_directory_that_is_no_model_is_refused_by_name(path, tmp_path):
    """A typo in --model must say what was looked for, and where."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        load_model(tmp_path / path)
    assert str(tmp_path / path) in str(stop.value)
    assert "config.json" in str(stop.value)
