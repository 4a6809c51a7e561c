"""Attention back ends: each sees the same documents and gives the same numbers.

Names are Hugging Face's `attn_implementation`. Layout is batch, seq, heads, head_dim. A query
attends to the keys of its own document up to its own index, or to the last `window` of them; where
there are more keys than queries (a cache, a memory), the queries are the last ones of each row.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from lit_longctx.batch import Documents

AttnImplementation = Literal["sdpa", "flash_attention_2", "varlen", "flex_attention"]

Heads = Float[Tensor, "batch queries heads head_dim"]
KVHeads = Float[Tensor, "batch keys kv_heads head_dim"]
Values = Float[Tensor, "batch keys kv_heads value_dim"]


class AttentionBackend(ABC):
    """The same two beats as a position scheme: once per forward pass, once per layer."""

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


def attention_backend(name: str) -> AttentionBackend:
    """Return the back end of that name; ImportError or ValueError names what is missing."""
    backends = {
        "sdpa": SDPA,
        "flash_attention_2": FlashAttention2,
        "varlen": Varlen,
        "flex_attention": FlexAttention,
    }
    if name not in backends:
        raise ValueError(f"attn_implementation {name!r} unknown; expected one of {list(backends)}")
    return backends[name]()


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
    ) -> Tensor | Segments | None:
        """Return None (plain causal rows), Segments (packed rows) or one mask for all rows."""
        batch, num_queries = queries.ids.shape
        num_keys = keys.ids.shape[1]
        device = queries.ids.device
        if window is not None and window >= keys.longest:
            window = None
        whole = len(queries.boundaries) == len(keys.boundaries) == batch + 1
        if whole and window is None:
            if num_queries == num_keys:
                return None
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
        if not isinstance(mask, Segments):
            out = _sdpa(q, k, v, mask, scale)
        else:
            parts = (q.flatten(0, 1).split(mask.queries), mask.split(k), mask.split(v))
            stretch = _recomputed_sdpa if mask.views and torch.is_grad_enabled() else _sdpa
            flat = [
                stretch(q[None], k[None], v[None], m, scale)[0]
                for q, k, v, m in zip(*parts, mask.masks, strict=True)
                if len(q)
            ]
            out = torch.cat(flat).view(q.shape)
        return out[..., :value_dim]


def _recomputed_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Keep neither a mask in floats nor repeated heads for backward: blocks × keys of both."""
    return checkpoint(_sdpa, q, k, v, mask, scale, use_reentrant=False, preserve_rng_state=False)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    with _kernel_priority(q):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
    return out.transpose(1, 2)


def _kernel_priority(q: Tensor) -> Any:
    """On Hopper put cuDNN before flash: 1.7 to 2.3 times faster in training shapes."""
    from contextlib import nullcontext

    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] != 9:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    order += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


class VarlenMask(NamedTuple):
    """What variable-length kernels are told: documents of queries and keys, and the window."""

    queries: Documents
    keys: Documents
    window: int | None


def window_size(window: int | None) -> tuple[int, int]:
    """Keys before and after its own that a query sees, as flash kernels count; −1: all of them."""
    return (-1 if window is None else window - 1, 0)


class FlashAttention2(AttentionBackend):
    """The flash-attn package's varlen kernel (Dao 2023, arXiv:2307.08691); CUDA, fp16 or bf16."""

    def __init__(self) -> None:
        try:
            from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                "attn_implementation 'flash_attention_2' needs the flash-attn package: "
                "pip install 'lit_longctx[flash]' on a CUDA machine, or use 'sdpa'"
            ) from error
        self.kernel = flash_attn_varlen_func

    def prepare(self, queries: Documents, keys: Documents, window: int | None = None) -> VarlenMask:
        """The kernel takes the boundaries as they are."""
        return VarlenMask(queries, keys, window)

    def attend(
        self, q: Heads, k: KVHeads, v: Values, mask: Any, scale: float
    ) -> Float[Tensor, "batch queries heads value_dim"]:
        """One kernel over all documents of the batch."""
        queries, keys, window = mask
        value_dim = v.shape[-1]
        v = widen(v, q.shape[-1])
        out = self.kernel(
            *(x.flatten(0, 1) for x in (q, k, v)),
            cu_seqlens_q=queries.boundaries,
            cu_seqlens_k=keys.boundaries,
            max_seqlen_q=queries.longest,
            max_seqlen_k=keys.longest,
            softmax_scale=scale,
            causal=True,
            window_size=window_size(window),
        )
        return out.view(q.shape)[..., :value_dim]


class Varlen(AttentionBackend):
    """torch.nn.attention.varlen: flash inside torch, no extra package; CUDA, fp16 or bf16."""

    def __init__(self) -> None:
        from torch.nn.attention.varlen import varlen_attn

        if not torch.cuda.is_available():
            raise ValueError("attn_implementation 'varlen' runs on CUDA only; use 'sdpa' here")
        self.kernel = varlen_attn

    def prepare(self, queries: Documents, keys: Documents, window: int | None = None) -> VarlenMask:
        """The kernel takes the boundaries as they are."""
        return VarlenMask(queries, keys, window)

    def attend(
        self, q: Heads, k: KVHeads, v: Values, mask: Any, scale: float
    ) -> Float[Tensor, "batch queries heads value_dim"]:
        """One kernel over all documents; KV heads are repeated: torch 2.11 lacks grouped heads."""
        queries, keys, window = mask
        value_dim = v.shape[-1]
        repeats = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, widen(v, q.shape[-1])))
        flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
        out = self.kernel(
            flat_q,
            flat_k,
            flat_v,
            queries.boundaries,
            keys.boundaries,
            queries.longest,
            keys.longest,
            scale=scale,
            window_size=window_size(window),
        )
        assert isinstance(out, Tensor)
        return out.view(q.shape)[..., :value_dim]


class FlexAttention(AttentionBackend):
    """torch's flex_attention, compiled on CUDA; on the CPU forward only (a limit of torch)."""

    def __init__(self) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        self.create_block_mask = create_block_mask
        compiled = torch.cuda.is_available()
        self.kernel = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def prepare(self, queries: Documents, keys: Documents, window: int | None = None) -> Any:
        """Build the block-sparse mask of same-document, not-later, near enough pairs."""
        batch, num_queries = queries.ids.shape
        num_keys = keys.ids.shape[1]
        window = num_keys if window is None else window
        past = keys.boundaries.diff() - queries.boundaries.diff()
        query_document, query_place = _places(queries, past)
        key_document, key_place = _places(keys, torch.zeros_like(past))
        return self.create_block_mask(
            lambda b, h, i, j: (
                (query_document[b, i] == key_document[b, j])
                & (query_place[b, i] >= key_place[b, j])
                & (query_place[b, i] - key_place[b, j] < window)
            ),
            batch,
            None,
            num_queries,
            num_keys,
            device=queries.ids.device,
        )

    def attend(
        self, q: Heads, k: KVHeads, v: Values, mask: Any, scale: float
    ) -> Float[Tensor, "batch queries heads value_dim"]:
        """Attend under the block mask; grouped heads are native."""
        value_dim = v.shape[-1]
        q, k, v = (x.transpose(1, 2) for x in (q, k, widen(v, q.shape[-1])))
        if not q.is_cuda and torch.is_grad_enabled() and q.requires_grad:
            raise ValueError(
                "flex_attention has no backward pass on the CPU; train with 'sdpa' here"
            )
        out = self.kernel(
            q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2)[..., :value_dim]


def _places(
    documents: Documents, first: Int[Tensor, " documents"]
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Return each token's document, numbered over all rows, and place in it, counted from `first`.

    Queries and keys of a document are compared by them, also where each has another past.
    """
    sizes = documents.boundaries.diff().long()
    tokens = documents.ids.numel()
    numbers = torch.arange(len(sizes), device=sizes.device)
    number = numbers.repeat_interleave(sizes, output_size=tokens)
    begins = (documents.boundaries[:-1] - first)[number]
    place = torch.arange(tokens, device=sizes.device) - begins
    return number.view(documents.ids.shape), place.view(documents.ids.shape)
