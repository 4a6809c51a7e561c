import gzip
import json
import struct
import sysconfig
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lit_longctx.data.documents import Faults, Reader
from lit_longctx.data.prepare import prepare

CAP = 2000
FIRST, LAST = b'{"text": "first", "id": "1"}\n', b'{"text": "last \\u00e9", "id": "2"}\n'
AROUND = [("first", "1"), ("last é", "2")]


def read(*inputs, **settings):
    """Documents as (text, id), and how many faults of which kind."""
    faults = Faults(tolerated=1)
    found = list(Reader(**settings).documents([str(i) for i in inputs], faults))
    assert faults.read == len(found)
    assert set(faults.examples) == set(faults.kinds)
    return [tuple(document) for document in found], dict(faults.kinds)


def skippable_frame(content):
    return b"\x50\x2a\x4d\x18" + struct.pack("<I", len(content)) + content


def zst(content, **settings):
    return zstandard.ZstdCompressor(**settings).compress(content)


def rows(number):
    return b"".join(b'{"text": "%d"}\n' % i for i in range(number))


ARCHIVES = {
    "a.jsonl": FIRST + LAST,
    "a.ndjson": FIRST + LAST.rstrip(),
    "a.json": FIRST.replace(b"\n", b"\r\n") + LAST,
    "a.v1.jsonl.gz": gzip.compress(FIRST + LAST),
    "members.jsonl.gz": gzip.compress(FIRST) + gzip.compress(LAST),
    "a.jsonl.zst": zst(FIRST + LAST),
    "frames.jsonl.zst": zst(FIRST) + skippable_frame(b"index") + zst(LAST),
    "torn_lines.jsonl.zst": zst(FIRST[:9]) + zst(FIRST[9:] + LAST),
    "a[1]{2}.jsonl": FIRST + LAST,
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_lines_however_packed(tmp_path, name):
    (tmp_path / name).write_bytes(ARCHIVES[name])
    assert read(tmp_path / name) == (AROUND, {})


def test_a_long_zst_is_read_as_it_was_written(tmp_path):
    texts = [f"{i} " * (i % 700) + "." for i in range(3000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zst(lines[:1_000_000]) + zst(lines[1_000_000:]))
    found, kinds = read(tmp_path / "a.jsonl.zst")
    assert [text for text, _ in found] == texts
    assert kinds == {}


def test_other_fields_and_names_of_rows(tmp_path):
    lines = ['{"body": "a", "key": 7}', '{"body": "b", "key": 0}', '{"body": "c"}']
    lines += ['{"body": "d", "key": null}', '{"body": "e", "key": ""}', '{"body": "f", "key": [1]}']
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    found, kinds = read(path, text_field="body", id_field="key")
    names = ["7", "0", f"{path}:3", f"{path}:4", f"{path}:5", "[1]"]
    assert found == list(zip("abcdef", names, strict=True))
    assert kinds == {}


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet(tmp_path, kind):
    path = tmp_path / "a.parquet"
    texts = [f"text {i}" for i in range(150)]
    names = [f"name {i}" if i % 2 else None for i in range(150)]
    table = pa.table({"other": range(150), "text": pa.array(texts, kind), "id": names})
    pq.write_table(table, path, row_group_size=70)
    expected = [name or f"{path}:{i + 1}" for i, name in enumerate(names)]
    assert read(path) == (list(zip(texts, expected, strict=True)), {})


def test_text_folder(tmp_path):
    texts = {
        "b.txt": "b\r\n",
        "a/z.md": "z",
        "a/é.rst": "é",
        "c.txt.gz": "packed",
        "BOM.txt": "bom",
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        content = text.encode("utf-8-sig" if name.startswith("BOM") else "utf-8")
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\xff")
    order = ["BOM.txt", "a/z.md", "a/é.rst", "b.txt", "c.txt.gz"]
    assert read(tmp_path) == ([(texts[n], str(tmp_path / n)) for n in order], {})


def test_a_glob_and_the_order_of_inputs(tmp_path):
    for name in ("part-2.jsonl", "part-1.jsonl", "other.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    found, _ = read(tmp_path / "part-*.jsonl", tmp_path / "other.jsonl")
    assert [text for text, _ in found] == ["part-1.jsonl", "part-2.jsonl", "other.jsonl"]


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "*.nothing", "code:missing", "code:a.txt", "empty"]
)
def test_an_input_that_is_not_there_is_refused_by_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("a file is no source tree")
    with pytest.raises(ValueError, match=r"matches no file|is no folder") as found:
        read(name)
    assert name in str(found.value)


def source_files(tmp_path):
    files = {
        "package/b.py": "b = 1\n",
        "package/__init__.py": "",
        "package/a/deep.c": "int deep;\n",
        "package/a/notes.txt": "no code",
        "package/__pycache__/b.py": "no source",
        "single.py": "single = 1\n",
        "BOM.py": "\ufeffbom = 1\n",
        ".hidden/x.py": "hidden",
        "nothing/notes.txt": "no code",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)


def test_a_source_tree_has_one_document_per_package(tmp_path):
    source_files(tmp_path)
    package = "# package/a/deep.c\nint deep;\n\n# package/b.py\nb = 1\n"
    assert read(f"code:{tmp_path}") == (
        [
            ("# BOM.py\nbom = 1\n", "BOM.py"),
            (package, "package"),
            ("# single.py\nsingle = 1\n", "single.py"),
        ],
        {},
    )


def test_a_source_file_that_cannot_be_read_leaves_the_package_standing(tmp_path):
    source_files(tmp_path)
    (tmp_path / "package/a/latin.py").write_bytes("é".encode("latin-1"))
    (tmp_path / "package/a/long.sql").write_text("x" * (CAP + 1))
    found, kinds = read(f"code:{tmp_path}", largest=CAP)
    assert [text.count("# package/") for text, name in found if name == "package"] == [2]
    assert kinds == {"bad UTF-8": 1, "too large": 1}


def test_a_package_over_the_cap_is_counted(tmp_path):
    (tmp_path / "package").mkdir()
    for i in range(3):
        (tmp_path / f"package/{i}.py").write_text("x" * (CAP // 2))
    (tmp_path / "single.py").write_text("x = 1")
    found, kinds = read(f"code:{tmp_path}", largest=CAP)
    assert [name for _, name in found] == ["single.py"]
    assert kinds == {"too large": 1}


def test_stdlib():
    found, _ = read("stdlib")
    texts = {name: text for text, name in found}
    assert len(texts) == len(found) > 150
    assert not {"test", "site-packages", "idlelib"} & set(texts)
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.joinpath("json").glob("*.py"), key=lambda path: path.name)
    assert texts["json"] == "\n".join(f"# json/{f.name}\n{f.read_text()}" for f in files)
    assert texts["heapq.py"] == "# heapq.py\n" + root.joinpath("heapq.py").read_text()


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
    "nested beside": (b'{"text": "a", "x": ' + b'{"x":' * 10**5 + b"1" + b"}" * 10**5 + b"}",) * 2,
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
BAD_LINES["nested beside"] = (BAD_LINES["nested beside"][0], "broken JSON")
NESTED = [name for name in BAD_LINES if name.startswith("nested") or name == "huge number"]


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_counted_and_those_around_it_read(tmp_path, name, packed):
    line, kind = BAD_LINES[name]
    content = FIRST + line + b"\n" + LAST
    path = tmp_path / f"a.jsonl{packed}"
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zst}[packed]
    path.write_bytes(pack(content))
    largest = 2**28 if name in NESTED else CAP
    assert read(path, largest=largest) == (AROUND, {kind: 1})


def test_a_line_of_exactly_the_cap_is_read(tmp_path):
    line = b'{"text": "%b"}\n'
    text = b"x" * (CAP - len(line % b""))
    (tmp_path / "a.jsonl").write_bytes(FIRST + line % text + line % (text + b"x") + LAST)
    found, kinds = read(tmp_path / "a.jsonl", largest=CAP)
    assert [text for text, _ in found] == ["first", text.decode(), "last é"]
    assert kinds == {"too large": 1}


@pytest.mark.parametrize(
    "extra",
    [
        b"\n\n \t\r\n",
        b'{"text": "a", "x": NaN, "y": Infinity}\n',
        b'{"text": "a", "x": null, "x": {"y": [1]}}\n',
        b'{"text": "a", "id": "\\ud800"}\n',
        b'{"text": "\\ud83d\\ude00"}\n',
    ],
    ids=["blank lines", "NaN beside", "twice the same key", "odd name", "surrogate pair"],
)
def test_what_is_odd_but_no_fault(tmp_path, extra):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + FIRST + extra + LAST)
    found, kinds = read(tmp_path / "a.jsonl")
    assert [found[0], found[-1]] == AROUND
    assert [text for text, _ in found[1:-1]] in ([], ["a"], ["😀"])
    assert (len(found) == 3) == bool(extra.strip())
    assert kinds == {}


def parquet(columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def unchecked(content):
    """A string array with these bytes, UTF-8 or not."""
    offsets = pa.py_buffer(struct.pack("<4i", 0, 1, 1 + len(content), 2 + len(content)))
    return pa.Array.from_buffers(
        pa.string(), 3, [None, offsets, pa.py_buffer(b"a" + content + b"c")]
    )


GZ, ZST = gzip.compress(rows(6000)), zst(rows(20000))
PARQUET = parquet({"text": [f"{i}" for i in range(1000)]})
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
        assert 1000 < len(inside) < 20000
    elif name.endswith(".parquet"):
        assert inside == ["a", "c"][:good]
    else:
        assert inside == [str(i) for i in range(good)]


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


def test_as_much_as_is_tolerated_and_no_more(tmp_path):
    faults = Faults(tolerated=0.01)
    path = tmp_path / "a.jsonl"
    path.write_bytes(rows(99) + b"broken\n")
    assert len(list(Reader().documents([str(path)], faults))) == 99
    faults.check()
    faults.read -= 1
    with pytest.raises(ValueError, match="1 of 99 documents are broken") as found:
        faults.check()
    assert str(found.value) == (
        "1 of 99 documents are broken (tolerated: 1.0%), most often broken JSON "
        f"(1, first at {path}:100); mend the input or raise --tolerated"
    )


def test_a_hopeless_input_stops_early(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"broken\n" * 100_000)
    faults = Faults(tolerated=0.5)
    with pytest.raises(ValueError, match="1000 of 1000 documents are broken"):
        list(Reader().documents([str(tmp_path)], faults))


def test_the_message_is_one_line_whatever_the_names(tmp_path):
    row = json.dumps({"text": "", "id": "a\nb\ud800 é" + "x" * 1000})
    (tmp_path / "a.jsonl").write_text(row)
    faults = Faults(tolerated=0)
    list(Reader().documents([str(tmp_path)], faults))
    with pytest.raises(ValueError, match=r"first at a\\nb\\ud800 éx{194}\)") as found:
        faults.check()
    assert "\n" not in str(found.value)
    str(found.value).encode()


def everything_malformed(folder):
    folder.mkdir()
    for i, (line, _) in enumerate(BAD_LINES.values()):
        (folder / f"line {i}.jsonl").write_bytes(rows(2) + line + b"\n" + rows(2))
    for name, (content, *_) in BAD_FILES.items():
        (folder / name).write_bytes(content)
    return len(BAD_LINES) + len(BAD_FILES)


def test_prepare_over_everything_malformed(tmp_path, capsys):
    broken = everything_malformed(tmp_path / "in")
    (tmp_path / "odd name.jsonl").write_bytes(b'{"text": "", "id": "\\ud800\\n"}')
    out = tmp_path / "out"
    reader = Reader(largest=CAP)
    with pytest.raises(ValueError, match="documents are broken") as found:
        prepare([str(tmp_path)], str(out), reader=reader, tolerated=0)
    assert "\n" not in str(found.value)
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []

    content = prepare([str(tmp_path)], str(out), reader=reader, tolerated=0.5, held_out=0)
    kinds = {kind: fault["count"] for kind, fault in content["broken"].items()}
    assert sum(kinds.values()) == broken + 1
    assert kinds["empty file"] == 6
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  skipped") for line in lines) == len(kinds)
    assert content["splits"]["train"]["documents"] > 4 * len(BAD_LINES)
