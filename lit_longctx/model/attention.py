"""Attention back ends by Hugging Face's `attn_implementation`."""

import sys
from functools import cache
from typing import Any, Literal, final

import torch
from jaxtyping import Float

from lit_longctx.batch import Documents
from lit_longctx.model.backend import AttentionBackend, Heads, KVHeads, Values
from lit_longctx.model.kernels import FlashAttention2, FlexAttention, Varlen
from lit_longctx.model.sdpa import SDPA
from lit_longctx.progress import say

AttnImplementation = Literal["auto", "sdpa", "flash_attention_2", "varlen", "flex_attention"]

LARGEST_HEAD_DIM = 256
"""Of flash kernels, whose head dimensions are multiples of 8."""


def automatic(
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> tuple[AttnImplementation, str]:
    """Return what `auto` stands for, varlen or sdpa, and why not varlen.

    Args:
        device: Of q, k and v; default: CUDA where there is some.
        dtype: Of q, k and v; default: half precision.
        head_dim: Of q and k; default: one that fits.
    """
    if not torch.cuda.is_available() or torch.device(device or "cuda").type != "cuda":
        return "sdpa", "varlen runs on CUDA only"
    if dtype not in (None, torch.bfloat16, torch.float16):
        return "sdpa", f"varlen takes bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim is not None and (head_dim > LARGEST_HEAD_DIM or head_dim % 8):
        limit = f"multiples of 8 up to {LARGEST_HEAD_DIM}"
        return "sdpa", f"varlen takes head dimensions that are {limit}, not {head_dim}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return "sdpa", f"varlen needs sm_80 or later, this is sm_{major}{minor}"
    return "varlen", ""


def attention_backend(name: str) -> AttentionBackend:
    """Return the back end of that name; ImportError or ValueError names what is missing.

    Args:
        name: One of `AttnImplementation`.
    """
    backends = {
        "auto": Automatic,
        "sdpa": SDPA,
        "flash_attention_2": FlashAttention2,
        "varlen": Varlen,
        "flex_attention": FlexAttention,
    }
    if name not in backends:
        raise ValueError(f"attn_implementation {name!r} unknown; expected one of {[*backends]}")
    return backends[name]()


class AnyMask:
    """Documents of queries and keys, and the mask of the back end that was asked for last."""

    __slots__ = ("backend", "mask", "structure")

    def __init__(self, queries: Documents, keys: Documents, window: int | None) -> None:
        self.structure = queries, keys, window
        self.backend: AttentionBackend | None = None
        self.mask: Any = None

    def of(self, backend: AttentionBackend) -> Any:
        """Return what a back end makes of the documents; made once."""
        if self.backend is not backend:
            self.backend, self.mask = backend, backend.prepare(*self.structure)
        return self.mask


@final
class Automatic(AttentionBackend):
    """varlen where q, k and v are such that it can take them, else sdpa; known when they come."""

    def __init__(self) -> None:
        self.chosen: dict[tuple[torch.device, torch.dtype, int], AttentionBackend] = {}
        self.backends: dict[str, AttentionBackend] = {}

    def prepare(self, queries: Documents, keys: Documents, window: int | None = None) -> AnyMask:
        """Keep the documents until a back end is chosen."""
        return AnyMask(queries, keys, window)

    def attend(
        self, q: Heads, k: KVHeads, v: Values, mask: Any, scale: float
    ) -> Float[torch.Tensor, "batch queries heads value_dim"]:
        """Attend by the back end that these tensors get."""
        kind = (q.device, q.dtype, q.shape[-1])
        if kind not in self.chosen:
            self.chosen[kind] = self._choose(*kind)
        backend = self.chosen[kind]
        return backend.attend(q, k, v, mask.of(backend), scale)

    def _choose(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
        name, reason = automatic(device, dtype, head_dim)
        if reason and device.type == "cuda":
            _say_once(f"attn_implementation auto: {name}, as {reason}")
        return self.backends.setdefault(name, attention_backend(name))


@cache
def _say_once(line: str) -> None:
    say(line, sys.stderr)  # what `generate` prints is text
