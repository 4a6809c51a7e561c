"""What an input names (a file, a folder, a glob, a URL) → its files, in a fixed order."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from glob import glob
from io import BufferedIOBase, BufferedReader, RawIOBase
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

TEXT_SUFFIXES = {".txt", ".md", ".rst"}
LINE_SUFFIXES = {".jsonl", ".json", ".ndjson"}
TABLE_SUFFIXES = {".parquet", ".arrow"}
PACKINGS = {".gz", ".zst"}
SUFFIXES = TEXT_SUFFIXES | LINE_SUFFIXES | TABLE_SUFFIXES | PACKINGS
"""What is taken from a folder."""


@dataclass(frozen=True)
class File:
    """A file of an input."""

    path: str
    """Path or URL, as the user finds it."""
    name: str
    """Path below the input's root, POSIX style: the same however the input was spelled."""
    system: Any = None
    """The fsspec file system that holds it; None: this machine."""

    @property
    def packing(self) -> str:
        """`.gz`, `.zst` or nothing."""
        suffix = PurePosixPath(self.name).suffix
        return suffix if suffix in PACKINGS else ""

    @property
    def kind(self) -> str:
        """Suffix of what is inside the packing."""
        return PurePosixPath(self.name.removesuffix(self.packing)).suffix

    @property
    def is_plain(self) -> bool:
        """Whether it is stored as text, neither packed nor a table."""
        return not self.packing and self.kind not in TABLE_SUFFIXES

    @property
    def bytes(self) -> int:
        """Size of a file on this machine; 0 for others, and for links to nothing."""
        here = self.system is None and os.path.exists(self.path)
        return os.path.getsize(self.path) if here else 0

    def open(self) -> BufferedIOBase:
        """Open the file for reading bytes, as they are stored."""
        if self.system is None:
            return open(self.path, "rb")
        return BufferedReader(Download(self.system, self.path), 2**20)


def files(name: str) -> list[File]:
    """Return the files an input names, sorted; ValueError if there is none.

    The root of their names is the folder given, a glob's folder before its first wildcard, or a
    file's own folder. A folder that `datasets` wrote stands for its Arrow files.
    """
    found = _remote(name) if "://" in name else _local(name)
    if not found:
        expected = "a file, a folder, a glob, a URL, code:DIR or stdlib"
        raise ValueError(f"input {name} matches no file; expected {expected}")
    return found


def _local(name: str) -> list[File]:
    path = Path(name)
    if path.is_dir():
        root, found = path, [p for p in path.rglob("*") if p.suffix in SUFFIXES]
    elif path.is_file():
        root, found = path.parent, [path]
    else:
        root, found = Path(*_fixed(path.parts)), map(Path, glob(name, recursive=True))
    # a link to nothing is kept: opening it is a fault that is counted
    found = sorted(p for p in found if p.is_file() or (p.is_symlink() and not p.exists()))
    return [File(str(p), p.relative_to(root).as_posix()) for p in found]


def _remote(name: str) -> list[File]:
    import fsspec

    try:
        system, path = fsspec.url_to_fs(name)
        if system.isfile(path):
            root, found = PurePosixPath(path).parent, [path]
        elif _has_wildcard(path):
            root = PurePosixPath(*_fixed(PurePosixPath(path).parts))
            entries = system.glob(path, detail=True)
            found = [p for p, entry in entries.items() if entry["type"] == "file"]
        else:
            root = PurePosixPath(path)
            found = [p for p in system.find(path) if PurePosixPath(p).suffix in SUFFIXES]
    except Exception as error:  # each protocol raises its own
        raise ValueError(f"input {name} cannot be listed: {_one_line(error)}") from error
    return [
        File(system.unstrip_protocol(p), PurePosixPath(p).relative_to(root).as_posix(), system)
        for p in sorted(found, key=PurePosixPath)
    ]


def _has_wildcard(part: str) -> bool:
    return not set("*?[").isdisjoint(part)


def _fixed(parts: Iterable[str]) -> list[str]:
    return list(takewhile(lambda part: not _has_wildcard(part), parts))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class Download(RawIOBase):
    """A remote file, read as it is needed.

    Whatever goes wrong on the way is a ValueError that stops the run: were it counted as a broken
    file, the weather of the network would choose the training data.
    """

    def __init__(self, system: Any, url: str) -> None:
        self.url = url
        self.file = self._or_stop(lambda: system.open(url, "rb"))

    def _or_stop(self, step: Any) -> Any:
        try:
            return step()
        except Exception as error:  # each protocol raises its own
            raise ValueError(f"reading {self.url} failed: {_one_line(error)}; try again") from error

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """As far as the protocol can."""
        return self.file.seekable()

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore
        """Fetch what fits into the buffer."""
        piece = self._or_stop(lambda: self.file.read(len(buffer)))
        buffer[: len(piece)] = piece
        return len(piece)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a place."""
        return self._or_stop(lambda: self.file.seek(offset, whence))

    def tell(self) -> int:
        """Bytes before the current place."""
        return self.file.tell()

    def close(self) -> None:
        """Close the remote file too."""
        if not self.closed and hasattr(self, "file"):
            self.file.close()
        super().close()


class Names:
    """Gives each file one name: its own, with a number where another file has the same.

    The held-out split hangs on names. Without the number, `*/text.txt` spelled out as many inputs
    would be one name, and all of it held out or none.
    """

    def __init__(self) -> None:
        self.places: dict[str, dict[str, int]] = {}

    def of(self, name: str, path: str) -> str:
        """Return the name of the file at that path; the same whenever the path comes again."""
        places = self.places.setdefault(name, {})
        number = places.setdefault(os.path.abspath(path), len(places) + 1)
        return name if number == 1 else f"{name}#{number}"
