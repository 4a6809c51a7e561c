"""Sums over nats per token: loss by position and source, exact over ranks."""

from collections.abc import Sequence

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


class LossByPosition(Metric):
    """Mean nats by source and by how many tokens of the document came before.

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
        shape = (len(self.sources), len(self.edges) - 1)
        self.add_state("nats", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("targets", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nats: Float[Tensor, "batch seq"], batch: Batch) -> None:
        """Add a batch of nats, as `Llama` returns them."""
        inner = torch.tensor(self.edges[1:-1], device=nats.device)
        bucket = torch.bucketize(batch.position_ids, inner, right=True)
        cell = batch.sources.unsqueeze(1) * (len(self.edges) - 1) + bucket
        has_target = batch.labels != NO_TARGET
        cells = cell[has_target]
        self.nats.view(-1).index_add_(0, cells, nats[has_target].double())
        self.targets.view(-1).index_add_(0, cells, torch.ones_like(cells, dtype=torch.float64))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return Σ nats and number of targets, each [source, bucket], over all ranks."""
        return self.nats.cpu(), self.targets.cpu()

    def by_bucket(self) -> list[float]:
        """Mean nats of each position bucket over all sources; nan where there was no target."""
        nats, targets = self.compute()
        return (nats.sum(0) / targets.sum(0)).tolist()

    def scalars(self, prefix: str = "val") -> dict[str, float]:
        """Return overall loss and perplexity, and the loss of each bucket and each source."""
        nats, targets = self.compute()
        mean = float(nats.sum() / targets.sum())
        values = {f"{prefix}/loss": mean, f"{prefix}/ppl": float(torch.tensor(mean).exp())}
        for i, (low, high) in enumerate(zip(self.edges[:-1], self.edges[1:], strict=True)):
            if targets[:, i].sum():
                values[f"{prefix}/loss_pos/{low}-{high}"] = float(
                    nats[:, i].sum() / targets[:, i].sum()
                )
        if len(self.sources) > 1:
            for i, name in enumerate(self.sources):
                if targets[i].sum():
                    values[f"{prefix}/loss_source/{name}"] = float(nats[i].sum() / targets[i].sum())
        return values
