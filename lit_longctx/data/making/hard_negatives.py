"""Documents made long by chunks of others that resemble theirs.

NExtLong (Gao et al. 2025, arXiv:2501.12766): a model that reads such a text must tell what belongs
together, far apart, from what only looks alike.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lit_longctx.data.reading.documents import Document
from lit_longctx.data.tokens.tokenizer import Ids, Tokenizer

Embed = Callable[[list[str]], Any]
"""Texts → [texts, width], one vector each."""


class _Pool(NamedTuple):
    """Chunks of the documents that are searched together."""

    chunks: list[Ids]
    owners: Int[np.ndarray, " chunks"]
    """Which document each chunk is of."""


@dataclass(frozen=True)
class HardNegatives:
    """Puts after each chunk of a document those chunks of other documents that are most like it.

    No token of a document is lost or moved within it, none of another stands in it twice, and it
    grows to 1 + negatives times its length: all chunks of the pool can be negatives of many. The
    paper retrieves by embeddings of a large corpus; here by BM25 over token ids, or by a function
    of yours, among the `pool` documents that follow each other in the stream.

        A = a1 a2, most like a1: b3 c1, most like a2: c1 c2      (negatives 2)
        a1 b3 c1 a2 c2 b1                                        (c1 stands there already)
    """

    chunk_tokens: int = 2048
    """Tokens of a chunk, the paper's granularity; the last one of a document may be shorter."""
    negatives: int = 2
    """Chunks of others after each chunk; fewer where the pool has no more."""
    pool: int = 1000
    """Documents that are held in memory and searched together."""
    embed: Embed | None = None
    """Function by its import path that returns a vector for each of a list of texts, compared by
    their cosine; default: BM25 (Robertson & Zaragoza 2009) with k1 = 1.5 and b = 0.75."""

    def __post_init__(self) -> None:
        for name, least in (("chunk_tokens", 1), ("negatives", 1), ("pool", 2)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"hard_negatives.{name} {getattr(self, name)} is too few; expected {least} "
                    "or more"
                )

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the documents, as a manifest keeps it."""
        name = self.embed and f"{self.embed.__module__}.{self.embed.__qualname__}"
        return {**vars(self), "embed": name}

    def extended(
        self, pairs: Iterator[tuple[Document, Ids]], tokenizer: Tokenizer
    ) -> Iterator[tuple[Document, Ids]]:
        """Yield every document with its negatives; name and text stay its own.

        Args:
            pairs: Documents and their ids.
            tokenizer: What `embed` reads chunks by.
        """
        pairs = iter(pairs)
        while group := list(islice(pairs, self.pool)):
            pool = self._cut([ids for _, ids in group])
            score = self._scorer(pool, tokenizer)
            for owner, (document, ids) in enumerate(group):
                yield document, self._extend(pool, owner, score) if len(ids) else ids

    def _cut(self, group: Sequence[Ids]) -> _Pool:
        chunks, owners = [], []
        for owner, ids in enumerate(group):
            parts = [
                ids[at : at + self.chunk_tokens] for at in range(0, len(ids), self.chunk_tokens)
            ]
            chunks += parts
            owners += [owner] * len(parts)
        return _Pool(chunks, np.array(owners, dtype=np.int64))

    def _extend(
        self, pool: _Pool, owner: int, score: Callable[[int], Float[np.ndarray, " chunks"]]
    ) -> Ids:
        """Return a document's chunks, each followed by its negatives."""
        usable = pool.owners != owner
        found: list[Ids] = []
        for own in (pool.owners == owner).nonzero()[0]:
            order = np.argsort(-score(int(own)), kind="stable")
            nearest = order[usable[order]][: self.negatives]
            usable[nearest] = False
            found += [pool.chunks[own], *(pool.chunks[i] for i in nearest)]
        return np.concatenate(found)

    def _scorer(
        self, pool: _Pool, tokenizer: Tokenizer
    ) -> Callable[[int], Float[np.ndarray, " chunks"]]:
        """Return what gives the likeness of a chunk, by number, to every chunk of the pool."""
        if not pool.chunks:
            return lambda own: np.zeros(0)
        if self.embed is None:
            return bm25([list(map(str, chunk.tolist())) for chunk in pool.chunks])
        texts = [tokenizer.decode(chunk.tolist()) for chunk in pool.chunks]
        vectors = np.asarray(self.embed(texts), dtype=np.float64)
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise ValueError(
                f"hard_negatives.embed returned {vectors.shape} for {len(texts)} texts; expected "
                "one vector each"
            )
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return lambda own: vectors @ vectors[own]


def bm25(texts: list[list[str]]) -> Callable[[int], Float[np.ndarray, " texts"]]:
    """Return what gives the BM25 score of every text for the terms of one of them, by number."""
    try:
        import bm25s
    except ImportError as error:
        raise ImportError(
            "hard_negatives needs bm25s: pip install 'lit_longctx[bm25]'; or give an embed function"
        ) from error
    index = bm25s.BM25(k1=1.5, b=0.75)
    index.index(texts, show_progress=False)
    return lambda own: index.get_scores(sorted(set(texts[own])))
