"""What every position scheme is: a map of queries and keys, and nothing else."""

from abc import ABC, abstractmethod

from jaxtyping import Float, Num
from torch import Tensor, nn

from lit_longctx.batch import Documents


class PositionScheme(ABC):
    """How a token's place reaches attention.

    Schemes are frozen dataclasses: the object is its own config. They hold no buffers and no cache, so
    meta-device initialisation, resharding and evaluation at any length need nothing from them.
    """

    @abstractmethod
    def encode(
        self, position_ids: Num[Tensor, "batch seq"], head_dim: int, documents: Documents | None = None
    ) -> Float[Tensor, "batch seq code"]:
        """Return what the layers need to know of each place, in float32.

        Computed once per forward pass and shared by all layers. `documents` serves schemes that depend on
        how long a token's document is.
        """

    @abstractmethod
    def layer(self, num_heads: int, head_dim: int) -> nn.Module:
        """Return what each block applies: (q, k, code) -> (q, k); it holds weights only if the scheme learns."""
