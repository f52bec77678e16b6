"""Convert a Llama as Meta distributes it (consolidated.NN.pth, params.json, tokenizer.model) to a model directory.

Merges the shards of model parallelism and reorders the rows of the query and key projections for Hugging Face's rotary
embedding; dtypes stay. Weights are mapped and written one file at a time, so about 4 GB of memory are needed. Only
plain tensors are read: a .pth file is a pickle, which can run code. DST appears once it is complete.

    python -m tools.convert_meta SRC DST
"""
import argparse
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from checkpoint import TOKENIZER_FILES, config_json, write_weights
from infra.run import read_json, run_script, write_json
from model import Llama, ModelConfig

NAMES = {  # part of a name here -> part of Meta's name
    "embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3", "model.": ""}
PARAMS = {"dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "rope_theta", "use_scaled_rope", "vocab_size",
          "multiple_of", "ffn_dim_multiplier", "max_batch_size", "max_seq_len"}
POSITIONS = {10000: 4096, 1000000: 16384, 500000: 8192}  # by rope_theta: Llama 2, CodeLlama, Llama 3


def convert(source: Path, target: Path) -> None:
    if target.exists():
        raise SystemExit(f"{target} exists: name a new directory")
    count = max(1, len(list(source.glob("consolidated.*.pth"))))
    shards = [load_shard(source / f"consolidated.{i:02}.pth") for i in range(count)]
    config = model_config(source / "params.json", shards)
    raw = config_json(config, shards[0]["tok_embeddings.weight"].dtype)
    if config.vocab_size == 128256:  # Llama 3; an instruct model's end tokens are in its tokenizer's files
        raw |= {"bos_token_id": 128000, "eos_token_id": 128001}

    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as folder:
        unfinished = Path(folder) / "model"
        unfinished.mkdir()
        write_weights(merged_weights(source, config, shards), unfinished)
        write_json(unfinished / "config.json", raw)
        copy_tokenizer(source, unfinished)
        unfinished.rename(target)
    print(f"{target} is written. params.json states neither max_position_embeddings ({config.max_position_embeddings}) "
          f"nor rope_scaling ({config.rope_scaling}): they are those of Meta's own model with the same rope_theta. "
          "For another model correct them in config.json")


def load_shard(path: Path) -> dict[str, Tensor]:
    """Map the tensors of one file, without reading them."""
    try:
        return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # of several types, all of which mean this
        raise SystemExit(f"{path} is missing, cut off, or holds more than plain tensors (nothing else is unpickled): "
                         f"{str(error).splitlines()[0]}") from None


def model_config(path: Path, shards: list[dict[str, Tensor]]) -> ModelConfig:
    params = read_json(path)
    if unknown := sorted(set(params) - PARAMS):
        raise SystemExit(f"{path}: not supported: {', '.join(unknown)}")
    try:
        D, H, layers, eps = (params[name] for name in ("dim", "n_heads", "n_layers", "norm_eps"))
        embedding, gate = (shards[0][name] for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"))
    except KeyError as error:
        raise SystemExit(f"{path.parent} is not a Llama of Meta's: there is no {error}") from None

    # vocab_size is -1 in old files and a width has several formulas: the tensors tell, whichever way they are split
    vocabulary, width = (weight.numel() * len(shards) // D for weight in (embedding, gate))
    head = shards[0].get("output.weight")  # models with a tied one (Llama 3.2) come as one shard
    tied = head is None or len(shards) == 1 and torch.equal(head, embedding)
    theta, scaling = params.get("rope_theta", 10000.0), None
    positions = POSITIONS.get(theta, 4096) if eps >= 1e-5 else 2048  # Llama 1; its 65B looks like a Llama 2
    if params.get("use_scaled_rope"):
        positions, factor = 131072, 32.0 if tied else 8.0  # Llama 3.2; 3.1 and 3.3
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192}
    return ModelConfig(vocabulary, D, width, layers, H, params.get("n_kv_heads") or H, D // H, positions, eps, theta,
                       scaling, tied)


def merged_weights(source: Path, config: ModelConfig, shards: list[dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights one by one, under Hugging Face's names and in its order of rows."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Llama(config).named_parameters()}
    theirs = {name: re.sub("|".join(map(re.escape, NAMES)), lambda part: NAMES[part[0]], name) for name in shapes}
    for i, shard in enumerate(shards):
        if wrong := sorted((set(theirs.values()) ^ shard.keys()) - {"rope.freqs", "output.weight"}):
            raise SystemExit(f"{source}/consolidated.{i:02}.pth: missing or unexpected: {', '.join(wrong[:4])}")

    for name, shape in shapes.items():
        weight = merge([shard[theirs[name]] for shard in shards], shape, f"{source}: {theirs[name]}")
        yield name, to_halves(weight, config.head_dim) if name.endswith(("q_proj.weight", "k_proj.weight")) else weight


def merge(parts: list[Tensor], shape: torch.Size, label: str) -> Tensor:
    """Put a weight of this shape together from its parts in Meta's shards.

    Norms are complete in every shard. Of matrices, rows are dealt out (q, k, v, gate, up, head, Llama 3's embedding) or
    columns (o, down, the embedding of Llama 1 and 2): the shape leaves one way to fit.
    """
    if parts[0].shape == shape and all(torch.equal(part, parts[0]) for part in parts):
        return parts[0]
    for dim in range(len(shape)):
        wanted = torch.Size([*shape[:dim], shape[dim] // len(parts), *shape[dim + 1:]])
        if shape[dim] % len(parts) == 0 and all(part.shape == wanted for part in parts):
            return torch.cat(parts, dim)
    raise SystemExit(f"{label}: shapes {[tuple(part.shape) for part in parts]} do not make {tuple(shape)}")


def to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of a query or key projection from Meta's order to Hugging Face's.

    Meta rotates neighbours (0, 1), (2, 3), ... of a head, model.rotate i and i + h/2, by the same angle for the i-th
    pair. So the first of all pairs go to the first half of the head. Products of queries and keys stay as they were.
    """
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])  # (heads, pair, first or second, D)
    return pairs.transpose(1, 2).reshape(weight.shape)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer, except Llama 3's tokenizer.model: a tiktoken file, which cannot be read here."""
    for path in (source / name for name in TOKENIZER_FILES):
        if path.is_file() and not re.match(rb"[A-Za-z0-9+/]+=* \d+\n", path.read_bytes()[:200]):
            shutil.copyfile(path, target / path.name)
    if not (target / "tokenizer.model").exists() and not (target / "tokenizer.json").exists():
        print("there is no tokenizer yet: for Llama 1 and 2 add tokenizer.model, which Meta puts one directory up, for "
              "Llama 3 the tokenizer.json of its Hugging Face release")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", type=Path, help="directory with consolidated.*.pth and params.json")
    parser.add_argument("target", metavar="DST", type=Path, help="model directory to write; must not exist yet")
    convert(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_script(main)
