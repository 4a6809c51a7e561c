"""Files → rows: JSON lines and arrays, parquet and Arrow, one row in memory at a time.

Each reader takes a file, the fields that are wanted (None: all) and the bytes a row may have, and
yields the row's number, from 1, with the row or with what is `Broken` about it. A file that breaks
off ends with a `Broken` row; those before it are good.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from io import BufferedIOBase
from typing import Any

from lit_longctx.data.reading.archives import ARCHIVE_ERRORS, unpacked
from lit_longctx.data.reading.faults import Broken, broken_file
from lit_longctx.data.reading.inputs import LINE_SUFFIXES, File
from lit_longctx.data.reading.json_array import elements

Rows = Iterator[tuple[int, Any]]
PIECE = 2**20
"""Bytes read at a time."""
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
"""Last bytes of an Arrow stream that was written to its end."""


def json_rows(file: File, fields: Sequence[str] | None, largest: int) -> Rows:
    """Yield the value of every line that is not blank; numbers count all lines.

    Of a file that is one array, the elements.
    """
    number = 0
    try:
        with file.open() as stored, unpacked(stored, file.packing) as stream:
            if _begin(stream) == b"[":
                for number, value in enumerate(elements(stream, largest), 1):
                    yield number, value
                return
            for number, line in enumerate(lines(stream, largest), 1):
                if len(line) > largest:
                    yield number, Broken("too large")
                elif not line.isspace():
                    yield number, _parsed(line)
    except ARCHIVE_ERRORS as error:
        yield number + 1, broken_file(error, "broken archive")


def _begin(stream: BufferedIOBase) -> bytes:
    """Return the first byte that is no space, if it is among the first, without reading it."""
    first: bytes = stream.peek(PIECE)  # pyright: ignore - all that are opened here can
    return first.removeprefix(BOM_UTF8).lstrip()[:1]


def lines(stream: BufferedIOBase, largest: int) -> Iterator[bytearray]:
    """Yield each line; of one that is longer than `largest` bytes, a little more than those."""
    while piece := stream.readline(PIECE):
        line = bytearray(piece)
        while not piece.endswith(b"\n") and (piece := stream.readline(PIECE)):
            if len(line) <= largest:
                line += piece
        yield line


def _parsed(line: bytearray) -> Any:
    if b"\0" in line[:4]:  # UTF-16 or UTF-32
        return Broken("bad UTF-8")
    if line.startswith(BOM_UTF8):
        del line[:3]
    try:
        text = str(line, "utf-8", "surrogatepass")
        line.clear()  # else a long line would stand in memory three times, with what it says
        return json.loads(text)
    except UnicodeDecodeError:
        return Broken("bad UTF-8")
    except (ValueError, RecursionError):
        return Broken("broken JSON")


def parquet_rows(file: File, fields: Sequence[str] | None, largest: int) -> Rows:
    """Yield the wanted fields of each row as a dict.

    Memory: a page, which the writer closes after about a thousand rows or a MiB, whichever is more.
    """
    return _table_rows(_parquet_batches(file, fields), largest, "broken parquet")


def arrow_rows(file: File, fields: Sequence[str] | None, largest: int) -> Rows:
    """Yield the wanted fields of each row of an Arrow IPC stream as a dict.

    Memory: a local file is mapped; of a remote one, a record batch.
    """
    return _table_rows(_arrow_batches(file, fields), largest, "broken arrow")


def _parquet_batches(file: File, fields: Sequence[str] | None) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with file.open() as stream, pq.ParquetFile(stream, buffer_size=PIECE) as table:
        present = _present(table.schema_arrow, fields)
        # one row at a time: a batch of more could hold that many of the largest
        yield from table.iter_batches(batch_size=1, columns=present, use_threads=False)


def _arrow_batches(file: File, fields: Sequence[str] | None) -> Iterator[Any]:
    import pyarrow as pa

    source = file.open() if file.system else pa.memory_map(file.path)
    with source, pa.ipc.open_stream(source) as table:
        present = _present(table.schema, fields)
        for batch in table:
            chosen = batch.select(present)
            for column in chosen.columns:
                _check_offsets(column)
            yield chosen
        source.seek(-len(ARROW_END), 2)
        if source.read(len(ARROW_END)) != ARROW_END:
            raise pa.ArrowInvalid("cut off between two record batches, which the library lets pass")


def _present(schema: Any, fields: Sequence[str] | None) -> list[str]:
    return [name for name in schema.names if fields is None or name in fields]


def _check_offsets(column: Any) -> None:
    """Raise ArrowInvalid if strings point outside of the data; that they are UTF-8, rows check."""
    import pyarrow as pa

    as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type)
    (column.view(as_bytes) if as_bytes else column).validate(full=True)


def _table_rows(batches: Iterator[Any], largest: int, otherwise: str) -> Rows:
    import pyarrow as pa

    number = 0
    try:
        for batch in batches:
            for at in range(batch.num_rows):
                number += 1
                yield number, _cells(batch, at, largest)
            del batch  # not to be held while the next is read
    except (pa.ArrowException, OSError) as error:
        yield number + 1, broken_file(error, otherwise)


def _cells(batch: Any, at: int, largest: int) -> Any:
    cells = {name: batch.column(i)[at] for i, name in enumerate(batch.schema.names)}
    if any(_size(cell) > largest for cell in cells.values()):
        return Broken("too large")
    try:
        return {name: cell.as_py() for name, cell in cells.items()}
    except UnicodeDecodeError:  # neither format checks its strings
        return Broken("bad UTF-8")


def _size(cell: Any) -> int:
    import pyarrow as pa

    value = cell.value if isinstance(cell, pa.DictionaryScalar) else cell
    content = value.as_buffer() if isinstance(value, pa.BinaryScalar) else None
    return content.size if content else 0


READERS: dict[str, Callable[[File, Sequence[str] | None, int], Rows]] = {
    **dict.fromkeys(LINE_SUFFIXES, json_rows),
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
