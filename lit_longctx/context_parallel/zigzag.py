"""Zigzag: chunks from both ends of a row, and keys and values gathered from all processes."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from lit_longctx.batch import Batch, Documents, pad_rows
from lit_longctx.context_parallel.balance import chunks_of, imbalance
from lit_longctx.context_parallel.base import ContextParallel, Share
from lit_longctx.context_parallel.collectives import Gather
from lit_longctx.model.backend import AttentionBackend, Heads, KVHeads, Values
from lit_longctx.model.keys import (
    Kernel,
    KeySource,
    LayerSource,
    SeenKeys,
    SeenValues,
    View,
    make_view,
)
from lit_longctx.model.layers import LayerKind
from lit_longctx.model.recompute import recomputed


@final
class Zigzag(ContextParallel):
    """Each process has chunks from both ends of a row, and gathers the others' keys and values.

    Of one document's 2n chunks, each process has one from its beginning and one from its end, which
    together see as much as any other pair (Llama 3, arXiv:2407.21783, §3.3.2). Where documents make
    that uneven, chunks are smaller and divided by what they have to see. Any number of heads will
    do.

    Args:
        group: The processes; default: all.
        kv_heads_at_once: Key and value heads that are gathered at a time; default: all.
    """

    def __init__(
        self, group: ProcessGroup | None = None, kv_heads_at_once: int | None = None
    ) -> None:
        super().__init__(group)
        self.kv_heads_at_once = kv_heads_at_once

    def check(self, num_heads: int) -> None:
        """Any number will do."""

    def share(self, batch: Batch) -> Share:
        """Give this process its chunks of each row."""
        batch = pad_rows(batch, 2 * self.size)
        chunks = chunks_of(batch.documents, self.size)
        columns = chunks.flatten(1)
        whole = GatheredKeys(self, batch.documents, chunks)
        return Share(self._take(batch, columns), whole, columns)

    def imbalance(self, batch: Batch) -> float:
        """Count query-key pairs, without windows."""
        documents = pad_rows(batch, 2 * self.size).documents
        return imbalance(documents, chunks_of(documents, self.size))


class ShardParts(NamedTuple):
    """Which keys a process's queries see, and where among the gathered ones they are."""

    sent: Int[Tensor, " sent"] | None
    """This process's columns that the others need; None: all of them."""
    index: Int[Tensor, " keys"]
    """Of each key that is seen, its place among those gathered, then this process's own."""
    mask: Any
    """In the back end's form."""


@final
class GatheredKeys(KeySource):
    """Own queries, keys and values of all processes: one gathering a layer and head group."""

    def __init__(
        self,
        context: Zigzag,
        documents: Documents,
        chunks: Int[Tensor, "processes chunks size"],
    ) -> None:
        self.rank = context.rank
        self.documents = documents
        self.chunks = chunks
        self._layer = GatheredLayer(context)

    def views(
        self,
        batch: Batch,
        kinds: Sequence[LayerKind],
        backend: AttentionBackend,
        head_dim: int,
    ) -> list[View]:
        """Positions of own tokens; masks of own queries against all keys they may see."""
        return [
            make_view(
                kind,
                self._parts(kind.window, backend),
                head_dim,
                batch.position_ids,
                batch.documents,
            )
            for kind in kinds
        ]

    def layer(self, index: int) -> "GatheredLayer":
        """All layers share one."""
        return self._layer

    def advance(self, batch: Batch) -> None:
        """Nothing is remembered."""

    def _parts(self, window: int | None, backend: AttentionBackend) -> ShardParts:
        """Lay out queries and keys chunk by chunk; the first document of a chunk began before."""
        rows, seq = self.documents.ids.shape
        device = self.documents.ids.device
        mine = [(int(chunk[0]), int(chunk[-1]) + 1) for chunk in self.chunks[self.rank].cpu()]
        tail = None if window is None or window > self.chunks.shape[2] else window - 1
        place, sent = self._places(tail)
        boundaries = self.documents.boundaries.tolist()
        query_sizes: list[int] = []
        key_sizes: list[int] = []
        index: list[Tensor] = []
        for begin, end in ((row * seq + a, row * seq + b) for row in range(rows) for a, b in mine):
            after = bisect_right(boundaries, begin)
            inner = boundaries[after : bisect_left(boundaries, end)]
            first = boundaries[after - 1]
            if window is not None:
                first = max(first, begin - window + 1)
            query_sizes += [b - a for a, b in pairwise([begin, *inner, end])]
            key_sizes += [b - a for a, b in pairwise([first, *inner, end])]
            index.append(place[first:end])
        queries, keys = (_one_row(sizes, device) for sizes in (query_sizes, key_sizes))
        return ShardParts(sent, torch.cat(index), backend.prepare(queries, keys, window))

    def _places(self, tail: int | None) -> tuple[Int[Tensor, " tokens"], Tensor | None]:
        """Return where every token's key is found, and which own tokens are sent, if not all.

        With a window shorter than a chunk each process sends the last `tail` keys of its chunks.
        """
        rows, seq = self.documents.ids.shape
        processes, _, size = self.chunks.shape
        sent = self.chunks if tail is None else self.chunks[:, :, size - tail :]
        place = torch.full((rows, seq), -1, device=self.chunks.device)
        number = torch.arange(rows * sent.numel(), device=place.device)
        number = number.view(processes, rows, -1).movedim(0, 1).flatten(1)
        place[:, sent.flatten()] = number
        if tail is None:
            return place.flatten(), None
        mine = self.chunks[self.rank]
        own = torch.arange(rows * mine.numel(), device=place.device).view(rows, -1)
        place[:, mine.flatten()] = own + number.numel()
        local = torch.arange(mine.numel(), device=place.device).view(mine.shape)
        return place.flatten(), local[:, size - tail :].flatten()


@final
class GatheredLayer(LayerSource):
    """Gathers one layer's keys and values; queries stay where they are."""

    def __init__(self, context: Zigzag) -> None:
        self.context = context

    def inputs(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq width"]:
        """Keys are computed from own tokens."""
        return x

    def extend(self, k: KVHeads, v: Values) -> tuple[SeenKeys, SeenValues]:
        """Not used: what is gathered depends on the mask."""
        raise NotImplementedError("keys are gathered in attend")

    @torch.compiler.disable
    def attend(
        self, q: Heads, k: KVHeads, v: Values, mask: ShardParts, kernel: Kernel
    ) -> Float[Tensor, "batch queries heads value_dim"]:
        """Attend by groups of heads; rows are joined to one, since their key lengths differ.

        Backward gathers the keys of several groups again, and computes their attention again, so
        that keys of one group exist at a time.
        """
        at_once = self.context.kv_heads_at_once or k.shape[2]
        queries_of_each = q.shape[2] // k.shape[2]
        parts = (
            q.flatten(0, 1)[None].split(at_once * queries_of_each, dim=2),
            k.split(at_once, dim=2),
            v.split(at_once, dim=2),
        )

        def of_group(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return kernel(q, self._seen(k, mask), self._seen(v, mask), mask.mask)

        if len(parts[0]) > 1:
            of_group = partial(recomputed, of_group)
        found = [of_group(*group) for group in zip(*parts, strict=True)]
        return torch.cat(found, dim=2).view(*q.shape[:3], v.shape[-1])

    def _seen(self, x: KVHeads, parts: ShardParts) -> Float[Tensor, "1 seen kv_heads head_dim"]:
        sent = x if parts.sent is None else x[:, parts.sent]
        found = Gather.apply(sent, self.context.group).flatten(0, 2)
        if parts.sent is not None:
            found = torch.cat([found, x.flatten(0, 1)])
        return found.index_select(0, parts.index)[None]


def _one_row(sizes: Sequence[int], device: torch.device) -> Documents:
    """Documents of these sizes, one after the other."""
    each = torch.tensor(sizes)
    boundaries = F.pad(each.cumsum(0), (1, 0)).int()
    ids = torch.arange(len(sizes)).repeat_interleave(each)
    return Documents(ids[None].to(device), boundaries.to(device), max(sizes))
