"""Files → documents: jsonl (.gz, .zst), parquet, text folders, source trees.

What cannot be read is skipped, counted by kind and shown in the report; too much of it stops the
run.
"""

import json
import sysconfig
from collections.abc import Iterator, Set
from dataclasses import dataclass
from glob import glob
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

from lit_longctx.data.archives import ARCHIVE_ERRORS, open_packed
from lit_longctx.data.faults import Faults

TEXT_SUFFIXES = {".txt", ".md", ".rst"}
SCRIPT_SUFFIXES = {".jl", ".js", ".lua", ".php", ".py", ".rb", ".sh", ".sql", ".ts"}
COMPILED_SUFFIXES = {
    ".c",
    ".cc",
    ".cpp",
    ".cs",
    ".go",
    ".h",
    ".hpp",
    ".java",
    ".kt",
    ".rs",
    ".scala",
}
CODE_SUFFIXES = SCRIPT_SUFFIXES | COMPILED_SUFFIXES
LINE_SUFFIXES = {".jsonl", ".json", ".ndjson"}


class Document(NamedTuple):
    """A text with a name that is unique within its source."""

    text: str
    id: str


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
                if fault := self._fault(document.text):
                    faults.add(fault, document.id)
                else:
                    faults.read += 1
                    yield document

    def _fault(self, text: str) -> str | None:
        """Return what makes a text unfit, if anything does."""
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            return "lone surrogate"
        if size > self.largest:
            return "too large"
        if "\0" in text:
            return "NUL in text"
        return None if text.strip() else "empty text"

    def _input(self, name: str, faults: Faults) -> Iterator[Document]:
        if name == "stdlib":
            root = Path(sysconfig.get_path("stdlib"))
            yield from source_tree(root, faults, STDLIB_LEAVES_OUT, {".py"}, self.largest)
        elif name.startswith("code:"):
            root = existing_folder(name.removeprefix("code:"))
            yield from source_tree(root, faults, largest=self.largest)
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
            yield Document(content.decode("utf-8-sig"), str(path))
        except UnicodeDecodeError:
            faults.add("bad UTF-8", str(path))
        except ARCHIVE_ERRORS:
            faults.add("broken archive", str(path))

    def _lines(self, path: Path, faults: Faults) -> Iterator[Document]:
        number = rows = 0
        try:
            with open_packed(path) as file:
                while line := file.readline(self.largest + 1):
                    number += 1
                    where = f"{path}:{number}"
                    if len(line) > self.largest:
                        rows += 1
                        faults.add("too large", where)
                        _skip_rest(line, file)
                    elif line.strip():
                        rows += 1
                        yield from self._row(line, where, faults)
            if not rows:
                faults.add("empty file", str(path))
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
        else:
            name = row.get(self.id_field)
            yield Document(row[self.text_field], where if name in (None, "") else str(name))

    def _parquet(self, path: Path, faults: Faults) -> Iterator[Document]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(path)
            present = [f for f in (self.text_field, self.id_field) if f in file.schema_arrow.names]
            number = 0
            for rows in file.iter_batches(batch_size=64, columns=present):
                for at in range(rows.num_rows):
                    number += 1
                    yield from self._cells(rows.slice(at, 1), f"{path}:{number}", faults)
            if not number:
                faults.add("empty file", str(path))
        except (pa.ArrowException, OSError):
            faults.add("broken parquet", str(path))

    def _cells(self, row: Any, where: str, faults: Faults) -> Iterator[Document]:
        try:
            cells = row.to_pylist()[0]
        except UnicodeDecodeError:  # parquet does not check its strings
            faults.add("bad UTF-8", where)
        else:
            yield from self._document(cells, where, faults)


STDLIB_LEAVES_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


def existing_folder(name: str) -> Path:
    """Return a folder that exists; ValueError else."""
    path = Path(name)
    if not path.is_dir():
        raise ValueError(f"input code:{name} is no folder")
    return path


def matching(name: str) -> list[Path]:
    """Return the files a name stands for, sorted: itself, those below a folder or of a glob."""
    path = Path(name)
    if path.is_dir():
        kinds = TEXT_SUFFIXES | LINE_SUFFIXES | {".parquet", ".gz", ".zst"}
        found = [p for p in path.rglob("*") if p.is_file() and p.suffix in kinds]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(p) for p in glob(name, recursive=True) if Path(p).is_file()]
    if not found:
        expected = "a file, a folder, a glob, code:DIR or stdlib"
        raise ValueError(f"input {name} matches no file; expected {expected}")
    return sorted(found)


def _skip_rest(line: bytes, file: BufferedIOBase) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(2**20)


def source_tree(
    root: Path,
    faults: Faults,
    leave_out: Set[str] = frozenset({"__pycache__"}),
    suffixes: Set[str] = CODE_SUFFIXES,
    largest: int = 2**28,
) -> Iterator[Document]:
    """Yield one document per package (a folder directly below `root`) and one per single module.

    A package's files stand in one document in order of their paths, each under a line with its
    path, as ProLong joins a repository's files (Gao et al. 2024, arXiv:2410.02660). Files of more
    than `largest` bytes are left out.
    """
    for entry in sorted(root.iterdir()):
        if entry.name in leave_out or entry.name.startswith("."):
            continue
        files = sorted(entry.rglob("*")) if entry.is_dir() else [entry]
        parts = []
        for file in files:
            below = file.relative_to(root)
            if file.is_file() and file.suffix in suffixes and not leave_out & set(below.parts):
                text = _source(file, largest, faults)
                parts += [f"# {below.as_posix()}\n{text}"] if text else []
        if parts:
            yield Document("\n".join(parts), entry.relative_to(root).as_posix())


def _source(file: Path, largest: int, faults: Faults) -> str:
    try:
        if file.stat().st_size <= largest:
            return file.read_text(encoding="utf-8-sig")
        faults.add("too large", str(file))
    except UnicodeDecodeError:
        faults.add("bad UTF-8", str(file))
    except OSError as error:
        faults.add(f"unreadable: {error.strerror}", str(file))
    return ""
