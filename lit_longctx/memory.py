"""Segment recurrence: what a window remembers of the windows before it (Dai et al. 2019, §3.2).

Each block keeps its detached inputs of the last windows; the next window's keys and values are
computed from them again, by today's weights, as far as they belong to the document that goes on.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_longctx.batch import NO_TARGET, Batch, Documents


class Memory:
    """Inputs of every block for the last `tokens` places of each row; empty at first.

    Rows must walk through documents: row r of a batch follows row r of the batch before.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.hidden: list[Float[Tensor, "batch past width"]] = []
        self.visible: Bool[Tensor, "batch past"] | None = None
        """Places that belong to the document that was open when the last window ended."""

    @property
    def length(self) -> int:
        """Places remembered."""
        return self.hidden[0].shape[1] if self.hidden else 0

    def documents(self, batch: Batch) -> tuple[Documents, Documents]:
        """Return queries and keys of a window with its memory in front.

        Both have the same segments: in each row first what is hidden (no queries), then the open
        document with its remembered places, then the other documents.
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

    def places(self, batch: Batch) -> Int[Tensor, "batch places"]:
        """Places of memory and window, the open document's first place in the window being 0."""
        before = torch.arange(-self.length, 0, device=batch.position_ids.device)
        return torch.cat([before.expand(len(batch.position_ids), -1), batch.position_ids], dim=1)

    def advance(self, batch: Batch, inputs: list[Tensor]) -> None:
        """Remember this window: the inputs of its blocks, and which places the next one may see."""
        ids = batch.documents.ids
        goes_on = (batch.labels[:, -1:] != NO_TARGET).expand(ids.shape)
        visible = (ids == ids[:, -1:]) & goes_on
        inputs = [x.detach() for x in inputs]
        if self.visible is not None:
            still_open = (ids[:, -1:] == 0) & goes_on[:, :1]
            visible = torch.cat([self.visible & still_open, visible], dim=1)
            inputs = [torch.cat([a, b], dim=1) for a, b in zip(self.hidden, inputs, strict=True)]
        self.visible = visible[:, -self.tokens :]
        self.hidden = [x[:, -self.tokens :] for x in inputs]


def _close(begins: Tensor, end: int) -> Int[Tensor, " offsets"]:
    return torch.cat([begins, begins.new_tensor([end])]).int()
