"""Chunks of several documents in turn, so that what belongs together stands far apart.

Chunk-interleaved pretraining of LongSkywork (Zhao et al. 2024, arXiv:2406.00605). Its code is not
public: sizes and details here are ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from lit_longctx.data.reading.documents import Document
from lit_longctx.data.tokens.tokenizer import Ids


@dataclass(frozen=True)
class Interleave:
    """Joins every few documents of a stream into one whose chunks stand as A1 B1 C1 A2 B2 C2.

    Each document is cut into chunks, its last one may be shorter, and the group's documents take
    turns with a chunk each; one that has ended is passed over, so that what the longest one has
    left comes in one piece. No token is lost, repeated or moved within its document. The stream's
    last group may have fewer documents; a group of one stays as it is. Holds one group; nothing is
    random.

        A = a1 a2 a3   B = b1 b2 b3 b4 b5   C = c1      (chunk_tokens 2, together 3)
        a1 a2 b1 b2 c1 a3 b3 b4 b5
    """

    chunk_tokens: int = 1024
    """Tokens a document gives at its turn."""
    together: int = 4
    """Documents that are joined into one; chunks that followed each other stand up to
    (together − 1) · chunk_tokens tokens apart."""

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens {self.chunk_tokens} is too few; expected 1 or more")
        if self.together < 2:
            raise ValueError(f"together {self.together} joins nothing; expected 2 or more")

    def __call__(self, pairs: Iterator[tuple[Document, Ids]]) -> Iterator[tuple[Document, Ids]]:
        """Yield one document per group, named after its parts; its text is theirs, not mixed."""
        pairs = iter(pairs)
        while group := list(islice(pairs, self.together)):
            documents = [document for document, _ in group]
            text = "\n".join(document.text for document in documents)
            name = " + ".join(document.id for document in documents)
            yield Document(text, name), self._in_turn([ids for _, ids in group])

    def _in_turn(self, group: list[Ids]) -> Ids:
        longest = max(len(ids) for ids in group)
        turns = range(0, longest or 1, self.chunk_tokens)
        return np.concatenate([ids[at : at + self.chunk_tokens] for at in turns for ids in group])
