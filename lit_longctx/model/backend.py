"""Interface of attention back ends, and the causal mask that all of them compute.

Layout is batch, seq, heads, head_dim. A query attends to the keys of its own document up to its own
index, or to the last `window` of them; where there are more keys than queries (a cache, a memory),
the queries are the last ones of each row.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from lit_longctx.batch import Documents

Heads = Float[Tensor, "batch queries heads head_dim"]
KVHeads = Float[Tensor, "batch keys kv_heads head_dim"]
Values = Float[Tensor, "batch keys kv_heads value_dim"]


CUDNN_FIRST = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
FLASH_FIRST = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def kernel_order(names: Sequence[str]) -> AbstractContextManager[Any]:
    """Return a context in which torch takes the first of these SDPBackends that can do the work."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([getattr(SDPBackend, name) for name in names], set_priority=True)


class AttentionBackend(ABC):
    """Interface of attention kernels: `prepare` makes a mask for a pass, `attend` applies it."""

    @abstractmethod
    def prepare(self, queries: Documents, keys: Documents, window: int | None = None) -> Any:
        """Turn document structure into whatever the kernel wants; shared by all layers of a kind.

        Args:
            queries: Documents of the queries.
            keys: Documents of the keys, in the same order; each ends with its queries.
            window: Keys that a query sees, its own included (Hugging Face's `sliding_window`).
        """

    @abstractmethod
    def attend(
        self, q: Heads, k: KVHeads, v: Values, mask: Any, scale: float
    ) -> Float[Tensor, "batch queries heads value_dim"]:
        """Softmax of scale·q·k over each query's visible keys, applied to v."""


def aligned(
    num_queries: int, num_keys: int, device: torch.device, window: int | None = None
) -> Bool[Tensor, "queries keys"]:
    """Causal mask of one document whose queries are its last tokens, in a window if there is one.

    Of 3 queries, 5 keys and a window of 2 (else the zeros on the left were ones):

        0 1 1 0 0
        0 0 1 1 0
        0 0 0 1 1
    """
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    mask = mask.tril(num_keys - num_queries)
    return mask if window is None else mask.triu(num_keys - num_queries - window + 1)


def widen(v: Values, width: int) -> Float[Tensor, "batch keys kv_heads width"]:
    """Pad v to the width of q: kernels with unequal widths fall back to a seq × seq matrix."""
    return F.pad(v, (0, width - v.shape[-1])) if v.shape[-1] < width else v
