"""Model directories in Hugging Face's layout: config.json, model.safetensors, tokenizer.model.

What is written here loads in transformers, vLLM and lm-eval as it is. Nothing is ever unpickled.
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


def load_config(directory: Path) -> ModelConfig:
    """The ModelConfig in a directory's config.json."""
    path = directory / "config.json"
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: give a directory with config.json and weights")
    raw = json.loads(path.read_text())
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
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True)


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
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
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
