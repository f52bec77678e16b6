"""Meta's files become the same model: logits are those of the transformers model whose weights they hold."""
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from checkpoint import load_config, load_model, write_weights
from model import Llama, ModelConfig, rotate
from tiny import random_tokens, tiny_model
from tools import convert_meta
from tools.convert_meta import convert

SPLIT = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}  # dimension, from fairscale
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}
LLAMA3 = dict(rope_theta=500000.0)
MODELS = {  # fields of the model, how its files are written, fields of params.json, the context that must come out
    "llama 1": (dict(rms_norm_eps=1e-6), {}, {}, 2048),
    "llama 2": (dict(), dict(shards=2, embedding=1), {}, 4096),
    "llama 2 70B": (dict(num_key_value_heads=2), dict(shards=2, embedding=1), dict(ffn_dim_multiplier=1.3), 4096),
    "codellama": (dict(rope_theta=1e6), {}, {}, 16384),
    "llama 3": (dict(num_key_value_heads=2, **LLAMA3), dict(shards=2, embedding=0), {}, 8192),
    "llama 3.1": (dict(rope_scaling=SCALING, **LLAMA3), dict(shards=4, embedding=0), dict(use_scaled_rope=True),
                  131072),
    "llama 3.2": (dict(rope_scaling=SCALING | {"factor": 32.0}, tie_word_embeddings=True, **LLAMA3), {},
                  dict(use_scaled_rope=True), 131072)}


def small(**fields) -> Llama:
    return tiny_model(**{"num_key_value_heads": 4, **fields})


def meta_tensors(model: Llama) -> dict[str, torch.Tensor]:
    """Meta's names and order of rows for the weights of a model, each pair of rows put side by side."""
    half = model.config.head_dim // 2
    found = {}
    for name, weight in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = torch.stack([head[i + j] for head in weight.split(2 * half) for i in range(half)
                                  for j in (0, half)])
        for ours, theirs in convert_meta.NAMES.items():
            name = name.replace(ours, theirs)
        found[name] = weight
    return found


def write_meta(model: Llama, folder: Path, tensors=None, shards: int = 1, embedding: int = 1, **params) -> Path:
    """The directory that Meta would distribute; `embedding` is the dimension that its shards split."""
    folder.mkdir()
    config = model.config
    for i in range(shards):
        part = {"rope.freqs": torch.ones(4)}
        for name, weight in (tensors or meta_tensors(model)).items():
            dim = SPLIT.get(name.split(".")[-2], embedding if name.startswith("tok") else None)
            part[name] = weight if dim is None else weight.chunk(shards, dim)[i].clone()
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    params = {"dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
              "n_kv_heads": config.num_key_value_heads, "norm_eps": config.rms_norm_eps, "vocab_size": -1,
              "rope_theta": config.rope_theta, "multiple_of": 256} | params
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_metas_files_become_the_same_model(name, tmp_path, monkeypatch):
    """Rows of q and k in the wrong order, a part on the wrong side or another theta: all load, all shapes fit, and the
    model talks nonsense."""
    fields, files, params, positions = MODELS[name]
    model = small(**{"rope_theta": 10000.0, **fields})
    monkeypatch.setattr(convert_meta, "write_weights", partial(write_weights, shard_bytes=10_000))
    convert(write_meta(model, tmp_path / "meta", **files, **params), tmp_path / "new" / "hf")
    assert len(list((tmp_path / "new" / "hf").glob("model-*-of-*.safetensors"))) > 2
    loaded, tokens = load_model(tmp_path / "new" / "hf"), random_tokens(8, 2, 60)
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.config.max_position_embeddings == positions
    assert loaded.config.rope_scaling == model.config.rope_scaling

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "hf")
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=0, atol=2e-4)


def test_metas_rotary_embedding_is_the_one_that_is_converted():
    """The writer of Meta's files above is ours; this is Meta's own definition: neighbours as complex numbers, rotated
    by their angle. Scores must be the same from reordered rows under `rotate`."""
    torch.manual_seed(0)
    heads, h, D, T = 3, 8, 16, 5
    wq, wk, x = torch.randn(heads * h, D), torch.randn(heads * h, D), torch.randn(T, D)
    angles = torch.outer(torch.arange(T), 100.0 ** (-torch.arange(0, h, 2) / h))  # (T, h/2)

    def theirs(weight: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex((x @ weight.T).view(T, heads, h // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones(T, 1, h // 2), angles[:, None])).flatten(2)

    def ours(weight: torch.Tensor) -> torch.Tensor:
        x_heads = (x @ convert_meta.to_halves(weight, h).T).view(T, heads, h)
        cos, sin = angles[:, None].cos(), angles[:, None].sin()
        return rotate(x_heads, torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))

    expected = torch.einsum("thd,shd->hts", theirs(wq), theirs(wk))
    torch.testing.assert_close(torch.einsum("thd,shd->hts", ours(wq), ours(wk)), expected)


def test_the_dtype_of_metas_files_stays_and_llama_3_has_its_own_end_token(tmp_path):
    model = tiny_model(vocab_size=128256, hidden_size=8, head_dim=2, tie_word_embeddings=True).to(torch.bfloat16)
    convert(write_meta(model, tmp_path / "meta", rope_theta=500000.0), tmp_path / "hf")
    stored = load_model(tmp_path / "hf", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(stored[name], weight) for name, weight in model.state_dict().items())
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert raw["eos_token_id"] == 128001 and raw["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("tokenizer, kept", [(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00", True),
                                             (b"IQ== 0\nIg== 1\n", False), (None, False)])
def test_llama_3s_tokenizer_model_is_no_sentencepiece_model(tokenizer, kept, tmp_path, capsys):
    """It has the same name, and would fail much later, inside sentencepiece."""
    write_meta(small(), tmp_path / "meta")
    if tokenizer:
        (tmp_path / "meta/tokenizer.model").write_bytes(tokenizer)
    convert(tmp_path / "meta", tmp_path / "hf")
    assert (tmp_path / "hf/tokenizer.model").exists() == kept
    assert ("there is no tokenizer yet" in capsys.readouterr().out) != kept


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    """A .pth file is a pickle, and a plain load of one runs whatever it says."""
    model, trap = small(), tmp_path / "was here"

    class Evil:
        def __reduce__(self):
            return open, (str(trap), "w")

    write_meta(model, tmp_path / "meta", tensors=meta_tensors(model) | {"x.norm.weight": Evil()})
    with pytest.raises(SystemExit, match="consolidated.00.pth .*more than plain tensors"):
        convert(tmp_path / "meta", tmp_path / "hf")
    assert not trap.exists() and not (tmp_path / "hf").exists()
    torch.load(tmp_path / "meta/consolidated.00.pth", weights_only=False)
    assert trap.exists()  # the trap was a trap


def change_params(folder: Path, **fields) -> None:
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


BROKEN = {
    "first shard missing": (lambda f: (f / "consolidated.00.pth").unlink(), "consolidated.00.pth is missing"),
    "last shard missing": (lambda f: (f / "consolidated.01.pth").unlink(), r"\(24, 16\)\] do not make"),
    "cut": (lambda f: (f / "consolidated.01.pth").write_bytes((f / "consolidated.01.pth").read_bytes()[:900]),
            "consolidated.01.pth is .*cut off"),
    "no params": (lambda f: (f / "params.json").unlink(), "params.json"),
    "experts": (lambda f: change_params(f, moe_args={}), "moe_args"),
    "layers": (lambda f: change_params(f, n_layers=1), "unexpected: layers.1.attention"),
    "no Llama": (lambda f: torch.save({"x": torch.ones(1)}, f / "consolidated.00.pth"), "is not a Llama"),
    "target": (lambda f: (f.parent / "hf").write_text("mine"), "hf exists")}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_no_llama_of_metas_is_refused(fault, tmp_path):
    """By name, without a half directory left behind, and without writing over anything."""
    spoil, named = BROKEN[fault]
    spoil(write_meta(small(), tmp_path / "meta", shards=2))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit, match=named):
        convert(tmp_path / "meta", tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


MEASURE = """
import functools, sys, threading, time
from pathlib import Path
from tools import convert_meta

def own_memory():
    [line] = [line for line in open("/proc/self/status") if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024

def watch():
    while not done:
        peaks.append(own_memory())
        time.sleep(0.0005)

convert_meta.write_weights = functools.partial(convert_meta.write_weights, shard_bytes=26_000_000)
convert_meta.convert(Path(sys.argv[1]), Path(sys.argv[2]))  # what is imported on the way is not the model's
start, peaks, done = own_memory(), [], False
thread = threading.Thread(target=watch)
thread.start()
convert_meta.convert(Path(sys.argv[3]), Path(sys.argv[4]))
done = True
thread.join()
print(max(peaks) - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_converting_never_holds_the_model(tmp_path):
    """The 140 GB of a 70B model do not fit into most machines; one file's worth of them does."""
    model = Llama(ModelConfig(8192, 1024, 4096, 2, 8, 8, 128)).to(torch.bfloat16)  # 100 MB, a file has a quarter
    write_meta(small(), tmp_path / "tiny")
    write_meta(model, tmp_path / "large", shards=2)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in ("tiny", "tiny-hf", "large", "large-hf"))],
        capture_output=True, text=True, cwd=Path(convert_meta.__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    size = sum(weight.nbytes for weight in model.parameters())
    assert int(done.stdout.split()[-1]) < 0.55 * size  # a file, the tensor that did not fit into it, and its parts
    assert len(list((tmp_path / "large-hf").glob("*.safetensors"))) >= 4
    assert load_config(tmp_path / "large-hf").hidden_size == 1024
