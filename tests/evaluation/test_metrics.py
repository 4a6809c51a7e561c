"""Sums of nats by source and place, against a loop over tokens."""

import copy
import math
from collections import Counter, defaultdict

import pytest
import torch
from torch import Tensor

from lit_longctx.batch import Batch, pack
from lit_longctx.evaluation.loss.metrics import LossByPosition, position_edges

BOS, SEQ = 1, 512
SOURCES = ["books", "code"]


def batch(seed: int, rows: int = 4) -> tuple[Tensor, Batch]:
    """Packed documents of two sources; nats are multiples of 2^-6, so that sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(2, 99, (rows, SEQ + 1), generator=generator)
    windows[torch.rand(windows.shape, generator=generator) < 0.01] = BOS
    windows[0, 400:] = -100
    windows[1:2, 1:][windows[1:2, 1:] == BOS] = 2
    sources = torch.randint(len(SOURCES), (rows,), generator=generator)
    packed = pack(windows, BOS, sources=sources)
    nats = torch.randint(0, 640, packed.labels.shape, generator=generator) / 64
    return nats * (packed.labels >= 0), packed


def by_hand(
    batches: list[tuple[Tensor, Batch]], edges: list[int]
) -> dict[tuple[int, int, int], list]:
    """Collect the nats of each (source, length, position), a token at a time."""
    cells = defaultdict(list)
    for nats, packed in batches:
        for row in range(len(nats)):
            sizes = Counter(packed.documents.ids[row].tolist())
            for t in range(SEQ):
                if packed.labels[row, t] == -100:
                    continue
                place = int(packed.position_ids[row, t])
                size = sizes[int(packed.documents.ids[row, t])]
                bucket = max(i for i, low in enumerate(edges[:-1]) if low <= place)
                length = max(i for i, low in enumerate(edges) if low <= size)
                cells[int(packed.sources[row]), length, bucket].append(float(nats[row, t]))
    return cells


def test_edges_double_up_to_the_window():
    assert position_edges(4096) == [0, 128, 256, 512, 1024, 2048, 4096]
    assert position_edges(1000) == [0, 128, 256, 512, 1000]
    assert position_edges(128) == [0, 128]


def test_sums_are_those_of_a_loop_over_tokens():
    edges = [0, 5, 50, 51, 300, SEQ]
    batches = [batch(0), batch(1)]
    metric = LossByPosition(SOURCES, SEQ, edges)
    for nats, packed in batches:
        metric.update(nats, packed)
    cells = by_hand(batches, edges)
    nats, targets = metric.compute()
    for source in range(len(SOURCES)):
        for length in range(len(edges)):
            for bucket in range(len(edges) - 1):
                cell = source, length, bucket
                assert float(nats[cell]) == sum(cells[cell])
                assert int(targets[cell]) == len(cells[cell])
    assert int(targets.sum()) == sum(int((packed.labels >= 0).sum()) for _, packed in batches)


def test_scalars_are_means_over_targets():
    batches = [batch(2), batch(3)]
    metric = LossByPosition(SOURCES, SEQ)
    for nats, packed in batches:
        metric.update(nats, packed)
    cells = by_hand(batches, [0, 128, 256, SEQ])
    every = [value for values in cells.values() for value in values]

    def mean(keep) -> float:
        values = [v for key, found in cells.items() if keep(*key) for v in found]
        return sum(values) / len(values)

    assert metric.scalars() == pytest.approx(
        {
            "val/loss": sum(every) / len(every),
            "val/ppl": math.exp(sum(every) / len(every)),
            "val/loss_pos/0-128": mean(lambda source, length, bucket: bucket == 0),
            "val/loss_pos/128-256": mean(lambda source, length, bucket: bucket == 1),
            "val/loss_pos/256-512": mean(lambda source, length, bucket: bucket == 2),
            "val/loss_len/0-128": mean(lambda source, length, bucket: length == 0),
            "val/loss_len/128-256": mean(lambda source, length, bucket: length == 1),
            "val/loss_len/256-512": mean(lambda source, length, bucket: length == 2),
            "val/loss_len/512": mean(lambda source, length, bucket: length == 3),
            "val/loss_source/books": mean(lambda source, length, bucket: source == 0),
            "val/loss_source/code": mean(lambda source, length, bucket: source == 1),
        },
        rel=1e-6,
    )


def test_a_bucket_without_targets_is_left_out():
    metric = LossByPosition(["books"], window=1024)
    nats, packed = batch(4)
    metric.update(nats, packed._replace(sources=torch.zeros_like(packed.sources)))
    found = metric.scalars("test")
    positions = [name for name in found if "pos" in name]
    assert positions == [f"test/loss_pos/{edges}" for edges in ("0-128", "128-256", "256-512")]
    assert "test/loss_len/1024" not in found
    assert not any("source" in name for name in found)
    assert all(math.isfinite(value) for value in found.values())


def test_ranks_add_up_exactly():
    """Unequal shares, as ranks have them: a mean of means would differ."""
    everything, first, second = (LossByPosition(SOURCES, SEQ) for _ in range(3))
    parts = [batch(5, rows=5), batch(6, rows=1)]
    for metric, part in ((first, parts[0]), (second, parts[1])):
        metric.update(*part)
        everything.update(*part)
    merged = copy.deepcopy(first)
    merged.merge_state(second)
    for found, expected in zip(merged.compute(), everything.compute(), strict=True):
        assert torch.equal(found, expected)
    assert merged.scalars() == everything.scalars()
    assert {merged._reductions[name].__name__ for name in ("nats", "targets")} == {"dim_zero_sum"}


def test_reset_forgets():
    metric = LossByPosition(SOURCES, SEQ)
    metric.update(*batch(7))
    metric.reset()
    assert float(metric.nats.abs().sum()) == float(metric.targets.sum()) == 0
