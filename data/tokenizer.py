"""Text <-> token ids: `tokenizer.model` with sentencepiece, `tokenizer.json` with tokenizers (optional).

`encode` adds no special tokens and recognises none: "</s>" in a question is just characters. (Tokens that a
tokenizer.json adds without marking them as special, such as Qwen's <tool_call>, count as ordinary words.) BOS and EOS
are added in one place, data/prompts.py. A response ends with any token that one of the directory's files declares.
"""
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import sentencepiece

from checkpoint import read_object
from infra import InputError

APART = "\ufdd0"  # a character that no text has: text behind it is encoded as text that follows other tokens


class SentencePieceTokenizer:
    """A `tokenizer.model` file: Llama 1 and 2, CodeLlama, TinyLlama, Mistral, and the toy world's own."""

    def __init__(self, path: Path) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self.processor.vocab_size()
        self.bos_id: int | None = self.processor.bos_id()
        if self.bos_id < 0 or read_object(path.with_name("tokenizer_config.json"), {}).get("add_bos_token") is False:
            self.bos_id = None
        names = {self.processor.id_to_piece(i): i for i in range(self.vocab_size)}
        self.eos_ids, self.eos_note = end_tokens(path, names.get, self.processor.eos_id())
        self.eos_id = self.eos_ids[0]
        self.begins_with_space = self.processor.encode("a", out_type=str)[0].startswith("▁")
        control = {name: i for name, i in names.items() if self.processor.is_control(i)}
        self.chat_template, self.named, self.specials = chat_settings(path, self, control | added_tokens(path))

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def encode_after(self, token: int, text: str) -> list[int]:
        """Encode text that follows a token (-1: any): sentencepiece's first space comes only behind BOS."""
        if token == self.bos_id:
            return self.encode(text)
        return self.encode(APART + text)[len(self.encode(APART)):]

    def decode(self, ids: list[int]) -> str:
        """Return the text without special tokens, and without ids that exist only in a padded embedding."""
        return self.processor.decode([token for token in ids if token < self.vocab_size])


class JsonTokenizer:
    """A `tokenizer.json` file: Llama 3, Qwen2, SmolLM2. It has a BOS if its own template begins with one."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise InputError(f"{path} needs a package that is not installed: pip install tokenizers") from None
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises no narrower one
            raise InputError(f"{path} is not a complete tokenizer: {error}") from None
        self.tokenizer.encode_special_tokens = True  # a special token's name in a text is text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.eos_ids, self.eos_note = end_tokens(path, self.tokenizer.token_to_id)
        self.eos_id = self.eos_ids[0]
        templated, bare = (self.tokenizer.encode("a", add_special_tokens=added) for added in (True, False))
        self.bos_id = templated.ids[0] if templated.special_tokens_mask[:1] == [1] else None
        self.begins_with_space = "".join(bare.tokens).startswith(("▁", "Ġ"))
        added = self.tokenizer.get_added_tokens_decoder()
        self.chat_template, self.named, self.specials = chat_settings(
            path, self, {token.content: i for i, token in added.items() if token.special})
        self.anchored = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        self.anchored.encode_special_tokens = True
        self.anchored.add_tokens([tokenizers.AddedToken(APART, normalized=False)])

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_after(self, token: int, text: str) -> list[int]:
        """Encode text that follows a token, whichever it is."""
        return self.anchored.encode(APART + text, add_special_tokens=False).ids[1:]

    def decode(self, ids: list[int]) -> str:
        """Return the text without special tokens."""
        return self.tokenizer.decode(ids)


def end_tokens(path: Path, token_id: Callable[[str], int | None], own: int = -1) -> tuple[tuple[int, ...], str]:
    """Collect the ids of all tokens that end a response, and a note that names the files if these disagree.

    The first id also ends what is written for training: it is that of the tokenizer's settings, or else its `own`.
    config.json and generation_config.json often list more, such as the end of a turn. InputError for a token that the
    tokenizer does not have, and where none is declared.
    """
    def read(name: str) -> dict:
        return read_object(path.with_name(name), {})

    found = {}
    declared = {**{name: read(name).get("eos_token") for name in ("tokenizer_config.json", "special_tokens_map.json")},
                path.name: None if own < 0 else own,
                **{name: read(name).get("eos_token_id") for name in ("generation_config.json", "config.json")}}
    try:
        added = added_tokens(path)
        for name, tokens in declared.items():
            for token in tokens if isinstance(tokens, list) else [tokens]:
                if token is None:
                    continue
                text = token["content"] if isinstance(token, dict) else token
                number = added.get(text, token_id(text)) if isinstance(text, str) else text
                if type(number) is not int or not 0 <= number < 2**31:
                    raise ValueError(f"{name} declares the end token {text!r}, which {path.name} does not have")
                found.setdefault(name, []).append(number)
        if not found:
            raise ValueError("no file declares an end token (eos_token)")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path.parent}: {error}. Copy all files of the tokenizer from the model's source") from None
    note = "; ".join(f"{name} declares {', '.join(map(str, numbers))}" for name, numbers in found.items())
    ids = dict.fromkeys(number for numbers in found.values() for number in numbers)
    return tuple(ids), note if len({*map(frozenset, found.values())}) > 1 else ""


def added_tokens(path: Path) -> dict[str, int]:
    """Collect the tokens that files next to a tokenizer's add to it."""
    listed = read_object(path.with_name("tokenizer.json"), {}).get("added_tokens") or []
    decoder = read_object(path.with_name("tokenizer_config.json"), {}).get("added_tokens_decoder") or {}
    found = {token["content"]: token["id"] for token in listed} | read_object(path.with_name("added_tokens.json"), {})
    return found | {token["content"]: int(number) for number, token in decoder.items()}


def chat_settings(path: Path, tokenizer, specials: dict[str, int]) -> tuple[str, dict[str, str], dict[str, int]]:
    """Return the model's chat template ("": none), the names that it may use for special tokens, and these."""
    settings = {}
    for name in ("special_tokens_map.json", "chat_template.json", "tokenizer_config.json"):
        settings |= read_object(path.with_name(name), {})
    named = {f"{kind}_token": name for name, i in specials.items()
             for kind in ("bos", "eos") if i == getattr(tokenizer, f"{kind}_id")}
    for kind, token in settings.items():
        if re.fullmatch("(bos|eos|unk|pad|sep|cls|mask)_token", kind) and token:
            named[kind] = token.get("content", "") if isinstance(token, dict) else token
    template, own = settings.get("chat_template") or "", path.with_name("chat_template.jinja")
    try:
        if own.is_file():
            template = own.read_text(encoding="utf-8")
        elif isinstance(template, list):  # several under names
            template = {one["name"]: one["template"] for one in template}.get("default", "")
        if not isinstance(template, str):
            raise ValueError(f"it is {template!r}, not a text")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path.parent}: the chat template cannot be read: {error}") from None
    return template, named, specials


def load_tokenizer(directory: str | Path) -> SentencePieceTokenizer | JsonTokenizer:
    """Load the tokenizer of a model directory; `tokenizer.model` comes first where both files exist."""
    path, json_path = (Path(directory) / name for name in ("tokenizer.model", "tokenizer.json"))
    if path.is_file():
        try:
            return SentencePieceTokenizer(path)
        except RuntimeError as error:  # Llama 3 ships another format under this name
            if not json_path.is_file():
                raise InputError(f"{path} is not a sentencepiece model ({error}): put the model's tokenizer.json "
                                 "next to it") from None
    if json_path.is_file():
        return JsonTokenizer(json_path)
    if not path.parent.is_dir():
        raise InputError(f"{directory}: there is no such directory")
    raise InputError(f"{directory} has no tokenizer.model and no tokenizer.json: give a directory with config.json, "
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
    try:
        with open(f"{path}.tmp", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=file, model_type="bpe", vocab_size=vocab_size,
                hard_vocab_limit=False, user_defined_symbols=symbols, normalization_rule_name="identity",
                remove_extra_whitespaces=False, character_coverage=1.0, max_sentence_length=2**30, num_threads=1,
                minloglevel=2)
    except RuntimeError as error:  # such as fewer tokens than characters
        raise InputError(f"--vocab_size {vocab_size}: no tokenizer can be made of these texts: {error}") from None
    os.replace(f"{path}.tmp", path)
