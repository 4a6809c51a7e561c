"""Folders written by MosaicML's own MDSWriter (mosaicml-streaming 0.13.0), with known tokens."""

import json
import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from lit_longctx.data.pretraining import read_batch
from lit_longctx.data.store import mds
from lit_longctx.data.store.mds import MDSWindows, open_windows
from lit_longctx.data.store.storage import ObjectStorage
from lit_longctx.data.tokens.info import TokenizerInfo

GOLDEN = Path(__file__).parents[1] / "golden" / "mds"
ITEM, ITEMS = 256, 5
TOKENIZER = TokenizerInfo("none", 128256, bos=1, eos=2)


def item(number):
    """Tokens and first tokens of documents that the folders were written with."""
    starts = [0, 50 + number, 200]
    ids = [place * (number + 2) * 977 % 128000 + 10 for place in range(ITEM)]
    return [1 if place in starts else token for place, token in enumerate(ids)], starts


@pytest.fixture
def storage(tmp_path):
    return ObjectStorage(cache=str(tmp_path / "cache"))


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(GOLDEN / "plain", tmp_path / "copy"))


def edit(folder, **changes):
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        shard.update(changes)
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["plain", "zstd", "json"])
def test_a_window_as_long_as_an_item_is_the_item_and_padding(name, storage):
    packs = MDSWindows(GOLDEN / name, "train", ITEM, TOKENIZER, storage)
    assert (len(packs), packs.tokens, packs.dropped) == (ITEMS, ITEMS * ITEM, 0)
    for number in (3, 0, 4, 2, 1, 3):
        tokens, starts = packs[number]
        expected, documents = item(number)
        assert tokens.tolist() == [*expected, -100]
        assert np.flatnonzero(starts).tolist() == documents
        assert tokens.dtype == np.int64


@pytest.mark.parametrize("length", [1, 64, 100, 128, 200])
def test_shorter_windows_are_cut_from_items_and_never_join_them(length, storage):
    packs = MDSWindows(GOLDEN / "zstd", "train", length, TOKENIZER, storage)
    expected, begins = [], []
    for number in range(ITEMS):
        tokens, starts = item(number)
        for k in range(0, ITEM - length + 1, length):
            expected.append([*tokens, -100][k : k + length + 1])
            begins.append([s - k for s in starts if k <= s <= k + length])
    assert len(packs) == len(expected)
    assert [packs[i][0].tolist() for i in range(len(packs))] == expected
    assert [np.flatnonzero(packs[i][1]).tolist() for i in range(len(packs))] == begins
    assert packs.dropped == ITEMS * (ITEM % length) == packs.tokens - len(packs) * length


def test_longer_windows_are_refused(storage):
    message = f"packed to {ITEM} tokens; set a window of {ITEM} or less$"
    with pytest.raises(ValueError, match=message):
        MDSWindows(GOLDEN / "plain", "train", ITEM + 1, TOKENIZER, storage)


def test_tokens_outside_all_spans_are_padding(copy, storage):
    packs = MDSWindows(copy, "train", ITEM, TOKENIZER, storage)
    path = copy / "shard.00000.mds"
    end = np.array([200, ITEM], np.uint32).tobytes()
    assert path.read_bytes().count(end) == 2
    path.write_bytes(path.read_bytes().replace(end, np.array([200, 240], np.uint32).tobytes()))
    tokens, starts = packs[0]
    assert tokens.tolist() == item(0)[0][:240] + [-100] * 17
    assert np.flatnonzero(starts).tolist() == [0, 50, 200]


def test_it_says_once_that_there_are_no_hashes(copy, storage, capsys):
    for _ in range(3):
        MDSWindows(copy, "train", ITEM, TOKENIZER, storage)
    assert capsys.readouterr().out.count("without hashes: only the sizes") == 1


def test_what_pretraining_reads(storage):
    packs = open_windows(GOLDEN / "plain", "train", 128, storage, TOKENIZER)
    assert (packs.tokenizer, packs.chunk_tokens) == (TOKENIZER, 2 * ITEM)
    assert packs.length == 128
    cut = open_windows(GOLDEN / "plain", "train", 100, storage, TOKENIZER)
    assert cut.chunk_tokens // 100 == 4  # windows of a shard's two items
    held_out = open_windows(GOLDEN / "plain", "held_out", 128, storage, TOKENIZER)
    assert (len(held_out), held_out.tokens, held_out.dropped) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"is packed already; set packing to concatenate$"):
        packs.document_lengths()
    with pytest.raises(IndexError, match="window 10 of 10"):
        packs[10]
    with pytest.raises(ValueError, match="is an MDS folder, which does not say its tokenizer"):
        open_windows(GOLDEN / "plain", "train", 128, storage)


def read_all(packs, queue):
    queue.put([packs[i][0].tolist() for i in range(len(packs))])


def test_copies_in_other_processes_read_the_same(storage):
    packs = MDSWindows(GOLDEN / "zstd", "train", ITEM, TOKENIZER, storage)
    expected = [[*item(i)[0], -100] for i in range(ITEMS)]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=read_all, args=(packs, queue))
    worker.start()
    assert queue.get(timeout=60) == expected
    worker.join()
    again = pickle.loads(pickle.dumps(packs))
    assert [again[i][0].tolist() for i in range(ITEMS)] == expected


def test_unpacked_shards_respect_the_cache_bound(tmp_path):
    shard = 2400  # bytes at most; two items
    storage = ObjectStorage(cache=str(tmp_path / "cache"), cache_gib=1.5 * shard / 2**30)
    packs = MDSWindows(GOLDEN / "zstd", "train", ITEM, TOKENIZER, storage)
    for number in (0, 4, 2, 0, 3, 1):
        assert packs[number][0].tolist() == [*item(number)[0], -100]
        files = [path for path in (storage.root / "files").rglob("*") if path.is_file()]
        assert len(files) == 1
        assert sum(path.stat().st_size for path in files) <= 1.5 * shard


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "index.json").unlink(), "is no MDS folder: it has no index.json"),
        (lambda folder: (folder / "index.json").write_text("{}"), "no MDS shards of version 2$"),
        (lambda folder: edit(folder, format="json"), "no column input_ids of arrays; got columns"),
        (lambda folder: edit(folder, column_names=["a", "b", "c", "d"]), "no column input_ids"),
        (lambda folder: (folder / "shard.00000.mds").unlink(), "shard.00000.mds is missing"),
        (lambda folder: (folder / "shard.00000.mds").write_bytes(b""), "expected .* bytes, got 0"),
    ],
)
def test_a_broken_folder_is_refused(copy, storage, change, message):
    change(copy)
    with pytest.raises(ValueError, match=message):
        MDSWindows(copy, "train", ITEM, TOKENIZER, storage)


def test_other_compressions_are_refused(copy, storage):
    edit(copy, compression="gz")
    with pytest.raises(ValueError, match=r"is compressed by gz; expected zstd or none"):
        MDSWindows(copy, "train", ITEM, TOKENIZER, storage)


def test_items_of_another_length_are_refused(copy, storage):
    packs = MDSWindows(copy, "train", 128, TOKENIZER, storage)
    packs.item_tokens = ITEM - 1
    with pytest.raises(ValueError, match=r"item 1 of .* has 256 tokens, the first 255; pack all"):
        packs[1]


@pytest.mark.parametrize("shape", [(3,), (300,), (70000,), (2, 3)])
@pytest.mark.parametrize("dtype", ["uint32", "int64", "uint16"])
def test_arrays_by_the_published_layout(shape, dtype):
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    width = 0 if max(shape) < 2**8 else 1 if max(shape) < 2**16 else 2
    head = bytes([len(shape) << 2 | width]) + np.array(shape, f"u{2**width}").tobytes()
    code = bytes([{"uint32": 32, "int64": 65, "uint16": 16}[dtype]])
    flat = values.ravel().tolist()
    assert mds.decode_array(code + head + values.tobytes(), "ndarray").tolist() == flat
    assert mds.decode_array(head + values.tobytes(), f"ndarray:{dtype}").tolist() == flat
    fixed = f"ndarray:{dtype}:{','.join(map(str, shape))}"
    assert mds.decode_array(values.tobytes(), fixed).tolist() == flat


def test_an_item_without_spans_is_one_document(storage):
    """As in ProLong's training/dataset.py: without `indices` no boundary, BOS or not."""
    tokens, starts = MDSWindows(GOLDEN / "bos", "train", ITEM, TOKENIZER, storage)[1]
    assert (tokens.tolist(), np.flatnonzero(starts).tolist()) == ([*item(1)[0], -100], [0])


def test_tokens_of_mask_0_are_no_targets(storage):
    """Shards with the columns that ProLong released for fine-tuning: input_ids, indices, mask."""
    windows = MDSWindows(GOLDEN / "mask", "train", 128, TOKENIZER, storage)
    assert MDSWindows(GOLDEN / "plain", "train", 128, TOKENIZER, storage).targets(0) is None
    batch = read_batch({0: windows}, [(0, 3, 0), (0, -1, 1), (0, 0, 2)], bos=1)
    for row, (number, begin) in {0: (1, 128), 2: (0, 0)}.items():
        ids, starts = item(number)
        expected = [
            -100 if place == ITEM or place % 5 >= 2 or place in starts else ids[place]
            for place in range(begin + 1, begin + 129)
        ]
        assert batch.labels[row].tolist() == expected
    assert (batch.labels[1] == -100).all()
    assert (batch.loss_weights == (batch.labels != -100)).all()  # else the mean is over all tokens
