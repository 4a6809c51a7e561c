"""RoPE on a part of each head's features; the others have no positions."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lit_longctx.position.rotary import Rotary, base_frequencies
from lit_longctx.position.scheme import KEEP_THE_RUN


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"partial_rotary_factor must be above 0 and at most 1; got {share}")


@dataclass(frozen=True)
class PartialRoPE(Rotary):
    """RoPE on the first features of each head alone (Black et al. 2022, arXiv:2204.06745, §2.1).

    As in GPT-NeoX and Phi: the first ⌊p·head_dim⌋ features turn as a head of that width would, its
    halves being pairs. No family here has it in transformers, so that it cannot be exported.
    """

    theta: float | None = None
    """Rotary base b; default: the checkpoint's."""
    partial_rotary_factor: float = field(kw_only=True)
    """p: share of the features that turn, above 0 and up to 1; GPT-NeoX: 0.25."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self.partial_rotary_factor)

    def rotary_dim(self, head_dim: int) -> int:
        """Features that turn, ⌊p·head_dim⌋."""
        return int(head_dim * self.partial_rotary_factor)

    def check(self, head_dim: int) -> None:
        """Raise a ValueError unless the features that turn are pairs."""
        width = self.rotary_dim(head_dim)
        if width < 2 or width % 2:
            raise ValueError(
                f"partial_rotary_factor {self.partial_rotary_factor} turns {width} of {head_dim} "
                "features; expected an even number of 2 or more"
            )

    def frequencies(self, head_dim: int, length: int | None = None) -> Float[Tensor, " freq"]:
        """θ_i of a head of ⌊p·head_dim⌋ features."""
        self.check(head_dim)
        return base_frequencies(self.theta, self.rotary_dim(head_dim))

    def to_rope(self, head_dim: int) -> dict[str, Any]:
        """Refuse: transformers' Llama turns all features, whatever partial_rotary_factor says."""
        raise ValueError(
            f"Hugging Face's Llama cannot represent partial_rotary_factor "
            f"{self.partial_rotary_factor}; train with ProportionalRoPE, or {KEEP_THE_RUN}"
        )


@dataclass(frozen=True)
class ProportionalRoPE(Rotary):
    """p-RoPE: only the fastest pairs of each head turn (Barbero et al. 2025, arXiv:2410.06205, §6).

    Hugging Face's `proportional` (Gemma 4): frequencies are those of the whole head, so that a pair
    turns as in RoPE or not at all.
    """

    theta: float | None = None
    """Rotary base b; default: the checkpoint's."""
    partial_rotary_factor: float = field(kw_only=True)
    """p: share of the pairs that turn, above 0 and up to 1; Gemma 4: 0.25."""
    factor: float = 1.0
    """s: frequencies are divided by it, as in position interpolation."""

    rope_type = "proportional"
    rope_fields = ("theta", "partial_rotary_factor", "factor")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self.partial_rotary_factor)

    @classmethod
    def from_rope(cls, rope: dict[str, Any], context: int) -> "Rotary":
        """Build the scheme; without a factor it is 1, and without a share all pairs turn."""
        rope |= {"factor": 1.0, "partial_rotary_factor": 1.0, **rope}
        return super().from_rope(rope, context)

    def frequencies(self, head_dim: int, length: int | None = None) -> Float[Tensor, " freq"]:
        """θ_i / s of the first ⌊p·d/2⌋ pairs, 0 of the others."""
        turning = int(self.partial_rotary_factor * head_dim // 2)
        found = base_frequencies(self.theta, head_dim) / self.factor
        return torch.where(torch.arange(head_dim // 2) < turning, found, 0.0)
