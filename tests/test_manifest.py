import hashlib
import json
import random
from pathlib import Path

import pytest

from lit_longctx import manifest

FILES = {"chunk.bin": 5000, "part/index.json": 300, "part/deep/weights": 1, "name with ö": 700}


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "data"
    generator = random.Random(0)
    with manifest.whole_folder(target) as temporary:
        for name, size in FILES.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(generator.randbytes(size))
        hashes = manifest.hash_files(temporary)
        manifest.seal(temporary, hashes, bos=256, share=0.25, counts={1024: 3}, name="ö")
    return target


def damaged(folder, path, content):
    """What verify says once `path` holds `content`; the file is restored."""
    whole = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(ValueError) as found:  # noqa: PT011
        manifest.verify(folder)
    path.write_bytes(whole)
    return str(found.value)


def test_a_whole_folder_is_accepted_and_described(folder):
    content = manifest.verify(folder)
    assert content["bos"] == 256
    assert content["share"] == 0.25
    assert content["counts"] == {"1024": 3}
    assert content["name"] == "ö"
    assert content["files"] == {
        name: {"bytes": size, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
        for name, size in sorted(FILES.items())
    }


@pytest.mark.parametrize("name", [*FILES, manifest.NAME])
def test_every_flipped_bit_is_detected(folder, name):
    path = folder / name
    whole = path.read_bytes()
    generator = random.Random(name)
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        message = damaged(folder, path, bytes(flipped))
        assert str(path) in message
        assert "\n" not in message
    manifest.verify(folder)


@pytest.mark.parametrize("name", ["chunk.bin", manifest.NAME])
def test_every_truncation_is_detected(folder, name):
    path = folder / name
    whole = path.read_bytes()
    places = [0, len(whole) - 1, *random.Random(0).sample(range(1, len(whole) - 1), 18)]
    for place in places:
        assert str(path) in damaged(folder, path, whole[:place])


def test_growth_is_detected(folder):
    path = folder / "chunk.bin"
    message = damaged(folder, path, path.read_bytes() + b"\0")
    assert message == f"{path} is torn: expected 5000 bytes, got 5001"


@pytest.mark.parametrize("name", [*FILES, manifest.NAME])
def test_every_missing_file_is_detected(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=r"is missing|is not finished") as found:
        manifest.verify(folder)
    assert name in str(found.value)


def test_ranks_share_the_checking(folder):
    (folder / "part/deep/weights").write_bytes(b"!!")
    refused = []
    for rank in range(3):
        try:
            manifest.verify(folder, rank, 3)
        except ValueError:
            refused.append(rank)
    assert refused == [sorted(FILES).index("part/deep/weights") % 3]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"files": {}}', '{"files": []}'])
def test_a_torn_manifest_is_one_clear_error(folder, text):
    (folder / manifest.NAME).write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is torn; make the folder anew$"):
        manifest.read(folder)


def test_a_missing_manifest_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"is not finished: it has no manifest\.json$"):
        manifest.verify(tmp_path)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_block_leaves_nothing(tmp_path, error):
    def fail():
        with manifest.whole_folder(tmp_path / "data") as temporary:
            (temporary / "part").mkdir()
            (temporary / "part/file").write_text("half")
            assert not (tmp_path / "data").exists()
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused_and_kept(folder):
    before = sorted(p.name for p in folder.parent.iterdir())
    with (
        pytest.raises(ValueError, match=r"data exists already; choose another folder or remove it"),
        manifest.whole_folder(folder),
    ):
        pytest.fail("the block must not run")
    manifest.verify(folder)
    assert sorted(p.name for p in folder.parent.iterdir()) == before


def test_a_target_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "data"

    def be_late():
        with manifest.whole_folder(target) as temporary:
            (temporary / "mine").write_text("late")
            target.mkdir()
            (target / "theirs").write_text("early")

    with pytest.raises(ValueError, match="data exists already"):
        be_late()
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
        "data",
        "data/theirs",
    ]


def test_write_text_replaces_in_one_step(tmp_path):
    path = tmp_path / "latest"
    path.write_text("old")
    with open(path) as reader:
        manifest.write_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_the_manifest_is_plain_json(folder):
    content = json.loads((folder / manifest.NAME).read_text())
    assert list(content)[:5] == ["bos", "share", "counts", "name", "files"]


@pytest.mark.parametrize("name", ["../x", "/etc/x", "held_out/y/../../../evil.txt", "a\\..\\b", ""])
def test_a_name_that_leads_out_of_the_folder_is_refused(name: str, tmp_path: Path):
    manifest.write_text(
        tmp_path / manifest.NAME,
        manifest._signed({"files": {name: {"bytes": 0, "sha256": ""}}}),
    )
    for call in (manifest.read, manifest.verify, manifest.verify_sizes):
        with pytest.raises(ValueError, match="lists a file outside of itself"):
            call(tmp_path)
