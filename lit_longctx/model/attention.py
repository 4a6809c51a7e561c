"""Attention back ends by Hugging Face's `attn_implementation`."""

from typing import Literal

import torch

from lit_longctx.model.backend import AttentionBackend
from lit_longctx.model.kernels import FlashAttention2, FlexAttention, Varlen
from lit_longctx.model.sdpa import SDPA

AttnImplementation = Literal["auto", "sdpa", "flash_attention_2", "varlen", "flex_attention"]


def automatic(
    device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> AttnImplementation:
    """Return what `auto` stands for: varlen on CUDA in half precision (sm_80 on), else sdpa."""
    cuda = torch.cuda.is_available() and torch.device(device or "cuda").type == "cuda"
    half = dtype in (None, torch.bfloat16, torch.float16)
    return "varlen" if cuda and half and torch.cuda.get_device_capability()[0] >= 8 else "sdpa"


def attention_backend(
    name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> AttentionBackend:
    """Return the back end of that name; ImportError or ValueError names what is missing.

    Args:
        name: One of `AttnImplementation`.
        device: Where the model will run, for `auto`; default: CUDA where there is some.
        dtype: Of q, k and v, for `auto`; default: half precision.
    """
    if name == "auto":
        name = automatic(device, dtype)
    backends = {
        "sdpa": SDPA,
        "flash_attention_2": FlashAttention2,
        "varlen": Varlen,
        "flex_attention": FlexAttention,
    }
    if name not in backends:
        expected = ["auto", *backends]
        raise ValueError(f"attn_implementation {name!r} unknown; expected one of {expected}")
    return backends[name]()
