"""LongCE: targets that need long context count more (Fang et al. 2024, arXiv:2410.23771)."""

from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor

from lit_longctx.batch import NO_TARGET, Batch, documents_from_starts, positions_from_starts
from lit_longctx.model import Llama


@dataclass(frozen=True)
class LongCE:
    """Multiplies each target's weight by p(full context) / p(truncated context), at most γ.

    The loss stays a sum over targets divided by their number, as in the paper. Both probabilities
    come from the model as it stands, without gradient. Costs a forward pass over the rows and one
    over (truncated_context + stride) / stride times their tokens: with the defaults a step takes
    about three times as long.
    """

    truncated_context: int = 4096
    """Least tokens of the truncated context; targets with fewer before them keep their weight."""
    stride: int = 1024
    """Targets in a row whose truncated contexts begin alike."""
    largest: float = 5.0
    """γ, the largest factor."""

    def __post_init__(self) -> None:
        if self.truncated_context < 1 or self.stride < 1:
            raise ValueError(
                f"long_ce: truncated_context {self.truncated_context} and stride {self.stride} "
                "must be 1 or more"
            )
        if not 0 < self.largest < inf:
            raise ValueError(f"long_ce: largest {self.largest} must be above 0")

    @torch.no_grad()
    def weighed(self, llama: Llama, batch: Batch) -> Batch:
        """Return the batch with new loss weights; every process runs as many forward passes."""
        gain = self._truncated(llama, batch) - llama(batch)
        factors = gain.exp().clamp(max=self.largest)
        return batch._replace(loss_weights=batch.loss_weights * factors.to(batch.loss_weights))

    def _truncated(self, llama: Llama, batch: Batch) -> Float[Tensor, "batch seq"]:
        """Nats of each target after few of the tokens before it, in its own document."""
        seq = batch.input_ids.shape[1]
        nats = []
        for begin in range(0, max(1, seq - self.truncated_context + 1), self.stride):
            end = min(seq, begin + self.truncated_context + self.stride - 1)
            new = 0 if begin == 0 else self.truncated_context - 1
            nats.append(llama(cut(batch, begin, end, new))[:, new:])
        return torch.cat(nats, dim=1)


def cut(batch: Batch, begin: int, end: int, first_target: int) -> Batch:
    """Return columns of a batch as a text of its own, whose positions and documents begin anew."""
    ids = batch.documents.ids[:, begin:end]
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    labels = batch.labels[:, begin:end].clone()
    labels[:, :first_target] = NO_TARGET
    return batch._replace(
        input_ids=batch.input_ids[:, begin:end],
        labels=labels,
        loss_weights=batch.loss_weights[:, begin:end],
        position_ids=positions_from_starts(starts),
        documents=documents_from_starts(starts),
    )
