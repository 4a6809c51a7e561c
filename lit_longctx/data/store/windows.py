"""Token windows by number, and any stretch of tokens, from a prepared folder or URL.

litdata writes the chunk files and carries them; they are read here as what they are: flat tokens
behind a header. Through its dataset a stretch would cost 15 µs per block of 256 tokens.
"""

import mmap
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from litdata.constants import _NUMPY_DTYPES_MAPPING

from lit_longctx.data.store.remote import open_folder
from lit_longctx.data.store.storage import ObjectStorage
from lit_longctx.data.tokens.info import TokenizerInfo
from lit_longctx.json_file import object_in
from lit_longctx.manifest import short_hash

ANSWER = 2**31
"""Bit of the ids of answers, in folders of conversations."""
OPEN_CHUNKS = 5
"""Chunks held open: a group that is shuffled together, and the one its last window runs into."""
LENGTHS = "lengths.npy"
"""File of a split that holds the tokens of every document."""
LONG = "long_documents.npy"
"""File of a split of conversations: where in each a long document begins and ends, in tokens."""


class Windows:
    """Windows of `length` + 1 tokens at stride `length` over one split of a prepared folder.

    In a folder of conversations ids have the bit ANSWER where the assistant says them.

    Each file's hash is checked when it is first read, so that an altered one stops the run instead
    of training it. A window costs a memory copy; the first of a chunk, its hash (about 1 GB/s) and,
    from a URL, its download. Where documents start costs 8 bytes of memory per document.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        length: int,
        storage: ObjectStorage = ObjectStorage(),
        chat: bool = False,
    ) -> None:
        self.folder, self.split, self.length = folder, split, length
        self.manifest, self.files = open_folder(folder, storage)
        if self.manifest.chat != chat:
            held = ("documents", "conversations")
            raise ValueError(
                f"expected {held[chat]} in {folder}; got {held[not chat]}; "
                f"prepare {'with' if chat else 'without'} --chat true"
            )
        if split not in self.manifest.splits:
            raise ValueError(f"{folder} holds no split {split!r}; make it with lit_longctx prepare")
        self.block = self.manifest.block
        chunk = self.manifest.chunk_tokens
        if length < 1 or length % self.block:
            raise ValueError(f"window {length} is no multiple of the block of {self.block} tokens")
        if length > chunk:
            raise ValueError(
                f"window {length} exceeds chunk of {chunk} tokens; "
                f"prepare with --chunk_tokens {length} or more"
            )
        self.tokens = self.manifest.splits[split].tokens
        tokenizer = self.manifest.tokenizer
        if self.tokens and not self._has_lengths and tokenizer.bos == tokenizer.eos:
            raise ValueError(
                f"{folder} was prepared by an older version, which did not record where documents "
                "start, and its BOS is its EOS, which does not tell; prepare it again"
            )
        self.chunk_tokens = chunk
        """Tokens of a chunk file."""
        self._chunks: Chunks | None = None
        self._begins: np.ndarray | None = None

    def __len__(self) -> int:
        """Whole windows in the split; the last needs one token beyond it."""
        return max(0, (self.tokens - 1) // self.length)

    @property
    def dropped(self) -> int:
        """Stride tokens at the end that fill no window: tokens = windows × length + dropped."""
        return self.tokens - len(self) * self.length

    @property
    def fetches(self) -> Counter[str]:
        """How often this process asked for each file over the network."""
        return self.files.fetches

    @property
    def tokenizer(self) -> TokenizerInfo:
        """The tokenizer that made the ids and, where it is recorded, the largest id in use.

        `largest_id` is the largest in any split. A vocabulary may hold more: a [PAD] that no data
        has, beyond the rows of the model's embedding.
        """
        largest = [split.largest_id for split in self.manifest.splits.values()]
        known = [each for each in largest if each is not None]
        if len(known) < len(largest):
            return self.manifest.tokenizer
        return replace(self.manifest.tokenizer, largest_id=max(known))

    @property
    def content_hash(self) -> str:
        """Hash of the stored tokens; the same where `prepare` ran again on the same input."""
        files = self.manifest.files.items()
        kept = {n: f["sha256"] for n, f in files if n.startswith(("train/", "held_out/"))}
        return short_hash({n: f for n, f in kept.items() if not n.endswith("index.json")})

    @property
    def tokenizer_folder(self) -> Path:
        """Where the folder's tokenizer lies on disk; fetched there from a URL."""
        return self.files.subfolder("tokenizer")

    def __getitem__(self, index: int) -> np.ndarray:
        """Return tokens [index × length, (index + 1) × length], both ends included."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return self.read(index * self.length, (index + 1) * self.length + 1)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) of the split as int64; costs about a memory copy."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.tokens}")
        if self._chunks is None:
            self._chunks = Chunks(self)
        found = np.empty(stop - start, dtype=np.int64)
        at = start
        while at < stop:
            part = self._chunks.rest(at)[: stop - at]
            found[at - start : at - start + len(part)] = part
            at += len(part)
        return found

    def with_starts(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of a window, and True where a document starts."""
        tokens = self[index]
        begin = index * self.length
        if not self._has_lengths:
            return tokens, tokens == self.manifest.tokenizer.bos
        return tokens, self.starts(begin, begin + self.length + 1)

    def starts(self, start: int, stop: int) -> np.ndarray:
        """Return whether a document starts at each of the tokens [start, stop) of the split.

        As recorded, not as told by BOS, which may be EOS too. What fills the last block starts
        anew at each token, so that none of it is a target.
        """
        if self._begins is None:
            ends = self.document_lengths().cumsum(dtype=np.int64)
            self._begins = np.concatenate([[0], ends[:-1], np.arange(ends[-1], self.tokens)])
        first, last = np.searchsorted(self._begins, [start, stop])
        found = np.zeros(stop - start, dtype=bool)
        found[self._begins[first:last] - start] = True
        return found

    @property
    def _has_lengths(self) -> bool:
        """Whether the folder records its documents' lengths; the first version's did not."""
        return f"{self.split}/{LENGTHS}" in self.manifest.files

    def document_lengths(self) -> np.ndarray:
        """Tokens of each document in order, BOS and EOS included, uint32."""
        return self._array(LENGTHS)

    def long_documents(self) -> np.ndarray:
        """First token of each conversation's long document and the first behind it, uint32."""
        return self._array(LONG)

    def _array(self, name: str) -> np.ndarray:
        name = f"{self.split}/{name}"
        if name not in self.manifest.files:
            raise ValueError(f"{self.folder} was prepared by an older version; prepare it again")
        with self.files.open(name) as file:
            return np.load(file)

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files, and what is quickly read again, behind when a worker copies this."""
        return {**self.__dict__, "_chunks": None, "_begins": None}


class Chunks:
    """The chunk files of one split as one run of tokens."""

    def __init__(self, windows: Windows) -> None:
        self.maps = Maps(windows.files.open)
        name = f"{windows.split}/index.json"
        index = object_in(self.maps(name)[:], f"{windows.folder}/{name}")
        try:
            kind, number = index["config"]["data_format"][0].split(":")
            self.dtype = _NUMPY_DTYPES_MAPPING[int(number)]
            self.names = [f"{windows.split}/{chunk['filename']}" for chunk in index["chunks"]]
            self.ends = np.cumsum([chunk["dim"] for chunk in index["chunks"]])
            fits = kind == "no_header_numpy" and self.ends[-1] == windows.tokens
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            fits = False
        if not fits:
            raise ValueError(
                f"{windows.folder}/{name} does not list chunks of {windows.tokens} tokens, as the "
                "folder's manifest has it; make the folder anew"
            )

    def rest(self, token: int) -> np.ndarray:
        """Tokens from `token` to the end of its chunk, in the file's own type, without a copy."""
        chunk = int(np.searchsorted(self.ends, token, side="right"))
        content = self.maps(self.names[chunk])
        # litdata's header: the number of items, then where each begins and where the last ends
        begin = int(np.frombuffer(content, np.uint32, 2)[1])
        tokens = np.frombuffer(content, self.dtype, offset=begin)
        expected = int(self.ends[chunk] - (self.ends[chunk - 1] if chunk else 0))
        if len(tokens) != expected:
            raise ValueError(
                f"{self.names[chunk]} holds {len(tokens)} tokens; its index says {expected}; "
                "prepare the folder again"
            )
        return tokens[token - int(self.ends[chunk]) :]


class Maps:
    """The files read last, mapped into memory; a file mapped here is in use for the cache."""

    def __init__(self, open: Callable[[str], BufferedReader]) -> None:
        self.open = open
        self.maps: dict[str, mmap.mmap] = {}

    def __call__(self, name: str) -> mmap.mmap:
        """Return a file's content; lets go of the one used least recently."""
        content = self.maps.pop(name, None)
        if content is None:
            if len(self.maps) == OPEN_CHUNKS:
                del self.maps[next(iter(self.maps))]
            with self.open(name) as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.maps[name] = content
        return content
