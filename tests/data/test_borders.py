"""Where documents start, with a tokenizer whose BOS is its EOS: compared with a loop over texts."""

import json
import shutil

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from lit_longctx import manifest
from lit_longctx.data.making.mixture import Upsampling, mix
from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.making.scale import join, part_folder
from lit_longctx.data.pretraining import PretrainData, Source
from lit_longctx.data.store.windows import Windows
from lit_longctx.data.tokens.opening import open_tokenizer
from lit_longctx.evaluation.loss.held_out import HeldOutLoss
from lit_longctx.evaluation.retrieval.prompts import Haystack
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE

VOCABULARY = 40
END = 0
LENGTHS = [1, 100, 253, 254, 255, 30, 900, 7, 510, 511, 512, 3, 3, 1300, 60, 61, 62, 254, 5]
"""Tokens of the documents' texts: some end on a border of a block, some fill whole windows."""


@pytest.fixture(scope="module")
def texts():
    generator = np.random.default_rng(0)
    return [generator.integers(2, VOCABULARY, length).tolist() for length in LENGTHS]


def tokenizer(folder):
    """Words w2, w3, … are ids 2, 3, …; id 0 ends and, unless another is named, begins documents."""
    vocab = {"<end>": END, "<s>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    model = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="w2"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def prepared(folder, texts, bos="<end>", **settings):
    rows = [{"text": " ".join(f"w{i}" for i in ids)} for ids in texts]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"held_out": 0, "chunk_tokens": 1024} | settings
    prepare(
        str(folder / "a.jsonl"),
        str(folder / "out"),
        tokenizer(folder),
        bos=bos,
        eos="<end>",
        **settings,
    )
    return folder / "out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    return prepared(tmp_path_factory.mktemp("end"), texts)


def epoch(folder, window, packing):
    """All windows of an epoch as one batch."""
    data = PretrainData({"a": Source(str(folder))}, window, window, packing=packing)
    readers = dict(enumerate(data.readers(data.stage_schedule.stages[0]).values()))
    return data.batch(readers, [(0, i, i) for i in range(len(readers[0]))], training=True)


def expected_rows(texts, window):
    """Labels and documents of concatenated windows, token by token."""
    stream = [
        (token, number, at)
        for number, ids in enumerate(texts)
        for at, token in enumerate([END, *ids, END])
    ]
    stream += [(END, -1, 0)] * (-len(stream) % 256)
    rows = []
    for begin in range(0, len(stream) - window, window):
        labels, documents = [], []
        for place in range(begin, begin + window):
            (_, number, _), (following, its_number, its_place) = stream[place : place + 2]
            documents.append(number)
            labels.append(following if its_number == number and its_place else -100)
        rows.append((labels, documents))
    return rows


@pytest.mark.parametrize("window", [256, 512, 1024])
def test_concatenated_windows_are_those_of_a_loop_over_the_documents(folder, texts, window):
    batch = epoch(folder, window, "concatenate")
    expected = expected_rows(texts, window)
    assert batch.labels.tolist() == [labels for labels, _ in expected]
    for ids, (_, documents) in zip(batch.documents.ids.tolist(), expected, strict=True):
        assert [i - ids[0] for i in ids] == [i - documents[0] for i in documents]
    ends = np.cumsum([len(ids) + 2 for ids in texts])
    inside = int((ends - 1 <= len(expected) * window).sum())  # the last target of the last window
    assert int((batch.labels == END).sum()) == inside > 12


@pytest.mark.parametrize("window", [256, 512, 1024])
def test_best_fit_has_every_end_as_a_target_once(folder, texts, window):
    batch = epoch(folder, window, "best_fit")
    assert int((batch.labels == END).sum()) == len(texts)
    # each text's tokens are targets once, but the first of every later piece of a cut document
    counts = np.bincount(batch.labels[batch.labels >= 0].numpy(), minlength=VOCABULARY)
    expected = np.zeros(VOCABULARY, dtype=int)
    for ids in texts:
        for token in [*ids, END]:
            expected[token] += 1
    assert counts.tolist() == expected.tolist()


@pytest.mark.parametrize("bos", ["<end>", "<s>"])
def test_the_tokens_and_the_loss_do_not_depend_on_which_token_begins(tmp_path, texts, bos):
    """The same borders for both tokenizers: BOS alone says where, if it is no EOS."""
    batch = epoch(prepared(tmp_path, texts, bos), 512, "concatenate")
    expected = expected_rows(texts, 512)
    assert batch.labels.tolist() == [labels for labels, _ in expected]
    if bos == "<s>":
        windows = Windows(tmp_path / "out", "train", 512)
        for i in range(len(windows)):
            tokens, starts = windows.with_starts(i)
            assert starts.tolist() == (tokens == 1).tolist()


def without_lengths(folder, copy):
    """The folder as the first version wrote it."""
    shutil.copytree(folder, copy)
    content = manifest.read(copy)
    (copy / "train/lengths.npy").unlink()
    del content["files"]
    manifest.seal(copy, manifest.hash_files(copy), **content)
    return copy


def test_a_folder_without_lengths_is_read_by_bos_or_refused(tmp_path, folder, texts):
    with pytest.raises(ValueError, match=r"older version.* BOS is its EOS.*; prepare it again$"):
        PretrainData({"a": Source(str(without_lengths(folder, tmp_path / "old")))}, 256, 256)
    other = without_lengths(prepared(tmp_path / "s", texts, "<s>"), tmp_path / "old_s")
    batch = epoch(other, 256, "concatenate")
    assert batch.labels.tolist() == [labels for labels, _ in expected_rows(texts, 256)]


def starts_of(folder):
    windows = Windows(folder, "train", 256)
    return np.flatnonzero(windows.starts(0, windows.tokens)).tolist()


def expected_starts(texts):
    starts, at = [], 0
    for ids in texts:
        starts.append(at)
        at += len(ids) + 2
    return [*starts, *range(at, -(-at // 256) * 256)]


def test_mixed_joined_and_interleaved_folders_know_their_borders(tmp_path, folder, texts):
    assert starts_of(folder) == expected_starts(texts)
    mix({"a": str(folder)}, str(tmp_path / "mix"), Upsampling("none"))
    assert starts_of(tmp_path / "mix/a") == expected_starts(texts)

    for part, chosen in enumerate((texts[:7], texts[7:])):
        rows = [{"text": " ".join(f"w{i}" for i in ids)} for ids in chosen]
        path = tmp_path / f"rows/{part}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"bos": "<end>", "eos": "<end>", "held_out": 0}
    for part in range(2):
        out = part_folder(tmp_path / "parts", part)
        rows = str(tmp_path / "rows")
        prepare(rows, str(out), tokenizer(tmp_path), part=part, parts=2, **names)
    join([part_folder(tmp_path / "parts", i) for i in range(2)], tmp_path / "joined")
    assert starts_of(tmp_path / "joined") == expected_starts(texts)


def test_held_out_loss_counts_the_ends(tmp_path, texts):
    out = prepared(tmp_path, [*texts, *texts], held_out=0.5)
    windows = Windows(out, "held_out", 256)
    lengths = windows.document_lengths().tolist()
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(VOCABULARY, 16, 32, 1, 2), RoPE())
    for weight in llama.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    measure = HeldOutLoss({"a": windows}, 1000)
    cells = [measure.measure(llama, unit) for unit in measure.eval_items()]
    targets = sum(number for window in cells for *_, number in window)
    # every token but the first of each document, as far as the windows reach
    begins = np.cumsum([0, *lengths])[:-1]
    reach = len(windows) * 256
    assert targets == reach - int(((begins > 0) & (begins <= reach)).sum())


def test_a_haystack_of_stored_tokens_is_the_texts(tmp_path, texts):
    coder = open_tokenizer(tokenizer(tmp_path), "<end>", "<end>")
    stored = np.array([token for ids in texts for token in (END, *ids, END)])
    hay = Haystack.of_tokens(coder, stored)
    assert hay.text == "\n".join(" ".join(f"w{i}" for i in ids) for ids in texts)
