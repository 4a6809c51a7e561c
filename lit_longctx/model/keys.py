"""Where attention takes keys and values from: the batch itself, a cache, a memory of past windows.

A `KeySource` serves a whole forward pass, a `LayerSource` one layer of it. The model asks both and
knows nothing of what stands behind them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

from jaxtyping import Float, Num
from torch import Tensor

from lit_longctx.batch import Batch, Documents
from lit_longctx.model.backend import AttentionBackend, Heads, KVHeads, Values
from lit_longctx.model.layers import LayerKind

Kernel = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""(q, k, v, mask) → attention's output: a back end's `attend` with the layer's scale."""


SeenKeys = Float[Tensor, "batch seen kv_heads head_dim"]
SeenValues = Float[Tensor, "batch seen kv_heads value_dim"]


class View(NamedTuple):
    """What all layers of one kind share in a forward pass."""

    code: Float[Tensor, "batch inputs code"]
    """Position code of every token whose keys a layer computes, float32."""
    mask: Any
    """Which keys each query sees, in the back end's own form."""
    query_factor: Float[Tensor, "batch inputs 1 1"] | None = None
    """What queries are multiplied by, float32; None: nothing."""


class LayerSource(ABC):
    """Keys and values of one layer in one forward pass."""

    @abstractmethod
    def inputs(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch inputs width"]:
        """Return the block inputs that keys and values are computed from; the last `seq` are x."""

    @abstractmethod
    def extend(self, k: KVHeads, v: Values) -> tuple[SeenKeys, SeenValues]:
        """Return the keys and values that the layer's queries attend to."""

    def attend(
        self, q: Heads, k: KVHeads, v: Values, mask: Any, kernel: Kernel
    ) -> Float[Tensor, "batch queries heads value_dim"]:
        """Return attention's output; a source that exchanges queries among processes wraps it."""
        return kernel(q, *self.extend(k, v), mask)


class KeySource(ABC):
    """Keys and values of all layers in one forward pass."""

    @abstractmethod
    def views(
        self,
        batch: Batch,
        kinds: Sequence[LayerKind],
        backend: AttentionBackend,
        head_dim: int,
    ) -> list[View]:
        """Return position code and mask of each kind of layer."""

    @abstractmethod
    def layer(self, index: int) -> LayerSource:
        """Return what serves one layer."""

    @abstractmethod
    def advance(self, batch: Batch) -> None:
        """Take note that all layers have seen the batch."""


def make_views(
    kinds: Sequence[LayerKind],
    backend: AttentionBackend,
    head_dim: int,
    position_ids: Num[Tensor, "batch inputs"],
    queries: Documents,
    keys: Documents,
) -> list[View]:
    """Return code and mask of each kind, given positions and the documents of queries and keys."""
    return [
        make_view(
            kind, backend.prepare(queries, keys, kind.window), head_dim, position_ids, queries
        )
        for kind in kinds
    ]


def make_view(
    kind: LayerKind,
    mask: Any,
    head_dim: int,
    position_ids: Num[Tensor, "batch inputs"],
    documents: Documents,
) -> View:
    """Return the view of one kind, given its mask, and positions and documents of the tokens."""
    code = kind.position.encode(position_ids, head_dim, documents)
    return View(code, mask, kind.query_factor(position_ids))


@final
class OwnLayer(LayerSource):
    """Queries attend to the keys of their own batch."""

    def inputs(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq width"]:
        """Keys are computed from the batch alone."""
        return x

    def extend(self, k: KVHeads, v: Values) -> tuple[SeenKeys, SeenValues]:
        """There are no others."""
        return k, v


@final
class Own(KeySource):
    """The batch's own keys and values: training and evaluation without recurrence."""

    _layer = OwnLayer()

    def views(
        self,
        batch: Batch,
        kinds: Sequence[LayerKind],
        backend: AttentionBackend,
        head_dim: int,
    ) -> list[View]:
        """Queries and keys are the batch's documents."""
        documents = batch.documents
        return make_views(kinds, backend, head_dim, batch.position_ids, documents, documents)

    def layer(self, index: int) -> OwnLayer:
        """All layers share one."""
        return self._layer

    def advance(self, batch: Batch) -> None:
        """Nothing is remembered."""


OWN = Own()
