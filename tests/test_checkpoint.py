"""A model directory is there whole or not at all, and gives back the same bits."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import load_config, load_model, load_sampler, sampler_of, save_model, weights_hash
from model import Llama, ModelConfig
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
    """bfloat16 to sample, float32 to train."""
    save_model(tiny_model(), tmp_path / "model")
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_model(tmp_path / "model", dtype=dtype)
        assert {p.dtype for p in loaded.parameters()} == {dtype}


@pytest.mark.parametrize("features, dtype", [
    ({}, torch.float32), ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
    ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16)])
def test_a_cpu_samples_in_bfloat16_if_it_has_products_of_it(tmp_path, monkeypatch, features, dtype):
    """Elsewhere bfloat16 is emulated, which is slower than float32; training keeps float32 weights anyway."""
    monkeypatch.setattr(checkpoint, "device", lambda: "cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    save_model(tiny_model(), tmp_path / "model")
    trained = load_model(tmp_path / "model")
    for sampler in (load_sampler(tmp_path / "model"), sampler_of(trained)):
        assert {p.dtype for p in sampler.parameters()} == {dtype}
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert (sampler is trained) == (dtype == torch.float32)  # no copy without need


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


def refusal(directory) -> str:
    with pytest.raises(SystemExit) as stop:
        load_model(directory)
    return str(stop.value)


def edit(path: Path, **fields) -> None:
    """Set fields of a JSON file; `...` removes one."""
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("fields, named", [
    ({"model_type": "gpt2"}, "model_type is 'gpt2'"), ({"model_type": ...}, "model_type is None"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"), ({"rope_parameters": LINEAR}, "'linear'"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor, high_freq_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is {'quant_method': 'gptq'}"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"), ({"mlp_bias": True}, "mlp_bias is True"),
    ({"attention_bias": True}, "attention_bias"),
    ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True},
     "use_sliding_window is True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ({"rms_norm_eps": ...}, "rms_norm_eps is None"), ({"vocab_size": "24"}, "vocab_size is '24'")], ids=str)
def test_models_that_cannot_be_computed_are_refused(fields, named, tmp_path):
    """Another architecture, or another rotary scaling, under weights of the same names and shapes
    would load and talk nonsense. A field that is missing must not become a default that was another
    family's, either."""
    save_model(tiny_model(), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    edit(path, **fields)
    said = refusal(tmp_path / "model")
    assert str(path) in said and named in said


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_broken_json_is_refused_by_name(name, text, tmp_path):
    write_shards(tmp_path / "model", tiny_model())
    (tmp_path / "model" / name).write_text(text, encoding="latin-1")
    assert str(tmp_path / "model" / name) in refusal(tmp_path / "model")


@pytest.mark.parametrize("missing", ["config.json", "model-00002-of-00003.safetensors",
                                     "model.safetensors.index.json"])
def test_a_directory_with_a_file_missing_is_refused(missing, tmp_path):
    """A download that broke off: some weights would keep whatever memory held."""
    write_shards(tmp_path / "model", tiny_model())
    (tmp_path / "model" / missing).unlink()
    said = refusal(tmp_path / "model")
    assert str(tmp_path / "model") in said and missing in said


def test_a_cut_file_is_refused_by_name(tmp_path):
    save_model(tiny_model(), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refusal(tmp_path / "model")


def test_an_index_cannot_lead_out_of_its_directory(tmp_path):
    save_model(tiny_model(), tmp_path / "other")
    write_shards(tmp_path / "model", tiny_model())
    index = tmp_path / "model" / "model.safetensors.index.json"
    edit(index, weight_map={"lm_head.weight": "../other/model.safetensors"})
    assert str(index) in refusal(tmp_path / "model")


def test_two_models_in_one_directory_are_refused(tmp_path):
    """An index and a model.safetensors that is not in it: which of them is meant?"""
    write_shards(tmp_path / "model", tiny_model())
    save_file({"x": torch.ones(1)}, tmp_path / "model" / "model.safetensors")
    assert "model.safetensors.index.json" in refusal(tmp_path / "model")


def test_pickled_weights_are_never_loaded(tmp_path):
    """Unpickling can run code; the message says how to come by safetensors."""
    save_model(tiny_model(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    said = refusal(tmp_path / "model")
    assert "pickle" in said and "save_pretrained" in said


@pytest.mark.parametrize("change, named", [
    (lambda w: w.pop("model.norm.weight"), "missing: model.norm.weight"),
    (lambda w: w.update({"score.weight": torch.ones(2)}), "unexpected: score.weight"),
    (lambda w: w.update({"lm_head.weight": torch.ones(9, 32)}), "has shape [9, 32] and should have [24, 32]"),
    (lambda w: w.update({"lm_head.weight": torch.ones(24, 32, dtype=torch.int8)}), "lm_head.weight is stored as I8"),
    (lambda w: [w.pop(name) for name in list(w) if ".layers." in name], "and 14 more")])
def test_weights_that_do_not_fit_are_named(change, named, tmp_path):
    """In one line: of a model with 700 tensors, torch's own message fills the screen."""
    save_model(tiny_model(), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    said = refusal(tmp_path / "model")
    assert named in said and str(tmp_path / "model") in said and len(said) < 500


def test_a_tensor_in_two_files_is_refused(tmp_path):
    """Which of the two counts would depend on the order of the files."""
    write_shards(tmp_path / "model", tiny_model())
    path = tmp_path / "model" / "model-00001-of-00003.safetensors"
    other = load_file(tmp_path / "model" / "model-00002-of-00003.safetensors")
    save_file(load_file(path) | dict([next(iter(other.items()))]), path)
    assert "in two files" in refusal(tmp_path / "model")


def test_a_tied_head_may_lie_in_the_file_if_it_is_the_embedding(tmp_path):
    """Some files carry both. If they differ, config.json is not this model's."""
    save_model(tiny_model(tie_word_embeddings=True), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path)
    assert same_bits(load_model(tmp_path / "model"), tiny_model(tie_word_embeddings=True))
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, path)
    assert "tie_word_embeddings" in refusal(tmp_path / "model")


# --- memory ---------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time
import torch
from checkpoint import convert, load_model

def memory(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

def watch():
    global peak
    while not done:
        peak = max(peak, memory("RssAnon"))
        time.sleep(0.0005)

load_model(sys.argv[1])  # what torch imports on the way is not the model's
start, start_all, peak, done = memory("RssAnon"), memory("VmRSS"), 0, False
thread = threading.Thread(target=watch)
thread.start()
WORK
done = True
thread.join()
print(peak - start, memory("VmHWM") - start_all)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A directory with 100 MB of bfloat16 weights in four shards, and one that is tiny."""
    folder = tmp_path_factory.mktemp("large")
    model = Llama(ModelConfig(8192, 1024, 4096, 2, 8, 8, 128)).to(torch.bfloat16)
    with checkpoint.whole_directory(folder / "model") as new:
        checkpoint.write_weights(model.named_parameters(), new, shard_bytes=26_000_000)
        checkpoint.write_json(new / "config.json", checkpoint.config_json(model.config, torch.bfloat16))
    assert len(list((folder / "model").glob("*.safetensors"))) >= 4
    save_model(tiny_model(), folder / "tiny")
    yield folder, sum(weight.nbytes for weight in model.parameters())
    shutil.rmtree(folder)


def measure(work: str, folder: Path, size: int) -> tuple[float, float]:
    """By how much a statement lets memory of a process's own, and all of its pages, grow at most; in units
    of `size`."""
    script = [sys.executable, "-c", MEASURE.replace("WORK", work), str(folder / "tiny")]
    child = subprocess.run(script, capture_output=True, text=True, cwd=Path(checkpoint.__file__).parent)
    assert child.returncode == 0, child.stderr
    own, all_pages = child.stdout.split()[-2:]
    return int(own) / size, int(all_pages) / size


NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


@NEEDS_PROC
@pytest.mark.parametrize("dtype, copies", [("float32", 2), ("bfloat16", 0)])
def test_loading_never_holds_two_copies(dtype, copies, large):
    """A 70B model must fit where its weights fit. `copies`: size of the parameters in units of the file;
    in the file's own dtype they are views of it.

    Memory of one's own (RssAnon) is what cannot be given back. Pages of the file can, but containers
    count them, so that no more than one shard is to be mapped beside the parameters.
    """
    folder, size = large
    own, all_pages = measure(f"model = load_model({str(folder / 'model')!r}, dtype=torch.{dtype})", folder, size)
    assert copies * 0.9 < own < copies * 1.1 + 0.1
    assert all_pages < copies + 0.5


@NEEDS_PROC
def test_converting_never_holds_the_model(large):
    """The 140 GB of a 70B model do not fit into most machines; one file's worth of them does."""
    folder, size = large
    names = {**checkpoint.META_NAMES, "model.": ""}
    halves = [{}, {}]
    for name, weight in load_model(folder / "model", dtype=torch.bfloat16).named_parameters():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        dim = 1 if name.endswith(("tok_embeddings.weight", "wo.weight", "w2.weight")) else 0
        for half, part in zip(halves, weight.detach().chunk(2, dim)):
            half[name] = weight.detach() if weight.dim() == 1 else part.clone()
    (folder / "meta").mkdir()
    for i, half in enumerate(halves):
        torch.save(half, folder / "meta" / f"consolidated.{i:02}.pth")
    (folder / "meta" / "params.json").write_text(json.dumps(
        {"dim": 1024, "n_layers": 2, "n_heads": 8, "norm_eps": 1e-5, "vocab_size": -1}))
    own, _ = measure(f"convert({str(folder / 'meta')!r}, {str(folder / 'hf')!r}, shard_bytes=26_000_000)", folder, size)
    assert own < 0.55  # a file of a quarter, the tensor that did not fit into it, and its parts
    assert len(list((folder / "hf").glob("*.safetensors"))) >= 4


# --- saving ---------------------------------------------------------------------------------------

def test_training_in_place_leaves_the_file_alone_and_can_be_saved_over_it(tmp_path):
    """Parameters are views of the mapped file: a shared map would write training into it, and a file
    that is overwritten under the map would change the model that is being saved."""
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


def test_half_written_directories_are_never_seen(tmp_path, monkeypatch):
    """Stopped while the weights are written: under its name there is nothing, or still the old
    model. What a kill left behind is cleared away by the next save."""
    def broken(weights, path, metadata):
        path.write_bytes(b"half of the wei")
        raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny_model(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "model.new.tmp").mkdir()
    (tmp_path / "model.new.tmp" / "9.safetensors").write_bytes(b"half of the wei")
    save_model(tiny_model(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny_model(seed=1), tmp_path / "model")
    assert same_bits(load_model(tmp_path / "model"), tiny_model())


@pytest.mark.parametrize("moves, under_its_name", [(0, 0), (1, None), (2, 1)])
def test_a_kill_while_the_old_model_is_replaced_loses_none(moves, under_its_name, tmp_path, monkeypatch):
    """Killed before the first move, between the two, and after the second, with the old model not yet
    removed: a whole model (known by its seed) is there, and if it is not under its name, the message
    says where."""
    save_model(tiny_model(seed=0), tmp_path / "model")
    replace, rmtree, done = checkpoint.os.replace, checkpoint.shutil.rmtree, []

    def killed(*args, **kwargs):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(replace(*args))

    monkeypatch.setattr(checkpoint.os, "replace", killed)
    monkeypatch.setattr(checkpoint.shutil, "rmtree",
                        lambda *args, **kwargs: killed() if len(done) == 2 else rmtree(*args, **kwargs))
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny_model(seed=1), tmp_path / "model")
    monkeypatch.undo()
    if under_its_name is None:
        said = refusal(tmp_path / "model")
        for seed, name in enumerate(("model.old.tmp", "model.new.tmp")):
            assert str(tmp_path / name) in said
            assert same_bits(load_model(tmp_path / name), tiny_model(seed=seed))
    else:
        assert same_bits(load_model(tmp_path / "model"), tiny_model(seed=under_its_name))
    save_model(tiny_model(seed=2), tmp_path / "model")
    assert same_bits(load_model(tmp_path / "model"), tiny_model(seed=2))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_over_a_model_leaves_no_file_of_the_old_one(tmp_path):
    """Shards of an old model beside the new file would be merged into it at the next load."""
    write_shards(tmp_path / "model", tiny_model())
    save_model(tiny_model(seed=1), tmp_path / "model")
    assert same_bits(load_model(tmp_path / "model"), tiny_model(seed=1))
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["config.json", "model.safetensors"]


def test_the_tokenizer_travels_with_the_model(tmp_path):
    """A model directory without it cannot be sampled from. Weights of the source stay where they are:
    they would be taken for the new model's."""
    write_shards(tmp_path / "start", tiny_model())
    for name in checkpoint.TOKENIZER_FILES:
        (tmp_path / "start" / name).write_text(name)
    (tmp_path / "start" / "training_args.bin").write_bytes(b"pickle")
    save_model(tiny_model(seed=1), tmp_path / "model", source=tmp_path / "start")
    save_model(tiny_model(seed=1), tmp_path / "model", source=tmp_path / "model")  # onto itself
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json", "model.safetensors", *checkpoint.TOKENIZER_FILES}
    for name in checkpoint.TOKENIZER_FILES:
        assert (tmp_path / "model" / name).read_text() == name


def test_config_json_of_the_source_is_kept_if_it_is_this_models(tmp_path):
    """Its end tokens, template names and the rest are the model's; but the config.json of another shape
    would make a directory that does not load, and one of another theta a model that talks nonsense."""
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
