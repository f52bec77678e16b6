"""Model directories in Hugging Face's layout: config.json, *.safetensors, the tokenizer's files; and the
state of a training, from which it goes on to the bit.

Llama 1 to 3, CodeLlama, TinyLlama, SmolLM2, Mistral and Qwen2 load as they are downloaded, and what is
saved here loads in transformers as it is. Whatever model.py does not compute is refused by name: under
weights of the same names and shapes it would load and talk nonsense. Left out: quantised weights, and
pickled ones, which can run code; of Meta's own `.pth` files only plain tensors are read:

    python checkpoint.py convert SRC DST     # Meta's consolidated.*.pth and params.json -> a model directory
"""
import argparse
import dataclasses
import gc
import hashlib
import inspect
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from model import Llama, ModelConfig
from infra.parallel import barrier, by_first, device, gather, like, rank, split, whole, world

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
ONLY = {  # fields of config.json with the one value that model.py computes, which is also their default
    "hidden_act": "silu", "mlp_bias": False, "partial_rotary_factor": 1, "use_sliding_window": False,
    "quantization_config": None}
NUMBERS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "max_position_embeddings", "rms_norm_eps")
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json")
SHARD_BYTES = 4_000_000_000  # of weights in one file
INDEX = "model.safetensors.index.json"
TABLE = "rotary_emb.inv_freq"  # in the first Llama files, and no weight
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # with one rank it is not needed


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise SystemExit(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


# --- config.json -------------------------------------------------------------------------------------

def load_config(directory: Path) -> ModelConfig:
    """The ModelConfig in a directory's config.json, as transformers 4 or 5 writes it."""
    path = directory / "config.json"
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: give a directory with config.json and weights{hint(directory)}")
    raw = read_json(path)
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        raise SystemExit(f"{path}: model_type is {family!r}, and only {', '.join(ARCHITECTURES)} can be loaded")
    if raw.get("architectures") not in (None, [ARCHITECTURES[family]]):
        raise SystemExit(f"{path}: architectures is {raw['architectures']}, and only {ARCHITECTURES[family]} of "
                         f"model_type {family} can be loaded")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # transformers 4 or 5
    for field, value in ONLY.items():
        found = rope.get(field, raw.get(field))  # partial_rotary_factor may be in either
        if found not in (None, value):
            raise SystemExit(f"{path}: {field} is {found!r}, and only {value!r} is supported")
    if family == "llama" and raw.get("attention_bias"):
        raise SystemExit(f"{path}: attention_bias is true, which puts biases on q, k, v and o; biases on q, k "
                         "and v alone (Qwen2) are supported")
    if set(raw.get("layer_types") or []) - {"full_attention"}:
        raise SystemExit(f"{path}: layer_types is {raw['layer_types']}, and only full_attention is supported")
    for field in NUMBERS:
        if not isinstance(raw.get(field), (int, float)) or raw[field] <= 0:
            raise SystemExit(f"{path}: {field} is {raw.get(field)!r}, and must be a number above 0")
    return ModelConfig(
        **{field: raw[field] for field in NUMBERS},
        num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
        rope_scaling=rope_scaling(path, rope, raw["max_position_embeddings"]),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        attention_bias=family == "qwen2",
        # a Mistral whose config.json does not mention the window has one of 4096 tokens in transformers
        sliding_window=raw.get("sliding_window", 4096) if family == "mistral" else None)


def rope_scaling(path: Path, rope: dict, max_positions: int) -> dict | None:
    """ModelConfig.rope_scaling out of the dictionary of a config.json."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise SystemExit(f"{path}: rope type {rope_type!r} is not supported, only default and llama3")
    rope = {"original_max_position_embeddings": max_positions} | rope
    missing = [field for field in LLAMA3_ROPE if field not in rope]
    if missing:
        raise SystemExit(f"{path}: rope scaling {rope} has no {', '.join(missing)}")
    return {"rope_type": "llama3"} | {field: rope[field] for field in LLAMA3_ROPE}


def hint(directory: Path) -> str:
    """What may have happened to a directory that is no model."""
    if (directory / "params.json").is_file():
        return f". This one is Meta's: python checkpoint.py convert {directory} NEW"
    new, old = beside(directory)
    if not directory.exists() and old.exists():
        return f". A save was killed at its last step: rename {new}, or {old}, the model before, to {directory}"
    return ""


def config_json(config: ModelConfig, dtype: torch.dtype, source: Path | None = None) -> dict:
    """What to write as config.json: that of the source if it describes this model, else a new one with
    the source's token ids; of the families that compute the same, the plainest."""
    family = "qwen2" if config.attention_bias else "mistral" if config.sliding_window else "llama"
    new = {"architectures": [ARCHITECTURES[family]], "model_type": family, "hidden_act": "silu", "bos_token_id": 1,
           "eos_token_id": 2, **{k: v for k, v in dataclasses.asdict(config).items() if v is not None}}
    if source is not None and (source / "config.json").is_file():
        old = read_json(source / "config.json")
        same = load_config(source) == config
        new = old if same else new | {name: old[name] for name in old if name.endswith("_token_id")}
    keys = [key for key in ("dtype", "torch_dtype") if key in new] or ["torch_dtype"]  # transformers 5, 4
    return new | dict.fromkeys(keys, str(dtype).removeprefix("torch."))


# --- loading -----------------------------------------------------------------------------------------

def load_model(directory: str | Path, device: str = "cpu", dtype: torch.dtype | None = torch.float32,
               ranks: int = 1) -> Llama:
    """The model of a directory, each weight memory-mapped and converted on its own (dtype None: as stored),
    or this rank's part of it, if it is split over several.

    On the CPU, weights that are stored in `dtype` are not copied: they are views of a private map, and
    only pages that training writes to take memory of their own. Files must therefore be replaced, never
    written into; save_model does so.
    """
    if world() > 1:
        gc.collect()  # a sharded model that is no longer needed refers to itself
    directory = Path(directory)
    config = load_config(directory)
    files = weight_files(directory)
    with torch.device("meta"):
        model = Llama(config)
    check_names(directory, model, files)
    if ranks > 1:
        split(model, ranks)
    spare_head = None
    for path in files:
        with open_weights(path) as file:
            for name in file.keys():
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    spare_head = file.get_tensor(name)
                elif not name.endswith(TABLE):
                    put(model, name, file.get_tensor(name).to(device, dtype))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
        if spare_head is not None and not torch.equal(spare_head.to(device, dtype), model.lm_head.weight):
            raise SystemExit(f"{directory}: tie_word_embeddings is true in config.json, and lm_head.weight "
                             "differs from model.embed_tokens.weight")
    return model


def put(model: Llama, name: str, weight: Tensor) -> None:
    """Set a weight; where the model is split over ranks, this rank's part of it."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(like(model.get_parameter(name), weight)))


def sampling_dtype() -> torch.dtype:
    """bfloat16 where products of it are fast: on a GPU, and on a CPU with AVX-512 BF16 or AMX; else float32."""
    features = torch.cpu.get_capabilities()
    fast = device() == "cuda" or features.get("avx512_bf16") or features.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def load_sampler(directory: str | Path, ranks: int = 1) -> Llama:
    """A model to sample from, in sampling_dtype, split over so many ranks."""
    return load_model(directory, device(), sampling_dtype(), ranks)


def sampler_of(model: Llama, ranks: int = 1) -> Llama:
    """A model in training as a model to sample from; a copy, unless it is that already."""
    if ranks == 1 and world() == 1 and model.lm_head.weight.dtype == sampling_dtype():
        return model
    with torch.device("meta"):
        copy = Llama(model.config)
    if ranks > 1:
        split(copy, ranks)
    for name, weight in model.named_parameters():
        put(copy, name, whole(weight.detach()).to(device(), sampling_dtype()))
    if model.config.tie_word_embeddings:
        copy.lm_head.weight = copy.model.embed_tokens.weight
    return copy


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that an index names, or the only one there is."""
    index, whole = directory / INDEX, directory / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        names = sorted(set(weight_map.values()), key=str) if isinstance(weight_map, dict) else []
        if not names or any(Path(str(name)).name != name for name in names):
            raise SystemExit(f"{index} has no weight_map from tensors to files of its directory")
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise SystemExit(f"{index} names {listed(missing)}, not there: fetch the missing files")
        if whole.is_file() and whole.name not in names:
            raise SystemExit(f"{directory} has {INDEX} and a model.safetensors that it does not name: "
                             "remove one of the two models")
        return [directory / name for name in names]
    files = sorted(directory.glob("model*.safetensors"))
    if len(files) > 1:
        raise SystemExit(f"{directory} has {listed([f.name for f in files])}, and no {INDEX} that says which "
                         "of them belong together: fetch it")
    if not files and list(directory.glob("*.bin")):
        raise SystemExit(f"{directory} has only pickled weights (*.bin), which are never loaded, since a pickle can "
                         "run code. Where you trust it, transformers writes safetensors: "
                         f"AutoModelForCausalLM.from_pretrained('{directory}').save_pretrained(NEW)")
    if not files:
        raise SystemExit(f"{directory} has neither model.safetensors nor {INDEX}")
    return files


def open_weights(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise SystemExit(f"{path} is no whole safetensors file: {error}. Fetch it again") from None


def check_names(directory: Path, model: Llama, files: list[Path]) -> None:
    """Refuse missing, surplus, doubled or misshapen tensors, before anything is read."""
    wanted = {name: list(weight.shape) for name, weight in model.named_parameters()}  # a tied head once
    spare = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    found, faults = {}, []
    for path in files:
        with open_weights(path) as file:
            for name in file.keys():
                weight = file.get_slice(name)
                if name in found:
                    faults.append(f"{name} is in two files")
                elif weight.get_dtype() not in ("F32", "BF16", "F16"):
                    faults.append(f"{name} is stored as {weight.get_dtype()}, not as F32, BF16 or F16")
                elif name in wanted and weight.get_shape() != wanted[name]:
                    faults.append(f"{name} has shape {weight.get_shape()} and should have {wanted[name]}")
                found[name] = path
    missing = [name for name in wanted if name not in found]
    surplus = [name for name in found if name not in wanted and name not in spare and not name.endswith(TABLE)]
    faults = ([f"missing: {listed(missing)}"] if missing else []) \
        + ([f"unexpected: {listed(surplus)}"] if surplus else []) + faults
    if faults:
        raise SystemExit(f"{directory}: the weights are not those of its config.json: {listed(faults, '; ')}")


def listed(names: list[str], comma: str = ", ") -> str:
    return comma.join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# --- saving ------------------------------------------------------------------------------------------

def save_model(model: Llama, directory: str | Path, source: str | Path | None = None,
               **files: dict) -> None:
    """Write a model directory, whole or not at all.

    source: the directory that the model comes from, possibly the same one: its config.json is kept (up
    to the dtype), and the files of its tokenizer are copied. files: name -> what NAME.json says beside it.
    """
    source = None if source is None else Path(source)
    weights = ((name, whole(weight.detach())) for name, weight in model.named_parameters())
    if rank() > 0:
        for _ in weights:  # a sharded weight is put together by all ranks
            pass
    else:
        config = config_json(model.config, model.lm_head.weight.dtype, source)
        with whole_directory(Path(directory)) as temporary:
            write_weights(weights, temporary)
            for name, value in {"config": config, **files}.items():
                write_json(temporary / f"{name}.json", value)
            if source is not None:
                copy_tokenizer(source, temporary)
    barrier()


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """A new directory to fill, which takes the place of `directory` when the block ends without an error.

    The old one is moved aside and removed last: after a kill at any point there is a whole model under
    the name, or, between two renames, the old and the new one beside it (`hint` says where). Models
    that map the old files keep them alive.
    """
    temporary, old = beside(directory)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary)
        raise
    take_place(directory)


def take_place(directory: Path) -> None:
    """Put the complete successor of a directory in its place."""
    temporary, old = beside(directory)
    for path in (*temporary.iterdir(), temporary):
        flush(path)
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(directory, old)
    os.replace(temporary, directory)
    flush(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def beside(directory: Path) -> tuple[Path, Path]:
    """Where a directory's successor is written, and where its predecessor waits to be removed."""
    return tuple(directory.with_name(f"{directory.name}.{age}.tmp") for age in ("new", "old"))


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_weights(weights: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """One file, or, past shard_bytes, several and their index; no more than one file's weights at a time."""
    weight_map, total, count = {}, 0, 0
    for part in in_shards(weights, shard_bytes):
        count += 1
        try:
            save_file(part, folder / f"{count}.safetensors", metadata={"format": "pt"})
        except (SafetensorError, OSError) as error:
            raise SystemExit(f"{folder} cannot be written: {error}. Make room and give the command again") from None
        weight_map |= dict.fromkeys(part, count)
        total += sum(weight.nbytes for weight in part.values())
        part.clear()
    if count == 1:
        os.rename(folder / "1.safetensors", folder / "model.safetensors")
        return
    names = {i: f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)}
    for i, name in names.items():
        os.rename(folder / f"{i}.safetensors", folder / name)
    write_json(folder / INDEX, {"metadata": {"total_size": total},
                                "weight_map": {name: names[i] for name, i in weight_map.items()}})


def in_shards(weights: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    part, size = {}, 0
    for name, weight in weights:
        if part and size + weight.nbytes > shard_bytes:
            yield part
            part, size = {}, 0
        part[name] = weight.contiguous()
        size += weight.nbytes
    yield part


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def weights_hash(model: Llama) -> str:
    """SHA-256 over names and values of all parameters: which model a stored number belongs to."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(whole(weight.detach()).cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


# --- the state of a training ---------------------------------------------------------------------------
# FOLDER/step-00000040/ holds weights and moments (*.safetensors, a file per rank, written and read by
# torch.distributed.checkpoint, so that another number of ranks can go on), records.jsonl with the record of
# every step so far, and state.json with what the training is made of and the SHA-256 of the other files.

def save_state(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, records: list[dict],
               made_of: dict) -> None:
    """Write the state after len(records) steps, whole or not at all; the one before is kept beside it."""
    target = folder / f"step-{len(records):08}"
    temporary = beside(target)[0]

    def open_directory() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def close_directory() -> None:
        (temporary / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        hashes["records.jsonl"] = file_hash(temporary / "records.jsonl")
        write_json(temporary / "state.json", {"made_of": made_of, "sha256": hashes})
        take_place(target)
        for old in states(folder)[2:]:
            shutil.rmtree(old)

    try:
        by_first(open_directory)
        dcp.save(tensors(module, optimizer), no_dist=world() == 1,
                 storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
        files = by_first(lambda: sorted(path.name for path in temporary.glob("*.safetensors")))
        hashes = {}
        for part in gather({name: file_hash(temporary / name) for name in files[rank()::world()]}):
            hashes |= part
        by_first(close_directory)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reasons = [str(failure) for failure, _ in error.failures.values()] if hasattr(error, "failures") else [error]
        raise SystemExit(f"{target} cannot be written: {reasons[0]}. The states before it in {folder} are whole: "
                         "make room, and the same command goes on from the newest") from None


def load_state(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, made_of: dict) -> list[dict]:
    """Bring back the newest state that is whole; the records of the steps until then, [] if there is none."""
    found = by_first(lambda: states(folder))
    for path in found:
        if fault := fault_of(path):
            if rank() == 0:
                print(f"warning: {path} is not whole and is passed over: {fault}")
            continue
        before = read_json(path / "state.json")["made_of"]
        changed = [f"  {name}: {before.get(name)!r} there, {made_of.get(name)!r} now" for name in before | made_of
                   if before.get(name) != made_of.get(name)]
        if changed:
            raise SystemExit(f"{path} is the state of another training:\n" + "\n".join(changed)
                             + f"\nRemove {folder} to start this one from its beginning.")
        dcp.load(tensors(module, optimizer), no_dist=world() == 1,
                 storage_reader=HuggingFaceStorageReader(str(path)))
        return [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]
    if found:
        raise SystemExit(f"{folder} holds no state that is whole. Remove it to start this training from its beginning.")
    return []


def drop(folder: Path) -> None:
    """Remove the states of a training that is over."""
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)


def states(folder: Path) -> list[Path]:
    """The states in a folder, newest first."""
    return sorted((path for path in folder.glob("step-*") if path.suffix != ".tmp"), reverse=True)


def fault_of(path: Path) -> str:
    """What is wrong with the files of a state, if anything is; every rank reads some of them."""
    try:
        hashes = read_json(path / "state.json")["sha256"]
    except (SystemExit, KeyError) as error:
        return f"state.json: {error}"
    faults = [f"{name} is missing" if not (path / name).is_file() else f"{name} has changed"
              for name in sorted(hashes)[rank()::world()]
              if not (path / name).is_file() or file_hash(path / name) != hashes[name]]
    return "; ".join(fault for part in gather(faults) for fault in part)


def file_hash(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and AdamW's moments and step counts by name; moments that are not there yet become zeros."""
    named = {}
    for name, weight in module.named_parameters():
        state = optimizer.state[weight]
        if not state:
            state |= {"step": torch.zeros((), dtype=torch.float32, device=weight.device),
                      "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        named |= {name: weight.detach()} | {f"{name}.{part}": value for part, value in state.items()}
    return named


# --- Meta's files ------------------------------------------------------------------------------------

META_NAMES = {  # Hugging Face's part of a name -> Meta's
    "embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}
PARAMS = {"dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "rope_theta", "use_scaled_rope",
          "vocab_size", "multiple_of", "ffn_dim_multiplier", "max_batch_size", "max_seq_len"}


def convert(source: str | Path, target: str | Path, max_positions: int | None = None,
            rope_factor: float | None = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a Llama as Meta distributes it (consolidated.NN.pth, params.json, tokenizer.model) as a model
    directory in Hugging Face's layout.

    The shards of model parallelism are merged, and rows of the query and key projections reordered for
    Hugging Face's rotary embedding; dtypes stay. Weights are mapped, and written one file of 4 GB at a
    time, so about that much memory is needed. DST appears when it is complete.

    params.json tells neither the longest input of a model nor how far its rotary embedding is stretched.
    For the known Llamas both follow from the rest; the rule that applied is printed, and a flag
    overrules it.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise SystemExit(f"{target} exists: name a new directory")
    params = read_json(source / "params.json")
    if params.keys() - PARAMS:
        raise SystemExit(f"{source / 'params.json'}: not supported: {listed(sorted(params.keys() - PARAMS))}")
    shards = [load_pth(path) for path in meta_files(source)]
    config = meta_config(source, params, shards, max_positions, rope_factor)
    merged = meta_weights(source, config, shards)
    with whole_directory(target) as temporary:
        write_weights(merged, temporary, shard_bytes)
        raw = config_json(config, shards[0]["tok_embeddings.weight"].dtype)
        if config.vocab_size == 128256:  # Llama 3; an instruct model's end tokens are in its tokenizer's files
            raw |= {"bos_token_id": 128000, "eos_token_id": 128001}
        write_json(temporary / "config.json", raw)
        copy_meta_tokenizer(source, temporary)
    print(f"{target} is written: {config}")


def meta_files(source: Path) -> list[Path]:
    files = sorted(source.glob("consolidated.*.pth"))
    expected = [source / f"consolidated.{i:02}.pth" for i in range(max(1, len(files)))]
    if files != expected:
        missing = [path.name for path in expected if path not in files]
        raise SystemExit(f"{source} has no {listed(missing)}, and {listed([f.name for f in files]) or 'no other'}")
    return files


def load_pth(path: Path) -> dict[str, Tensor]:
    """Meta's tensors of one shard, mapped, not read."""
    try:
        weights = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # of several types, all of which mean this
        raise SystemExit(f"{path} is not a whole file of plain tensors, and nothing else is unpickled: "
                         f"{str(error).splitlines()[0]}") from None
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise SystemExit(f"{path} does not hold a dictionary of tensors")
    return weights


def meta_config(source: Path, params: dict, shards: list[dict[str, Tensor]], max_positions: int | None,
                rope_factor: float | None) -> ModelConfig:
    """The ModelConfig of params.json. What it leaves open is decided by a rule, which is printed."""
    try:
        D, H, layers, eps = (params[name] for name in ("dim", "n_heads", "n_layers", "norm_eps"))
        embedding, gate = (shards[0][name] for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"))
    except KeyError as error:
        raise SystemExit(f"{source} is not a Llama of Meta's: there is no {error}") from None
    # vocab_size is -1 in old files, and a width can be computed in several ways: the tensors tell,
    # whichever way the embedding is split
    vocabulary, width = (weight.numel() * len(shards) // D for weight in (embedding, gate))
    head = shards[0].get("output.weight")  # models with a tied one (Llama 3.2) come as one shard
    tied = head is None or len(shards) == 1 and torch.equal(head, embedding)
    if max_positions is None:
        max_positions, model = guess_max_positions(source, params)
        print(f"max_position_embeddings {max_positions}: params.json looks like {model}; "
              "--max_positions gives another")
    scaling = None
    if params.get("use_scaled_rope"):
        if rope_factor is None:
            rope_factor = 32.0 if tied else 8.0
            print(f"rope scaling by {rope_factor:g}, as the {'tied Llama 3.2' if tied else 'Llama 3.1 and 3.3'} "
                  "models have it; --rope_factor gives another")
        scaling = {"rope_type": "llama3", "factor": rope_factor, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return ModelConfig(
        vocab_size=vocabulary, hidden_size=D, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=H, num_key_value_heads=params.get("n_kv_heads") or H, head_dim=D // H,
        max_position_embeddings=max_positions, rms_norm_eps=eps, rope_theta=params.get("rope_theta", 10000.0),
        rope_scaling=scaling, tie_word_embeddings=tied)


def guess_max_positions(source: Path, params: dict) -> tuple[int, str]:
    """The context length of a Llama, which params.json does not tell, and the models that have it."""
    theta = params.get("rope_theta", 10000.0)
    if params.get("use_scaled_rope"):
        return 131072, "Llama 3.1, 3.2 or 3.3"
    if theta == 500000:
        return 8192, "Llama 3"
    if theta == 1000000:
        return 16384, "CodeLlama"
    if theta != 10000:
        raise SystemExit(f"{source / 'params.json'}: no Llama with rope_theta {theta} is known here: give the longest "
                         "input it was trained for as --max_positions")
    if params["norm_eps"] < 1e-5:
        return 2048, "Llama 1"
    return 4096, "Llama 2 (the 65B of Llama 1 looks the same, and has 2048)"


def meta_weights(source: Path, config: ModelConfig, shards: list[dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """All weights one by one, merged, in Hugging Face's order and under its names."""
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in Llama(config).named_parameters()}
    theirs = {name: meta_name(name) for name in shapes}
    for i, shard in enumerate(shards):
        missing = sorted(set(theirs.values()) - shard.keys())
        surplus = sorted(shard.keys() - theirs.values() - {"rope.freqs", "output.weight"})
        if missing or surplus:
            raise SystemExit(f"{source / f'consolidated.{i:02}.pth'}: missing: {listed(missing) or 'nothing'}; "
                             f"unexpected: {listed(surplus) or 'nothing'}")
    for name, shape in shapes.items():
        try:
            weight = merge([shard[theirs[name]] for shard in shards], shape)
        except ValueError as error:
            raise SystemExit(f"{source}: {theirs[name]}: {error}") from None
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = to_halves(weight, config.head_dim)
        yield name, weight


def meta_name(name: str) -> str:
    for ours, theirs in META_NAMES.items():
        name = name.replace(ours, theirs)
    return name.removeprefix("model.")


def merge(parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """A weight of this shape out of its parts in Meta's shards. Raises ValueError where they do not fit.

    Meta's model parallelism deals out rows of q, k, v, gate, up and the head, columns of o and down,
    columns (width) of Llama 1's and 2's embedding and rows (vocabulary) of Llama 3's; norms are whole in
    every shard. The shape leaves one way to fit, so no table of names is needed.
    """
    sizes = {tuple(part.shape) for part in parts}
    if sizes == {shape} and all(torch.equal(part, parts[0]) for part in parts):
        return parts[0]
    for dim in range(len(shape)):
        rest = shape[:dim] + shape[dim + 1:]
        if ({size[:dim] + size[dim + 1:] for size in sizes} == {rest}
                and sum(part.shape[dim] for part in parts) == shape[dim]):
            return torch.cat(parts, dim)
    raise ValueError(f"shapes {[tuple(part.shape) for part in parts]} do not make {shape}")


def to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection, from Meta's order to Hugging Face's.

    Meta's rotary embedding turns neighbours (0, 1), (2, 3), ... of a head, Hugging Face's (model.rotate)
    turns i and i + h/2, by the same angle for the i-th pair. So the first of all pairs go to the first
    half of the head, the second ones behind them. Queries and keys are reordered alike, which leaves
    their products as they were; values are not rotated and stay.
    """
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])  # (heads, pair, first or second, D)
    return pairs.transpose(1, 2).reshape(weight.shape)


def copy_meta_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer, except for Llama 3's tokenizer.model, which is no sentencepiece model."""
    copy_tokenizer(source, target)
    path = target / "tokenizer.model"
    if path.is_file() and re.match(rb"[A-Za-z0-9+/]+=* \d+\n", path.read_bytes()[:200]):
        path.unlink()
        print("tokenizer.model is a tiktoken file (Llama 3), which cannot be read here, and was left out")
    if not path.is_file() and not (target / "tokenizer.json").is_file():
        print("there is no tokenizer yet: for Llama 1 and 2 add tokenizer.model, which Meta puts one directory up, "
              "for Llama 3 the tokenizer.json of its Hugging Face release")


def main() -> None:
    plain = dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(description=__doc__, **plain)
    commands = parser.add_subparsers(required=True, metavar="convert")
    command = commands.add_parser("convert", help="Meta's files -> a model directory; `convert --help` says more",
                                  description=inspect.cleandoc(convert.__doc__), **plain)
    command.add_argument("source", metavar="SRC", help="directory with consolidated.*.pth and params.json")
    command.add_argument("target", metavar="DST", help="model directory to write, which must not exist yet")
    command.add_argument("--max_positions", type=int, help="longest input of the model in tokens")
    command.add_argument("--rope_factor", type=float, help="factor of the rope scaling, for Llama 3.1 and later")
    convert(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
