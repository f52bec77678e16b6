"""Text <-> token ids: `tokenizer.model` with sentencepiece, `tokenizer.json` with tokenizers (optional).

`encode` adds no special tokens and recognises none: "</s>" in a question is just characters. (Tokens that a
tokenizer.json adds without marking them as special, such as Qwen's <tool_call>, count as ordinary words.) BOS and EOS
are added in one place, data/prompts.py.
"""
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece


class SentencePieceTokenizer:
    """A `tokenizer.model` file: Llama 1 and 2, CodeLlama, TinyLlama, Mistral, and the toy world's own."""
    begins_with_space = True

    def __init__(self, path: Path) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.bos_id: int | None = self.processor.bos_id()
        if self.bos_id < 0 or settings(path).get("add_bos_token") is False:
            self.bos_id = None
        self.eos_id = self.processor.eos_id()
        self.vocab_size = self.processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Return the text without special tokens, and without ids that exist only in a padded embedding."""
        return self.processor.decode([token for token in ids if token < self.vocab_size])


class JsonTokenizer:
    """A `tokenizer.json` file: Llama 3, Qwen2, SmolLM2. It has a BOS if its own template begins with one."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise SystemExit(f"{path} needs a package that is not installed: pip install tokenizers") from None
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises no narrower one
            raise SystemExit(f"{path} is not a complete tokenizer: {error}") from None
        self.tokenizer.encode_special_tokens = True  # a special token's name in a text is text
        self.tokenizer.no_truncation()
        self.vocab_size = self.tokenizer.get_vocab_size()

        eos = settings(path).get("eos_token")
        eos = eos["content"] if isinstance(eos, dict) else eos
        self.eos_id = self.tokenizer.token_to_id(eos or "")
        if self.eos_id is None:
            raise SystemExit(f"{path.with_name('tokenizer_config.json')} names no eos_token of {path.name} "
                             f"(eos_token is {eos!r}): copy that file from the model's source")
        template = self.tokenizer.encode("").ids  # the special tokens that are put around an empty text
        self.bos_id = template[0] if template and template[0] != self.eos_id else None
        first = self.tokenizer.encode("a", add_special_tokens=False).tokens[0]
        self.begins_with_space = first.startswith(("▁", "Ġ"))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Return the text without special tokens."""
        return self.tokenizer.decode(ids)


def settings(path: Path) -> dict:
    """Read the tokenizer_config.json next to a tokenizer's file; {} if there is none."""
    config = path.with_name("tokenizer_config.json")
    try:
        return json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except ValueError as error:
        raise SystemExit(f"{config} cannot be read: {error}") from None


def load_tokenizer(directory: str | Path) -> SentencePieceTokenizer | JsonTokenizer:
    """Load the tokenizer of a model directory; `tokenizer.model` comes first where both files exist."""
    path, json_path = (Path(directory) / name for name in ("tokenizer.model", "tokenizer.json"))
    if path.is_file():
        try:
            return SentencePieceTokenizer(path)
        except RuntimeError as error:  # Llama 3 ships another format under this name
            if not json_path.is_file():
                raise SystemExit(f"{path} is not a sentencepiece model ({error}): put the model's tokenizer.json "
                                 "next to it") from None
    if json_path.is_file():
        return JsonTokenizer(json_path)
    raise SystemExit(f"{directory} has no tokenizer.model and no tokenizer.json: give a directory with config.json, "
                     "weights and tokenizer, such as `make base` writes")


def pieces(tokenizer, ids: Iterable[int]) -> Iterator[tuple[int, str]]:
    """Yield each token with the text it adds. A character that spans several tokens is yielded with the last one."""
    seen, shown = [], ""
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)
        complete = not text.endswith("\N{REPLACEMENT CHARACTER}")
        yield token, text[len(shown):] if complete else ""
        shown = text if complete else shown


def train_tokenizer(texts: list[str], directory: str | Path, vocab_size: int, symbols: list[str]) -> None:
    """Train a byte-pair tokenizer in which each of `symbols` is always a token of its own."""
    path = Path(directory) / "tokenizer.model"
    with open(f"{path}.tmp", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, model_type="bpe", vocab_size=vocab_size,
            hard_vocab_limit=False, user_defined_symbols=symbols, normalization_rule_name="identity",
            remove_extra_whitespaces=False, character_coverage=1.0, num_threads=1, minloglevel=2)
    os.replace(f"{path}.tmp", path)
