"""Queries that grow with their position, so that attention over many keys stays sharp."""

from dataclasses import dataclass
from math import inf

from jaxtyping import Float, Num
from torch import Tensor


@dataclass(frozen=True)
class QueryTemperature:
    """Queries at position p are multiplied by 1 + a·ln(1 + ⌊(p + o)/f⌋); positions in tokens.

    Llama 4 has it in layers without positions (attn_temperature_tuning: a 0.1, f 8,192, o 1),
    Ministral 3 in all (llama_4_scaling_beta: a 0.1, f the original context of 16,384, o 0); the
    idea is scalable softmax (Nakanishi 2025, arXiv:2501.19399).
    """

    floor_scale: int
    """f: tokens of a step; queries before the first step are left as they are."""
    attn_scale: float = 0.1
    """a: by how much the factor grows with the logarithm of the steps."""
    offset: int = 0
    """o: is added to positions; Llama 4 counts them from 1."""

    def __post_init__(self) -> None:
        if self.floor_scale != int(self.floor_scale) or self.floor_scale < 1:
            raise ValueError(f"floor_scale must be 1 or more tokens; got {self.floor_scale}")
        if not 0 <= self.attn_scale < inf:
            raise ValueError(f"attn_scale must be finite and 0 or more; got {self.attn_scale}")
        if self.offset not in (0, 1):
            raise ValueError(f"offset must be 0 or 1; got {self.offset}")

    def factor(self, position_ids: Num[Tensor, "batch seq"]) -> Float[Tensor, "batch seq 1 1"]:
        """Return what the queries of each token are multiplied by, float32."""
        steps = ((position_ids.double() + self.offset) / self.floor_scale).floor()
        return (1 + self.attn_scale * steps.log1p()).float()[..., None, None]
