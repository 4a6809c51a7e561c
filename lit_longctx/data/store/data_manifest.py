"""The manifest of a prepared data folder, typed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lit_longctx import manifest
from lit_longctx.data.tokens.info import TokenizerInfo


@dataclass(frozen=True)
class SplitInfo:
    """Token ledger of one split: `tokens` = text + boundary tokens + padding."""

    documents: int
    tokens: int
    text_tokens: int
    """Tokens of the documents' text."""
    boundary_tokens: int
    """BOS and EOS of the documents."""
    padding: int
    """BOS that fill the last block."""
    chunks: int
    """Chunk files."""
    lengths: list[list[int]]
    """Lower edge in tokens, documents and tokens of each length bucket."""
    largest_id: int | None = None
    """Largest token id; None in folders of earlier versions."""
    answer_tokens: int | None = None
    """Tokens that the assistant says; None where no conversations are stored."""

    def as_json(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds, how it was made, and its files with their hashes."""

    source: str
    """Name of the source in reports."""
    block: int
    """Tokens of a block; windows are multiples of it."""
    chunk_tokens: int
    """Tokens of a chunk file."""
    tokenizer: TokenizerInfo
    splits: Mapping[str, SplitInfo]
    files: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Bytes and SHA-256 by name below the folder; filled in when the manifest is written."""
    round_trip: float = 1.0
    """Share of the first texts that came back exactly from their ids."""
    part: tuple[int, int] = (0, 1)
    """Number of this part, and of how many."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What decided the documents' tokens and split."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Files taken and left."""
    broken: Mapping[str, Any] = field(default_factory=dict)
    """Documents that could not be read: count and first example, by kind."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    filter: Mapping[str, Any] | None = None
    """Report of the long-dependency filter; None if there was none."""
    chat: bool = False
    """Whether conversations are stored."""
    mixed: Mapping[str, Any] | None = None
    """Report of `mix`, in the folders that it makes."""
    format: int = 1
    hash: str = ""
    """Short hash of the manifest as it was stored; empty before."""

    @staticmethod
    def from_json(content: Mapping[str, Any], folder: Path | str) -> "Manifest":
        """Return the manifest of a data folder; ValueError names it if it is no such manifest."""
        known = {each.name for each in fields(Manifest)} - {"hash"}
        found = {name: value for name, value in content.items() if name in known}
        try:
            found["tokenizer"] = TokenizerInfo.from_json(content["tokenizer"])
            found["splits"] = {s: SplitInfo(**entry) for s, entry in content["splits"].items()}
            found["part"] = tuple(content.get("part", (0, 1)))
            return Manifest(**found, hash=manifest.short_hash(content))
        except (KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{folder} holds no prepared data: its {manifest.NAME} has other entries; "
                "make it with lit_longctx prepare"
            ) from None

    def as_json(self) -> dict[str, Any]:
        """Return the manifest as it is stored, without its files."""
        splits = {name: split.as_json() for name, split in self.splits.items()}
        found = {
            "format": self.format,
            "source": self.source,
            "block": self.block,
            "chunk_tokens": self.chunk_tokens,
            "tokenizer": self.tokenizer.as_json(),
            "round_trip": self.round_trip,
            "part": list(self.part),
            "settings": self.settings,
            "splits": splits,
            "inputs": self.inputs,
            "broken": self.broken,
            "notes": self.notes,
            "filter": self.filter,
            "chat": self.chat,
        }
        return found if self.mixed is None else {**found, "mixed": self.mixed}
