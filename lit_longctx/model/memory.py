"""Segment recurrence: what a window remembers of the windows before it (Dai et al. 2019, §3.2).

Each block keeps its detached inputs of the last windows; the next window's keys and values are
computed from them again, by today's weights, as far as they belong to the document that goes on.
"""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_longctx.batch import NO_TARGET, Batch, Documents
from lit_longctx.model.backend import AttentionBackend, KVHeads, Values
from lit_longctx.model.keys import KeySource, LayerSource, SeenKeys, SeenValues, View, make_views
from lit_longctx.model.layers import LayerKind


@final
class Memory(KeySource):
    """Inputs of every block for the last `tokens` tokens of each row; empty at first.

    Rows must walk through documents: row r of a batch follows row r of the batch before.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.hidden: list[Float[Tensor, "batch past width"]] = []
        """By block."""
        self.visible: Bool[Tensor, "batch past"] | None = None
        """Tokens that belong to the document that was open when the last window ended."""
        self._layers: list[LayerMemory] = []

    @property
    def length(self) -> int:
        """Tokens remembered."""
        return self.hidden[0].shape[1] if self.hidden else 0

    def views(
        self,
        batch: Batch,
        kinds: Sequence[LayerKind],
        backend: AttentionBackend,
        head_dim: int,
    ) -> list[View]:
        """Queries are the window's tokens, keys those and what is remembered."""
        for kind in kinds:
            if kind.position.depends_on_length:
                name = type(kind.position).__name__
                raise ValueError(
                    f"{name} cannot have a memory: it must know how long documents are"
                )
        self._layers = []
        queries, keys = self.documents(batch)
        return make_views(kinds, backend, head_dim, self.position_ids(batch), queries, keys)

    def layer(self, index: int) -> "LayerMemory":
        """Return the memory of one block."""
        assert index == len(self._layers), "layers are asked for in order, once per forward pass"
        self._layers.append(LayerMemory(self.hidden[index] if self.hidden else None))
        return self._layers[-1]

    def documents(self, batch: Batch) -> tuple[Documents, Documents]:
        """Return queries and keys of a window with its memory in front.

        Both have the same segments: in each row first what is hidden (no queries), then the open
        document with its remembered tokens, then the other documents.
        """
        now = batch.documents
        if self.visible is None:
            return now, now
        rows, seq = now.ids.shape
        hidden = (~self.visible).sum(1)
        past = self.visible.long() - 1  # 0, the first document of the window, or −1, none of it
        ids = torch.cat([past, now.ids], dim=1)
        begins = now.boundaries[:-1].long()
        row = begins // seq
        first = begins % seq == 0
        in_row = torch.where(first, hidden[row], begins % seq + self.length)
        key_begins = row * (seq + self.length) + in_row
        row_begins = torch.arange(rows, device=ids.device)
        queries = torch.cat([begins, row_begins * seq]).sort().values
        keys = torch.cat([key_begins, row_begins * (seq + self.length)]).sort().values
        longest = now.longest + self.length
        return (
            Documents(now.ids, _close(queries, rows * seq), now.longest),
            Documents(ids, _close(keys, ids.numel()), longest),
        )

    def position_ids(self, batch: Batch) -> Int[Tensor, "batch inputs"]:
        """Positions relative to the window's first token; memory is negative."""
        before = torch.arange(-self.length, 0, device=batch.position_ids.device)
        return torch.cat([before.expand(len(batch.position_ids), -1), batch.position_ids], dim=1)

    def advance(self, batch: Batch) -> None:
        """Remember this window: the inputs of its blocks, and which tokens the next one may see."""
        ids = batch.documents.ids
        goes_on = (batch.labels[:, -1:] != NO_TARGET).expand(ids.shape)
        visible = (ids == ids[:, -1:]) & goes_on
        if self.visible is not None:
            still_open = (ids[:, -1:] == 0) & goes_on[:, :1]
            visible = torch.cat([self.visible & still_open, visible], dim=1)
        self.visible = visible[:, -self.tokens :]
        self.hidden = [layer.seen[:, -self.tokens :] for layer in self._layers]
        self._layers = []


@final
class LayerMemory(LayerSource):
    """What one block remembers; it is asked again when activations are recomputed in backward."""

    def __init__(self, past: Float[Tensor, "batch past width"] | None) -> None:
        self.past = past
        self.seen: Float[Tensor, "batch inputs width"]
        """Past and present inputs, detached."""

    def inputs(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch inputs width"]:
        """Return past inputs in front of the window's own."""
        inputs = x if self.past is None else torch.cat([self.past, x], dim=1)
        self.seen = inputs.detach()
        return inputs

    def extend(self, k: KVHeads, v: Values) -> tuple[SeenKeys, SeenValues]:
        """The past is among the inputs, and so among the keys."""
        return k, v


def _close(begins: Tensor, end: int) -> Int[Tensor, " offsets"]:
    return torch.cat([begins, begins.new_tensor([end])]).int()
