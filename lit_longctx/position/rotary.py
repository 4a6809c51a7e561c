"""Rotary schemes: each pair of features turns by its own angle per token.

Pairs are (i, i + head_dim/2), as in Hugging Face checkpoints, so that weights load without permutation.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from lit_longctx.batch import Documents
from lit_longctx.position.scheme import PositionScheme


def base_frequencies(theta: float, head_dim: int) -> Float[Tensor, " freq"]:
    """θ_i = b^(−2i/d) in radians per token, i = 0 … d/2 − 1 (Su et al. 2021, arXiv:2104.09864, eq. 15)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / theta**exponents


class Rotate(nn.Module):
    """Turn each pair of q and k by the angles whose cosines and sines are in `code`; no weights."""

    def forward(
        self,
        q: Float[Tensor, "batch seq heads head_dim"],
        k: Float[Tensor, "batch seq kv_heads head_dim"],
        code: Float[Tensor, "batch seq head_dim"],
    ) -> tuple[Float[Tensor, "batch seq heads head_dim"], Float[Tensor, "batch seq kv_heads head_dim"]]:
        """Rotate in float32, whatever the dtype of q and k: bf16 angles would be wrong beyond 256 tokens."""
        cos, sin = code.unsqueeze(2).chunk(2, dim=-1)
        return rotate(q, cos, sin), rotate(k, cos, sin)


def rotate(
    x: Float[Tensor, "batch seq heads head_dim"],
    cos: Float[Tensor, "batch seq 1 freq"],
    sin: Float[Tensor, "batch seq 1 freq"],
) -> Float[Tensor, "batch seq heads head_dim"]:
    """(a, b) → (a cos − b sin, b cos + a sin) for the half-split pairs (a, b) of x."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


@dataclass(frozen=True)
class RoPE(PositionScheme):
    """Rotary position embedding (Su et al. 2021); a larger theta is ABF (Xiong et al. 2023, arXiv:2309.16039)."""

    theta: float = 10_000.0
    """Rotary base b. Llama 2: 1e4, Llama 3: 5e5, Llama 2 Long (ABF): 5e5."""

    attention_factor = 1.0

    def frequencies(self, head_dim: int, length: int | None = None) -> Float[Tensor, " freq"]:
        """Radians per token of each pair, float32."""
        return base_frequencies(self.theta, head_dim)

    def encode(
        self, position_ids: Num[Tensor, "batch seq"], head_dim: int, documents: Documents | None = None
    ) -> Float[Tensor, "batch seq code"]:
        """Return [cos | sin] of every pair's angle, float32."""
        angles = position_ids.unsqueeze(-1).float() * self.frequencies(head_dim).to(position_ids.device)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def layer(self, num_heads: int, head_dim: int) -> nn.Module:
        """Rotation needs no weights."""
        return Rotate()
