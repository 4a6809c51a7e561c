"""Rotary schemes: each pair of features turns by its own angle per token.

Pairs are (i, i + head_dim/2), as in Hugging Face checkpoints, so that weights load without
permutation.
Notation: d = head_dim, b = theta, θ_i = b^(−2i/d), wavelength λ_i = 2π/θ_i, s = factor, L =
    original_context.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from math import inf, pi
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from lit_longctx.batch import Documents
from lit_longctx.position.rotation import Rotate, cos_sin
from lit_longctx.position.scheme import THETA, PositionScheme, document_lengths


def base_frequencies(theta: float | None, head_dim: int) -> Float[Tensor, " freq"]:
    """θ_i in radians per token, i = 0 … d/2 − 1 (Su et al. 2021, arXiv:2104.09864, eq. 15)."""
    return 1.0 / base_powers(theta, head_dim)


def base_powers(theta: float | None, head_dim: int) -> Float[Tensor, " freq"]:
    """b^(2i/d): tokens per radian of each pair."""
    return (theta or THETA) ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


ORIGINAL = "original_max_position_embeddings"
ROPE_KEYS = {"theta": "rope_theta", "original_context": ORIGINAL}
"""Hugging Face's names of fields, where they differ."""


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else float(value)


POSITIVE = (
    "theta",
    "factor",
    "short_factor",
    "long_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
)
"""Fields of which no position code follows unless they are finite and above 0."""


def _check(name: str, value: Any) -> None:
    """ValueError, by name, for a value that a scheme cannot have."""
    if name == "original_context" and (value != int(value) or value < 1):
        raise ValueError(f"original_context must be 1 or more tokens; got {value}")
    for number in value if isinstance(value, tuple) else (value,):
        if name in POSITIVE and not 0 < number < inf:
            raise ValueError(f"{name} must be a finite number above 0; got {number}")


class Rotary(PositionScheme):
    """A scheme that is given by one frequency per pair and a factor on cos and sin."""

    rope_type: ClassVar[str | None] = None
    """Hugging Face's name of the scheme, if it has one."""
    rope_fields: ClassVar[tuple[str, ...]] = ("theta",)
    """Fields that Hugging Face's `rope_parameters` hold."""
    theta: float | None
    original_context: int | None = None
    attention_factor: float | None = None
    """The attention factor that is given, in place of what the scheme derives."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None:
                _check(name, value)

    @property
    def base(self) -> float:
        """Rotary base b: theta, or 10,000 for a scheme that stands alone."""
        return self.theta or THETA

    @property
    def known_context(self) -> int:
        """L, original_context; ValueError where neither user, checkpoint nor config gave it."""
        if self.original_context is None:
            raise ValueError(
                f"{type(self).__name__}'s original_context is missing: give the tokens per "
                "sequence that the model was trained on"
            )
        return self.original_context

    def to_rope(self, head_dim: int) -> dict[str, Any]:
        """Return `rope_type` and the scheme's fields under Hugging Face's names."""
        if self.rope_type is None:
            return super().to_rope(head_dim)
        rope: dict[str, Any] = {"rope_type": self.rope_type}
        for name in self.rope_fields:
            if name == "original_context":
                rope[ORIGINAL] = self.known_context
            else:
                value = self.base if name == "theta" else getattr(self, name)
                rope[ROPE_KEYS.get(name, name)] = _as_json(value)
        return rope

    @classmethod
    def from_rope(cls, rope: dict[str, Any], context: int) -> "Rotary":
        """Build the scheme from `rope_parameters`, taking out the keys that it knows.

        Args:
            rope: Settings under Hugging Face's names.
            context: The config's max_position_embeddings.

        Raises:
            ValueError: A key is missing.
        """
        return cls(**cls._rope_values(rope, context))

    @classmethod
    def _rope_values(cls, rope: dict[str, Any], context: int) -> dict[str, Any]:
        original = int(rope.pop(ORIGINAL, context))
        open_values = {"beta_fast": 32.0, "beta_slow": 1.0}
        if cls.rope_type in ("yarn", "longrope"):
            open_values["factor"] = context / max(original, 1)
        found: dict[str, Any] = {}
        for name in cls.rope_fields:
            key = ROPE_KEYS.get(name, name)
            if name == "original_context":
                found[name] = original
            elif key not in rope and name not in open_values:
                raise ValueError(f"rope key {key} is missing for rope_type {cls.rope_type}")
            else:
                value = rope.pop(key, open_values.get(name))
                if name.startswith("beta_"):
                    value = value or open_values[name]  # as transformers reads 0
                found[name] = value if isinstance(value, list) else float(value)
        return found

    @property
    def attention_scaling(self) -> float:
        """Multiplies cos and sin, so that scores grow by its square; 1 for most schemes."""
        return 1.0 if self.attention_factor is None else self.attention_factor

    @abstractmethod
    def frequencies(self, head_dim: int, length: int | None = None) -> Float[Tensor, " freq"]:
        """Radians per token of each pair, float32, in a document of `length` tokens."""

    def encode(
        self,
        position_ids: Num[Tensor, "batch seq"],
        head_dim: int,
        documents: Documents | None = None,
    ) -> Float[Tensor, "batch seq code"]:
        """Return [cos | sin] of every pair's angle, float32."""
        frequencies = self.frequencies(head_dim).to(position_ids.device)
        return cos_sin(position_ids.unsqueeze(-1).float() * frequencies, self.attention_scaling)

    def layer(self, num_heads: int, head_dim: int) -> nn.Module:
        """Rotation needs no weights."""
        return Rotate()


@dataclass(frozen=True)
class RoPE(Rotary):
    """Rotary position embedding (Su et al. 2021); larger theta: ABF (Xiong et al. 2023, §2.1)."""

    theta: float | None = None
    """Rotary base b. Llama 2: 1e4, Llama 3: 5e5, Llama 2 Long (ABF): 5e5. Default: the
    checkpoint's."""

    rope_type = "default"

    def frequencies(self, head_dim: int, length: int | None = None) -> Float[Tensor, " freq"]:
        """θ_i."""
        return base_frequencies(self.theta, head_dim)


@dataclass(frozen=True)
class PositionInterpolation(Rotary):
    """Positions divided by s (Chen et al. 2023, arXiv:2306.15595, eq. 4); HF's `linear`."""

    theta: float | None = None
    """Rotary base b; default: the checkpoint's."""
    factor: float = field(kw_only=True)
    """s: how many times the original context is wanted."""

    rope_type = "linear"
    rope_fields = ("theta", "factor")

    def frequencies(self, head_dim: int, length: int | None = None) -> Float[Tensor, " freq"]:
        """θ_i / s."""
        return base_frequencies(self.theta, head_dim) / self.factor


@dataclass(frozen=True)
class NTKAware(Rotary):
    """Base b·s^(d/(d−2)): the slowest pair is interpolated, the fastest kept (bloc97 2023)."""

    theta: float | None = None
    """Rotary base b before scaling; default: the checkpoint's."""
    factor: float = field(kw_only=True)
    """s: how many times the original context is wanted."""

    def scaled_theta(self, head_dim: int) -> float:
        """The base that results; it is all that Hugging Face needs to know."""
        return self.base * self.factor ** (head_dim / (head_dim - 2))

    def to_rope(self, head_dim: int) -> dict[str, Any]:
        """Return plain RoPE with the base that results."""
        return RoPE(self.scaled_theta(head_dim)).to_rope(head_dim)

    def frequencies(self, head_dim: int, length: int | None = None) -> Float[Tensor, " freq"]:
        """θ_i of the scaled base."""
        return base_frequencies(self.scaled_theta(head_dim), head_dim)


@dataclass(frozen=True)
class DynamicNTK(Rotary):
    """NTK-aware with the factor that each document's length asks for (emozilla 2023); none up to L.

    n tokens get the base b·(s·n/L − (s − 1))^(d/(d−2)); s = 1 scales just as much as n needs.
    """

    theta: float | None = None
    """Rotary base b before scaling; default: the checkpoint's."""
    factor: float = field(kw_only=True)
    """s, Hugging Face's `factor`."""
    original_context: int | None = field(default=None, kw_only=True)
    """L: tokens per sequence the model was trained on; default: as the checkpoint says."""

    rope_type = "dynamic"
    rope_fields = ("theta", "factor")
    depends_on_length = True

    @classmethod
    def from_rope(cls, rope: dict[str, Any], context: int) -> "Rotary":
        """Build the scheme; transformers scales from max_position_embeddings, whatever is said."""
        return cls(**cls._rope_values(rope, context), original_context=context)

    def frequencies(self, head_dim: int, length: int | None = None) -> Float[Tensor, " freq"]:
        """θ_i of the base for `length` tokens; without a length, of b."""
        context = self.known_context
        stretched = max(length or 0, context) / context
        scale = (self.factor * stretched - (self.factor - 1)) ** (head_dim / (head_dim - 2))
        return base_frequencies(self.base * scale, head_dim)

    def encode(
        self,
        position_ids: Num[Tensor, "batch seq"],
        head_dim: int,
        documents: Documents | None = None,
    ) -> Float[Tensor, "batch seq code"]:
        """Return [cos | sin]; every document has its own frequencies."""
        lengths = document_lengths(position_ids, documents).double()
        stretched = lengths.clamp(min=self.known_context) / self.known_context
        scale = (self.factor * stretched - (self.factor - 1)) ** (head_dim / (head_dim - 2))
        exponents = torch.arange(0, head_dim, 2, device=lengths.device, dtype=torch.float32)
        base = (self.base * scale).float().unsqueeze(-1)
        frequencies = 1.0 / base ** (exponents / head_dim)
        return cos_sin(position_ids.unsqueeze(-1).float() * frequencies, self.attention_scaling)


@dataclass(frozen=True)
class Llama3(Rotary):
    """Llama 3.1's scaling: a ramp in L/λ_i from interpolated to kept pairs (arXiv:2407.21783)."""

    theta: float | None = None
    """Rotary base b; Llama 3: 5e5. Default: the checkpoint's."""
    factor: float = field(kw_only=True)
    """s; Llama 3.1: 8, Llama 3.2: 32."""
    low_freq_factor: float = 1.0
    """Pairs with L/λ below this are interpolated."""
    high_freq_factor: float = 4.0
    """Pairs with L/λ above this are kept."""
    original_context: int | None = field(default=None, kw_only=True)
    """L; Llama 3: 8,192. Default: as the checkpoint says."""

    rope_type = "llama3"
    rope_fields = ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_context")

    def frequencies(self, head_dim: int, length: int | None = None) -> Float[Tensor, " freq"]:
        """t_i·θ_i + (1 − t_i)·θ_i/s, with t the place of L/λ_i between the two factors."""
        base = base_frequencies(self.theta, head_dim)
        turns = self.known_context * base / (2 * pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return (1 - kept) * base / self.factor + kept * base
