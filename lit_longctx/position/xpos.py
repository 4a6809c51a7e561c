"""xPos: rotation whose scores decay with distance."""

from dataclasses import dataclass
from math import ceil, log

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from lit_longctx.batch import Documents
from lit_longctx.position.rotary import Rotary, base_frequencies
from lit_longctx.position.rotation import cos_sin, rotate


class RotateAndScale(nn.Module):
    """Rotate, and let q grow and k shrink with the position; costs what rotation does."""

    def forward(
        self,
        q: Float[Tensor, "batch seq heads head_dim"],
        k: Float[Tensor, "batch seq kv_heads head_dim"],
        code: Float[Tensor, "batch seq code"],
    ) -> tuple[
        Float[Tensor, "batch seq heads head_dim"], Float[Tensor, "batch seq kv_heads head_dim"]
    ]:
        """`code` is [cos | sin] times the scale of q, then [cos | sin] times that of k."""
        q_cos, q_sin, k_cos, k_sin = code.unsqueeze(2).chunk(4, dim=-1)
        return rotate(q, q_cos, q_sin), rotate(k, k_cos, k_sin)


@dataclass(frozen=True)
class XPos(Rotary):
    """RoPE whose scores decay with distance (Sun et al. 2022, arXiv:2212.10554, §2.2).

    q is scaled by ζ_i^((p−c)/B) and k by its inverse, ζ_i = (2i/d + 0.4)/1.4, so that a score
    depends on p_q − p_k alone; c only keeps the scales small. Needs bfloat16 or float32 (float16
    overflows).
    """

    theta: float | None = None
    """Rotary base b; xPos ABF (Xiong et al. 2023): 5e5. Default: the checkpoint's."""
    scale_base: float = 512.0
    """B: the larger, the slower the decay."""
    centre: int = 16_384
    """c: position of scale 1, best half the context; queries and cached keys must share it."""

    def frequencies(self, head_dim: int, length: int | None = None) -> Float[Tensor, " freq"]:
        """θ_i, as RoPE."""
        return base_frequencies(self.theta, head_dim)

    def encode(
        self,
        position_ids: Num[Tensor, "batch seq"],
        head_dim: int,
        documents: Documents | None = None,
    ) -> Float[Tensor, "batch seq code"]:
        """Return [cos | sin] as q and as k has them; ValueError where a scale leaves float32."""
        self._check(int(position_ids.min()), int(position_ids.max()))
        positions = position_ids.unsqueeze(-1)
        zeta = (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim + 0.4) / 1.4
        # the exponent is large far from the centre: float64 keeps the scale exact to float32
        exponents = (
            (positions.double() - self.centre) / self.scale_base * zeta.log().to(positions.device)
        )
        angles = positions.float() * self.frequencies(head_dim).to(positions.device)
        scale = exponents.exp().float().repeat(1, 1, 2)
        turned = cos_sin(angles, 1.0)
        return torch.cat([turned * scale, turned / scale], dim=-1)

    def _check(self, first: int, last: int) -> None:
        allowed = -log(torch.finfo(torch.float32).tiny) / log(1.4 / 0.4)  # of (p − c)/B, for ζ_0
        farthest = max(last - self.centre, self.centre - min(first, 0))
        if farthest > allowed * self.scale_base:
            fitting = ceil((farthest + 1) / allowed)
            raise ValueError(
                f"xPos scales leave float32 at position {last:,} with centre {self.centre:,}; "
                f"set scale_base to {fitting} or more, or centre to half the context"
            )

    def layer(self, num_heads: int, head_dim: int) -> nn.Module:
        """Rotation and scaling need no weights."""
        return RotateAndScale()
