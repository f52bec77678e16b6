"""Model directories in Hugging Face's layout: config.json, model.safetensors, tokenizer.model.

A Llama written here loads in transformers as it is. Nothing is ever unpickled.
"""
import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from model import Llama, ModelConfig

MODEL_TYPES = ("llama", "mistral", "qwen2")


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_config(directory: Path) -> ModelConfig:
    """The ModelConfig in a directory's config.json."""
    path = directory / "config.json"
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: give a directory with config.json and weights")
    raw = json.loads(path.read_text())
    if raw.get("model_type") not in MODEL_TYPES:
        raise SystemExit(f"{path}: model_type is {raw.get('model_type')!r}, and only "
                         f"{', '.join(MODEL_TYPES)} can be loaded")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5 or 4
    raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise SystemExit(f"{path}: rope type {rope_type!r} is not supported, only default and llama3")
    raw["rope_scaling"] = rope if rope_type == "llama3" else None
    raw.setdefault("attention_bias", raw["model_type"] == "qwen2")
    raw.setdefault("num_key_value_heads", raw["num_attention_heads"])
    raw["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    return ModelConfig(**{name: raw[name] for name in names if name in raw})


def load_model(directory: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Llama:
    """The model of a directory, its weights in one file or in shards with an index."""
    directory = Path(directory)
    config = load_config(directory)
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise SystemExit(f"{directory} has no model*.safetensors")
    with torch.device("meta"):
        model = Llama(config)
    weights = {}
    for file in files:
        weights |= load_file(file, device=device)
    weights = {name: weight.to(dtype) for name, weight in weights.items()
               if not name.endswith("rotary_emb.inv_freq")}  # a table that old files carry
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True)


def load_sampler(directory: str | Path) -> Llama:
    """A model to sample from: bfloat16 on a GPU, float32 on a CPU."""
    return load_model(directory, device(), torch.bfloat16 if device() == "cuda" else torch.float32)


def save_model(model: Llama, directory: str | Path, tokenizer_from: str | Path | None = None) -> None:
    """Write a model directory, whole or not at all; the tokenizer is copied from another one."""
    directory = Path(directory)
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
    family = "Qwen2" if model.config.attention_bias else "Llama"  # Llama's bias is on o_proj too
    config = {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower(),
              "hidden_act": "silu",
              "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
              **dataclasses.asdict(model.config)}
    (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if tokenizer_from is not None:
        shutil.copy(Path(tokenizer_from) / "tokenizer.model", temporary)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(temporary, directory)


def weights_hash(model: Llama) -> str:
    """SHA-256 over names and values of all parameters: which model a stored number belongs to."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
