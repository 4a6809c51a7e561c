"""Files → documents: jsonl (.gz, .zst), parquet, text folders, source trees.

What cannot be read is skipped, counted by kind and shown in the report; too much of it stops the run.
"""

import gzip
import json
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import glob
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

TEXT_SUFFIXES = {".txt", ".md", ".rst"}
CODE_SUFFIXES = set(".c .cc .cpp .cs .go .h .hpp .java .js .jl .kt .lua .php .py .rb .rs .scala .sh .sql .ts".split())
LINE_SUFFIXES = {".jsonl", ".json", ".ndjson"}


class Document(NamedTuple):
    """A text with a name that is unique within its source."""

    text: str
    id: str


@dataclass
class Faults:
    """What could not be read: counted by kind, with the first of each kind kept for the report."""

    tolerated: float = 0.01
    """Largest share of broken documents; above it the run stops."""
    read: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, where: str) -> None:
        """Count one broken document."""
        self.kinds[kind] += 1
        self.examples.setdefault(kind, where)
        if self.read + self.kinds.total() >= 1000:
            self.check()

    def check(self) -> None:
        """Raise ValueError if more than the tolerated share was broken."""
        broken = self.kinds.total()
        seen = self.read + broken
        if broken > self.tolerated * seen:
            kind, count = self.kinds.most_common(1)[0]
            raise ValueError(
                f"{broken} of {seen} documents are broken (tolerated: {self.tolerated:.1%}), most often "
                f"{kind} ({count}, first at {self.examples[kind]}); mend the input or raise --tolerated"
            )


@dataclass(frozen=True)
class Reader:
    """How to read the input of `prepare`."""

    text_field: str = "text"
    """Field of a jsonl or parquet row that holds the text."""
    id_field: str = "id"
    """Field that names the row; default for rows without it: file and row number."""
    largest: int = 2**28
    """Bytes a single document may have."""

    def documents(self, inputs: list[str], faults: Faults) -> Iterator[Document]:
        """Yield the documents of all inputs, in a fixed order."""
        for name in inputs:
            for document in self._input(name, faults):
                if not document.text.strip():
                    faults.add("empty text", document.id)
                elif "\0" in document.text:
                    faults.add("NUL in text", document.id)
                else:
                    faults.read += 1
                    yield document

    def _input(self, name: str, faults: Faults) -> Iterator[Document]:
        if name == "stdlib":
            root = Path(sysconfig.get_path("stdlib"))
            yield from source_tree(root, faults, leave_out=STDLIB_LEAVES_OUT, suffixes={".py"})
        elif name.startswith("code:"):
            yield from source_tree(existing(name.removeprefix("code:")), faults)
        else:
            for path in matching(name):
                yield from self._file(path, faults)

    def _file(self, path: Path, faults: Faults) -> Iterator[Document]:
        suffixes = path.suffixes[-2:]
        packed = suffixes[-1] in (".gz", ".zst") if suffixes else False
        kind = suffixes[-2] if packed and len(suffixes) == 2 else path.suffix
        if kind == ".parquet":
            yield from self._parquet(path, faults)
        elif kind in LINE_SUFFIXES:
            yield from self._lines(path, faults)
        else:
            yield from self._text(path, faults)

    def _text(self, path: Path, faults: Faults) -> Iterator[Document]:
        try:
            with open_packed(path) as file:
                content = file.read(self.largest + 1)
            if len(content) > self.largest:
                faults.add("too large", str(path))
                return
            yield Document(content.decode(), str(path))
        except UnicodeDecodeError:
            faults.add("bad UTF-8", str(path))
        except ARCHIVE_ERRORS:
            faults.add("broken archive", str(path))

    def _lines(self, path: Path, faults: Faults) -> Iterator[Document]:
        number = 0
        try:
            with open_packed(path) as file:
                while line := file.readline(self.largest + 1):
                    number += 1
                    where = f"{path}:{number}"
                    if len(line) > self.largest:
                        faults.add("too large", where)
                        _skip_line(file)
                    elif line.strip():
                        yield from self._row(line, where, faults)
        except ARCHIVE_ERRORS:
            faults.add("broken archive", f"{path}:{number + 1}")

    def _row(self, line: bytes, where: str, faults: Faults) -> Iterator[Document]:
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            faults.add("bad UTF-8", where)
        except (ValueError, RecursionError):
            faults.add("broken JSON", where)
        else:
            yield from self._document(row, where, faults)

    def _document(self, row: Any, where: str, faults: Faults) -> Iterator[Document]:
        if not isinstance(row, dict) or self.text_field not in row:
            faults.add(f"no field {self.text_field!r}", where)
        elif not isinstance(row[self.text_field], str):
            faults.add(f"{self.text_field!r} is no string", where)
        elif _has_surrogates(row[self.text_field]):
            faults.add("lone surrogate", where)
        else:
            yield Document(row[self.text_field], str(row.get(self.id_field) or where))

    def _parquet(self, path: Path, faults: Faults) -> Iterator[Document]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(path)
            present = [f for f in (self.text_field, self.id_field) if f in file.schema_arrow.names]
            number = 0
            for rows in file.iter_batches(batch_size=64, columns=present):
                for row in rows.to_pylist():
                    number += 1
                    yield from self._document(row, f"{path}:{number}", faults)
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            faults.add("broken parquet", str(path))


ARCHIVE_ERRORS = (OSError, EOFError, zstandard.ZstdError, gzip.zlib.error)  # pyright: ignore
STDLIB_LEAVES_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


def existing(name: str) -> Path:
    """Return a path that exists; ValueError else."""
    path = Path(name)
    if not path.exists():
        raise ValueError(f"input {name} does not exist")
    return path


def matching(name: str) -> list[Path]:
    """Return the files a name stands for: itself, those below a folder, or those of a glob; sorted."""
    path = Path(name)
    if path.is_dir():
        kinds = TEXT_SUFFIXES | LINE_SUFFIXES | {".parquet", ".gz", ".zst"}
        found = [p for p in path.rglob("*") if p.is_file() and p.suffix in kinds]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(p) for p in glob(name, recursive=True) if Path(p).is_file()]
    if not found:
        raise ValueError(f"input {name} matches no file; expected a file, a folder, a glob, code:DIR or stdlib")
    return sorted(found)


def open_packed(path: Path) -> BufferedReader:
    """Open a file for reading bytes, unpacking .gz and .zst on the way."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # pyright: ignore
    if path.suffix == ".zst":
        stream = zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(
            open(path, "rb"), read_across_frames=True, closefd=True
        )
        return BufferedReader(stream, 2**20)  # pyright: ignore
    return open(path, "rb")


def _skip_line(file: BufferedReader) -> None:
    while (piece := file.readline(2**20)) and not piece.endswith(b"\n"):
        pass


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def source_tree(
    root: Path,
    faults: Faults,
    leave_out: set[str] = frozenset({"__pycache__"}),  # pyright: ignore
    suffixes: set[str] = CODE_SUFFIXES,
) -> Iterator[Document]:
    """Yield one document per package (a folder directly below `root`) and one per single module.

    A package's files stand in one document in order of their paths, each under a line with its path, as
    ProLong joins a repository's files (Gao et al. 2024, arXiv:2410.02660).
    """
    for entry in sorted(root.iterdir()):
        if entry.name in leave_out or entry.name.startswith("."):
            continue
        files = sorted(entry.rglob("*")) if entry.is_dir() else [entry]
        parts = []
        for file in files:
            below = file.relative_to(root)
            if file.is_file() and file.suffix in suffixes and not leave_out & set(below.parts):
                text = _source(file, faults)
                parts += [f"# {below.as_posix()}\n{text}"] if text else []
        if parts:
            yield Document("\n".join(parts), entry.relative_to(root).as_posix())


def _source(file: Path, faults: Faults) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        faults.add("bad UTF-8", str(file))
    except OSError as error:
        faults.add(f"unreadable: {error.strerror}", str(file))
    return ""
