"""What an input names (a file, a folder, a glob, a URL) → its files, in a fixed order."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from glob import glob
from io import BufferedIOBase, BufferedReader, RawIOBase
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

from lit_longctx import hub

TEXT_SUFFIXES = {".txt", ".md", ".rst"}
LINE_SUFFIXES = {".jsonl", ".json", ".ndjson"}
TABLE_SUFFIXES = {".parquet", ".arrow"}
PACKINGS = {".gz", ".zst", ".xz", ".bz2"}
UNREAD_SUFFIXES = {".csv", ".tsv", ".xls", ".xlsx", ".zip", ".tar", ".tgz"}
"""Tables and archives that would be read as one text, were they named."""


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
        """`.gz`, `.zst`, `.xz`, `.bz2` or nothing."""
        suffix = PurePosixPath(self.name).suffix.lower()
        return suffix if suffix in PACKINGS else ""

    @property
    def kind(self) -> str:
        """Suffix of what is inside the packing, in small letters."""
        return PurePosixPath(self.name[: len(self.name) - len(self.packing)]).suffix.lower()

    @property
    def is_read(self) -> bool:
        """Whether its kind is not one of those that there is no reader for."""
        return self.kind not in UNREAD_SUFFIXES and not (
            self.packing and self.kind in TABLE_SUFFIXES
        )

    def left_because(self) -> str:
        """Say why the file is left where a folder is named; nothing if it is taken."""
        path = PurePosixPath(self.name)
        ending = self.kind + self.packing
        if any(part.startswith(".") for part in path.parts):
            return "hidden"
        if self.kind in TEXT_SUFFIXES and path.name.upper().startswith("README."):
            return "README"
        known = self.kind in TEXT_SUFFIXES | LINE_SUFFIXES | TABLE_SUFFIXES
        if self.is_read and (known or (self.packing and not self.kind)):
            return ""
        return f"{ending} is not read" if ending else "no ending"

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


@dataclass
class Selection:
    """Which files of the inputs are taken, and which are left, counted by ending and by reason."""

    taken: Counter[str] = field(default_factory=Counter)
    left: dict[str, list[str]] = field(default_factory=dict)
    """Paths by reason."""

    def leave(self, reason: str, file: File) -> None:
        """Count a file that is left."""
        self.left.setdefault(reason, []).append(file.path)

    def take(self, files: Iterable[File]) -> None:
        """Count files that are taken."""
        self.taken.update(file.kind + file.packing or "no ending" for file in files)

    def described(self) -> dict[str, Any]:
        """Return the manifest's entry: numbers, and the first file of each reason."""
        left = {why: {"count": len(paths), "first": paths[0]} for why, paths in self.left.items()}
        return {"taken": dict(self.taken), "left": left}

    def report(self) -> str:
        """Return a line of what is taken, and one for each reason of what is left."""
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in self.taken.most_common())
        lines = [f"input files: {self.taken.total():,} taken ({kinds})"] if kinds else []
        for why, paths in self.left.items():
            lines.append(f"  left {len(paths):,}: {why}, first {paths[0]!a}")
        return "".join(f"{line}\n" for line in lines)


def files(name: str, selection: Selection | None = None) -> list[File]:
    """Return the files an input names, sorted; ValueError if there is none.

    The root of their names is the folder given, a glob's folder before its first wildcard, or a
    file's own folder. A folder that `datasets` wrote stands for its Arrow files. Of a folder,
    hidden files, READMEs and kinds that there is no reader for are left; of a glob, only the last.
    """
    selection = Selection() if selection is None else selection
    found, how = _remote(name) if "://" in name else _local(name)
    taken = []
    for file in found:
        reason = file.left_because() if how == "folder" else ""
        if not file.is_read:
            reason = reason or f"{file.kind}{file.packing} is not read"
        if reason:
            selection.leave(reason, file)
        else:
            taken.append(file)
    if not taken:
        expected = "a file, a folder, a glob, a URL, code:DIR or stdlib"
        if found:
            count = Counter(file.left_because() for file in found).most_common(1)[0]
            expected = f"{count[1]} of {len(found)} are left ({count[0]}); convert them to jsonl"
            raise ValueError(f"input {name} holds no file that is read: {expected}")
        raise ValueError(f"input {name} matches no file; expected {expected}")
    return taken


def _local(name: str) -> tuple[list[File], str]:
    path = Path(name)
    if path.is_dir():
        how, root, found = "folder", path, path.rglob("*")
    elif path.is_file():
        how, root, found = "file", path.parent, [path]
    else:
        how, root, found = "glob", Path(*_fixed(path.parts)), map(Path, glob(name, recursive=True))
    # a link to nothing is kept: opening it is a fault that is counted
    found = sorted(p for p in found if p.is_file() or (p.is_symlink() and not p.exists()))
    return [File(str(p), p.relative_to(root).as_posix()) for p in found], how


def _remote(name: str) -> tuple[list[File], str]:
    import fsspec

    if name.startswith("hf://"):
        hub.limit_waiting()
    try:
        system, path = fsspec.url_to_fs(name)
        if system.isfile(path):
            how, root, found = "file", PurePosixPath(path).parent, [path]
        elif _has_wildcard(path):
            how, root = "glob", PurePosixPath(*_fixed(PurePosixPath(path).parts))
            entries = system.glob(path, detail=True)
            found = [p for p, entry in entries.items() if entry["type"] == "file"]
        else:
            how, root, found = "folder", PurePosixPath(path), system.find(path)
    except Exception as error:  # each protocol raises its own
        raise ValueError(f"input {name} cannot be listed: {_one_line(error)}") from error
    listed = [
        File(system.unstrip_protocol(p), PurePosixPath(p).relative_to(root).as_posix(), system)
        for p in sorted(found, key=PurePosixPath)
    ]
    return listed, how


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
