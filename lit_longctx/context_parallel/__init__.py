"""Context parallelism: each row of a batch is spread over the processes of a group.

Every process holds some of a row's tokens. Position codes are computed where the token is; keys and
values, or heads, are exchanged in each layer. Documents stay those of the whole row, so packed rows
cost and give what they do on one process.
"""

from typing import Literal

from torch.distributed import ProcessGroup

from lit_longctx.context_parallel.base import ContextParallel, Share, apply_context_parallel
from lit_longctx.context_parallel.ulysses import Ulysses
from lit_longctx.context_parallel.zigzag import Zigzag

__all__ = [
    "ContextParallel",
    "ContextParallelName",
    "Share",
    "Ulysses",
    "Zigzag",
    "apply_context_parallel",
    "context_parallel",
]

ContextParallelName = Literal["zigzag", "ulysses"]
"""How rows are divided: chunks of tokens and gathered keys, or heads for tokens."""


def context_parallel(
    name: ContextParallelName, group: ProcessGroup | None, kv_heads_at_once: int | None = None
) -> ContextParallel:
    """Return the kind of context parallelism of that name."""
    return Zigzag(group, kv_heads_at_once) if name == "zigzag" else Ulysses(group)
