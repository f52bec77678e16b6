"""A new tokenizer and fresh weights for the texts that a model will be trained on."""
import math
from pathlib import Path

import torch

from checkpoint import save_model
from data.tokenizer import load_tokenizer, train_tokenizer
from data.toy import SYMBOLS
from infra.parallel import barrier, by_first
from model import Llama, ModelConfig


HEADS = 8  # and norms on queries and keys (Qwen3): both make a model learn early to look things up (docs/toy-world.md)


def fresh_model(texts: list[str], folder: Path, vocab_size: int, hidden_size: int, num_layers: int, max_positions: int,
                seed: int) -> str:
    """Make a model directory, unless it is complete; return its name."""
    if by_first((folder / "config.json").exists):  # save_model puts it here with the finished weights
        return str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    by_first(lambda: train_tokenizer([text.replace("\n", " ") for text in texts], folder, vocab_size, SYMBOLS))
    shape = ModelConfig(vocab_size=load_tokenizer(folder).vocab_size, hidden_size=hidden_size,
                        intermediate_size=8 * hidden_size // 3 // 8 * 8, num_hidden_layers=num_layers,
                        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=hidden_size // HEADS,
                        max_position_embeddings=max_positions, qk_norm=True)
    barrier()  # save_model will replace the folder
    save_model(initialize(Llama(shape), seed, std=0.08), folder, source=folder)
    return str(folder)


@torch.no_grad()
def initialize(model: Llama, seed: int, std: float = 0.02) -> Llama:
    """Draw fresh weights: normal, divided by sqrt(2 * layers) where a block writes its output."""
    generator = torch.Generator().manual_seed(seed)
    residual = std / math.sqrt(2 * model.config.num_hidden_layers)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            weight.normal_(0, residual if writes else std, generator=generator)
        elif name.endswith("q_norm.weight"):
            weight.fill_(2)  # attention is sharper from the start, and look-ups are learnt earlier
        elif name.endswith("bias"):
            weight.zero_()
    return model
