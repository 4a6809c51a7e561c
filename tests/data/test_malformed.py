import gzip
import json
import os
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from test_documents import AROUND, CAP, FIRST, LAST, read, rows, zst

from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.reading.documents import DocumentReader

NO_FIELD, NO_STRING = "no field 'text'", "'text' is no string"
BAD_LINES = {
    "bad UTF-8": (b'{"text": "\xff\xfe"}', "bad UTF-8"),
    "latin-1": ('{"text": "é"}'.encode("latin-1"), "bad UTF-8"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16-le"), "bad UTF-8"),
    "cut off": (b'{"text": "unfinished', "broken JSON"),
    "two rows": (b'{"text": "a"} {"text": "b"}', "broken JSON"),
    "single quotes": (b"{'text': 'a'}", "broken JSON"),
    "raw NUL": (b'{"text": "a\0b"}', "broken JSON"),
    "raw control character": (b'{"text": "a\x01b"}', "broken JSON"),
    "nested open": (b"[" * 10**5, "broken JSON"),
    "nested closed": (b"[" * 10**5 + b"]" * 10**5, "broken JSON"),
    "nested beside": (
        b'{"text": "a", "x": ' + b'{"x":' * 10**5 + b"1" + b"}" * 10**5,
        "broken JSON",
    ),
    "huge number": (b'{"text": "a", "x": ' + b"9" * 10**5 + b"}", "broken JSON"),
    "missing field": (b'{"txt": "a"}', NO_FIELD),
    "empty object": (b"{}", NO_FIELD),
    "list": (b'["text", "a"]', NO_FIELD),
    "number": (b"7", NO_FIELD),
    "string": (b'"text"', NO_FIELD),
    "null row": (b"null", NO_FIELD),
    "NaN row": (b"NaN", NO_FIELD),
    "null": (b'{"text": null}', NO_STRING),
    "number as text": (b'{"text": 7}', NO_STRING),
    "NaN as text": (b'{"text": NaN}', NO_STRING),
    "infinity as text": (b'{"text": -Infinity}', NO_STRING),
    "list as text": (b'{"text": ["a"]}', NO_STRING),
    "object as text": (b'{"text": {"text": "a"}}', NO_STRING),
    "empty text": (b'{"text": ""}', "empty text"),
    "white text": (b'{"text": " \\n\\t\\u00a0"}', "empty text"),
    "NUL": (b'{"text": "a\\u0000b"}', "NUL in text"),
    "lone surrogate": (b'{"text": "a\\ud800b"}', "lone surrogate"),
    "surrogate bytes": (b'{"text": "a\xed\xa0\x80b"}', "lone surrogate"),
    "long line": (b'{"text": "' + b"x" * CAP + b'"}', "too large"),
    "long line, exactly one byte over": (b"x" * (CAP + 1), "too large"),
    "long blank line": (b" " * (CAP + 5), "too large"),
}
NESTED = [name for name in BAD_LINES if name.startswith("nested") or name == "huge number"]


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_counted_and_those_around_it_read(tmp_path, name):
    line, kind = BAD_LINES[name]
    (tmp_path / "a.jsonl").write_bytes(FIRST + line + b"\n" + LAST)
    largest = 2**28 if name in NESTED else CAP
    assert read(tmp_path / "a.jsonl", largest=largest) == (AROUND, {kind: 1})


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_bad_lines_of_packed_files_are_counted_and_those_around_them_read(tmp_path, packed):
    """All in a file: what is unpacked is split into lines before anything looks at them."""
    pack = {".gz": gzip.compress, ".zst": zst}[packed]
    path = tmp_path / f"a.jsonl{packed}"
    for largest, names in ((2**28, NESTED), (CAP, [n for n in BAD_LINES if n not in NESTED])):
        bad = [BAD_LINES[name] for name in names]
        path.write_bytes(pack(b"".join(FIRST + line + b"\n" + LAST for line, _ in bad)))
        found, kinds = read(path, largest=largest)
        assert [text for text, _ in found] == [text for text, _ in AROUND] * len(bad)
        assert kinds == Counter(kind for _, kind in bad)


def parquet(columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def arrow(columns):
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=100)
    return sink.getvalue().to_pybytes()


def astray():
    """An Arrow file whose second string ends far behind the data."""
    content = arrow({"text": ["a", "bbbbbbbb", "c"]})
    offsets = struct.pack("<4i", 0, 1, 9, 10)
    assert content.count(offsets) == 1
    return content.replace(offsets, struct.pack("<4i", 0, 1, 2**30, 10))


def unchecked(content):
    """A string array with these bytes, UTF-8 or not."""
    offsets = pa.py_buffer(struct.pack("<4i", 0, 1, 1 + len(content), 2 + len(content)))
    return pa.Array.from_buffers(
        pa.string(), 3, [None, offsets, pa.py_buffer(b"a" + content + b"c")]
    )


GZ, ZST = gzip.compress(rows(6000)), zst(rows(20000))
PARQUET = parquet({"text": [f"{i}" for i in range(1000)]})
ARROW = arrow({"text": [f"{i}" for i in range(1000)]})
BAD_FILES = {
    "empty.jsonl": (b"", "empty file", 0),
    "empty.jsonl.gz": (gzip.compress(b""), "empty file", 0),
    "nothing.jsonl.gz": (b"", "empty file", 0),
    "nothing.jsonl.zst": (b"", "empty file", 0),
    "blank.jsonl": (b"\n\n  \n", "empty file", 0),
    "no rows.parquet": (parquet({"text": pa.array([], pa.string())}), "empty file", 0),
    "empty.txt": (b"", "empty text", 0),
    "white.md": (b" \n", "empty text", 0),
    "latin.txt": ("é".encode("latin-1"), "bad UTF-8", 0),
    "zeros.txt": (bytes(100), "NUL in text", 0),
    "large.txt": (b"x" * (CAP + 1), "too large", 0),
    "large.txt.gz": (gzip.compress(b"x" * (CAP + 1)), "too large", 0),
    "junk.jsonl.gz": (b"junk" * 50, "broken archive", 0),
    "junk.jsonl.zst": (b"junk" * 50, "broken archive", 0),
    "junk.txt.zst": (b"junk" * 50, "broken archive", 0),
    "after.jsonl.gz": (gzip.compress(rows(5)) + b"junk", "broken archive", 5),
    "after.jsonl.zst": (zst(rows(5)) + b"junk", "broken archive", 5),
    "cut.jsonl.gz": (GZ[: len(GZ) // 2], "broken archive", None),
    "cut.jsonl.zst": (ZST[: len(ZST) // 2], "broken archive", None),
    "cut short.jsonl.zst": (zst(FIRST)[:-1], "broken archive", 0),
    "cut header.jsonl.zst": (zst(FIRST)[:3], "broken archive", 0),
    "checksum.jsonl.gz": (GZ[:-8] + bytes(4) + GZ[-4:], "broken archive", 6000),
    "checksum.jsonl.zst": (zst(rows(5), write_checksum=True)[:-4] + bytes(4), "broken archive", 0),
    "cut.txt.zst": (zst(FIRST)[:-2], "broken archive", 0),
    "cut.txt.gz": (gzip.compress(FIRST)[:-2], "broken archive", 0),
    "cut.parquet": (PARQUET[: len(PARQUET) // 2], "broken parquet", 0),
    "cut tail.parquet": (PARQUET[:-1], "broken parquet", 0),
    "no.parquet": (FIRST + LAST, "broken parquet", 0),
    "nothing.parquet": (b"", "broken parquet", 0),
    "null.parquet": (parquet({"text": ["a", None, "c"]}), NO_STRING, 2),
    "UTF-8.parquet": (parquet({"text": unchecked(b"\xff\xfe")}), "bad UTF-8", 2),
    "long.parquet": (parquet({"text": ["a", "x" * (CAP + 1), "c"]}), "too large", 2),
    "bytes.parquet": (parquet({"text": [b"a"]}), NO_STRING, 0),
    "numbers.parquet": (parquet({"text": [1.5]}), NO_STRING, 0),
    "other.parquet": (parquet({"txt": ["a"]}), NO_FIELD, 0),
    "UTF-16.txt": ("a".encode("utf-16"), "bad UTF-8", 0),
    "UTF-16.jsonl": ('{"text": "a"}'.encode("utf-16"), "bad UTF-8", 0),
    "array.json": (b"[\n", "broken JSON", 0),
    "cut.arrow": (ARROW[: len(ARROW) // 2], "broken arrow", None),
    "junk.arrow": (b"junk" * 50, "broken arrow", 0),
    "nothing.arrow": (b"", "broken arrow", 0),
    "no rows.arrow": (arrow({"text": pa.array([], pa.string())}), "empty file", 0),
    "astray.arrow": (astray(), "broken arrow", 0),
    "null.arrow": (arrow({"text": ["a", None, "c"]}), NO_STRING, 2),
    "UTF-8.arrow": (arrow({"text": unchecked(b"\xff\xfe")}), "bad UTF-8", 2),
    "long.arrow": (arrow({"text": ["a", "x" * (CAP + 1), "c"]}), "too large", 2),
    "numbers.arrow": (arrow({"text": [7]}), NO_STRING, 0),
    "other.arrow": (arrow({"txt": ["a"]}), NO_FIELD, 0),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_counted_and_those_around_it_read(tmp_path, name):
    content, kind, good = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "a.jsonl").write_bytes(FIRST)
    (tmp_path / "z.jsonl").write_bytes(LAST)
    found, kinds = read(tmp_path / "a.jsonl", tmp_path / name, tmp_path / "z.jsonl", largest=CAP)
    assert [found[0], found[-1]] == AROUND
    assert kinds == {kind: 1}
    inside = [text for text, _ in found[1:-1]]
    if good is None:
        assert inside == [str(i) for i in range(len(inside))]
        assert 300 < len(inside) < 20000
    elif name.endswith((".parquet", ".arrow")):
        assert inside == ["a", "c"][:good]
    else:
        assert inside == [str(i) for i in range(good)]


def dangling(path):
    path.symlink_to("nowhere")


def locked(path):
    path.write_bytes(FIRST)
    path.chmod(0)


NOT_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="a Linux file")
BAD_PLACES = [
    pytest.param(Path.mkdir, {}, id="a folder"),
    pytest.param(dangling, {"unreadable: No such file or directory": 1}, id="a link to nothing"),
    pytest.param(locked, {"unreadable: Permission denied": 1}, id="locked", marks=NOT_ROOT),
]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "txt", "parquet", "arrow"])
@pytest.mark.parametrize(("make", "kinds"), BAD_PLACES)
def test_a_bad_place_is_counted_and_files_around_it_read(tmp_path, make, kinds, kind):
    make(tmp_path / f"b.{kind}")
    (tmp_path / "a.jsonl").write_bytes(FIRST)
    (tmp_path / "z.jsonl").write_bytes(LAST)
    assert read(tmp_path) == (AROUND, kinds)
    assert read(tmp_path / "*") == (AROUND, kinds)


@LINUX
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "txt"])
def test_a_disk_that_fails_is_counted(tmp_path, kind):
    (tmp_path / f"b.{kind}").symlink_to("/proc/self/mem")  # opens, and cannot be read at 0
    (tmp_path / "a.jsonl").write_bytes(FIRST)
    assert read(tmp_path) == (AROUND[:1], {"unreadable: Input/output error": 1})


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("packed", [".zst", ".gz"])
def test_a_bomb_is_stopped_at_the_cap(tmp_path, kind, packed):
    bomb = bytes(2**27)
    content = zst(bomb) if packed == ".zst" else gzip.compress(bomb, 1)
    assert len(content) < 2**20
    around = (zst if packed == ".zst" else gzip.compress)(b"\n" + LAST)
    path = tmp_path / f"a.{kind}{packed}"
    path.write_bytes(content + (around if kind == "jsonl" else b""))
    tracemalloc.start()
    found, kinds = read(path, largest=2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == (AROUND[1:] if kind == "jsonl" else [])
    assert kinds == {"too large": 1}
    assert peak < 2**25


def test_too_wide_a_window_is_refused(tmp_path):
    settings = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(FIRST) + packer.flush())
    assert read(tmp_path / "a.jsonl.zst") == ([], {"broken archive": 1})


PEAK = """
import re, sys
import pyarrow.ipc, pyarrow.parquet
from lit_longctx.data.reading.documents import Faults, DocumentReader

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

before = peak()
faults = Faults(1.0)
for document in DocumentReader(largest=2**25).documents(sys.argv[1:], faults):
    assert len(document.text) == 29 * 2**20
print(peak() - before, faults.read, faults.kinds.total())
"""
LONG = ("the quick brown\n fox " * (2**21))[: 29 * 2**20]
BIG = {
    "a.txt": (lambda: LONG.encode(), 64),
    "a.jsonl": (lambda: json.dumps({"text": LONG}).encode(), 64),
    "a.jsonl.gz": (lambda: gzip.compress(json.dumps({"text": LONG}).encode(), 1), 64),
    "a.jsonl.zst": (lambda: zst(json.dumps({"text": LONG}).encode()), 80),
    "a.arrow": (lambda: arrow({"text": [LONG]}), 96),
    "a.parquet": (lambda: parquet({"text": [LONG]}), 176),
    "bomb.txt.zst": (lambda: zst(bytes(2**28)), 64),
    "bomb.jsonl.gz": (lambda: gzip.compress(bytes(2**28), 1), 64),
}


@LINUX
@pytest.mark.parametrize(
    "name", [n if i < 2 else pytest.param(n, marks=pytest.mark.slow) for i, n in enumerate(BIG)]
)
def test_memory_is_bounded_by_the_largest_document(tmp_path, name):
    """The cap is 32 MiB. Twice is what JSON needs: the line as a str, and the text in it.

    zstandard unpacks up to 8 MiB at a time; Arrow and parquet hold their columns besides.
    """
    make, bound = BIG[name]
    (tmp_path / name).write_bytes(make())
    command = [sys.executable, "-c", PEAK, str(tmp_path / name)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert float(found[0]) < bound
    assert found[1:] == (["0", "1"] if name.startswith("bomb") else ["1", "0"])


def everything_malformed(folder):
    folder.mkdir()
    for i, (line, _) in enumerate(BAD_LINES.values()):
        (folder / f"line {i}.jsonl").write_bytes(rows(2) + line + b"\n" + rows(2))
    for name, (content, *_) in BAD_FILES.items():
        (folder / name).write_bytes(content)
    return len(BAD_LINES) + len(BAD_FILES)


@pytest.mark.slow
def test_prepare_over_everything_malformed(tmp_path, capsys):
    broken = everything_malformed(tmp_path / "in")
    (tmp_path / "odd name.jsonl").write_bytes(b'{"text": "", "id": "\\ud800\\n"}')
    out = tmp_path / "out"
    reader = DocumentReader(largest=CAP)
    with pytest.raises(ValueError, match="documents are broken") as found:
        prepare([str(tmp_path)], str(out), reader=reader, tolerated=0)
    assert "\n" not in str(found.value)
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []

    content = prepare([str(tmp_path)], str(out), reader=reader, tolerated=0.5, held_out=0)
    kinds = {kind: fault["count"] for kind, fault in content["broken"].items()}
    assert sum(kinds.values()) == broken + 1
    assert kinds["empty file"] == 7
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  skipped") for line in lines) == len(kinds)
    assert content["splits"]["train"]["documents"] > 4 * len(BAD_LINES)
