"""Sums over nats per token: loss by source, document length and position, exact over ranks."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from lit_longctx.batch import NO_TARGET, Batch


def position_edges(window: int, first: int = 128) -> list[int]:
    """Bucket edges 0, 128, 256, 512, … doubling up to the window."""
    edges = [0]
    edge = first
    while edge < window:
        edges.append(edge)
        edge *= 2
    return [*edges, window]


def bucket_names(edges: Sequence[int]) -> list[str]:
    """Names of the buckets of lengths: between two edges, and whole windows at last."""
    return [*(f"{low}-{high}" for low, high in pairwise(edges)), str(edges[-1])]


class LossByPosition(Metric):
    """Mean nats by source, by length of the document and by how many of its tokens came before.

    A document's length is what the window shows of it. Positions fall between two edges; lengths
    too, with one bucket more at the end for documents that fill the whole window: their tokens
    are the same documents' at every position.

    Args:
        sources: Names of the sources, in the order of `Batch.sources`.
        window: Largest position, in tokens.
        edges: Bucket edges in tokens; default: doubling.
    """

    full_state_update = False
    nats: Tensor
    targets: Tensor

    def __init__(
        self, sources: Sequence[str], window: int, edges: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.sources = list(sources)
        self.edges = list(edges or position_edges(window))
        shape = (len(self.sources), len(self.edges), len(self.edges) - 1)
        self.add_state("nats", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("targets", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nats: Float[Tensor, "batch seq"], batch: Batch) -> None:
        """Add a batch of nats, as `Llama` returns them."""
        edges = torch.tensor(self.edges[1:], device=nats.device)
        place = torch.bucketize(batch.position_ids, edges[:-1], right=True)
        length = torch.bucketize(batch.documents.lengths(), edges, right=True)
        _, lengths, positions = self.nats.shape
        cell = (batch.sources.unsqueeze(1) * lengths + length) * positions + place
        has_target = batch.labels != NO_TARGET
        cells = cell[has_target]
        self.nats.view(-1).index_add_(0, cells, nats[has_target].double())
        self.targets.view(-1).index_add_(0, cells, torch.ones_like(cells, dtype=torch.float64))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return Σ nats and number of targets, each [source, length, position], over all ranks."""
        return self.nats.cpu(), self.targets.cpu()

    def scalars(self, prefix: str = "val") -> dict[str, float]:
        """Return overall loss and perplexity, and the loss of each position, length and source.

        Empty where there was no target.
        """
        nats, targets = self.compute()
        if not targets.any():
            return {}
        mean = float(nats.sum() / targets.sum())
        values = {f"{prefix}/loss": mean, f"{prefix}/ppl": float(torch.tensor(mean).exp())}
        names = bucket_names(self.edges)
        for kind, dims, found in (
            ("pos", (0, 1), names[:-1]),
            ("len", (0, 2), names),
            ("source", (1, 2), self.sources if len(self.sources) > 1 else []),
        ):
            means = (nats.sum(dims) / targets.sum(dims)).tolist()
            pairs = zip(found, means[: len(found)], strict=True)
            each = {f"{prefix}/loss_{kind}/{name}": mean for name, mean in pairs if mean == mean}
            values |= each
        return values
