import gzip
import json
import struct
import sysconfig
from pathlib import Path

import fsspec
import fsspec.implementations.memory
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.registry import known_implementations

from lit_longctx.data.reading.documents import DocumentReader, Faults

CAP = 2000
FIRST, LAST = b'{"text": "first", "id": "1"}\n', b'{"text": "last \\u00e9", "id": "2"}\n'
AROUND = [("first", "1"), ("last é", "2")]


def read(*inputs, **settings):
    """Documents as (text, id), and how many faults of which kind."""
    faults = Faults(tolerated=1)
    found = list(DocumentReader(**settings).documents([str(i) for i in inputs], faults))
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
    names = ["7", "0", "a.jsonl:3", "a.jsonl:4", "a.jsonl:5", "[1]"]
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
    expected = [name or f"a.parquet:{i + 1}" for i, name in enumerate(names)]
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
    assert read(tmp_path) == ([(texts[n], n) for n in order], {})


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


def test_as_much_as_is_tolerated_and_no_more(tmp_path):
    faults = Faults(tolerated=0.01)
    path = tmp_path / "a.jsonl"
    path.write_bytes(rows(99) + b"broken\n")
    assert len(list(DocumentReader().documents([str(path)], faults))) == 99
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
        list(DocumentReader().documents([str(tmp_path)], faults))


def test_the_message_is_one_line_whatever_the_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "a\nb\udcff é" + "x" * 220
    Path(name).write_text("")
    faults = Faults(tolerated=0)
    list(DocumentReader().documents([name], faults))
    with pytest.raises(ValueError, match=r"first at a\\nb\\udcff éx{194}\)") as found:
        faults.check()
    assert "\n" not in str(found.value)
    str(found.value).encode()


def test_names_do_not_hang_on_how_the_input_is_spelled(tmp_path, monkeypatch):
    (tmp_path / "books").mkdir()
    (tmp_path / "books/a.jsonl").write_bytes(rows(2))
    (tmp_path / "books/b.txt").write_text("b")
    monkeypatch.chdir(tmp_path)
    spelled = ["books", "./books/", str(tmp_path / "books"), "../" + tmp_path.name + "/books"]
    spelled += ["books/*", f"{tmp_path}/books/*", f"memory:/{tmp_path}/books"]
    for path in (tmp_path / "books").iterdir():
        fsspec.filesystem("memory").pipe(str(path), path.read_bytes())
    expected = ["a.jsonl:1", "a.jsonl:2", "b.txt"]
    assert [[name for _, name in read(i)[0]] for i in spelled] == [expected] * len(spelled)
    assert [name for _, name in read("books/a.jsonl", "books/b.txt")[0]] == expected
    assert [name for _, name in read(".")[0]] == [f"books/{name}" for name in expected]


def test_equal_names_get_numbers_and_the_same_file_the_same_name(tmp_path):
    for folder in "abc":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(folder)
        (tmp_path / folder / "pack").mkdir()
        (tmp_path / folder / "pack" / "x.py").write_text("x")
    inputs = [tmp_path / f"{folder}/text.txt" for folder in "abc"]
    inputs.append(f"{tmp_path}/b/../a/text.txt")
    found, _ = read(*inputs)
    names = ["text.txt", "text.txt#2", "text.txt#3", "text.txt"]
    assert found == list(zip("abca", names, strict=True))
    found, _ = read(*(f"code:{tmp_path / folder}" for folder in "ab"))
    assert [name for _, name in found] == ["pack", "pack#2"]


def test_faults_show_the_whole_path(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(FIRST + b'{"text": ""}\n')
    faults = Faults(tolerated=1)
    list(DocumentReader().documents([str(tmp_path)], faults))
    assert faults.examples == {"empty text": f"{tmp_path}/a.jsonl:2"}


@pytest.fixture
def bucket():
    system = fsspec.filesystem("memory")
    system.store.clear()
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.jsonl.zst", "d.txt", "e.parquet", "f.arrow"):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": [name]}), sink)
        line = json.dumps({"text": name}).encode() + b"\n"
        content = {"txt": name.encode(), "gz": gzip.compress(line), "zst": zst(line)}
        content |= {"parquet": sink.getvalue().to_pybytes(), "arrow": arrow([name])}
        system.pipe(f"/bucket/x/{name}", content.get(name.rsplit(".")[-1], line))
    system.pipe("/bucket/x/picture.png", b"\x89PNG\0\xff")
    yield system
    system.store.clear()


def arrow(texts, **columns):
    table = pa.table({"text": pa.array(texts, pa.string()), **columns})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def test_urls_name_a_file_a_folder_or_a_glob(bucket):
    a, b, c, d, e, f = ("a.jsonl.gz", "b.jsonl", "sub/c.jsonl.zst", "d.txt", "e.parquet", "f.arrow")
    names = [f"{a}:1", f"{b}:1", d, f"{e}:1", f"{f}:1", f"{c}:1"]
    everything = (list(zip([a, b, d, e, f, c], names, strict=True)), {})
    assert read("memory://bucket/x") == everything
    assert read("memory://bucket/x/") == everything
    assert read("memory://bucket/x/*.jsonl") == ([(b, "b.jsonl:1")], {})
    assert read("memory://bucket/*/*.jsonl.gz") == ([(a, "x/a.jsonl.gz:1")], {})
    assert read("memory://bucket/x/**/*.zst") == ([(c, "sub/c.jsonl.zst:1")], {})
    assert read("memory://bucket/x/sub/c.jsonl.zst") == ([(c, "c.jsonl.zst:1")], {})


def test_what_cannot_be_listed_is_one_line(bucket, monkeypatch):
    with pytest.raises(ValueError, match="input memory://bucket/none matches no file"):
        read("memory://bucket/none")
    with pytest.raises(ValueError, match=r"input nosuch://x cannot be listed: .*nosuch") as found:
        read("nosuch://x")
    assert "\n" not in str(found.value)
    missing = {"class": "no_such_package.System", "err": "Install no_such_package to access x"}
    monkeypatch.setitem(known_implementations, "lacking", missing)
    with pytest.raises(ValueError, match=r"lacking://x cannot .*: Install no_such_package"):
        read("lacking://x")


@pytest.mark.parametrize("name", ["b.jsonl", "a.jsonl.gz", "sub/c.jsonl.zst", "e.parquet"])
def test_a_download_that_breaks_off_stops_the_run(bucket, monkeypatch, name):
    class Breaking(fsspec.implementations.memory.MemoryFile):
        def read(self, size=-1):
            raise ConnectionResetError("gone\naway")

    with bucket.open(f"/bucket/x/{name}") as file:
        monkeypatch.setattr(type(file), "read", Breaking.read)
        with pytest.raises(ValueError, match=r"reading memory:///?bucket.* failed: .*; try again"):
            read(f"memory://bucket/x/{name}")


def test_a_url_is_read_as_it_goes(bucket):
    bucket.pipe("/bucket/long.jsonl", rows(300_000))
    with bucket.open("/bucket/long.jsonl") as file:
        documents = DocumentReader().documents(["memory://bucket/long.jsonl"], Faults())
        assert [next(documents).text for _ in range(3)] == ["0", "1", "2"]
        assert file.tell() <= 2**21 < file.getbuffer().nbytes


def saved(folder, texts, shards=2):
    """A folder as `Dataset.save_to_disk` leaves it, without the library."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(arrow(texts[i::shards], number=range(len(texts[i::shards]))))
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": n} for n in names]})
    )
    (folder / "dataset_info.json").write_text("{}")
    return names


def test_a_saved_dataset(tmp_path):
    a, b = saved(tmp_path / "set", list("abcdefg"))
    names = [*(f"{a}:{i}" for i in (1, 2, 3, 4)), *(f"{b}:{i}" for i in (1, 2, 3))]
    expected = (list(zip("acegbdf", names, strict=True)), {})
    assert read(tmp_path / "set") == expected
    (tmp_path / "set" / "cache-1.arrow").write_bytes(arrow(["left over"]))
    assert read(tmp_path / "set") == expected
    assert read(tmp_path / "set" / a) == (expected[0][:4], {})


def test_a_saved_dataset_must_be_whole_and_one_split(tmp_path):
    names = saved(tmp_path / "books/train", list("abc"))
    saved(tmp_path / "books/test", list("de"))
    (tmp_path / "books/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"holds the splits train, test; name one: .*books/train$"):
        read(tmp_path / "books")
    with pytest.raises(ValueError, match=r"holds a saved dataset, books/t\w+; name it by itself$"):
        read(tmp_path)
    (tmp_path / "books/train" / names[1]).unlink()
    with pytest.raises(ValueError, match=rf"train lacks {names[1]}, which its state.json names$"):
        read(tmp_path / "books/train")
    (tmp_path / "books/train/state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"state\.json has no list '_data_files'"):
        read(tmp_path / "books/train")


def test_folders_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = [f"text {i} é" * (i % 50 + 1) for i in range(2500)]
    table = datasets.Dataset.from_dict({"other": range(2500), "text": texts})
    table.save_to_disk(str(tmp_path / "one"), num_shards=3)
    found, kinds = read(tmp_path / "one")
    assert ([text for text, _ in found], kinds) == (texts, {})
    shuffled = table.shuffle(seed=1).select(range(100))
    splits = datasets.DatasetDict({"train": shuffled, "test": table.select([7])})
    splits.save_to_disk(str(tmp_path / "two"))
    assert [text for text, _ in read(tmp_path / "two/train")[0]] == shuffled["text"][:]
    assert [text for text, _ in read(tmp_path / "two/test")[0]] == [texts[7]]
    with pytest.raises(ValueError, match=r"holds the splits train, test; name one: .*two/train$"):
        read(tmp_path / "two")


def test_what_a_repository_leaves_out(tmp_path):
    source_files(tmp_path)
    for name in ("node_modules/x.js", ".git/hook.py", ".env.py", "a/vendor/x.go", "a/.b/x.py"):
        path = tmp_path / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("left out")
    (tmp_path / "package/a/link.py").symlink_to(tmp_path / "single.py")
    (tmp_path / "package/loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "package/a/film.ts").write_bytes(b"G\0binary")
    (tmp_path / "odd").mkdir()
    Path(f"{tmp_path}/odd/\udcff.py").write_text("a name that is no UTF-8")
    found, kinds = read(f"code:{tmp_path}")
    texts = {name: text for text, name in found}
    assert texts["package"] == "# package/a/deep.c\nint deep;\n\n# package/b.py\nb = 1\n"
    assert "odd" not in texts
    assert kinds == {"NUL in text": 1, "lone surrogate": 1}


def test_files_stand_in_order_of_their_paths(tmp_path):
    names = ["p/b/x.py", "p/a.py", "p/b-c.py", "p/b.py", "p/B/z.py", "p/a/y.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("code")
    ((text, _),), _ = read(f"code:{tmp_path}")
    headers = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    assert headers == sorted(names, key=lambda name: name.split("/"))


def test_a_repository_over_the_cap_is_not_read_to_its_end(tmp_path, monkeypatch):
    for i in range(50):
        (tmp_path / f"p/{i:02}").mkdir(parents=True)
        (tmp_path / f"p/{i:02}/x.py").write_text("x" * (CAP // 4))
    read_text, opened = Path.read_text, []
    monkeypatch.setattr(Path, "read_text", lambda p, **k: opened.append(p) or read_text(p, **k))
    assert read(f"code:{tmp_path}", largest=CAP) == ([], {"too large": 1})
    assert len(opened) == 4
