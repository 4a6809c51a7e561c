import json
import multiprocessing
import pickle
import random
import shutil

import numpy as np
import pytest
from litdata import StreamingDataset, TokensLoader
from litdata.streaming.writer import BinaryWriter

from lit_longctx import manifest
from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.store.data_manifest import Manifest, SplitInfo
from lit_longctx.data.store.windows import OPEN_CHUNKS, Windows
from lit_longctx.data.tokens.info import TokenizerInfo

BOS, EOS = 256, 257
CHUNK = 1536


def make(folder, documents, seed=0, **settings):
    """Prepare random documents; the flat stream they make, token by token."""
    generator = random.Random(seed)
    texts = [
        "".join(generator.choices("abcdefgh ", k=generator.randint(1, 900))) for _ in documents
    ]
    texts = [text + "." for text in texts]
    rows = folder.with_suffix(".jsonl")
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(rows)], str(folder), held_out=0, **{"chunk_tokens": CHUNK, **settings})
    flat = [token for text in texts for token in (BOS, *text.encode(), EOS)]
    return flat + [BOS] * (-len(flat) % 256)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("windows") / "data"
    return folder, make(folder, range(60))


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "copy")


def change(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("length", [256, 512, 768, 1024, 1280, 1536])
def test_windows_are_slices_of_the_flat_stream(whole, length):
    folder, flat = whole
    windows = Windows(folder, "train", length)
    expected = [flat[k : k + length + 1] for k in range(0, len(flat) - length, length)]
    assert len(windows) == len(expected) > 10
    assert [windows[i].tolist() for i in range(len(windows))] == expected
    assert windows[0].dtype == np.int64
    assert windows.tokens == len(flat) == len(windows) * length + windows.dropped


def test_windows_in_any_order_and_again(whole):
    folder, flat = whole
    windows = Windows(folder, "train", 512)
    generator = random.Random(0)
    for index in generator.choices(range(len(windows)), k=200):
        assert windows[index].tolist() == flat[512 * index : 512 * index + 513]


def test_every_token_but_the_dropped_is_an_input_once(whole):
    folder, flat = whole
    windows = Windows(folder, "train", 768)
    inputs = [token for i in range(len(windows)) for token in windows[i][:-1].tolist()]
    assert inputs == flat[: len(flat) - windows.dropped]


@pytest.mark.parametrize("tokens", [256, 512, 1536, 1792])
def test_a_window_needs_one_token_beyond_it(tmp_path, tokens):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * (tokens - 2)}))
    prepare([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), held_out=0, chunk_tokens=CHUNK)
    windows = Windows(tmp_path / "out", "train", 256)
    assert windows.tokens == tokens
    assert len(windows) == tokens // 256 - 1
    assert windows.dropped == 256
    if len(windows):
        assert windows[len(windows) - 1].tolist()[-1] == ord("x")


@pytest.mark.parametrize("index", [-1, 10**6])
def test_a_window_that_is_not_there_is_an_index_error(whole, index):
    windows = Windows(whole[0], "train", 256)
    with pytest.raises(IndexError, match=rf"window {index} of {len(windows)}"):
        windows[index]
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_longer_than_a_chunk_is_refused_with_the_cure(whole):
    message = r"window 1792 exceeds chunk of 1536 tokens; prepare with --chunk_tokens 1792 or more"
    with pytest.raises(ValueError, match=f"^{message}$"):
        Windows(whole[0], "train", 1792)


@pytest.mark.parametrize("length", [0, -256, 1, 100, 255, 257, 1000])
def test_no_multiple_of_the_block_is_refused(whole, length):
    with pytest.raises(
        ValueError, match=f"^window {length} is no multiple of the block of 256 tokens$"
    ):
        Windows(whole[0], "train", length)


def test_a_missing_folder_is_refused_with_the_cure(tmp_path):
    message = r"missing does not exist; make it with lit_longctx prepare$"
    with pytest.raises(ValueError, match=message):
        Windows(tmp_path / "missing", "train", 256)


def test_a_folder_without_manifest_or_split_is_refused(copy):
    with pytest.raises(ValueError, match="holds no split 'validation'"):
        Windows(copy, "validation", 256)
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"is not finished: it has no manifest\.json$"):
        Windows(copy, "train", 256)


@pytest.mark.parametrize("at", [0, 5, 12, 1000, -1])
def test_an_altered_chunk_stops_at_its_first_touch(whole, copy, at):
    flat = whole[1]
    path = copy / "train/chunk-0-1.bin"
    change(path, at)
    windows = Windows(copy, "train", 512)
    message = rf"^{path} is altered: its SHA-256 is not the one in manifest\.json$"
    assert windows[0].tolist() == flat[:513]
    assert windows[1].tolist() == flat[512:1025]
    for index in (2, 3, 5):  # 2 lies in chunk 0, but for its last target
        with pytest.raises(ValueError, match=message):
            windows[index]
    assert windows[6].tolist() == flat[3072:3585]
    change(path, at)
    assert windows[3].tolist() == flat[1536:2049]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"chunk-0-2\.bin is missing"),
        (lambda path: path.write_bytes(b""), r"chunk-0-2\.bin is torn: expected 3084 bytes, got 0"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "expected 3084 bytes, got 3082"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "expected 3084 bytes, got 3085"),
    ],
    ids=["missing", "empty", "cut", "grown"],
)
def test_a_torn_chunk_stops_at_its_first_touch(copy, damage, message):
    damage(copy / "train/chunk-0-2.bin")
    windows = Windows(copy, "train", 256)
    windows[0]
    with pytest.raises(ValueError, match=message):
        windows[13]


def test_an_altered_index_stops_at_the_first_window(copy):
    path = copy / "train/index.json"
    path.write_text(path.read_text().replace("chunk-0-1.bin", "chunk-0-2.bin", 1))
    windows = Windows(copy, "train", 256)
    with pytest.raises(ValueError, match=rf"^{path} is altered"):
        windows[0]


def test_a_folder_made_anew_is_read_anew(tmp_path):
    for seed in (1, 2):
        flat = make(tmp_path / "data", range(5), seed)
        assert Windows(tmp_path / "data", "train", 256)[1].tolist() == flat[256:513]
        shutil.rmtree(tmp_path / "data")


def test_ranks_in_the_environment_change_nothing(whole, monkeypatch):
    folder, flat = whole
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("GLOBAL_RANK", "3")
    monkeypatch.setenv("RANK", "3")
    windows = Windows(folder, "train", 1024)
    expected = [flat[k : k + 1025] for k in range(0, len(flat) - 1024, 1024)]
    assert [windows[i].tolist() for i in range(len(windows))] == expected


def by_litdata(folder):
    """All tokens of a split as litdata's own dataset serves them, block by block."""
    loader = TokensLoader(block_size=256)
    stream = StreamingDataset(str(folder / "train"), item_loader=loader, shuffle=False)
    return np.concatenate([np.asarray(stream[i]) for i in range(len(stream))]).tolist()


def test_what_is_read_is_what_litdata_reads(whole):
    folder, flat = whole
    windows = Windows(folder, "train", 256)
    assert windows.read(0, windows.tokens).tolist() == by_litdata(folder) == flat


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint32])
def test_every_type_of_token_that_litdata_writes(tmp_path, dtype):
    largest = min(np.iinfo(dtype).max, 2**40)
    tokens = np.random.default_rng(0).integers(0, largest, 8 * 256, endpoint=True).astype(dtype)
    writer = BinaryWriter(str(tmp_path / "train"), chunk_size=1, item_loader=TokensLoader())
    for i, part in enumerate((tokens[:768], tokens[768:1536], tokens[1536:])):
        writer[i] = part
    writer.done()
    writer.merge()
    split = SplitInfo(0, len(tokens), len(tokens), 0, 0, chunks=3, lengths=[])
    info = TokenizerInfo("numbers", largest, bos=0, eos=1)
    content = Manifest("numbers", 256, 768, info, {"train": split})
    manifest.seal(tmp_path, manifest.hash_files(tmp_path), **content.as_json())
    windows = Windows(tmp_path, "train", 512)
    assert windows.read(0, len(tokens)).tolist() == tokens.tolist() == by_litdata(tmp_path)
    assert windows[1].tolist() == tokens[512:1025].tolist()


def test_any_stretch_of_tokens(whole):
    folder, flat = whole
    windows = Windows(folder, "train", 512)
    generator = random.Random(0)
    edges = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, len(flat) - 1, len(flat)]
    stretches = [(a, b) for a in edges for b in edges if a <= b]
    stretches += [sorted(generator.choices(range(len(flat) + 1), k=2)) for _ in range(100)]
    for start, stop in stretches:
        found = windows.read(start, stop)
        assert found.tolist() == flat[start:stop]
        assert found.dtype == np.int64
    for start, stop in ((-1, 5), (5, 4), (0, len(flat) + 1)):
        with pytest.raises(IndexError, match=f"^tokens {start} to {stop} of {len(flat)}$"):
            windows.read(start, stop)


def test_what_is_read_may_be_changed(whole):
    windows = Windows(whole[0], "train", 256)
    windows.read(0, 256)[:] = 7
    assert windows.read(0, 256).tolist() == whole[1][:256]


def test_few_chunks_are_held_open(whole):
    windows = Windows(whole[0], "train", 256)
    windows.read(0, windows.tokens)
    assert windows.tokens > 2 * OPEN_CHUNKS * CHUNK
    assert windows._chunks
    assert len(windows._chunks.maps.maps) == OPEN_CHUNKS


def test_document_lengths_are_distances_between_first_tokens(whole, copy):
    folder, flat = whole
    windows = Windows(folder, "train", 256)
    lengths = windows.document_lengths()
    assert lengths.dtype == np.uint32
    begins = [i for i, token in enumerate(flat) if token == BOS][: len(lengths)]
    assert (lengths.cumsum() - lengths).tolist() == begins
    assert [flat[end - 1] for end in lengths.cumsum()] == [EOS] * 60
    change(copy / "train/lengths.npy", -1)
    with pytest.raises(ValueError, match=r"lengths\.npy is altered"):
        Windows(copy, "train", 256).document_lengths()


def test_a_folder_without_lengths_is_of_an_older_version(copy):
    content = manifest.read(copy)
    (copy / "train/lengths.npy").unlink()
    del content["files"]
    manifest.seal(copy, manifest.hash_files(copy), **content)
    windows = Windows(copy, "train", 256)
    assert len(windows[0]) == 257
    message = f"^{copy} was prepared by an older version; prepare it again$"
    with pytest.raises(ValueError, match=message):
        windows.document_lengths()


def read_all(windows, queue):
    queue.put([windows[i].tolist() for i in range(len(windows))])


@pytest.mark.parametrize(
    ("method", "opened"),
    [("fork", True), ("fork", False), pytest.param("spawn", True, marks=pytest.mark.slow)],
)
def test_copies_in_other_processes_read_the_same(whole, method, opened):
    folder, flat = whole
    windows = Windows(folder, "train", 1536)
    if opened:
        windows[0]
    expected = [flat[k : k + 1537] for k in range(0, len(flat) - 1536, 1536)]
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=read_all, args=(windows, queue))
    worker.start()
    assert queue.get(timeout=60) == expected
    worker.join()
    again = pickle.loads(pickle.dumps(windows))
    assert [again[i].tolist() for i in range(len(again))] == expected


def test_an_altered_tokenizer_is_refused(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "data")
    file = next(p for p in sorted((folder / "tokenizer").iterdir()) if p.is_file())
    file.write_bytes(file.read_bytes().replace(b"2", b"3"))
    with pytest.raises(ValueError, match=f"tokenizer/{file.name} is altered"):
        _ = Windows(folder, "train", 1536).tokenizer_folder
