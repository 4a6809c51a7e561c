"""What every position scheme is: a map of queries and keys, and nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from lit_longctx.batch import Documents

THETA = 10_000.0
"""Rotary base where nothing names one (Su et al. 2021)."""
INHERITED = ("theta", "original_context")
"""Fields of a scheme that are the checkpoint's where they are left None."""
KEEP_THE_RUN = "keep the run folder: lit_longctx evaluates and generates from it"


@runtime_checkable
class InheritedSettings(Protocol):
    """What names the values that a scheme leaves open: a checkpoint, or a model's config."""

    def inherited(self) -> Mapping[str, Any]:
        """Return values by field; one is left out where layers differ in it."""
        ...


class PositionScheme(ABC):
    """How a token's position reaches attention.

    Schemes are frozen dataclasses: the object is its own config. They hold no buffers and no
    cache, so meta-device initialisation, resharding and evaluation at any length need nothing from
    them.
    """

    depends_on_length = False
    """Whether the code of a position depends on how long its document is."""

    @abstractmethod
    def encode(
        self,
        position_ids: Num[Tensor, "batch seq"],
        head_dim: int,
        documents: Documents | None = None,
    ) -> Float[Tensor, "batch seq code"]:
        """Return what the layers need to know of each position, in float32.

        Computed once per forward pass and shared by all layers of a kind. `documents` are those of
        the tokens; they serve schemes that depend on how long a token's document is.
        """

    @abstractmethod
    def layer(self, num_heads: int, head_dim: int) -> nn.Module:
        """Return what each block applies, (q, k, code) -> (q, k); has weights only if it learns."""

    def check(self, head_dim: int) -> None:
        """Raise a ValueError if the scheme cannot serve heads of this width."""
        assert head_dim > 0

    def unset(self) -> list[str]:
        """Return the names of the fields that `resolved` fills in."""
        return [name for name in INHERITED if vars(self).get(name, THETA) is None]

    def resolved(self, source: InheritedSettings) -> "PositionScheme":
        """Return the scheme with the fields that are None taken from a checkpoint or a config.

        Raises:
            ValueError: The source has several values of a field; one must be given.
        """
        unset = self.unset()
        if not unset:
            return self
        found = source.inherited()
        if missing := [name for name in unset if name not in found]:
            raise ValueError(
                f"{type(self).__name__}'s {missing[0]} is left open, but layers of the checkpoint "
                "differ in it; give a number"
            )
        return replace(cast(Any, self), **{name: found[name] for name in unset})

    def to_rope(self, head_dim: int) -> dict[str, Any]:
        """Return Hugging Face's `rope_parameters` of this scheme.

        Raises:
            ValueError: Hugging Face's Llama has no such scheme.
        """
        raise ValueError(
            f"Hugging Face's Llama cannot represent {type(self).__name__}; "
            f"train with a scheme that it has, or {KEEP_THE_RUN}"
        )

    def initial_weight(self, name: str, shape: torch.Size) -> Tensor:
        """Return the start of a weight of `layer`; schemes that learn nothing are never asked."""
        raise NotImplementedError(f"{type(self).__name__} has no start for its weight {name}")


def document_lengths(
    position_ids: Num[Tensor, "batch seq"], documents: Documents | None
) -> Int[Tensor, "batch seq"]:
    """Length of each token's document in tokens; without documents, each row is one."""
    if documents is None:
        return (position_ids.amax(dim=1, keepdim=True).long() + 1).expand(position_ids.shape)
    return documents.lengths()
