"""No positions at all: the causal mask alone tells layers the order of tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from lit_longctx.batch import Documents
from lit_longctx.position.scheme import PositionScheme


class Unchanged(nn.Module):
    """Return q and k as they are; no weights."""

    def forward(
        self,
        q: Float[Tensor, "batch seq heads head_dim"],
        k: Float[Tensor, "batch seq kv_heads head_dim"],
        code: Float[Tensor, "batch seq 0"],
    ) -> tuple[
        Float[Tensor, "batch seq heads head_dim"], Float[Tensor, "batch seq kv_heads head_dim"]
    ]:
        """The code is empty."""
        return q, k


@dataclass(frozen=True)
class NoPE(PositionScheme):
    """No position encoding (Kazemnejad et al. 2023, arXiv:2305.19466)."""

    def encode(
        self,
        position_ids: Num[Tensor, "batch seq"],
        head_dim: int,
        documents: Documents | None = None,
    ) -> Float[Tensor, "batch seq code"]:
        """Return an empty code."""
        return torch.zeros(*position_ids.shape, 0, device=position_ids.device)

    def layer(self, num_heads: int, head_dim: int) -> nn.Module:
        """There is nothing to apply."""
        return Unchanged()
