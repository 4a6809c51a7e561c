"""YaRN: fast pairs of features are kept, slow ones interpolated."""

from dataclasses import dataclass, field, replace
from math import ceil, floor, isclose, log, pi
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lit_longctx.position.rotary import Rotary, base_frequencies


@dataclass(frozen=True)
class YaRN(Rotary):
    """Fast pairs kept, slow ones interpolated, a ramp between (Peng et al. 2023, arXiv:2309.00071).

    The paper's ramp is linear in L/λ_i (eq. 18); the authors' code, followed here and everywhere,
    is linear in the pair's index between those that turn beta_fast and beta_slow times in L tokens.
    """

    theta: float | None = None
    """Rotary base b; default: the checkpoint's."""
    factor: float = field(kw_only=True)
    """s: how many times the original context is wanted."""
    original_context: int | None = field(default=None, kw_only=True)
    """L: tokens per sequence the model was trained on; default: as the checkpoint says."""
    beta_fast: float = 32.0
    """Pairs that turn more often than this in L tokens are kept as they are."""
    beta_slow: float = 1.0
    """Pairs that turn less often than this in L tokens are fully interpolated."""
    truncate: bool = True
    """Whether the ramp begins and ends at whole pairs; false: also between them (gpt-oss)."""
    mscale: float | None = None
    """m: with m', the attention factor is (0.1 m ln s + 1) / (0.1 m' ln s + 1) (DeepSeek-V2)."""
    mscale_all_dim: float | None = None
    """m'."""
    attention_factor: float | None = None
    """The attention factor itself; default: by m and m', or 0.1 ln s + 1."""

    rope_type = "yarn"
    rope_fields = ("theta", "factor", "original_context", "beta_fast", "beta_slow")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError("mscale and mscale_all_dim go together; got one; give both or neither")
        if self.attention_factor is not None and self.mscale is not None:
            raise ValueError("got attention_factor and mscale; give one of them")

    def to_rope(self, head_dim: int) -> dict[str, Any]:
        """Return Hugging Face's settings; of what decides the attention factor, what is given."""
        rope = super().to_rope(head_dim)
        for name in ("mscale", "mscale_all_dim", "attention_factor"):
            if (value := getattr(self, name)) is not None:
                rope[name] = float(value)
        return rope if self.truncate else {**rope, "truncate": False}

    @classmethod
    def from_rope(cls, rope: dict[str, Any], context: int) -> "YaRN":
        """Build the scheme; keys that say what follows from the factor anyway are left out.

        As transformers: an attention_factor comes before mscale and mscale_all_dim, and 0 is none.
        One of these two alone is taken out only if it is 1: programs differ in what else it means.
        """
        plain = cls(**cls._rope_values(rope, context), truncate=rope.pop("truncate", True))
        scales = {name: rope.pop(name, 0) for name in ("mscale", "mscale_all_dim")}
        given = rope.pop("attention_factor", None)
        if given is not None:
            found = replace(plain, attention_factor=given)
        elif all(scales.values()):
            found = replace(plain, **scales)
        else:
            alone = {name: scale for name, scale in scales.items() if scale}
            rope |= {} if alone == {"mscale": 1} else alone
            return plain
        same = isclose(found.attention_scaling, plain.attention_scaling, rel_tol=1e-6)
        return plain if same else found

    @property
    def attention_scaling(self) -> float:
        """√(1/t) = 0.1 ln s + 1 (eq. 22), unless fields say otherwise."""
        if self.attention_factor is not None:
            return self.attention_factor
        stretch = log(max(self.factor, 1.0))
        over, under = self.mscale, self.mscale_all_dim
        if over is None or under is None:
            return 0.1 * stretch + 1.0
        return (0.1 * over * stretch + 1.0) / (0.1 * under * stretch + 1.0)

    def kept(self, head_dim: int) -> Float[Tensor, " freq"]:
        """Share of each pair's frequency that is kept: 1 for the fastest, 0 for the slowest."""
        low, high = self._pair(self.beta_fast, head_dim), self._pair(self.beta_slow, head_dim)
        if self.truncate:
            low, high = floor(low), ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        pairs = torch.arange(head_dim // 2, dtype=torch.float32)
        return 1 - ((pairs - low) / (high - low or 0.001)).clamp(0, 1)

    def _pair(self, turns: float, head_dim: int) -> float:
        """Index of the pair that turns so often in L tokens."""
        return head_dim * log(self.known_context / (turns * 2 * pi)) / (2 * log(self.base))

    def frequencies(self, head_dim: int, length: int | None = None) -> Float[Tensor, " freq"]:
        """γ_i·θ_i + (1 − γ_i)·θ_i/s, with γ the share kept."""
        base, kept = base_frequencies(self.theta, head_dim), self.kept(head_dim)
        return base / self.factor * (1 - kept) + base * kept
