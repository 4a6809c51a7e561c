"""Rotation of pairs of features by given angles, in float32 whatever the dtype of the features."""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Rotate(nn.Module):
    """Turn each pair of q and k by the angles whose cosines and sines are in `code`; no weights."""

    def forward(
        self,
        q: Float[Tensor, "batch seq heads head_dim"],
        k: Float[Tensor, "batch seq kv_heads head_dim"],
        code: Float[Tensor, "batch seq rotary_dim"],
    ) -> tuple[
        Float[Tensor, "batch seq heads head_dim"], Float[Tensor, "batch seq kv_heads head_dim"]
    ]:
        """Rotate in float32, whatever the dtype of q and k: bf16 has no integers beyond 256."""
        cos, sin = code.unsqueeze(2).chunk(2, dim=-1)
        return rotate(q, cos, sin), rotate(k, cos, sin)


FEATURES_AT_ONCE = 2**25
"""Features that are rotated at a time: 128 MiB in float32, 8,192 tokens of 32 heads of 128."""


def rotate(
    x: Float[Tensor, "batch seq heads head_dim"],
    cos: Float[Tensor, "batch seq 1 freq"],
    sin: Float[Tensor, "batch seq 1 freq"],
) -> Float[Tensor, "batch seq heads head_dim"]:
    """`turn` in float32, returned in x's dtype; of long rows some tokens at a time.

    The same to the bit, gradient included; float32 copies exist of `FEATURES_AT_ONCE` alone, unless
    it is compiled.
    """
    if x.numel() <= FEATURES_AT_ONCE or torch.compiler.is_compiling():
        return turn(x.float(), cos, sin).to(x.dtype)
    return cast(Tensor, _Rotation.apply(x, cos, sin))


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _by_tiles(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _by_tiles(grads[0], *ctx.saved_tensors, back=True), None, None


def _by_tiles(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tokens = max(1, FEATURES_AT_ONCE // x[:, 0].numel())
    tiles = (each.split(tokens, dim=1) for each in (x, cos, sin, out))
    for source, c, s, target in zip(*tiles, strict=True):
        target.copy_(turn(source.float(), c, -s if back else s))
    return out


def turn(
    x: Float[Tensor, "batch seq heads head_dim"],
    cos: Float[Tensor, "batch seq 1 freq"],
    sin: Float[Tensor, "batch seq 1 freq"],
) -> Float[Tensor, "batch seq heads head_dim"]:
    """(a, b) → (a cos − b sin, b cos + a sin) for the half-split pairs (a, b) of x.

    Features beyond the first 2·freq stay as they are.
    """
    width = cos.shape[-1]
    a, b, *rest = x.tensor_split((width, 2 * width), dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, *rest], dim=-1)


def cos_sin(
    angles: Float[Tensor, "batch seq freq"], attention_factor: float | Tensor
) -> Float[Tensor, "batch seq head_dim"]:
    """Return [cos | sin], both times the attention factor."""
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * attention_factor
