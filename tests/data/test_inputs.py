"""What of a folder is read, what is left and said, arrays, and ids that are none."""

import bz2
import gzip
import io
import json
import lzma
import random
from collections import Counter
from pathlib import Path

import pytest
from test_documents import AROUND, FIRST, LAST, read, zst

from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.reading.documents import DocumentReader
from lit_longctx.data.reading.faults import Broken, Faults
from lit_longctx.data.reading.inputs import Selection, files
from lit_longctx.data.reading.json_array import elements

LINE = b'{"text": "%s"}\n'
TAKEN = {
    "a.jsonl": LINE % b"a",
    "b.JSONL": LINE % b"b",
    "C.Json.GZ": gzip.compress(LINE % b"c"),
    "d.jsonl.xz": lzma.compress(LINE % b"d"),
    "e.jsonl.bz2": bz2.compress(LINE % b"e"),
    "f.TXT": b"f",
    "g.txt.xz": lzma.compress(b"g"),
    "h.gz": gzip.compress(b"h"),
    "readmes.md": b"i",
    "j.ndjson.ZST": zst(LINE % b"j"),
}
LEFT = {
    "k.csv": ".csv is not read",
    "l.csv.gz": ".csv.gz is not read",
    "m.parquet.gz": ".parquet.gz is not read",
    "n.png": ".png is not read",
    "LICENSE": "no ending",
    "README.md": "README",
    "sub/readme.TXT": "README",
    ".git/o.txt": "hidden",
    ".p.jsonl": "hidden",
    "sub/.cache/q.jsonl": "hidden",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {**TAKEN, **dict.fromkeys(LEFT, b"left")}.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "in"


def test_every_file_of_a_folder_is_read_or_left_for_a_reason(folder: Path, tmp_path: Path, capsys):
    found, kinds = read(folder)
    assert (sorted(text for text, _ in found), kinds) == (sorted("abcdefghij"), {})
    selection = Selection()
    assert len(files(str(folder), selection)) == len(TAKEN)
    left = {
        Path(p).relative_to(folder).as_posix(): r for r, ps in selection.left.items() for p in ps
    }
    assert left == LEFT
    content = prepare(str(folder), str(tmp_path / "out"), held_out=0)
    assert content["inputs"]["taken"][".jsonl"] == 2
    counts = {reason: entry["count"] for reason, entry in content["inputs"]["left"].items()}
    assert counts == Counter(LEFT.values())
    printed = capsys.readouterr().out
    assert "input files: 10 taken (2 .jsonl" in printed
    assert f"  left 3: hidden, first '{folder}/.git/o.txt'" in printed
    assert f"  left 1: .csv is not read, first '{folder}/k.csv'" in printed


def test_a_glob_names_files_of_any_kind_but_tables_that_are_not_read(folder: Path):
    selection = Selection()
    names = {file.name for file in files(f"{folder}/*", selection)}
    assert {"LICENSE", "README.md", "n.png"} <= names
    kinds = (".csv", ".csv.gz", ".parquet.gz")
    assert list(selection.left) == [f"{kind} is not read" for kind in kinds]


def test_a_file_that_is_not_read_is_refused_by_its_kind(folder: Path):
    for name in ("k.csv", "l.csv.gz", "m.parquet.gz"):
        with pytest.raises(ValueError, match=r"no file that is read: 1 of 1 are left"):
            files(str(folder / name))
    (folder / "only").mkdir()
    (folder / "only/.a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"1 of 1 are left \(hidden\); convert"):
        files(str(folder / "only"))


def test_packed_files_that_break_off_are_counted(tmp_path: Path):
    for name, pack in (("xz", lzma.compress), ("bz2", bz2.compress)):
        packed = pack(FIRST + LAST)
        (tmp_path / f"whole.jsonl.{name}").write_bytes(packed)
        assert read(tmp_path / f"whole.jsonl.{name}") == (AROUND, {})
        for kind, content in (("cut", packed[:-9]), ("junk", b"junk" * 50)):
            (tmp_path / f"{kind}.jsonl.{name}").write_bytes(content)
            found, kinds = read(tmp_path / f"{kind}.jsonl.{name}")
            assert (len(found) <= 2, kinds) == (True, {"broken archive": 1})


# ---- arrays


@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize("space", ["", "\ufeff\n ", "\n" * 3000])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_read_as_its_elements(tmp_path: Path, packing: str, space: str, indent):
    rows = [{"text": f'row {i} [{{\\" é', "id": f"{i}", "x": [i, {"y": None}]} for i in range(300)]
    content = (space + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n").encode()
    path = tmp_path / f"rows.json{packing}"
    path.write_bytes(gzip.compress(content) if packing else content)
    assert read(path) == ([(row["text"], row["id"]) for row in rows], {})


class Slow(io.BytesIO):
    """A stream that gives a few bytes at a time, as networks do."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(7)


def read_both(text: bytes) -> list:
    found = list(elements(io.BytesIO(text), 2**20))
    assert list(elements(Slow(text), 2**20)) == found or found == [Broken("bad UTF-8")]
    return found


def test_arrays_of_any_values_are_those_of_the_library():
    seeded = random.Random(0)

    def value(depth: int):
        kinds = [lambda: seeded.randrange(-(10**9), 10**9), lambda: seeded.random(), lambda: None]
        kinds += [lambda: True, lambda: 'é\\"[]{},: \n' * seeded.randrange(3)]
        if depth:
            kinds += [lambda: [value(depth - 1) for _ in range(seeded.randrange(4))]]
            kinds += [lambda: {f"k{i}": value(depth - 1) for i in range(seeded.randrange(4))}]
        return seeded.choice(kinds)()

    for _ in range(100):
        rows = [value(3) for _ in range(seeded.randrange(6))]
        text = json.dumps(rows, ensure_ascii=seeded.random() < 0.5, indent=seeded.choice([None, 2]))
        assert read_both(text.encode()) == rows


BAD = {
    "cut": (b"[1, 2", [1, 2, "broken JSON"]),
    "cut in a value": (b'[1, {"a": ', [1, "broken JSON"]),
    "trailing comma": (b"[1,]", [1, "broken JSON"]),
    "no comma": (b"[1 2]", [1, "broken JSON"]),
    "text behind": (b"[1] [2]", [1, "broken JSON"]),
    "empty": (b"[ ]", []),
    "not UTF-8": (b'[1, "\xff"]', ["bad UTF-8"]),
    "too deep": (b"[1, " + b"[" * 10**5, [1, "broken JSON"]),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_broken_about_an_array_ends_it(name: str):
    text, expected = BAD[name]
    found = [each.kind if isinstance(each, Broken) else each for each in read_both(text)]
    assert found == expected


def test_a_large_element_is_counted_and_those_behind_it_read():
    text = json.dumps([{"text": "x" * 100}, {"text": "y"}]).encode()
    assert list(elements(io.BytesIO(text), 50)) == [Broken("too large"), {"text": "y"}]
    assert list(elements(Slow(text), 50)) == [Broken("too large")]  # its end was not in sight


# ---- ids


def test_ids_that_repeat_are_said_and_split_by_file_and_number(tmp_path: Path, capsys):
    rows = [{"id": "same", "text": f"doc {i}"} for i in range(200)]
    rows += [{"id": f"own {i}", "text": f"other {i}"} for i in range(10)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    faults = Faults()
    names = [document.id for document in DocumentReader().documents([str(file)], faults)]
    assert names == [
        "same",
        *(f"rows.jsonl:{i}" for i in range(2, 201)),
        *(f"own {i}" for i in range(10)),
    ]
    content = prepare(str(file), str(tmp_path / "out"), held_out=0.3)
    held = content["splits"]["held_out"]["documents"]
    assert 0.15 < held / 210 < 0.45
    kind = "id that another row of the file has; split by file and number"
    assert content["notes"] == {kind: {"count": 199, "first": f"{file}:2"}}
    assert f"  199 rows: {kind}, first at {file}:2\n" in capsys.readouterr().out
