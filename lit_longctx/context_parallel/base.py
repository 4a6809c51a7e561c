"""What kinds of context parallelism share: a batch divided, and its nats put together again."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.distributed import ProcessGroup

from lit_longctx.batch import Batch, documents_from_starts
from lit_longctx.context_parallel.collectives import gather
from lit_longctx.model import Llama
from lit_longctx.model.keys import OWN, KeySource


class Share(NamedTuple):
    """A process's tokens of a batch, and where their keys and values come from."""

    batch: Batch
    source: KeySource
    columns: Int[Tensor, "processes local"]
    """Columns of the whole rows that each process holds."""


class ContextParallel(ABC):
    """How the processes of a group divide the rows of a batch that all of them have read.

    Args:
        group: The processes; default: all.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    @abstractmethod
    def check(self, num_heads: int) -> None:
        """Raise ValueError if so many query heads cannot be divided."""

    @abstractmethod
    def share(self, batch: Batch) -> Share:
        """Return this process's part of a batch, padded where a row does not divide."""

    @abstractmethod
    def imbalance(self, batch: Batch) -> float:
        """Return the attention work of the busiest process over the mean; 1 is perfect."""

    def join(
        self, x: Shaped[Tensor, "batch local"], columns: Int[Tensor, "processes local"], seq: int
    ) -> Shaped[Tensor, "batch seq"]:
        """Return values of whole rows, given each process's own; no gradient."""
        parts = gather(x, self.group)
        whole = x.new_empty(len(x), columns.numel())
        whole[:, columns.flatten()] = parts.movedim(0, 1).flatten(1)
        return whole[:, :seq]

    def _take(self, batch: Batch, columns: Int[Tensor, "processes local"]) -> Batch:
        """Return this process's tokens; each knows the length of its whole document."""
        mine = columns[self.rank]
        ids = batch.documents.ids[:, mine]
        goes_on = F.pad((ids.diff() == 0) & (mine.diff() == 1), (1, 0))
        documents = documents_from_starts(~goes_on)
        return batch._replace(
            input_ids=batch.input_ids[:, mine],
            labels=batch.labels[:, mine],
            loss_weights=batch.loss_weights[:, mine],
            position_ids=batch.position_ids[:, mine],
            documents=documents._replace(ids=ids, token_lengths=batch.documents.lengths()[:, mine]),
        )


def apply_context_parallel(llama: Llama, context: ContextParallel) -> None:
    """Let every entry point take whole rows, compute this process's tokens, return whole rows.

    All processes of the group must be given the same batch. Nats come back without gradient; the
    loss is that of this process's tokens. Decoding stays as it is: each process by itself.
    """
    context.check(llama.config.num_attention_heads)
    for method in ("forward", "loss", "top1_correct"):
        setattr(llama, method, partial(_shared, getattr(llama, method), context))


def _shared(
    method: Callable[..., Any], context: ContextParallel, batch: Batch, source: KeySource = OWN
) -> Any:
    """Call an entry point with this process's share; join what it finds of each token."""
    assert source is OWN, "context parallelism brings its own source of keys"
    seq = batch.labels.shape[1]
    share = context.share(batch)
    found = method(share.batch, share.source)

    def joined(x: Tensor) -> Tensor:
        return context.join(x.detach(), share.columns, seq) if x.ndim == 2 else x

    return joined(found) if isinstance(found, Tensor) else tuple(joined(each) for each in found)
