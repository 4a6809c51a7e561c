"""Attention kernels for CUDA: flash-attn, torch's varlen and flex_attention."""

import inspect
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_longctx.batch import Documents
from lit_longctx.model.backend import (
    FLASH_FIRST,
    AttentionBackend,
    Heads,
    KVHeads,
    Values,
    kernel_order,
    widen,
)


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
                "attn_implementation 'flash_attention_2' needs the flash-attn package, which is "
                "built against the installed torch (nvcc, about an hour): pip install "
                "--no-build-isolation flash-attn; or use 'varlen', the same kernel inside torch, "
                "or 'sdpa'"
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
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return out.view(q.shape)[..., :value_dim]


def activate_newest_flash(major: int) -> str:
    """Let torch's flash attention be FA3 or FA4 where one is installed; return its name, or FA2.

    For the whole process, as torch keeps it; what was activated before stays.

    Args:
        major: The GPU's compute capability: 9 (Hopper) runs FA3 and FA4, 10 (Blackwell) FA4.
    """
    from torch.nn import attention

    if active := getattr(attention, "current_flash_attention_impl", lambda: None)():
        return active
    for name in {9: ("FA3", "FA4"), 10: ("FA4",)}.get(major, ()):
        try:
            attention.activate_flash_attention_impl(name)
        except (AttributeError, ImportError, OSError, RuntimeError, ValueError):
            continue  # an older torch, or not installed for this one
        return name
    return "FA2"


class Varlen(AttentionBackend):
    """torch.nn.attention.varlen: flash inside torch, no extra package; CUDA, fp16 or bf16.

    On Hopper and Blackwell torch itself puts cuDNN first for causal documents; an installed FA3 or
    FA4 goes before it.
    """

    def __init__(self) -> None:
        from torch.nn.attention.varlen import varlen_attn

        if not torch.cuda.is_available():
            raise ValueError("attn_implementation 'varlen' runs on CUDA only; use 'sdpa' here")
        self.kernel = varlen_attn
        self.flash = activate_newest_flash(torch.cuda.get_device_capability()[0])
        """Implementation that torch's flash attention calls."""
        self.grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch ≥ 2.12

    def prepare(self, queries: Documents, keys: Documents, window: int | None = None) -> VarlenMask:
        """The kernel takes the boundaries as they are."""
        return VarlenMask(queries, keys, window)

    def attend(
        self, q: Heads, k: KVHeads, v: Values, mask: Any, scale: float
    ) -> Float[Tensor, "batch queries heads value_dim"]:
        """One kernel over all documents; KV heads are repeated only where torch cannot group."""
        queries, keys, window = mask
        if q.is_cuda and q.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"varlen takes bfloat16 or float16, not {q.dtype}; use 'sdpa'")
        value_dim = v.shape[-1]
        v = widen(v, q.shape[-1])
        grouped: Any = {"enable_gqa": True} if self.grouped and q.shape[2] != k.shape[2] else {}
        if not self.grouped:
            repeats = q.shape[2] // k.shape[2]
            k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
        flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
        with nullcontext() if self.flash == "FA2" else kernel_order(FLASH_FIRST):
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
                **grouped,
            )
        assert isinstance(out, Tensor)
        return out.view(q.shape)[..., :value_dim]


class FlexAttention(AttentionBackend):
    """torch's flex_attention, compiled on CUDA; on the CPU forward only (a limit of torch)."""

    def __init__(self) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.cuda.is_available()
        # uncompiled it would first build the dense mask: 256 GiB at 512K tokens
        self.create_block_mask = torch.compile(create_block_mask) if compiled else create_block_mask
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
