"""LongRoPE: a divisor for every pair of features, found by search."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import log, sqrt
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor

from lit_longctx.batch import Documents
from lit_longctx.position.rotary import Rotary, base_frequencies, base_powers
from lit_longctx.position.rotation import cos_sin
from lit_longctx.position.scheme import KEEP_THE_RUN, document_lengths


@dataclass(frozen=True)
class LongRoPE(Rotary):
    """A searched divisor for every pair (Ding et al. 2024, arXiv:2402.13753, eq. 3).

    Documents of up to L tokens use `short_factor`, longer ones `long_factor`. Without short factors
    it is LongRoPE2's mixed context windows (Shang et al. 2025, arXiv:2502.20082): short documents
    keep the original RoPE, also in a row with long ones.
    """

    theta: float | None = None
    """Rotary base b; default: the checkpoint's."""
    factor: float = field(kw_only=True)
    """s: longest context over L; decides the attention factor."""
    short_factor: Sequence[float] | None = field(default=None, kw_only=True)
    """λ_i for documents of up to L tokens, one per pair; default: 1 for all (LongRoPE2)."""
    long_factor: Sequence[float] = field(kw_only=True)
    """λ_i for longer documents, one per pair."""
    original_context: int | None = field(default=None, kw_only=True)
    """L: tokens per sequence the model was trained on; default: as the checkpoint says."""
    unscaled_tokens: int = 0
    """n̂: so many first positions of a document are not interpolated, and have no attention factor;
    Hugging Face lacks it."""

    rope_type = "longrope"
    rope_fields = ("theta", "factor", "short_factor", "long_factor", "original_context")
    depends_on_length = True

    def __post_init__(self) -> None:
        if self.short_factor is not None:
            object.__setattr__(self, "short_factor", tuple(self.short_factor))
        object.__setattr__(self, "long_factor", tuple(self.long_factor))
        super().__post_init__()

    def to_rope(self, head_dim: int) -> dict[str, Any]:
        """Return Hugging Face's settings, which know no first tokens that are left alone."""
        if self.unscaled_tokens:
            raise ValueError(
                f"Hugging Face cannot represent LongRoPE's unscaled_tokens {self.unscaled_tokens}; "
                f"train with unscaled_tokens 0, or {KEEP_THE_RUN}"
            )
        return super(LongRoPE, replace(self, short_factor=self._short(head_dim))).to_rope(head_dim)

    def _short(self, head_dim: int) -> Sequence[float]:
        return self.short_factor or (1.0,) * (head_dim // 2)

    @property
    def attention_scaling(self) -> float:
        """√(1 + ln s / ln L) as its authors' code has it."""
        return sqrt(1 + log(self.factor) / log(self.known_context)) if self.factor > 1 else 1.0

    def check(self, head_dim: int) -> None:
        """Raise a ValueError unless there is a divisor for every pair."""
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is not None and len(factors) != head_dim // 2:
                raise ValueError(
                    f"{name} must be {head_dim // 2} numbers for head_dim {head_dim}; got "
                    f"{len(factors)}"
                )

    def _divided(self, factors: Sequence[float], head_dim: int) -> Float[Tensor, " freq"]:
        """Return 1 / (λ_i·b^(2i/d)), in the authors' order of operations, which float32 shows."""
        self.check(head_dim)
        return 1.0 / (torch.tensor(factors) * base_powers(self.theta, head_dim))

    def frequencies(self, head_dim: int, length: int | None = None) -> Float[Tensor, " freq"]:
        """θ_i / λ_i; without a length, those of short documents."""
        long = length is not None and length > self.known_context
        return self._divided(self.long_factor if long else self._short(head_dim), head_dim)

    def encode(
        self,
        position_ids: Num[Tensor, "batch seq"],
        head_dim: int,
        documents: Documents | None = None,
    ) -> Float[Tensor, "batch seq code"]:
        """Return [cos | sin]; documents choose between short and long factors, positions by n̂."""
        device = position_ids.device
        long = (document_lengths(position_ids, documents) > self.known_context).unsqueeze(-1)
        frequencies = torch.where(
            long,
            self._divided(self.long_factor, head_dim).to(device),
            self._divided(self._short(head_dim), head_dim).to(device),
        )
        positions = position_ids.unsqueeze(-1).float()
        plain = base_frequencies(self.theta, head_dim).to(device)
        unscaled = positions < self.unscaled_tokens
        frequencies = torch.where(unscaled, plain, frequencies)
        return cos_sin(positions * frequencies, torch.where(unscaled, 1.0, self.attention_scaling))
