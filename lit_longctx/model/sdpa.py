"""torch's scaled_dot_product_attention, on stretches of packed rows: on any device."""

from collections.abc import Sequence
from contextlib import nullcontext
from enum import Enum
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from lit_longctx.batch import Documents
from lit_longctx.model.backend import (
    CUDNN_FIRST,
    AttentionBackend,
    Heads,
    KVHeads,
    Values,
    aligned,
    kernel_order,
    widen,
)
from lit_longctx.model.recompute import recomputed


class Segments:
    """Stretches of the flattened queries and keys that attend to each other and nothing else."""

    def __init__(self) -> None:
        self.queries: list[int] = []
        """Sizes of the queries' stretches, which follow each other."""
        self.keys: list[int] = []
        """Sizes of the keys' stretches."""
        self.begins: list[int] = []
        """First key of each stretch."""
        self.masks: list[Tensor | None] = []
        """Mask of a stretch; None where it is one document, causal from its first token."""
        self.gather: Int[Tensor, " keys"] | None = None
        """Keys of all stretches, where these overlap a little."""
        self.views = False
        """Whether stretches overlap so much that each is cut out by itself."""

    def add(self, num_queries: int, begin: int, num_keys: int, mask: Tensor | None) -> None:
        """Append a stretch."""
        self.queries.append(num_queries)
        self.begins.append(begin)
        self.keys.append(num_keys)
        self.masks.append(mask)

    def close(self, num_keys: int, device: torch.device) -> "Segments":
        """Decide how keys are cut, now that all stretches are known."""
        ends = list(accumulate(self.keys, initial=0))
        if ends[-1] > 3 * num_keys:
            self.views = True
        elif [*self.begins, num_keys] != ends:
            ranges = [torch.arange(b, b + n) for b, n in zip(self.begins, self.keys, strict=True)]
            self.gather = torch.cat(ranges).to(device)
        return self

    def split(self, x: Float[Tensor, "batch keys kv_heads dim"]) -> Sequence[Tensor]:
        """Cut keys or values into stretches; one gradient buffer serves all of them."""
        x = x.flatten(0, 1)
        if self.views:
            return [x[begin : begin + n] for begin, n in zip(self.begins, self.keys, strict=True)]
        return (x if self.gather is None else x.index_select(0, self.gather)).split(self.keys)


class Unmasked(Enum):
    """Rows of one document whose queries are its last tokens, to be attended to without a mask."""

    LAST = 1
    """One query a row, which sees all keys."""
    NEW = 2
    """Queries see all keys before them, and one another causally; on a CPU, without gradient."""


class SDPA(AttentionBackend):
    """torch's scaled_dot_product_attention, called per document: costs Σ len², never (Σ len)².

    Short documents share a call of at most `together` tokens with a dense mask, which is cheaper
    than a call each. Queries whose keys are more than they (a window, a cache, context parallelism)
    are cut into blocks, so that no mask is larger than a block's.
    """

    together = 256
    """Most tokens of a call with a dense mask, and of a block of queries."""

    def prepare(
        self, queries: Documents, keys: Documents, window: int | None = None
    ) -> Tensor | Segments | Unmasked | None:
        """Return None (plain causal rows), Segments (packed rows) or what all rows share."""
        batch, num_queries = queries.ids.shape
        num_keys = keys.ids.shape[1]
        device = queries.ids.device
        if window is not None and window >= keys.longest:
            window = None
        whole = len(queries.boundaries) == len(keys.boundaries) == batch + 1
        if whole and window is None:
            if num_queries == num_keys:
                return None
            if num_queries == 1:
                return Unmasked.LAST
            if device.type == "cpu" and not torch.is_grad_enabled():
                return Unmasked.NEW
            if num_queries <= self.together:
                return aligned(num_queries, num_keys, device)
        segments = Segments()
        sizes = (documents.boundaries.diff().tolist() for documents in (queries, keys))
        group: list[int] = []
        begin = 0
        for num_queries, num_keys in zip(*sizes, strict=True):
            alike = num_queries == num_keys
            if group and not (alike and sum(group) + num_queries <= self.together):
                self._close(segments, group, begin - sum(group), window, device)
                group = []
            if alike and (window is None or num_keys <= max(window, self.together)):
                group.append(num_queries)
            elif device.type == "cuda" and (window is None or num_keys <= window):
                mask = causal_lower_right(num_queries, num_keys)
                segments.add(num_queries, begin, num_keys, mask)
            else:
                self._blocks(segments, num_queries, begin, num_keys, window, device)
            begin += num_keys
        self._close(segments, group, begin - sum(group), window, device)
        return segments.close(keys.ids.numel(), device)

    def _close(
        self,
        segments: Segments,
        group: list[int],
        begin: int,
        window: int | None,
        device: torch.device,
    ) -> None:
        """Make one stretch of the documents of a group."""
        if not group:
            return
        mask = None
        if len(group) > 1 or (window is not None and group[0] > window):
            sizes = torch.tensor(group, device=device)
            ids = torch.arange(len(group), device=device).repeat_interleave(sizes)
            mask = (ids[:, None] == ids[None, :]) & aligned(len(ids), len(ids), device, window)
        segments.add(sum(group), begin, sum(group), mask)

    def _blocks(
        self,
        segments: Segments,
        num_queries: int,
        begin: int,
        num_keys: int,
        window: int | None,
        device: torch.device,
    ) -> None:
        """Cut a document's queries into blocks, each with the keys that it reaches."""
        size = max(window or 0, self.together)
        past = num_keys - num_queries
        reach = num_keys if window is None else min(num_keys, window - 1 + size)
        mask = aligned(min(size, num_queries), reach, device, window)  # blocks are its corners
        for first in range(0, num_queries, size):
            last = min(first + size, num_queries)
            unseen = 0 if window is None else max(0, past + first - window + 1)
            keys = past + last - unseen
            corner = mask[len(mask) - (last - first) :, reach - keys :]
            segments.add(last - first, begin + unseen, keys, corner)

    def attend(
        self, q: Heads, k: KVHeads, v: Values, mask: Any, scale: float
    ) -> Float[Tensor, "batch queries heads value_dim"]:
        """Attend row by row, or stretch by stretch when rows are packed."""
        value_dim = v.shape[-1]
        v = widen(v, q.shape[-1])
        if mask is Unmasked.NEW and torch.is_grad_enabled():  # prepared for a pass without
            mask = aligned(q.shape[1], k.shape[1], q.device)
        if mask is Unmasked.NEW:
            out = _past_and_new(q, k, v, scale)
        elif not isinstance(mask, Segments):
            with _kernel_priority(q):
                out = _sdpa(q, k, v, mask, scale)
        else:
            parts = (q.flatten(0, 1).split(mask.queries), mask.split(k), mask.split(v))
            # masks in floats and repeated heads, blocks × keys of both, are not kept for backward
            stretch = partial(recomputed, _sdpa) if mask.views else _sdpa
            flat = [
                stretch(q[None], k[None], v[None], m, scale)[0]
                for q, k, v, m in zip(*parts, mask.masks, strict=True)
                if len(q)
            ]
            out = torch.cat(flat).view(q.shape)
        return out[..., :value_dim]


def _past_and_new(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend to the keys before the queries and to the queries' own, and join both by their sums.

    A mask of new × all keys would cost a CPU more than half of the time.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    past = k.shape[2] - q.shape[2]
    before, before_sum = kernel(q, k[:, :, :past], v[:, :, :past], 0.0, False, scale=scale)
    new, new_sum = kernel(q, k[:, :, past:], v[:, :, past:], 0.0, True, scale=scale)
    share = torch.sigmoid(new_sum - before_sum).unsqueeze(-1).to(q.dtype)  # logs of both sums
    return torch.lerp(before, new, share).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Unmasked | None, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask if isinstance(mask, Tensor) else None,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=grouped,
    )
    return out.transpose(1, 2)


def _kernel_priority(q: Tensor) -> Any:
    """On Hopper put cuDNN before flash: 1.7 to 2.3 times faster on whole rows.

    Not on packed ones, for which it would build a graph for every new length of a document.
    """
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] != 9:
        return nullcontext()
    return kernel_order(CUDNN_FIRST)
