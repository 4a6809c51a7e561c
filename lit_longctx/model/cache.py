"""The decoding cache: keys and values of the tokens read so far."""

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lit_longctx.batch import Batch, Documents, one_document
from lit_longctx.model.backend import AttentionBackend, KVHeads, Values
from lit_longctx.model.keys import KeySource, LayerSource, SeenKeys, SeenValues, View, make_views
from lit_longctx.model.layers import LayerKind


@final
class Cache(KeySource):
    """Keys and values of what was read so far, for decoding; every row is one document.

    Args:
        num_layers: Blocks of the model.
        planned: Tokens that will be read in the end, padding, prompt and continuation; they are
            allocated at once. Schemes that depend on the document's length must know it, since
            keys in the cache cannot be turned again.
        padding: Tokens of each row before its document begins, where prompts differ in length;
            nothing sees them.
    """

    def __init__(
        self, num_layers: int, planned: int | None = None, padding: Sequence[int] = ()
    ) -> None:
        self.layers = [LayerCache(planned or 0) for _ in range(num_layers)]
        self.planned = planned
        self.padding = padding

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.layers[0].length

    def views(
        self,
        batch: Batch,
        kinds: Sequence[LayerKind],
        backend: AttentionBackend,
        head_dim: int,
    ) -> list[View]:
        """Queries are the new tokens, keys all that were read."""
        for kind in kinds:
            if kind.position.depends_on_length and self.planned is None:
                raise ValueError(
                    f"{type(kind.position).__name__} depends on the document's length, which a "
                    "cache must know beforehand: "
                    "Cache(num_layers, planned=prompt + new tokens)"
                )
        queries, keys = self.documents(batch.documents)
        return make_views(kinds, backend, head_dim, batch.position_ids, queries, keys)

    def layer(self, index: int) -> "LayerCache":
        """Return the cache of one block."""
        return self.layers[index]

    def advance(self, batch: Batch) -> None:
        """Each layer has taken its new keys already."""

    def documents(self, new: Documents) -> tuple[Documents, Documents]:
        """Return queries and keys of new tokens; padding is a document of its own."""
        batch, seq = new.ids.shape
        device = new.ids.device
        if len(new.boundaries) != batch + 1:
            raise ValueError("a cache needs one document per row; got packed rows; drop the cache")
        if self.padding:
            queries = _padded(self.padding, self.length, seq, device)
            keys = _padded(self.padding, 0, self.length + seq, device)
        else:
            queries, keys = new, one_document(batch, self.length + seq, device)
        if self.planned is None:
            return queries, keys
        # from the start a document has the length that it will have in the end
        padding = torch.tensor(self.padding or [0] * batch, device=device)
        lengths = (self.planned - padding)[:, None].expand(batch, seq)
        return queries._replace(token_lengths=lengths), keys


def _padded(padding: Sequence[int], first: int, seq: int, device: torch.device) -> Documents:
    """Documents of `seq` tokens from `first`: in each row its padding, then the rest, or neither.

    All on the host but for the result: kernels need not wait for `longest`.
    """
    ends = torch.tensor(padding)
    rows = torch.arange(len(ends)) * seq
    offsets = torch.stack([rows, rows + (ends - first).clamp(0, seq)], dim=1).flatten()
    boundaries = F.pad(offsets, (0, 1), value=len(ends) * seq).int()
    ids = (torch.arange(first, first + seq) >= ends[:, None]).long()
    return Documents(ids.to(device), boundaries.to(device), int(boundaries.diff().max()))


@final
class LayerCache(LayerSource):
    """Keys and values of one block, in tensors with room for what is planned; no backward pass.

    What a scheme adds to keys beyond head_dim tells their position, the same for all heads: it is
    held for one head and joined when read.
    """

    def __init__(self, planned: int = 0) -> None:
        self.planned = planned
        self.length = 0
        self.stored: list[Tensor] = []

    def inputs(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq width"]:
        """Only new tokens pass through the block."""
        return x

    def extend(self, k: KVHeads, v: Values) -> tuple[SeenKeys, SeenValues]:
        """Add new keys and values and return all of them; past the plan, the tensors double."""
        heads, dim = v.shape[2:]
        new = (k[..., :dim], k[:, :, :1, dim:], v)
        begin, self.length = self.length, self.length + k.shape[1]
        if not self.stored or self.stored[0].shape[1] < self.length:
            capacity = max(self.planned, 2 * begin, self.length)
            larger = [x.new_empty(len(x), capacity, *x.shape[2:]) for x in new]
            for old, stored in zip(self.stored, larger, strict=False):  # at first there are none
                stored[:, :begin] = old[:, :begin]
            self.stored = larger
        for stored, part in zip(self.stored, new, strict=True):
            stored[:, begin : self.length] = part
        content, position, values = (stored[:, : self.length] for stored in self.stored)
        if position.shape[-1]:
            content = torch.cat([content, position.expand(-1, -1, heads, -1)], dim=-1)
        return content, values
