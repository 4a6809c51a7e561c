"""Ulysses: tokens exchanged for heads around attention (Jacobs et al. 2023, arXiv:2309.14509)."""

from collections.abc import Sequence
from math import lcm
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from lit_longctx.batch import Batch, Documents, pad_rows
from lit_longctx.context_parallel.base import ContextParallel, Share
from lit_longctx.context_parallel.collectives import Exchange
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


@final
class Ulysses(ContextParallel):
    """Each process has a stretch of each row, and in attention all of the row for some heads.

    Query heads must divide by the processes; key and value
    heads are repeated where they do not. Balanced however documents lie.
    """

    def check(self, num_heads: int) -> None:
        """Raise ValueError if the heads do not divide."""
        if num_heads % self.size:
            raise ValueError(
                f"ulysses divides query heads among processes: {num_heads} heads do not divide "
                f"by context_parallel_size {self.size}; use zigzag, or another size"
            )

    def share(self, batch: Batch) -> Share:
        """Give this process its stretch of each row."""
        batch = pad_rows(batch, self.size)
        seq = batch.input_ids.shape[1]
        columns = torch.arange(seq, device=batch.input_ids.device).view(self.size, -1)
        whole = ExchangedHeads(self, batch.documents)
        return Share(self._take(batch, columns), whole, columns)

    def imbalance(self, batch: Batch) -> float:
        """Every process attends to whole rows, with as many heads as the others."""
        return 1.0


@final
class ExchangedHeads(KeySource):
    """In attention, whole rows of some heads in place of some tokens of all heads."""

    def __init__(self, context: Ulysses, documents: Documents) -> None:
        self.documents = documents
        self._layer = ExchangedLayer(context)

    def views(
        self,
        batch: Batch,
        kinds: Sequence[LayerKind],
        backend: AttentionBackend,
        head_dim: int,
    ) -> list[View]:
        """Positions of own tokens; masks of whole rows."""
        return [
            make_view(
                kind,
                backend.prepare(self.documents, self.documents, kind.window),
                head_dim,
                batch.position_ids,
                batch.documents,
            )
            for kind in kinds
        ]

    def layer(self, index: int) -> "ExchangedLayer":
        """All layers share one."""
        return self._layer

    def advance(self, batch: Batch) -> None:
        """Nothing is remembered."""


@final
class ExchangedLayer(LayerSource):
    """Exchanges tokens for heads before attention, and back after it."""

    def __init__(self, context: Ulysses) -> None:
        self.context = context

    def inputs(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq width"]:
        """Keys are computed from own tokens."""
        return x

    def extend(self, k: KVHeads, v: Values) -> tuple[SeenKeys, SeenValues]:
        """Not used: queries are exchanged too."""
        raise NotImplementedError("heads are exchanged in attend")

    @torch.compiler.disable
    def attend(
        self, q: Heads, k: KVHeads, v: Values, mask: Any, kernel: Kernel
    ) -> Float[Tensor, "batch queries heads value_dim"]:
        """Attend to whole rows with this process's heads."""
        repeats = lcm(k.shape[2], self.context.size) // k.shape[2]
        k, v = (x.repeat_interleave(repeats, dim=2) if repeats > 1 else x for x in (k, v))
        q, k, v = (self._heads_for_tokens(x) for x in (q, k, v))
        out = kernel(q, k, v, mask)
        return self._tokens_for_heads(out)

    def _heads_for_tokens(self, x: Heads) -> Float[Tensor, "batch seq own_heads head_dim"]:
        parts = torch.stack(x.chunk(self.context.size, dim=2))
        return torch.cat(Exchange.apply(parts, self.context.group).unbind(), dim=1)

    def _tokens_for_heads(self, x: Heads) -> Float[Tensor, "batch local all_heads head_dim"]:
        parts = torch.stack(x.chunk(self.context.size, dim=1))
        return torch.cat(Exchange.apply(parts, self.context.group).unbind(), dim=2)
