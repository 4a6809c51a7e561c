"""Inputs → documents: jsonl, parquet, saved datasets, text folders, repositories.

What cannot be read is skipped, counted by kind and shown in the report; too much of it stops the
run.
"""

import re
import sysconfig
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lit_longctx.data.reading.archives import ARCHIVE_ERRORS, unpacked
from lit_longctx.data.reading.faults import Broken, Faults, broken_file
from lit_longctx.data.reading.inputs import File, Names, Selection
from lit_longctx.data.reading.repositories import STDLIB_LEAVES_OUT, repositories
from lit_longctx.data.reading.rows import PIECE, READERS
from lit_longctx.data.reading.saved_datasets import input_files

MOST_IDS = 2**21
"""Ids of a file that are compared with those after them: 200 MB at most."""
REPEATED = "id that another row of the file has; split by file and number"


class Document(NamedTuple):
    """A text with a name that is unique within its source."""

    text: str
    id: str


class FilePart(NamedTuple):
    """What is read as a whole: the parts of a large input are shares of its file_parts."""

    name: str
    read: Callable[[Faults], Iterator[Any]]
    bytes: int = 0
    """Size as it is stored; 0 where that is not known."""
    plain: bool = False
    """Whether it is stored as text, neither packed nor a table."""


@dataclass(frozen=True)
class DocumentReader:
    """How to read the input of `prepare`."""

    text_field: str = "text"
    """Field of a row (jsonl, parquet, Arrow) that holds the text."""
    id_field: str = "id"
    """Field that names the row. Rows without it, and those whose id an earlier row of the file has,
    are named by file, below the input, and number."""
    labels: list[str] = field(default_factory=list)
    """Fields of conversations that change nothing of what is said, such as a rating, besides usual
    ones such as source and category; a row with a field that is not read is refused."""
    largest: int = 2**28
    """Bytes a single document may have, as its line or file. Memory: twice that for ASCII, four
    times with characters such as curly quotes, eight with emoji (Python's 1, 2 or 4 bytes each)."""

    def documents(
        self, inputs: list[str], faults: Faults, part: int = 0, parts: int = 1
    ) -> Iterator[Document]:
        """Yield the documents of all inputs, or of one share of their files; see `part_of`."""
        for file_part in part_of(self.file_parts(inputs), part, parts):
            yield from file_part.read(faults)

    def file_parts(self, inputs: list[str], selection: Selection | None = None) -> list[FilePart]:
        """Return what is read one after the other: a file, or all repositories of a `code:`."""
        names, file_parts, roots = Names(), [], 0
        selection = Selection() if selection is None else selection
        for name in inputs:
            if name == "stdlib" or name.startswith("code:"):
                roots += 1
                mark = f"#{roots}" if roots > 1 else ""
                file_parts.append(FilePart(name, partial(self._code, name, mark)))
                continue
            for file in input_files(name, selection):
                own = names.of(file.name, file.path)
                read = partial(self._file, file, own)
                file_parts.append(FilePart(own, read, file.bytes, file.is_plain))
        return file_parts

    def _code(self, name: str, mark: str, faults: Faults) -> Iterator[Document]:
        if name == "stdlib":
            root = Path(sysconfig.get_path("stdlib"))
            found = repositories(root, faults, STDLIB_LEAVES_OUT, {".py"}, self.largest)
        else:
            root = existing_folder(name.removeprefix("code:"))
            found = repositories(root, faults, largest=self.largest)
        for path, text in found:
            yield from self._checked(text, path.name + mark, str(path), faults)

    def _file(self, file: File, name: str, faults: Faults) -> Iterator[Document]:
        if file.kind not in READERS:
            yield from self._checked(whole_text(file, self.largest), name, file.path, faults)
            return
        number = 0
        wanted, seen = [self.text_field, self.id_field], set[int]()
        for number, row in READERS[file.kind](file, wanted, self.largest):
            text, key = self._text_and_key(row)
            where = f"{file.path}:{number}"
            if repeated := key not in (None, "") and hash(str(key)) in seen:
                faults.note(REPEATED, where)
            if repeated or key in (None, ""):
                key = f"{name}:{number}"
            else:
                key = where = str(key)
                if len(seen) < MOST_IDS:
                    seen.add(hash(key))
            yield from self._checked(text, key, where, faults)
            del row, text  # not to be held while the next is read
        if not number:
            faults.add("empty file", file.path)

    def _text_and_key(self, row: Any) -> tuple[str | Broken, Any]:
        if isinstance(row, Broken):
            return row, None
        if not isinstance(row, dict) or self.text_field not in row:
            return Broken(f"no field {self.text_field!r}"), None
        if not isinstance(row[self.text_field], str):
            return Broken(f"{self.text_field!r} is no string"), None
        return row[self.text_field], row.get(self.id_field)

    def _checked(
        self, text: str | Broken, name: str, where: str, faults: Faults
    ) -> Iterator[Document]:
        if isinstance(text, str):
            text = unfit(text) or text
        if isinstance(text, Broken):
            faults.add(text.kind, where)
        else:
            faults.read += 1
            yield Document(text, name)


def part_of(file_parts: Sequence[FilePart], part: int, parts: int) -> Sequence[FilePart]:
    """Return number `part` of `parts` shares; all, one after the other, are the whole."""
    if parts > len(file_parts):
        raise ValueError(f"{parts} parts are too many for {len(file_parts)} files; use as many")
    return file_parts[len(file_parts) * part // parts : len(file_parts) * (part + 1) // parts]


def whole_text(file: File, largest: int) -> str | Broken:
    """Return a text file's content, or what is broken about it."""
    content = bytearray()
    try:
        with file.open() as stored, unpacked(stored, file.packing) as stream:
            while piece := stream.read(PIECE):
                content += piece
                if len(content) > largest:
                    return Broken("too large")
        if content.startswith(BOM_UTF8):
            del content[:3]
        return str(content, "utf-8")
    except UnicodeDecodeError:
        return Broken("bad UTF-8")
    except ARCHIVE_ERRORS as error:
        return broken_file(error, "broken archive")


SURROGATE = re.compile("[\ud800-\udfff]")


def unfit(text: str) -> Broken | None:
    """Return what makes a text unfit for training, if anything does."""
    if not text.isascii() and SURROGATE.search(text):
        return Broken("lone surrogate")
    if "\0" in text:
        return Broken("NUL in text")
    return Broken("empty text") if not text or text.isspace() else None


def existing_folder(name: str) -> Path:
    """Return a folder that exists; ValueError else."""
    path = Path(name)
    if not path.is_dir():
        raise ValueError(f"input code:{name} is no folder")
    return path
