"""Transformer-XL's relative positions, as Gopher uses them, without a seq × seq bias."""

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float, Num
from torch import Tensor, nn

from lit_longctx.batch import Documents
from lit_longctx.position.rotary import base_frequencies
from lit_longctx.position.scheme import PositionScheme

LOCALITY = 12.0
"""Nats by which a head first prefers its own position to a far one; the best of 0 … 16 in a try."""


class RelativeDistance(nn.Module):
    """Widen q and k so that their dot product is the score of Dai et al. 2019, §3.3.

    The score (q_i + u)·k_j + (q_i + v)·W_R r(i−j) splits by the angle-difference identities: with
    [a | b] = (q_i + v) W_R, the coefficients of r's sines and cosines,

        a sin((i−j)ω) + b cos((i−j)ω)
            = cos(jω)·(a sin iω + b cos iω) + sin(jω)·(b sin iω − a cos iω)

    (Dai et al. 2020, Funnel-Transformer, arXiv:2006.03236, appendix A.2.2). Any attention kernel
    that takes head_dim + distance_dim features then serves it, in linear memory.
    """

    def __init__(self, num_heads: int, head_dim: int, distance_dim: int) -> None:
        super().__init__()
        self.content_bias = nn.Parameter(torch.empty(num_heads, head_dim))  # u
        self.position_bias = nn.Parameter(torch.empty(num_heads, head_dim))  # v
        self.distance_weight = nn.Parameter(torch.empty(num_heads, head_dim, distance_dim))  # W_R

    def forward(
        self,
        q: Float[Tensor, "batch seq heads head_dim"],
        k: Float[Tensor, "batch seq kv_heads head_dim"],
        code: Float[Tensor, "batch seq distance_dim"],
    ) -> tuple[Float[Tensor, "batch seq heads wide"], Float[Tensor, "batch seq kv_heads wide"]]:
        """Return q' = [q+u | a sin + b cos | b sin − a cos] and k' = [k | cos | sin]."""
        sin, cos = code.unsqueeze(2).chunk(2, dim=-1)
        coefficients = einsum(
            q + self.position_bias, self.distance_weight, "b s h d, h d place -> b s h place"
        )
        a, b = coefficients.float().chunk(2, dim=-1)
        place_q = torch.cat([a * sin + b * cos, b * sin - a * cos], dim=-1)
        place_k = torch.cat([cos, sin], dim=-1).expand(-1, -1, k.shape[2], -1)
        return (
            torch.cat([q + self.content_bias, place_q.to(q.dtype)], dim=-1),
            torch.cat([k, place_k.to(k.dtype)], dim=-1),
        )


@dataclass(frozen=True)
class TransformerXL(PositionScheme):
    """Sinusoids of the distance with learned u, v, W_R per block (the original shares u and v)."""

    theta: float | None = None
    """Base of the sinusoids' frequencies; default: the checkpoint's."""
    distance_dim: int | None = None
    """Width of the sinusoid (even); default: head_dim. The original uses the model's width."""

    def encode(
        self,
        position_ids: Num[Tensor, "batch seq"],
        head_dim: int,
        documents: Documents | None = None,
    ) -> Float[Tensor, "batch seq code"]:
        """Return [sin | cos] of every position, float32."""
        frequencies = base_frequencies(self.theta, self.distance_dim or head_dim)
        angles = position_ids.unsqueeze(-1).float() * frequencies.to(position_ids.device)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def layer(self, num_heads: int, head_dim: int) -> nn.Module:
        """Return u, v and W_R of one block; they hold no numbers yet."""
        return RelativeDistance(num_heads, head_dim, self.distance_dim or head_dim)

    def initial_weight(self, name: str, shape: torch.Size) -> Tensor:
        """Start from a bias towards near positions that has the shape of RoPE's own decay.

        u = 0, v = 1 and all rows of W_R alike: the score begins as q·k + LOCALITY·mean_i cos(dω_i)
        (after the softmax scale, in nats) plus a small part from q. Σ cos(dω_i) is how RoPE's
        score of equal q and k falls with the distance d; without it, a RoPE checkpoint would lose
        all sense of place. docs/log.md has the losses of both starts.
        """
        if name == "content_bias":
            return torch.zeros(shape)
        if name == "position_bias":
            return torch.ones(shape)
        _, head_dim, distance_dim = shape
        weight = torch.zeros(shape)
        weight[..., distance_dim // 2 :] = LOCALITY * head_dim**0.5 / (distance_dim // 2) / head_dim
        return weight
