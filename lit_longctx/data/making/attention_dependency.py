"""Attention score: how much of a model's attention goes to what stands far before.

After LADM (Chen et al. 2025, arXiv:2503.02502), which scores long documents by attention between
their spans. Its model code is not public: the spread of a span's scores, which LADM weighs with, is
left out here, and scores are normalised so that they lie between 0 and 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lit_longctx.batch import Documents
from lit_longctx.data.making.document_scorer import DocumentScorer, ScoreSettings
from lit_longctx.data.tokens.tokenizer import Ids
from lit_longctx.decoding import reading
from lit_longctx.model import Llama
from lit_longctx.model.backend import AttentionBackend, Heads, KVHeads, Values


def attention_score(shares: Float[np.ndarray, "spans spans"], far: int) -> float:
    """Mean over spans j of Σ_i share(j, i)·(j − i)/(spans − 1), over spans i at least `far` before.

    Args:
        shares: Share of the attention of span j (row) that goes to span i (column); rows sum to 1.
        far: Spans between two that count, at least 1.
    """
    spans = len(shares)
    later, earlier = np.indices(shares.shape)
    distances = later - earlier
    weighed = np.where(distances >= far, shares * distances / (spans - 1), 0.0)
    return float(weighed.sum(axis=1)[far:].mean())


class SpanAttention(AttentionBackend):
    """Attends as another back end does, and sums up the attention between spans of tokens.

    For one row that is one document. Scores are computed a second time, a span of queries at once:
    heads × span × seq numbers in float32.

    Args:
        backend: What attends.
        span: Tokens of a span; rows are whole numbers of them.
    """

    def __init__(self, backend: AttentionBackend, span: int) -> None:
        self.backend = backend
        self.span = span
        self.layers = 0
        self.sums: Tensor | None = None

    def prepare(self, queries: Documents, keys: Documents, window: int | None = None) -> Any:
        """Return the other back end's mask, and the window."""
        return self.backend.prepare(queries, keys, window), window

    def attend(
        self, q: Heads, k: KVHeads, v: Values, mask: Any, scale: float
    ) -> Float[Tensor, "batch queries heads value_dim"]:
        """Attend, and add each span's mean attention to every span."""
        inner, window = mask
        shares = self._shares(q[0], k[0], window, scale)
        self.sums = shares if self.sums is None else self.sums + shares
        self.layers += 1
        return self.backend.attend(q, k, v, inner, scale)

    def _shares(
        self, q: Tensor, k: Tensor, window: int | None, scale: float
    ) -> Float[Tensor, "spans spans"]:
        seq, heads = q.shape[:2]
        k = k.repeat_interleave(heads // k.shape[1], dim=1).transpose(0, 1).float()
        places = torch.arange(seq, device=q.device)
        rows = []
        for begin in range(0, seq, self.span):
            own = places[begin : begin + self.span, None]
            seen = places <= own
            if window is not None:
                seen &= places > own - window
            queries = q[begin : begin + self.span].transpose(0, 1).float()
            scores = (queries @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
            attention = scores.softmax(-1).mean(dim=(0, 1))
            rows.append(attention.view(-1, self.span).sum(1))
        return torch.stack(rows)


@contextmanager
def watched(llama: Llama, span: int) -> Iterator[SpanAttention]:
    """Have a model's layers attend through a `SpanAttention` for a while."""
    plain = llama.backend
    found = SpanAttention(plain, span)
    modules: list[Any] = [llama, *(block.self_attn for block in llama.model.layers)]
    try:
        for module in modules:
            module.backend = found
        yield found
    finally:
        for module in modules:
            module.backend = plain


@dataclass(frozen=True)
class AttentionFilter(ScoreSettings):
    """Keeps the documents in which a model attends to what is far away (LADM's idea).

    A document is cut into windows, each into spans. The score of a window is the share of attention
    that a span gives to spans at least `far` before it, weighted by distance (`attention_score`);
    that of a document is the mean over its windows by their tokens. A document of no more than
    `far` spans scores 0. The model must be trained on windows as long: beyond its context attention
    means little.

    Costs a forward pass over the document, and attention a second time in float32.

    The paper scored with TinyLlama-1.1B trained to 32K; scores lie between 0 and 1.
    """

    window: int = 32768
    """Tokens read at once, a multiple of `span`."""
    span: int = 128
    """Tokens of a span (the paper: 128)."""
    far: int = 4
    """Least distance that counts, in spans (the authors' script: 4)."""

    def __post_init__(self) -> None:
        if self.span < 1 or self.far < 1:
            raise ValueError(f"span {self.span} and far {self.far} must be 1 or more")
        if self.window % self.span or self.window <= self.far * self.span:
            raise ValueError(
                f"window {self.window} must be a multiple of span {self.span} and hold more than "
                f"far {self.far} of them"
            )
        if not 0 <= self.at_least <= 1:
            raise ValueError(f"at_least {self.at_least} is no score; expected 0 ≤ at_least ≤ 1")


class AttentionScorer(DocumentScorer):
    """Scores documents by attention to what is far away (see `AttentionFilter`)."""

    settings: AttentionFilter

    @torch.inference_mode()
    def score(self, ids: Ids) -> float:
        """Mean over a document's windows, by their tokens."""
        self._check(ids)
        how = self.settings
        total = read = 0
        for begin in range(0, len(ids), how.window):
            window = ids[begin : begin + how.window].astype(np.int64)
            spans = len(window) // how.span
            if spans <= how.far:
                continue
            row = torch.from_numpy(window[: spans * how.span])[None]
            with watched(self.llama, how.span) as found:
                self.llama.hidden(reading(row.to(self.llama.head_weight.device)))
            assert found.sums is not None
            shares = (found.sums / found.layers).cpu().double().numpy()
            if not np.isfinite(shares).all():
                raise ValueError(
                    f"{how.checkpoint} gives attention that is not finite in {how.compute_dtype}; "
                    "choose another compute_dtype or checkpoint"
                )
            total += attention_score(shares, how.far) * spans
            read += spans
        return total / read if read else 0.0
