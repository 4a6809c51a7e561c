"""Windows of packed items in MosaicML's MDS shards, such as ProLong's data (Gao et al. 2024).

litdata 0.2.76 reads MDS only where shards are compressed by `zstd` without a level, and has no
`ndarray` columns, which token ids are; so the shards are read here, by the published format:
number of items, where each begins and the last ends (uint32), the columns' description, the items.
"""

import json
from collections import Counter
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from lit_longctx import manifest
from lit_longctx.batch import NO_TARGET
from lit_longctx.data.store.remote import (
    LocalFiles,
    RemoteFiles,
    connect,
    fetch_text,
    fingerprint,
    is_remote,
)
from lit_longctx.data.store.storage import ObjectStorage
from lit_longctx.data.store.windows import Maps, Windows
from lit_longctx.data.tokens.info import TokenizerInfo
from lit_longctx.json_file import object_in

INDEX = "index.json"
DTYPES = {8: "u1", 9: "i1", 16: "u2", 17: "i2", 32: "u4", 33: "i4", 64: "u8", 65: "i8"}
"""MDS's codes of whole-number types, where a column leaves the type to each item."""


class MDSWindows:
    """Windows of `length` tokens cut from packed items; [i] gives tokens and where documents start.

    Documents begin at an item's spans (`indices`); without them an item is one document, as in
    ProLong's training code. Where an item has a `mask`, as ProLong's fine-tuning data, tokens of
    mask 0 are no targets. The last target of an item is padding, since no token follows it. An item
    is 4 bytes per token; a window costs the decoding of its item, about 0.1 ms at 64K.

    Args:
        folder: Folder or URL with an MDS index.
        split: `train` is the folder; there is nothing else.
        length: Tokens per window, at most those of an item.
        tokenizer: Ids that the folder was tokenised with: bos, eos, vocab_size, fingerprint.
        storage: Cache and access; shards compressed on disk are kept in it, unpacked.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        length: int,
        tokenizer: TokenizerInfo,
        storage: ObjectStorage = ObjectStorage(),
    ) -> None:
        self.folder, self.split, self.length = folder, split, length
        self.storage = storage
        index, self.files = open_shards(folder, storage)
        self.key = fingerprint([str(folder), index])
        self.content_hash = fingerprint(index)
        self.shards: list[dict[str, Any]] = index["shards"] if split == "train" else []
        self.ends = np.cumsum([shard["samples"] for shard in self.shards], dtype=np.int64)
        self._masked = any("mask" in shard["column_names"] for shard in self.shards)
        self._maps: Maps | None = None
        first = self._columns(0) if self.shards else {}
        self.item_tokens = len(first["input_ids"]) if self.shards else length
        if not 1 <= length <= self.item_tokens:
            raise ValueError(
                f"window {length} does not fit {folder}, packed to {self.item_tokens} tokens; "
                f"set a window of {self.item_tokens} or less"
            )
        items = self.shards[0]["samples"] if self.shards else 1
        used = self.item_tokens // length * length
        self.tokenizer = tokenizer
        """What the folder was tokenised with; which ids are in use, it does not say."""
        self.chunk_tokens = items * used
        """Tokens of a shard that are shuffled together."""

    @property
    def items(self) -> int:
        """Packed items."""
        return int(self.ends[-1]) if self.shards else 0

    @property
    def tokens(self) -> int:
        """All tokens stored."""
        return self.items * self.item_tokens

    @property
    def fetches(self) -> Counter[str]:
        """How often this process asked for each file over the network."""
        return self.files.fetches

    @property
    def dropped(self) -> int:
        """Tokens at the end of items that fill no window."""
        return self.tokens - len(self) * self.length

    def __len__(self) -> int:
        return self.items * (self.item_tokens // self.length)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `length` + 1 tokens, padding as −100, and True where a document starts."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        number, place = divmod(index, self.item_tokens // self.length)
        tokens, starts = self._item(number)
        begin = place * self.length
        return tokens[begin : begin + self.length + 1], starts[begin : begin + self.length + 1]

    def targets(self, index: int) -> np.ndarray | None:
        """Return which tokens of a window may be targets by the column `mask`, if there is one."""
        if not self._masked:  # before an item is decoded a second time
            return None
        number, place = divmod(index, self.item_tokens // self.length)
        if (mask := self._columns(number).get("mask")) is None:
            return None
        begin = place * self.length
        found = np.append(np.asarray(mask) != 0, False)
        return found[begin : begin + self.length + 1]

    def document_lengths(self) -> np.ndarray:
        """Refuse: the documents are packed already."""
        raise ValueError(f"{self.folder} is packed already; set packing to concatenate")

    def _item(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of an item and one of padding, and where its documents start."""
        columns = self._columns(number)
        ids = columns["input_ids"]
        if len(ids) != self.item_tokens:
            raise ValueError(
                f"item {number} of {self.folder} has {len(ids)} tokens, the first "
                f"{self.item_tokens}; pack all to one length"
            )
        tokens = np.full(len(ids) + 1, NO_TARGET, dtype=np.int64)
        starts = np.zeros(len(ids) + 1, dtype=bool)
        if "indices" in columns:
            for begin, end in np.asarray(columns["indices"]).reshape(-1, 2).tolist():
                tokens[begin:end] = ids[begin:end]
                starts[begin] = True
        else:
            tokens[:-1] = ids
            starts[0] = True
        return tokens, starts

    def _columns(self, number: int) -> dict[str, np.ndarray]:
        chosen = int(np.searchsorted(self.ends, number, side="right"))
        shard = self.shards[chosen]
        row = number - int(self.ends[chosen]) + shard["samples"]
        if self._maps is None:
            self._maps = Maps(self._open)
        content = self._maps(str(chosen))
        begin, end = np.frombuffer(content, np.uint32, 2, offset=4 * (1 + row)).tolist()
        return decode(content[begin:end], shard)

    def _open(self, name: str) -> BufferedReader:
        """Open a shard by number, unpacked."""
        shard = self.shards[int(name)]
        raw, packed = shard["raw_data"], shard["zip_data"]
        if not shard["compression"]:
            return self.files.open(raw["basename"])
        key = f"{self.key}/{raw['basename']}"
        if file := self.storage.find(key):
            return file
        with self.files.open(packed["basename"]) as source:
            return self.storage.open(key, raw["bytes"], lambda part: unpack(source, part))

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind when a loader worker copies this."""
        return {**self.__dict__, "_maps": None}


def open_windows(
    folder: str | Path,
    split: str,
    length: int,
    storage: ObjectStorage = ObjectStorage(),
    tokenizer: TokenizerInfo | None = None,
) -> Windows | MDSWindows:
    """Return windows of a prepared folder or, where `tokenizer` is given, of an MDS folder."""
    if tokenizer is not None:
        return MDSWindows(folder, split, length, tokenizer, storage)
    if not is_remote(folder) and (Path(folder) / INDEX).is_file():
        raise ValueError(f"{folder} is an MDS folder, which does not say its tokenizer; name it")
    return Windows(folder, split, length, storage)


def open_shards(
    folder: str | Path, storage: ObjectStorage
) -> tuple[dict[str, Any], LocalFiles | RemoteFiles]:
    """Return the index of an MDS folder, on disk or at a URL, and its files."""
    url = str(folder).rstrip("/") if is_remote(folder) else None
    connection = connect(url, storage) if url else None
    text = fetch_text(connection, f"{url}/{INDEX}") if connection else _read(folder)
    index = object_in(text, f"{folder}/{INDEX}")
    if index.get("version") != 2 or not index.get("shards"):
        raise ValueError(f"{folder}/{INDEX} describes no MDS shards of version 2")
    try:
        entries = _entries(folder, index["shards"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}/{INDEX} describes no MDS shards: {error!r}") from None
    _announce(str(folder))
    if url:
        return index, RemoteFiles(url, entries, fingerprint([url, index]), storage, connection)
    return index, LocalFiles(Path(folder), entries)


def _read(folder: str | Path) -> str:
    if not (Path(folder) / INDEX).is_file():
        raise ValueError(f"{folder} is no MDS folder: it has no {INDEX}")
    return (Path(folder) / INDEX).read_text()


def _entries(folder: str | Path, shards: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the size of every stored file by its name."""
    for shard in shards:
        _check_shard(folder, shard)
        for part in filter(None, (shard["raw_data"], shard["zip_data"])):
            manifest.check_inside(f"{folder}/{INDEX}", part["basename"])
    stored = [shard["zip_data"] or shard["raw_data"] for shard in shards]
    return {entry["basename"]: {"bytes": entry["bytes"]} for entry in stored}


def _check_shard(folder: str | Path, shard: dict[str, Any]) -> None:
    columns = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    if shard["format"] != "mds" or not columns.get("input_ids", "").startswith("ndarray"):
        raise ValueError(f"{folder} has no column input_ids of arrays; got columns {columns}")
    if (shard["compression"] or "zstd").split(":")[0] != "zstd":
        raise ValueError(
            f"{folder} is compressed by {shard['compression']}; expected zstd or none, convert it"
        )


@lru_cache
def _announce(folder: str) -> None:
    """Say once per process what cannot be checked."""
    print(f"{folder} is an MDS folder without hashes: only the sizes of its files are checked")


def unpack(source: BufferedReader, target: Path) -> None:
    """Write a compressed shard unpacked."""
    with open(target, "wb") as file:
        zstandard.ZstdDecompressor().copy_stream(source, file)


def decode(item: bytes, shard: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return an item's `input_ids` and, if it has them, its `indices` and `mask`.

    An item is the sizes of the columns that have no fixed one (uint32 each), then all columns.
    """
    sizes = shard["column_sizes"]
    varying = np.frombuffer(item, np.uint32, sizes.count(None)).tolist()
    at = 4 * len(varying)
    found = {}
    for name, encoding, fixed in zip(
        shard["column_names"], shard["column_encodings"], sizes, strict=True
    ):
        size = fixed or varying.pop(0)
        if name in ("input_ids", "indices", "mask"):
            found[name] = decode_array(item[at : at + size], encoding)
        at += size
    return found


def decode_array(data: bytes, encoding: str) -> np.ndarray:
    """Decode a column `json`, or `ndarray[:type[:shape]]`, whose unnamed parts lead each value."""
    kind, dtype, shape = (*encoding.split(":"), "", "")[:3]
    if kind == "json":
        return np.array(json.loads(data))
    at = 0
    if not dtype:
        dtype, at = DTYPES[data[0]], 1
    if not shape:
        # one byte: number of dimensions · 4 + log2 of the bytes that each of them takes
        at += 1 + (data[at] >> 2) * 2 ** (data[at] & 3)
    return np.frombuffer(data, dtype, offset=at)
