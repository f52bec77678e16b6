"""Model directories in Hugging Face's layout: config.json, *.safetensors, the tokenizer's files.

Llama 1 to 3, CodeLlama, TinyLlama, SmolLM2, Mistral, Qwen2 and Qwen3 load as they are downloaded, and what is saved
here loads in transformers as it is. Anything that model.py cannot compute is rejected by name; otherwise such a model
would load and silently produce nonsense. Left out: quantised weights, and pickled ones, since a pickle can run code
(transformers converts Meta's own .pth files).
"""
import dataclasses
import gc
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from infra import InputError
from infra.hardware import dtype_of
from infra.parallel import barrier, by_first, device, full_weight, rank, shard_like, split_over_ranks, world
from infra.run import fresh_directory, hash_of, put_in_place, read_json, write_json
from model import Llama, ModelConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
                 "qwen3": "Qwen3ForCausalLM"}
ONLY = {  # fields of config.json with the one value that model.py computes, which is also their default
    "hidden_act": "silu", "mlp_bias": False, "partial_rotary_factor": 1, "use_sliding_window": False,
    "quantization_config": None}
NUMBERS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "max_position_embeddings", "rms_norm_eps")
FRACTIONS = ("rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor")  # all others are whole
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json")
SHARD_BYTES = 4_000_000_000  # of weights in one file
INDEX = "model.safetensors.index.json"
ROTARY_TABLE = "rotary_emb.inv_freq"  # stored in the first Llama files, and not a weight


# --- config.json -------------------------------------------------------------------------------------

def load_config(directory: str | Path) -> ModelConfig:
    """Read a ModelConfig from a directory's config.json, as transformers 4 or 5 writes it."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a directory with config.json and weights (Meta's params.json "
                         "and *.pth: convert them with transformers' convert_llama_weights_to_hf first)")
    raw = read_object(path)
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # transformers 4 or 5
    if not isinstance(rope, dict):
        raise InputError(f"{path} is not supported: rope scaling is {rope!r}, not an object")
    before_scaling = raw.get("original_max_position_embeddings") or raw.get("max_position_embeddings")
    rope = {"rope_theta": raw.get("rope_theta", 10000.0), "original_max_position_embeddings": before_scaling} | rope
    if faults := config_faults(raw, rope):
        raise InputError(f"{path} is not supported: {'; '.join(faults)}")
    llama3 = rope.get("rope_type", rope.get("type")) == "llama3"
    width = 128 if raw["model_type"] == "qwen3" else raw["hidden_size"] // raw["num_attention_heads"]  # as transformers
    return ModelConfig(
        **{name: raw[name] for name in NUMBERS},
        num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim") or width,
        rope_theta=rope["rope_theta"],
        rope_scaling={"rope_type": "llama3", **{name: rope[name] for name in LLAMA3_ROPE}} if llama3 else None,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        attention_bias=raw["model_type"] == "qwen2",
        qk_norm=raw["model_type"] == "qwen3",
        # a Mistral whose config.json does not mention the window has one of 4096 tokens in transformers
        sliding_window=raw.get("sliding_window", 4096) if raw["model_type"] == "mistral" else None)


def read_object(path: Path, absent: dict | None = None) -> dict:
    """Read a JSON object; return `absent`, if that is given, where there is no such file."""
    value = absent if absent is not None and not path.is_file() else read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def config_faults(raw: dict, rope: dict) -> list[str]:
    """Name every field that describes a model which model.py does not compute."""
    family = raw.get("model_type")
    if family not in [*ARCHITECTURES]:
        return [f"model_type is {family!r}, and only {', '.join(ARCHITECTURES)} can be loaded"]
    faults = [f"{name} is {found!r}, and only {value!r} is supported" for name, value in ONLY.items()
              if (found := rope.get(name, raw.get(name))) not in (None, value)]  # partial_rotary_factor may be in rope
    if raw.get("architectures") not in (None, [ARCHITECTURES[family]]):
        faults.append(f"architectures is {raw['architectures']}, not {ARCHITECTURES[family]}")
    if family in ("llama", "qwen3") and raw.get("attention_bias"):
        faults.append("attention_bias is true, with biases on q, k, v and o; Qwen2's, on q, k and v, are supported")
    layers = raw.get("layer_types") or ["full_attention"]
    if not isinstance(layers, list) or layers.count("full_attention") < len(layers):
        faults.append(f"layer_types is {layers}, and only full_attention is supported")
    if raw.get("tie_word_embeddings") not in (None, False, True):
        faults.append(f"tie_word_embeddings is {raw['tie_word_embeddings']!r}, and must be true or false")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        faults.append(f"rope type is {rope_type!r}, and only default and llama3 are supported")

    optional = {name: raw[name] for name in ("num_key_value_heads", "head_dim", "sliding_window")
                if raw.get(name) is not None}
    scaling = {name: rope.get(name) for name in ("rope_theta", *(LLAMA3_ROPE if rope_type == "llama3" else ()))}
    numbers = {name: raw.get(name) for name in NUMBERS} | optional | scaling
    for name, value in numbers.items():
        kinds, limit = ((int, float), math.inf) if name in FRACTIONS else (int, 2**31)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < limit:
            faults.append(f"{name} is {value!r}, and must be a {'whole ' if kinds is int else ''}number above 0")
    if faults:
        return faults

    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    if heads % numbers.get("num_key_value_heads", heads):
        faults.append(f"num_attention_heads, {heads}, is no multiple of num_key_value_heads, {optional}")
    if numbers.get("head_dim", 128 if family == "qwen3" else width / heads) % 2:
        faults.append(f"head_dim must be even, and hidden_size {width} is divided by {heads} heads")
    if rope_type == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        faults.append(f"low_freq_factor is {rope['low_freq_factor']}, and must be below high_freq_factor")
    return faults


def config_json(config: ModelConfig, dtype: torch.dtype, source: Path | None = None) -> dict:
    """Return config.json's content: the source's if it describes this model, else a new one with the source's token
    ids and the simplest family that computes this model."""
    family = ("qwen3" if config.qk_norm else "qwen2" if config.attention_bias else
              "mistral" if config.sliding_window else "llama")
    fields = {k: v for k, v in dataclasses.asdict(config).items() if v is not None and k != "qk_norm"}
    new = {"architectures": [ARCHITECTURES[family]], "model_type": family, "hidden_act": "silu", "bos_token_id": 1,
           "eos_token_id": 2, **fields}
    if source is not None and (source / "config.json").is_file():
        old = read_json(source / "config.json")
        same = load_config(source) == config
        new = old if same else new | {name: old[name] for name in old if name.endswith("_token_id")}
    keys = [key for key in ("dtype", "torch_dtype") if key in new] or ["torch_dtype"]  # transformers 5, 4
    return new | dict.fromkeys(keys, str(dtype).removeprefix("torch."))


# --- loading -----------------------------------------------------------------------------------------

def load_model(directory: str | Path, device: str = "cpu", dtype: torch.dtype | None = torch.float32,
               ranks: int = 1) -> Llama:
    """Load the model of a directory (dtype None: as stored), or this rank's part of it if it is split over `ranks`.

    Weights are memory-mapped and converted one at a time. On the CPU, weights that are stored in `dtype` are not
    copied: they are views of a private map, and only pages that training writes to take memory of their own. Files
    must therefore be replaced, never written into; save_model does so.
    """
    if world() > 1:
        gc.collect()  # a sharded model that is no longer needed refers to itself
    directory, config = Path(directory), load_config(directory)
    model, files, spare_head = without_weights(config, ranks), weight_files(directory), None
    check_names(directory, model, files)
    for name, file in stored(files):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            spare_head = file.get_tensor(name)
        else:
            set_weight(model, name, file.get_tensor(name).to(device, dtype))
    if spare_head is not None and not torch.equal(spare_head.to(device, dtype), model.lm_head.weight):
        raise InputError(f"{directory}: tie_word_embeddings is true in config.json, and lm_head.weight differs from "
                         "model.embed_tokens.weight")
    return model


def without_weights(config: ModelConfig, ranks: int = 1) -> Llama:
    """Make a model on the meta device, split over this many ranks."""
    with torch.device("meta"):
        model = Llama(config)
    return split_over_ranks(model, ranks) if ranks > 1 else model


def set_weight(model: Llama, name: str, weight: Tensor) -> None:
    """Set a weight; where the model is split over ranks, this rank's part of it."""
    module, _, leaf = name.rpartition(".")
    part = shard_like(model.get_parameter(name), weight)
    setattr(model.get_submodule(module), leaf, nn.Parameter(part))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def load_sampler(directory: str | Path, precision: str, ranks: int = 1) -> Llama:
    """Load a model to sample from, in this precision, split over this many ranks."""
    return load_model(directory, device(), dtype_of(precision), ranks)


def sampler_of(model: Llama, precision: str, ranks: int = 1) -> Llama:
    """Turn a model in training into one to sample from: a copy, unless it is one already."""
    if ranks == 1 and world() == 1 and model.lm_head.weight.dtype == dtype_of(precision):
        return model
    copy = without_weights(model.config, ranks)
    for name, weight in model.named_parameters():
        set_weight(copy, name, full_weight(weight.detach()).to(device(), dtype_of(precision)))
    return copy


def weight_files(directory: Path) -> list[Path]:
    """List the safetensors files that an index names, or the only one there is."""
    index, files = directory / INDEX, [path.name for path in sorted(directory.glob("model*.safetensors"))]
    if not index.is_file():
        if not files and list(directory.glob("*.bin")):
            raise InputError(f"{directory} has only pickled weights (*.bin), which are never loaded: a pickle can run "
                             "code. Where you trust it, transformers writes safetensors: "
                             f"AutoModelForCausalLM.from_pretrained('{directory}').save_pretrained(NEW)")
        if len(files) != 1:
            raise InputError(f"{directory} has {listed(files) or 'no model.safetensors'}, and no {INDEX} that says "
                             "which files belong together: fetch what is missing")
        return [directory / files[0]]

    weight_map = read_object(index).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise InputError(f"{index} has no weight_map from tensors to files of its directory")
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise InputError(f"{index} names {listed(missing)}, which do not exist: fetch the missing files")
    if "model.safetensors" in set(files) - set(names):
        raise InputError(f"{directory} has {INDEX} and a model.safetensors that it does not name: remove one of the "
                         "two models")
    return [directory / name for name in names]


def stored(files: list[Path]) -> Iterator[tuple[str, safe_open]]:
    """Yield the name of every weight with the open file that holds it."""
    for path in files:
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise InputError(f"{path} is not a complete safetensors file: {error}. Fetch it again") from None
        with file:
            yield from ((name, file) for name in file.keys() if not name.endswith(ROTARY_TABLE))


def check_names(directory: Path, model: Llama, files: list[Path]) -> None:
    """Refuse missing, unexpected, doubled or misshapen tensors before anything is read."""
    wanted = {name: list(weight.shape) for name, weight in model.named_parameters()}  # a tied head once
    found, faults = set(), []
    for name, file in stored(files):
        weight = file.get_slice(name)
        if name in found:
            faults.append(f"{name} is in two files")
        elif weight.get_dtype() not in ("F32", "BF16", "F16"):
            faults.append(f"{name} is stored as {weight.get_dtype()}, not as F32, BF16 or F16")
        elif weight.get_shape() != wanted.get(name, weight.get_shape()):
            faults.append(f"{name} has shape {weight.get_shape()} and should have {wanted[name]}")
        found.add(name)
    spare = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    for fault, names in (("unexpected", found - wanted.keys() - spare), ("missing", wanted.keys() - found)):
        if names:
            faults.insert(0, f"{fault}: {listed(sorted(names))}")
    if faults:
        raise InputError(f"{directory}: the weights are not those of its config.json: {listed(faults, '; ')}")


def listed(names: list[str], comma: str = ", ") -> str:
    return comma.join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def num_parameters(directory: str | Path) -> int:
    """Count the parameters of a directory's model from its config.json; tied weights count once."""
    return sum(weight.numel() for weight in without_weights(load_config(directory)).parameters())


def flops(directory: str | Path, forward: int, trained: int) -> int:
    """Floating-point operations of a model on this many tokens: 2 per parameter forward only, 6 where it is trained.

    Attention scores are not counted: they cost little where hidden_size exceeds the sequence length.
    """
    return num_parameters(directory) * (2 * forward + 6 * trained)


def model_hash(directory: str | Path) -> str:
    """Tell which model a directory holds: SHA-256 over its config, its weights and the files of its tokenizer.

    eos_token_id counts, too: ModelConfig leaves it out, but responses end with it.
    """
    directory = Path(directory)
    tokenizer = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    return by_first(lambda: hash_of(load_config(directory), read_json(directory / "config.json").get("eos_token_id"),
                                    *weight_files(directory), *tokenizer))


# --- saving ----------------------------------------------------------------------------------------

def save_model(model: Llama, directory: str | Path, source: str | Path | None = None) -> None:
    """Write a model directory, completely or not at all.

    source: the directory that the model comes from, possibly the same one: its config.json is kept (up to the dtype),
    and the files of its tokenizer are copied.
    """
    directory, source = Path(directory), Path(source) if source else None
    config = config_json(model.config, model.lm_head.weight.dtype, source)
    temporary = by_first(lambda: fresh_directory(directory))
    write_json(temporary / "config.json", config)
    write_weights(model, temporary)
    if rank() == 0:
        for name in TOKENIZER_FILES:
            if source and (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
        put_in_place(directory)
    barrier()


def write_weights(model: Llama, folder: Path) -> None:
    """Write one file, or several of at most SHARD_BYTES and their index; only one file's weights are gathered."""
    parts, size = [{}], 0
    for name, weight in model.named_parameters():  # a tied head once
        if parts[-1] and size + weight.nbytes > SHARD_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = weight.detach()
        size += weight.nbytes

    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(part, file)
        full = {}
        for name, weight in part.items():
            gathered = full_weight(weight)  # by all ranks
            if rank() == 0:
                full[name] = gathered.contiguous()
        try:
            if rank() == 0:
                save_file(full, folder / file, metadata={"format": "pt"})
                shutil.copymode(folder / "config.json", folder / file)  # safetensors lets only the owner read
        except (SafetensorError, OSError) as error:
            raise InputError(f"{folder} cannot be written: {error}. Free some space and run it again") from None
    if len(parts) > 1:
        total = sum(weight.nbytes for weight in model.parameters())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
