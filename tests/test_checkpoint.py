"""A model directory is complete or absent, and gives back the same bits."""
import functools
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import load_config, load_model, load_sampler, model_hash, num_parameters, sampler_of, save_model
from infra import InputError
from model import Llama, ModelConfig
from tiny import LLAMA3, random_tokens, tiny_model

SHAPES = {"plain": {}, "tied": dict(tie_word_embeddings=True), "llama3": dict(rope_scaling=LLAMA3),
          "bias": dict(attention_bias=True), "wide heads": dict(head_dim=12),
          "q and k norms": dict(qk_norm=True)}


def same_bits(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape, tmp_path):
    """Weights to the bit and every field of the config: a default in place of one changes the logits. Tied weights stay
    tied: as two tensors, training would move them apart, and saving would drop one."""
    model = tiny_model(rms_norm_eps=3e-4, **SHAPES[shape])
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == model.config
    assert same_bits(loaded, model)
    tokens = random_tokens(1, 2, 9)
    assert torch.equal(loaded(tokens), model(tokens))
    assert all(p.requires_grad for p in loaded.parameters())
    tied = model.config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model" / "model.safetensors")) == (not tied)
    assert num_parameters(tmp_path / "model") == sum(p.numel() for p in model.parameters())
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1, "who may read one may read all"


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_sampler_has_the_precision_asked_for(precision, dtype, tmp_path):
    """Training keeps float32 weights anyway."""
    save_model(tiny_model(), tmp_path / "model")
    trained = load_model(tmp_path / "model")
    for sampler in (load_sampler(tmp_path / "model", precision), sampler_of(trained, precision)):
        assert {p.dtype for p in sampler.parameters()} == {dtype}
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert (sampler is trained) == (dtype == torch.float32)  # no copy without need


@pytest.mark.parametrize("tied", [False, True])
def test_a_sampler_is_a_copy_of_the_model_at_that_moment(tied):
    """Training that continues must not change it, and a tied head stays tied."""
    trained = tiny_model(tie_word_embeddings=tied)
    sampler, expected = sampler_of(trained, "bf16"), tiny_model(tie_word_embeddings=tied).to(torch.bfloat16)
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(1)
    assert same_bits(sampler, expected)
    assert (sampler.lm_head.weight is sampler.model.embed_tokens.weight) == tied


def write_shards(directory: Path, model, shards: int = 3) -> None:
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
    (directory / checkpoint.INDEX).write_text(json.dumps({"weight_map": index}))


def rewrite(directory: Path, change) -> None:
    """Change the weights of a directory's file."""
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def refusal(directory) -> str:
    with pytest.raises(InputError) as stop:
        load_model(directory)
    return str(stop.value)


def edit(path: Path, **fields) -> None:
    """Set fields of a JSON file; `...` removes one."""
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


@pytest.mark.parametrize("fields, named", [
    ({"model_type": "gpt2"}, "model_type is 'gpt2'"), ({"model_type": ...}, "model_type is None"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor is 1.0, and must be below"),
    ({"rope_scaling": LLAMA3 | {"factor": 0}}, "factor is 0"), ({"rope_scaling": [8.0]}, "rope scaling is [8.0]"),
    ({"rope_theta": "1e4"}, "rope_theta is '1e4'"), ({"rope_theta": math.inf}, "rope_theta is inf"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is {'quant_method': 'gptq'}"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"), ({"mlp_bias": True}, "mlp_bias is True"),
    ({"attention_bias": True}, "attention_bias"),
    ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, "attention_bias"),
    ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True},
     "use_sliding_window is True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ({"layer_types": 2}, "layer_types is 2"), ({"model_type": ["llama"]}, "model_type is ['llama']"),
    ({"rms_norm_eps": ...}, "rms_norm_eps is None"), ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
    *(({"vocab_size": value}, f"vocab_size is {value!r}, and must be a whole number")
      for value in ("24", 24.0, True, -24, None, 10**30)),
    ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'"), ({"num_key_value_heads": 3}, "no multiple"),
    ({"head_dim": 8.0}, "head_dim is 8.0"), ({"head_dim": 7}, "head_dim must be even"),
    ({"hidden_size": 30, "head_dim": ...}, "hidden_size 30 is divided by 4 heads"),
    ({"sliding_window": -1}, "sliding_window is -1"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'")], ids=str)
def test_models_that_cannot_be_computed_are_refused(fields, named, tmp_path):
    """Another architecture, or another rotary scaling, under weights of the same names and shapes would load and talk
    nonsense. A field that is missing must not become a default that was another family's, either. 24.0 and "false"
    ended in tracebacks, or in a tied model."""
    save_model(tiny_model(), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    edit(path, **fields)
    said = refusal(tmp_path / "model")
    assert str(path) in said and named in said


def test_a_qwen3_that_does_not_name_its_heads_width_has_heads_of_128(tmp_path):
    """As in transformers: 36 / 4 is odd, and has nothing to do with it."""
    save_model(tiny_model(qk_norm=True), tmp_path / "model")
    edit(tmp_path / "model" / "config.json", head_dim=None, hidden_size=36)
    assert load_config(tmp_path / "model").head_dim == 128


INDEX, FIRST, SECOND = checkpoint.INDEX, *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2))


def repeat_a_tensor(model: Path) -> None:
    weights = load_file(model / FIRST) | dict([next(iter(load_file(model / SECOND).items()))])
    save_file(weights, model / FIRST)


def one_file(change):
    """Change the weights of a directory that has them in one file."""
    def spoil(model: Path) -> None:
        shutil.rmtree(model)
        save_model(tiny_model(), model)
        rewrite(model, change)
    return spoil


@pytest.mark.parametrize("spoil, named", [
    (shutil.rmtree, ["config.json does not exist"]),
    (lambda model: (model / "config.json").rename(model / "params.json"), ["convert_llama_weights_to_hf"]),
    *((lambda model, name=name, text=text: (model / name).write_bytes(text), [name])
      for name in ("config.json", INDEX) for text in (b"{", b"[1]", b"\xff", b"[" * 10**6)),
    (one_file(lambda w: w.pop("model.norm.weight")), ["missing: model.norm.weight"]),
    (one_file(lambda w: w.update({"score.weight": torch.ones(2)})), ["unexpected: score.weight"]),
    (one_file(lambda w: w.update({"lm_head.weight": torch.ones(9, 32)})), ["shape [9, 32] and should have [24, 32]"]),
    (one_file(lambda w: w.update({"lm_head.weight": torch.ones(24, 32, dtype=torch.int8)})), ["is stored as I8"]),
    (one_file(lambda w: [w.pop(name) for name in list(w) if ".layers." in name]), ["and 14 more"]),
    (lambda model: (model / SECOND).unlink(), [SECOND]),
    (lambda model: (model / INDEX).unlink(), [INDEX, SECOND]),
    (lambda model: [path.unlink() for path in model.glob("model*")], ["model.safetensors"]),
    (lambda model: os.truncate(model / SECOND, 900), [SECOND, "not a complete"]),
    (lambda model: edit(model / INDEX, weight_map={"x": "../other/model.safetensors"}), [INDEX, "weight_map"]),
    (lambda model: shutil.copyfile(model / SECOND, model / "model.safetensors"), ["two models"]),
    (lambda model: [path.rename(model / f"{i}.bin") for i, path in enumerate(model.glob("model*"))],
     ["pickle", "save_pretrained"]),
    (repeat_a_tensor, ["in two files"])])  # which of the two counts would depend on the order of the files
def test_a_broken_directory_is_refused_by_name(spoil, named, tmp_path):
    """A download that broke off would leave weights with whatever memory held, and unpickling can run code. In one
    line: of a model with 700 tensors, torch's own message fills the screen."""
    save_model(tiny_model(), tmp_path / "other")
    write_shards(tmp_path / "model", tiny_model())
    spoil(tmp_path / "model")
    said = refusal(tmp_path / "model")
    assert all(name in said for name in [str(tmp_path / "model"), *named]) and len(said) < 500 + len(str(tmp_path))


def test_what_old_files_carry_too(tmp_path):
    """The first Llama files have rotary_emb.inv_freq, which is no weight; others a tied head as well as the embedding.
    If these differ, config.json is not this model's."""
    model = tiny_model(tie_word_embeddings=True)
    save_model(model, tmp_path)
    rewrite(tmp_path, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                                          "lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert same_bits(load_model(tmp_path), model)
    rewrite(tmp_path, lambda w: w["lm_head.weight"].add_(1))
    assert "tie_word_embeddings" in refusal(tmp_path)


# --- memory ---------------------------------------------------------------------------------------

MEASURE = """
import os, sys, threading, time
import torch
import checkpoint

def memory():  # in bytes: what cannot be given back, and with the mapped pages of files
    resident, mapped = map(int, open("/proc/self/statm").read().split()[1:3])
    return [(resident - mapped) * os.sysconf("SC_PAGE_SIZE"), resident * os.sysconf("SC_PAGE_SIZE")]

def watch():
    while not done:
        peak[:] = map(max, peak, memory())
        time.sleep(0.0005)

folder, checkpoint.SHARD_BYTES = sys.argv[1], int(sys.argv[2])
keep = [checkpoint.load_model(folder + "/tiny")]  # what torch imports on the way is not the model's
for work in (lambda: checkpoint.load_model(folder + "/model", dtype=torch.bfloat16),
             lambda: checkpoint.load_model(folder + "/model"), lambda: checkpoint.save_model(keep[1], folder + "/new")):
    start, peak, done = memory(), [0, 0], False
    thread = threading.Thread(target=watch)
    thread.start()
    keep.append(work())
    done = True
    thread.join()
    print(*(after - before for after, before in zip(peak, start)))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_loading_and_saving_never_hold_two_copies(tmp_path, monkeypatch):
    """A 70B model must fit where its weights fit, and containers count the mapped pages of files, too.

    In units of the file: in the file's own dtype, parameters are views of it and take nothing; in float32 they take
    two, with no more than a shard of the file mapped beside them; saving takes no more than a shard.
    """
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 15_000_000)
    with torch.device("meta"):
        model = Llama(ModelConfig(4096, 1024, 2048, 2, 8, 8, 128)).to(torch.bfloat16)
    save_model(model.to_empty(device="cpu"), tmp_path / "model")
    save_model(tiny_model(), tmp_path / "tiny")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) >= 4
    child = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path), "15_000_000"], capture_output=True, text=True,
                           cwd=Path(checkpoint.__file__).parent)
    assert child.returncode == 0, child.stderr
    size = sum(weight.nbytes for weight in model.parameters())
    mapped, copied, saved = ([int(number) / size for number in line.split()] for line in child.stdout.splitlines())
    assert mapped[0] < 0.1 and mapped[1] < 0.5
    assert 1.8 < copied[0] < 2.3 and copied[1] < 2.5
    assert saved[0] < 0.5


# --- saving ---------------------------------------------------------------------------------------

def test_training_in_place_leaves_the_file_alone_and_can_be_saved_over_it(tmp_path):
    """Parameters are views of the mapped file: a shared map would write training into it, and a file that is
    overwritten under the map would change the model that is being saved."""
    save_model(tiny_model(), tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    with torch.no_grad():
        for weight in list(loaded.parameters())[::2]:  # the others stay views
            weight.add_(1)
    assert same_bits(load_model(tmp_path / "model"), tiny_model())
    expected = {name: weight.clone() for name, weight in loaded.state_dict().items()}
    save_model(loaded, tmp_path / "model", source=tmp_path / "model")
    for model in (loaded, load_model(tmp_path / "model")):
        assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def killed_at(moment: int, monkeypatch) -> None:
    """Interrupt the program at the moment-th call that writes, moves or removes something on the disk."""
    calls = itertools.count()

    def call(act, *args, **kwargs):
        if next(calls) < moment:
            return act(*args, **kwargs)
        if act is save_file:
            args[1].write_bytes(b"half of the wei")
        raise KeyboardInterrupt

    for module, name in ((checkpoint, "save_file"), (shutil, "copyfile"), (os, "replace"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, functools.partial(call, getattr(module, name)))


def test_a_kill_at_any_moment_of_a_save_loses_no_model(tmp_path, monkeypatch):
    """Under its name is the old model or the new one (known by their seeds), or, between two moves, nothing; then both
    are next to it. What a kill left behind is cleared away by the next save."""
    seen, model = [], tmp_path / "model"
    for moment in itertools.count():
        save_model(tiny_model(seed=0), model)
        (model / "tokenizer.model").write_text("tokenizer")
        with monkeypatch.context() as patch:
            killed_at(moment, patch)
            try:
                save_model(tiny_model(seed=1), model, source=model)
                break
            except KeyboardInterrupt:
                pass
        if model.exists():
            seen.append(next(seed for seed in (0, 1) if same_bits(load_model(model), tiny_model(seed=seed))))
            assert (model / "tokenizer.model").read_text() == "tokenizer"
        else:
            seen.append("aside")
            for seed, age in enumerate(("old", "new")):
                assert same_bits(load_model(tmp_path / f"model.{age}.tmp"), tiny_model(seed=seed))
        save_model(tiny_model(seed=2), model)
        assert same_bits(load_model(model), tiny_model(seed=2))
        assert sorted(path.name for path in tmp_path.glob("**/*")) == ["config.json", "model", "model.safetensors"]
    assert seen[:4] == [0] * 4 and "aside" in seen and seen[-1] == 1


def test_a_full_disk_leaves_the_old_model_and_says_so(tmp_path, monkeypatch):
    save_model(tiny_model(), tmp_path / "model")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    for name in ("model", "other"):
        with pytest.raises(InputError, match=f"{name}.*No space left on device.*Free some space"):
            save_model(tiny_model(seed=1), tmp_path / name)
    assert same_bits(load_model(tmp_path / "model"), tiny_model()) and not (tmp_path / "other").exists()


def test_the_tokenizer_travels_with_the_model(tmp_path):
    """A model directory without it cannot be sampled from. Weights of the source stay where they are: they would be
    taken for the new model's."""
    write_shards(tmp_path / "start", tiny_model())
    for name in checkpoint.TOKENIZER_FILES:
        (tmp_path / "start" / name).write_text(name)
    (tmp_path / "start" / "training_args.bin").write_bytes(b"pickle")
    save_model(tiny_model(seed=1), tmp_path / "model", source=tmp_path / "start")
    save_model(tiny_model(seed=1), tmp_path / "model", source=tmp_path / "model")  # onto itself
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json", "model.safetensors", *checkpoint.TOKENIZER_FILES}
    assert all((tmp_path / "model" / name).read_text() == name for name in checkpoint.TOKENIZER_FILES)


def test_config_json_of_the_source_is_kept_if_it_is_this_models(tmp_path):
    """Its end tokens, template names and the rest are the model's; but the config.json of another shape would make a
    directory that does not load, and one of another theta a model that talks nonsense."""
    save_model(tiny_model(), tmp_path / "start")
    edit(tmp_path / "start" / "config.json", eos_token_id=[7, 8], pad_token_id=9, whatever="else")
    save_model(tiny_model(seed=1), tmp_path / "same", source=tmp_path / "start")
    kept = json.loads((tmp_path / "same" / "config.json").read_text())
    assert (kept["eos_token_id"], kept["pad_token_id"], kept["whatever"]) == ([7, 8], 9, "else")
    other = tiny_model(rope_theta=500.0, num_key_value_heads=4)
    save_model(other, tmp_path / "other", source=tmp_path / "start")
    assert load_config(tmp_path / "other") == other.config
    written = json.loads((tmp_path / "other" / "config.json").read_text())
    assert (written["eos_token_id"], written["pad_token_id"]) == ([7, 8], 9) and "whatever" not in written


@pytest.mark.parametrize("limit", [1, 8_000, 10**9])
def test_a_large_model_is_saved_in_files_of_limited_size(limit, tmp_path, monkeypatch):
    """Only a single weight may exceed the limit, neighbours would not fit into one file, the index tells the size, and
    no file of the model that was there before is left: it would be loaded with the others."""
    write_shards(tmp_path / "model", tiny_model(seed=1))
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", limit)
    save_model(tiny_model(), tmp_path / "model")
    assert same_bits(load_model(tmp_path / "model"), tiny_model())
    files = [load_file(path) for path in sorted((tmp_path / "model").glob("*.safetensors"))]
    sizes = [sum(weight.nbytes for weight in weights.values()) for weights in files]
    assert all(size <= limit or len(weights) == 1 for size, weights in zip(sizes, files))
    assert all(size + following > limit for size, following in itertools.pairwise(sizes))
    if len(files) == 1:
        assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    else:
        assert json.loads((tmp_path / "model" / INDEX).read_text())["metadata"]["total_size"] == sum(sizes)


# --- which model is it? ---------------------------------------------------------------------------

def change_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("change", [
    *(lambda model, i=i: change_a_bit(sorted(model.glob("*.safetensors"))[i]) for i in (0, 1, -1)),
    lambda model: edit(model / "config.json", rope_theta=101.0),
    lambda model: edit(model / "config.json", eos_token_id=[2, 7]),
    lambda model: (model / "generation_config.json").write_text('{"eos_token_id": 7}'),
    lambda model: (model / "tokenizer.model").write_bytes(b"another"),
    lambda model: edit(model / "tokenizer_config.json", eos_token="<end>"),
    lambda model: (model / "chat_template.jinja").write_text("{{ messages }}")])
def test_the_hash_of_a_model_tells_it_from_others(change, tmp_path, monkeypatch):
    """Stored samples and log-probabilities are trusted because of it: any change to what the model computes, or to how
    its tokens are read, must show. A copy, in whatever directory and with whatever other files, is the same model."""
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 8_000)
    model = tmp_path / "model"
    save_model(tiny_model(), model)
    (model / "tokenizer.model").write_bytes(b"a tokenizer")
    (model / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    save_model(load_model(model), tmp_path / "copy", source=model)
    (tmp_path / "copy" / "README.md").write_text("a copy")
    before = model_hash(tmp_path / "copy")
    assert model_hash(model) == before
    change(model)
    assert model_hash(model) != before
