"""Text <-> token ids with sentencepiece. Specials are never written in text: see `data.encode_prompt`."""
import os
from pathlib import Path

import sentencepiece


class Tokenizer:
    """A `tokenizer.model` file. `encode` adds no special tokens and interprets none in the text."""

    def __init__(self, path: Path) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.bos_id, self.eos_id = self.processor.bos_id(), self.processor.eos_id()
        self.vocab_size = self.processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens."""
        return self.processor.decode(ids)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a model directory."""
    path = Path(directory) / "tokenizer.model"
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: --model takes a directory with config.json, "
                         "weights and tokenizer.model, such as `make base` writes")
    return Tokenizer(path)


def train_tokenizer(texts: list[str], directory: str | Path, vocab_size: int,
                    symbols: list[str]) -> None:
    """Learn a byte-pair tokenizer in which each of `symbols` is one token wherever it stands."""
    path = Path(directory) / "tokenizer.model"
    with open(f"{path}.tmp", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, model_type="bpe",
            vocab_size=vocab_size, hard_vocab_limit=False, user_defined_symbols=symbols,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            character_coverage=1.0, num_threads=1, minloglevel=2)
    os.replace(f"{path}.tmp", path)
