"""Text ↔ token ids, such that no text can forge the token that begins a document."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from lit_longctx.data.tokens.special_tokens import (
    FAST,
    BosRule,
    save_config,
)

Ids = np.ndarray
"""One-dimensional array of token ids."""


class Tokenizer(ABC):
    """What the data side needs to know of a tokenizer."""

    vocab_size: int
    """Ids are below this."""
    bos: int
    """Id that begins documents and prompts, if `adds_bos`."""
    eos: int
    """Id that ends every document."""
    bos_token: str
    """Text of BOS."""
    eos_token: str
    """Text of EOS."""
    bos_rule: BosRule = BosRule(True, "the tokenizer")
    """Whether documents and prompts begin with BOS."""
    sources: Mapping[str, str] = MappingProxyType({"bos": "bytes", "eos": "bytes"})
    """Who named BOS and EOS, for reports."""

    @property
    def prefix(self) -> list[int]:
        """What documents and prompts begin with: BOS, or nothing."""
        return [self.bos] if self.bos_rule.added else []

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, without BOS and EOS; special tokens in the text are plain text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens left out."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write the tokenizer and tokenizer_config.json, as Hugging Face reads them."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids: data and model must agree on it."""


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte, then BOS 256 and EOS 257; needs no file, knows every language."""

    vocab_size = 258
    bos, bos_token = 256, "<bos>"
    eos, eos_token = 257, "<eos>"

    def __init__(self, rule: BosRule | None = None) -> None:
        self.bos_rule = rule or BosRule(True, "as bytes do")

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """UTF-8 bytes of each text."""
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the bytes; invalid sequences become U+FFFD."""
        found = np.asarray(ids, dtype=np.int64)
        return found[found < 256].astype(np.uint8).tobytes().decode(errors="replace")

    def save(self, folder: str | Path) -> None:
        """Write the same mapping as a byte-level BPE without merges, with ids equal to bytes."""
        bpe = self.as_bpe()
        bpe.post_processor = begun_by(self).post_processor
        bpe.save(str(Path(folder) / "tokenizer.json"))
        save_config(Path(folder), FAST, "<bos>", "<eos>")

    def as_bpe(self) -> tokenizers.Tokenizer:
        """Return the same as a tokenizer.json would hold it: byte-level BPE without merges."""
        bpe = tokenizers.Tokenizer(models.BPE(vocab=byte_vocabulary(), merges=[]))
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


def byte_vocabulary() -> dict[str, int]:
    """The printable letter by which byte-level BPE writes each byte (GPT-2's table) → the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = iter(range(256, 512))
    return {chr(b if b in printable else next(others)): b for b in range(256)}


def begun_by(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Return an empty tokenizer whose post-processor begins texts as the given one does."""
    begin = f"{tokenizer.bos_token} " * len(tokenizer.prefix)
    found = tokenizers.Tokenizer(models.BPE())
    found.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single=f"{begin}$A",
        pair=f"{begin}$A {begin}$B",
        special_tokens=[(tokenizer.bos_token, tokenizer.bos)] if begin else [],
    )
    return found
