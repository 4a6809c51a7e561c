"""The one type everything meets in: packed token windows that know their documents."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

NO_TARGET = -100
"""Label of a position that predicts nothing, as everywhere in the field."""


class Documents(NamedTuple):
    """Which token belongs to which document; attention never crosses from one to the next."""

    ids: Int[Tensor, "batch seq"]
    """Number of the document within its row, counted from 0."""
    boundaries: Int[Tensor, " offsets"]
    """First token of each document, then the end, in the flattened batch (`cu_seqlens`), int32."""
    longest: int
    """Tokens of the longest document; on the host, so that no kernel launch has to wait for it."""
    token_lengths: Int[Tensor, "batch seq"] | None = None
    """Length of each token's document, where `boundaries` do not show the whole of it."""

    def lengths(self) -> Int[Tensor, "batch seq"]:
        """Length of the document that each token belongs to, in tokens."""
        if self.token_lengths is not None:
            return self.token_lengths
        each = self.boundaries.diff().long()
        return each.repeat_interleave(each, output_size=self.ids.numel()).view(self.ids.shape)


class Batch(NamedTuple):
    """One micro-batch of windows with targets, weights and document structure."""

    input_ids: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    """The token that follows each input; -100 where there is no target."""
    loss_weights: Float[Tensor, "batch seq"]
    """Weight of each target in the training loss; 0 where there is none."""
    position_ids: Num[Tensor, "batch seq"]
    """Position within the document, from 0; fractional where a transform scales positions."""
    sources: Int[Tensor, " batch"]
    """Number of the data source each row came from."""
    samples: Int[Tensor, " batch"]
    """Global sample number of each row: what was seen, and the seed of row-wise transforms."""
    documents: Documents

    def with_position_ids(self, position_ids: Num[Tensor, "batch seq"]) -> "Batch":
        """Return the same batch with its tokens placed elsewhere."""
        return self._replace(position_ids=position_ids)


class StepBatch(NamedTuple):
    """All that one rank does before one optimizer update."""

    micro_batches: list[Batch]
    next_sample: int
    """Global number of the first sample that this step, over all ranks, leaves unread."""
    next_token: int
    """Tokens that the run has read by then, in stride tokens."""
    restart: bool = False
    """Whether rows do not follow those of the last step, so that a memory of them is void."""


def documents_from_starts(starts: Bool[Tensor, "batch seq"]) -> Documents:
    """Describe documents by where they start; column 0 must be a start, since rows never join."""
    ids = starts.long().cumsum(dim=1) - 1
    begins = starts.flatten().nonzero().flatten()
    boundaries = torch.cat([begins, begins.new_tensor([starts.numel()])])
    return Documents(ids, boundaries.int(), int(boundaries.diff().max()))


def positions_from_starts(starts: Bool[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """Number the tokens of each document from 0; column 0 must be a start."""
    positions = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    return positions - (positions * starts).cummax(dim=1).values


def one_document(batch: int, seq: int, device: torch.device | None = None) -> Documents:
    """Documents of a batch in which every row is a single document of `seq` tokens."""
    ids = torch.zeros(batch, seq, dtype=torch.long, device=device)
    return Documents(
        ids, torch.arange(0, batch * seq + 1, seq, dtype=torch.int32, device=device), seq
    )


def pad_rows(batch: Batch, multiple: int) -> Batch:
    """Lengthen rows to a multiple of so many tokens, by a document of padding without targets."""
    rows, seq = batch.input_ids.shape
    extra = -seq % multiple
    if not extra:
        return batch
    starts = torch.zeros(rows * seq, dtype=torch.bool, device=batch.input_ids.device)
    starts[batch.documents.boundaries[:-1].long()] = True
    starts = torch.nn.functional.pad(starts.view(rows, seq), (0, extra))
    starts[:, seq] = True
    positions = torch.arange(extra, device=starts.device, dtype=batch.position_ids.dtype)

    def padded(x: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, extra), value=value)

    return batch._replace(
        input_ids=padded(batch.input_ids, 0),
        labels=padded(batch.labels, NO_TARGET),
        loss_weights=padded(batch.loss_weights, 0),
        position_ids=torch.cat([batch.position_ids, positions.expand(rows, -1)], dim=1),
        documents=documents_from_starts(starts),
    )


def pack(
    windows: Int[Tensor, "batch window"],
    bos: int,
    starts: Bool[Tensor, "batch window"] | None = None,
    sources: Int[Tensor, " batch"] | None = None,
    samples: Int[Tensor, " batch"] | None = None,
) -> Batch:
    """Turn windows of seq + 1 tokens into a batch of seq inputs and their targets.

    Documents begin where `starts` is True or, if it is not given, wherever `bos` stands: right only
    where BOS stands nowhere else, so with a tokenizer whose BOS is its EOS give `starts`. The
    beginning of a window begins a document too: the fragment it opens with cannot see what was cut
    off before it. The first token of a document is never a target. Negative ids are padding: a
    document of its own, without targets.

        tokens     B a b E B c d | e        (window of seq + 1 = 8; the last token is a target only)
        input_ids  B a b E B c d
        labels     a b E · c d e            (· = -100: the next document's BOS)
        positions  0 1 2 3 0 1 2
    """
    padding = windows < 0
    if starts is None:
        starts = windows == bos
    previous_is_padding = torch.nn.functional.pad(padding[:, :-1], (1, 0), value=False)
    starts = starts | (padding != previous_is_padding)

    inputs = windows[:, :-1].masked_fill(padding[:, :-1], 0).long()
    labels = windows[:, 1:].masked_fill(starts[:, 1:] | padding[:, 1:], NO_TARGET).long()
    begins = starts[:, :-1].clone()
    begins[:, 0] = True

    zeros = torch.zeros(len(inputs), dtype=torch.long, device=inputs.device)
    return Batch(
        input_ids=inputs,
        labels=labels,
        loss_weights=(labels != NO_TARGET).float(),
        position_ids=positions_from_starts(begins),
        sources=zeros if sources is None else sources,
        samples=zeros if samples is None else samples,
        documents=documents_from_starts(begins),
    )
