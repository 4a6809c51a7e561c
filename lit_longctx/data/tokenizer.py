"""Text ↔ token ids, such that no text can forge the token that begins a document."""

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

Ids = np.ndarray
"""One-dimensional array of token ids."""


class Tokenizer(ABC):
    """What the data side needs to know of a tokenizer."""

    vocab_size: int
    """Ids are below this."""
    bos: int
    """Id that begins every document."""
    eos: int
    """Id that ends every document."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, without BOS and EOS; special tokens in the text are plain text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens left out."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as Hugging Face reads them."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids: data and model must agree on it."""


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte, then BOS 256 and EOS 257; needs no file, knows every language."""

    vocab_size = 258
    bos = 256
    eos = 257

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """UTF-8 bytes of each text."""
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the bytes; invalid sequences become U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def save(self, folder: str | Path) -> None:
        """Write the same mapping as a byte-level BPE without merges, with ids equal to bytes."""
        self._as_bpe().save(str(Path(folder) / "tokenizer.json"))
        save_config(Path(folder), {}, "<bos>", "<eos>")

    def _as_bpe(self) -> tokenizers.Tokenizer:
        bpe = tokenizers.Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
        bpe.decoder = decoders.ByteLevel()  # pyright: ignore
        bpe.add_special_tokens(
            [AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)]
        )
        return bpe

    @property
    def fingerprint(self) -> str:
        """Constant: bytes do not change."""
        return "bytes-258"


def _byte_vocabulary() -> dict[str, int]:
    """The printable letter by which byte-level BPE writes each byte (GPT-2's table) → the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = iter(range(256, 512))
    return {chr(b if b in printable else next(others)): b for b in range(256)}


class JsonTokenizer(Tokenizer):
    """Any Hugging Face tokenizer.json; BOS and EOS from `bos`, `eos` or tokenizer_config.json."""

    def __init__(self, file: str | Path, bos: str | None = None, eos: str | None = None) -> None:
        self.file = Path(file)
        try:
            self.model = tokenizers.Tokenizer.from_file(str(self.file))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{self.file} is no tokenizer.json: {error}") from None
        # despite its name: encode special tokens *as text*, else "<s>" in a document becomes BOS
        self.model.encode_special_tokens = True
        self.model.no_padding()
        self.model.no_truncation()
        self.vocab_size = max(self.model.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_token, self.bos = self._special("bos", bos)
        self.eos_token, self.eos = self._special("eos", eos)

    def _config(self) -> dict[str, Any]:
        return read_config(self.file.with_name("tokenizer_config.json"))

    def _special(self, role: str, token: str | None) -> tuple[str, int]:
        token = _content(self._config().get(f"{role}_token")) if token is None else token
        if token is None:
            raise ValueError(
                f"{self.file.parent} names no {role.upper()} token; pass --{role} TOKEN"
            )
        number = self.model.token_to_id(token)
        if number is None:
            raise ValueError(f"{self.file} has no token {token!r} for {role.upper()}")
        return token, number

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text; the library spreads a batch over the processor's cores."""
        found = self.model.encode_batch_fast(list(texts), add_special_tokens=False)
        dtype = np.uint16 if self.vocab_size <= 2**16 else np.int32
        return [np.asarray(encoding.ids, dtype=dtype) for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens left out."""
        return self.model.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Copy tokenizer.json, and tokenizer_config.json with the BOS and EOS in use."""
        shutil.copyfile(self.file, Path(folder) / "tokenizer.json")
        save_config(Path(folder), self._config(), self.bos_token, self.eos_token)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tokenizer.json with BOS and EOS."""
        content = self.file.read_bytes() + f"\n{self.bos}\n{self.eos}".encode()
        return hashlib.sha256(content).hexdigest()


def read_config(file: Path) -> dict[str, Any]:
    """Return a tokenizer_config.json, {} if there is none; ValueError if it is broken."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no JSON object")
    return config


def save_config(folder: Path, config: dict[str, Any], bos: str, eos: str) -> None:
    """Write the tokenizer_config.json that transformers needs, naming BOS and EOS."""
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config = dict(config or plain)
    for role, token in (("bos_token", bos), ("eos_token", eos)):
        if _content(config.get(role)) != token:
            config[role] = token
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _content(token: str | dict[str, Any] | None) -> str | None:
    """Text of a special token, which a config may hold with its settings."""
    return token.get("content") if isinstance(token, dict) else token


def open_tokenizer(name: str, bos: str | None = None, eos: str | None = None) -> Tokenizer:
    """Return the tokenizer of that name: `bytes`, a tokenizer.json, or a folder that holds one."""
    if name == "bytes":
        if bos or eos:
            raise ValueError("tokenizer 'bytes' has its own BOS and EOS; leave --bos and --eos out")
        return ByteTokenizer()
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"tokenizer {name!r} not found; expected 'bytes', a tokenizer.json or its folder"
        )
    if not (bos or eos) and _is_bytes(file):
        return ByteTokenizer()
    return JsonTokenizer(file, bos, eos)


def _is_bytes(file: Path) -> bool:
    """Whether a tokenizer.json is the one that ByteTokenizer writes."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        model, added = found["model"], [token["content"] for token in found["added_tokens"]]
        same = model["vocab"] == _byte_vocabulary() and not model["merges"]
        return same and added == ["<bos>", "<eos>"] and found["normalizer"] is None
    except (ValueError, KeyError, TypeError):
        return False
