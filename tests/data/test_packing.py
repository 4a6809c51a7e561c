"""Best-fit packing against a slow search, and every token accounted for in both packings."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from lit_longctx.batch import pack
from lit_longctx.data.sampling.packing import BestFit, best_fit, plan
from lit_longctx.data.store.chunks import SplitWriter
from lit_longctx.data.store.windows import Windows
from lit_longctx.data.tokens.info import TokenizerInfo

BOS, EOS = 256, 257
BYTES = TokenizerInfo("bytes", 258, BOS, EOS)


def slow_best_fit(lengths, window):
    """Look at every bin for every piece, longest first; the fullest that still has room."""
    bins = []
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rooms = [(window - sum(lengths[j] for j in b), n) for n, b in enumerate(bins)]
        fitting = [(room, n) for room, n in rooms if room >= lengths[piece]]
        if fitting:
            bins[min(fitting)[1]].append(piece)
        else:
            bins.append([piece])
    return bins


@pytest.mark.parametrize("seed", range(5))
def test_bins_are_as_full_as_those_of_a_slow_search(seed):
    lengths = np.random.default_rng(seed).integers(1, 101, 200)
    found = list(best_fit(lengths, 100))
    assert sorted(piece for chosen in found for piece in chosen) == list(range(200))
    full = [
        sorted(int(lengths[b].sum()) for b in bins) for bins in (found, slow_best_fit(lengths, 100))
    ]
    assert full[0] == full[1]


def stream(lengths):
    """Documents of random bytes, BOS and EOS included, and all of them in a row."""
    generator = np.random.default_rng(0)
    documents = [np.concatenate([[BOS], generator.integers(0, 256, n - 2), [EOS]]) for n in lengths]
    return documents, np.concatenate(documents)


class Fake(Windows):
    """What BestFit asks of Windows, from memory."""

    def __init__(self, lengths, window):
        self.documents, self.tokens = stream(lengths)
        self.lengths = np.array(lengths, dtype=np.uint32)
        self.length = window

    def document_lengths(self):
        return self.lengths

    def read(self, start, stop):
        assert 0 <= start < stop <= len(self.tokens)
        return self.tokens[start:stop]


@pytest.mark.parametrize("group_tokens", [100, 10**6])
def test_every_token_but_bos_is_a_target_once_and_every_token_an_input_once(group_tokens):
    lengths = [2, 64, 65, 63, 128, 129, 3, 200, 10, 64, 7, 64 * 3 + 1, 2, 30]
    fake = Fake(lengths, window=64)
    reader = BestFit(fake, group_tokens)
    inputs, targets, begun = Counter(), Counter(), Counter()
    for i in range(len(reader)):
        tokens, starts = reader[i]
        batch = pack(torch.tensor(tokens)[None], BOS, torch.tensor(starts)[None])
        padding = torch.tensor(tokens[:-1]) < 0
        inputs.update(batch.input_ids[0][~padding].tolist())
        targets.update(batch.labels[0][batch.labels[0] >= 0].tolist())
        begins = batch.documents.boundaries[:-1]
        begun.update(batch.input_ids[0, begins][~padding[begins]].tolist())
    assert inputs == Counter(fake.tokens.tolist())
    assert targets == Counter(fake.tokens[fake.tokens != BOS].tolist())
    cut = sum((n - 1) // 64 for n in lengths)
    assert begun.total() == len(lengths) + cut
    assert begun[BOS] == len(lengths)


def test_a_document_that_fits_is_never_cut_and_stands_alone():
    lengths = np.random.default_rng(1).integers(2, 65, 500).tolist()
    fake = Fake(lengths, window=64)
    reader = BestFit(fake, 1000)
    found = []
    for i in range(len(reader)):
        tokens, starts = reader[i]
        edges = [*np.flatnonzero(starts), len(tokens)]
        pieces = [tokens[a:b] for a, b in pairwise(edges)]
        found += [piece.tolist() for piece in pieces if piece[0] >= 0]
    assert sorted(found) == sorted(document.tolist() for document in fake.documents)


def test_groups_are_packed_by_themselves():
    lengths = np.random.default_rng(2).integers(2, 200, 300)
    packed = plan(lengths, 64, group_tokens=1000)
    ends = lengths.cumsum()
    groups = np.repeat(np.arange(len(packed.groups)), packed.groups)
    windows = np.repeat(np.arange(len(packed.offsets) - 1), np.diff(packed.offsets))
    owner = np.searchsorted(ends, packed.starts, side="right")
    begins = (ends - lengths)[owner]
    assert (begins // 1000 == groups[windows]).all()


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """1,000 random documents of 1 … 50,000 tokens of text."""
    folder = tmp_path_factory.mktemp("thousand")
    lengths = np.random.default_rng(3).integers(1, 50_001, 1000) + 2
    documents, tokens = stream(lengths)
    writer = SplitWriter(folder / "train", BYTES, 2**20)
    for document in documents:
        writer.add(document[1:-1])
    writer.finish()
    from lit_longctx import manifest
    from lit_longctx.data.store.data_manifest import Manifest

    content = Manifest("thousand", 256, 2**20, BYTES, {"train": writer.info()})
    manifest.seal(folder, manifest.hash_files(folder), **content.as_json())
    return folder, lengths, tokens


@pytest.mark.slow
def test_the_ledger_of_both_packings_is_exact(thousand):
    folder, lengths, tokens = thousand
    joined = Windows(folder, "train", 8192)
    assert joined.tokens == len(joined) * 8192 + joined.dropped
    assert joined.tokens - len(tokens) == -len(tokens) % 256
    read = np.concatenate([joined[i][:-1] for i in range(len(joined))])
    assert (read == tokens[: len(read)]).all()
    assert joined.document_lengths().tolist() == lengths.tolist()

    fitted = BestFit(joined, 4 * 2**20)
    held = padding = 0
    histogram = np.zeros(258, dtype=np.int64)
    for i in range(len(fitted)):
        row, _ = fitted[i]
        padding += int((row[:-1] < 0).sum())
        held += int((row[:-1] >= 0).sum())
        histogram += np.bincount(row[:-1][row[:-1] >= 0], minlength=258)
    assert held == len(tokens)
    assert held + padding == len(fitted) * 8192
    assert (histogram == np.bincount(tokens, minlength=258)).all()


@pytest.mark.slow
def test_the_report_says_what_was_cut(thousand):
    folder, lengths, _ = thousand
    ends = lengths.cumsum()
    joined = sum(
        int(a // 8192 != (b - 1) // 8192) for a, b in zip(ends - lengths, ends, strict=True)
    )
    windows = Windows(folder, "train", 8192)
    report = BestFit(windows, 4 * 2**20).report()
    print(report)
    assert f"best_fit cuts {(lengths > 8192).mean():.1%} of 1,000 documents" in report
    assert f"concatenate cuts {joined / 1000:.1%}, padding 0" in report


def test_windows_longer_than_every_chunk_are_refused(thousand):
    with pytest.raises(ValueError, match="window 1048832 exceeds chunk of 1048576 tokens"):
        Windows(thousand[0], "train", 2**20 + 256)


def test_no_window_beyond_the_last():
    reader = BestFit(Fake([5, 6], 8), 100)
    assert len(reader) == 2
    with pytest.raises(IndexError):
        reader[2]


def test_an_end_is_found_between_documents():
    reader = BestFit(Fake([5, 6, 7], 8), 100)
    ends = [token for token in range(1, 19) if reader._is_end(token)]
    assert ends == [5, 11, 18]
