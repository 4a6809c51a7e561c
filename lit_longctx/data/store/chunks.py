"""Documents as token ids → litdata chunk files, the documents' lengths and a token ledger.

Tokens stand flat, EOS after every document and, where the tokenizer adds it, BOS before, cut into
chunks of whole blocks, so that any window length that is a multiple of the block can be served and
no chunk loses its tail. The last block is filled up with BOS, which is never a target.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from litdata import TokensLoader
from litdata.streaming.writer import BinaryWriter
from litdata.utilities.env import _DistributedEnv

from lit_longctx.data.store.data_manifest import SplitInfo
from lit_longctx.data.store.windows import ANSWER, LENGTHS, LONG
from lit_longctx.data.tokens.chats import Rendered
from lit_longctx.data.tokens.info import TokenizerInfo
from lit_longctx.data.tokens.tokenizer import Ids

BLOCK = 256
"""Tokens per block: windows are multiples of it."""
SPLITS = ("train", "held_out")
BUCKETS = [0, *(2**i for i in range(10, 21))]
"""Lower edges of the length table, in tokens."""


@dataclass
class Ledger:
    """Where the tokens of one split went."""

    documents: int = 0
    text_tokens: int = 0
    """Tokens of the documents' text."""
    boundary_tokens: int = 0
    """One EOS per document and, where documents begin with BOS, one BOS; of conversations, none:
    the chat template wrote them."""
    padding: int = 0
    """BOS that fill the last block."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Documents per length bucket, by lower edge."""
    length_tokens: Counter[int] = field(default_factory=Counter)
    """Tokens per length bucket, by lower edge."""

    @property
    def tokens(self) -> int:
        """All tokens stored."""
        return self.text_tokens + self.boundary_tokens + self.padding

    def count(self, length: int, boundaries: int) -> None:
        """Enter a document of `length` tokens, of which so many are BOS and EOS."""
        self.documents += 1
        self.text_tokens += length - boundaries
        self.boundary_tokens += boundaries
        bucket = max(edge for edge in BUCKETS if edge <= length)
        self.lengths[bucket] += 1
        self.length_tokens[bucket] += length


class SplitWriter:
    """Writes one split: a litdata folder whose chunks hold whole blocks.

    Args:
        folder: Where to.
        tokenizer: What is known of it.
        chunk_tokens: Tokens of a chunk.
        chat: Whether conversations come, whose ids bear marks.
    """

    def __init__(
        self, folder: Path, tokenizer: TokenizerInfo, chunk_tokens: int, chat: bool = False
    ) -> None:
        self.ledger = Ledger()
        self.bos, self.eos = tokenizer.bos, tokenizer.eos
        self.prefix = tokenizer.prefix
        self.dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
        if chat:
            self.dtype = np.uint32
        self.long: list[tuple[int, int]] | None = [] if chat else None
        self.answer_tokens = 0
        self.largest_id = max(self.bos, self.eos)
        self.chunk_tokens = chunk_tokens
        self.folder = folder
        self.lengths = array("I")
        self.pieces: list[Ids] = []
        self.waiting = 0
        self.chunks = 0
        self.writer = BinaryWriter(str(folder), chunk_size=1, item_loader=TokensLoader())
        # else litdata waits for the other processes of a job whose WORLD_SIZE is in the environment
        self.writer._distributed_env = _DistributedEnv(1, 0, 1)
        self.writer._rank = 0

    def add(self, ids: Ids) -> None:
        """Append a document."""
        document = np.concatenate([self.prefix, ids, [self.eos]]).astype(np.int64)
        self.extend(document, [len(document)])

    def extend(self, tokens: Ids, lengths: Sequence[int]) -> None:
        """Append whole documents that stand one after the other, BOS and EOS included."""
        for length in lengths:
            self.ledger.count(length, boundaries=len(self.prefix) + 1)
        self.lengths.extend(lengths)
        self.largest_id = max(self.largest_id, int(tokens.max()))
        self._append(tokens.astype(self.dtype))

    def add_conversation(self, found: Rendered) -> None:
        """Append a conversation, its answers marked."""
        assert self.long is not None
        self.ledger.count(len(found.ids), boundaries=0)
        self.lengths.append(len(found.ids))
        self.largest_id = max(self.largest_id, int(found.ids.max()))
        self.long.append(found.document or (0, 0))
        self.answer_tokens += int(found.answers.sum())
        self._append(
            found.ids.astype(np.uint32) | np.where(found.answers, ANSWER, 0).astype(np.uint32)
        )

    def _append(self, tokens: Ids) -> None:
        self.pieces.append(tokens)
        self.waiting += len(tokens)
        if self.waiting >= self.chunk_tokens:
            stream = np.concatenate(self.pieces)
            while len(stream) >= self.chunk_tokens:
                self._chunk(stream[: self.chunk_tokens])
                stream = stream[self.chunk_tokens :]
            self.pieces, self.waiting = [stream], len(stream)

    def _chunk(self, tokens: Ids) -> None:
        self.writer[self.chunks] = np.ascontiguousarray(tokens)
        self.chunks += 1

    def finish(self) -> None:
        """Fill the last block with BOS, write the last chunk, litdata's index and all lengths."""
        self.ledger.padding = -self.waiting % BLOCK
        self._append(np.full(self.ledger.padding, self.bos, self.dtype))
        if self.waiting:
            self._chunk(np.concatenate(self.pieces))
        assert self.chunks, "litdata would wait for ever for the index of no chunk"
        self.writer.done()
        self.writer.merge()
        np.save(self.folder / LENGTHS, np.frombuffer(self.lengths, dtype=np.uint32))
        if self.long is not None:
            np.save(self.folder / LONG, np.array(self.long, dtype=np.uint32).reshape(-1, 2))

    def info(self) -> SplitInfo:
        """Return the token ledger of what was written."""
        ledger = self.ledger
        edges = sorted(ledger.lengths)
        return SplitInfo(
            documents=ledger.documents,
            tokens=ledger.tokens,
            text_tokens=ledger.text_tokens,
            boundary_tokens=ledger.boundary_tokens,
            padding=ledger.padding,
            chunks=self.chunks,
            largest_id=self.largest_id,
            lengths=[[e, ledger.lengths[e], ledger.length_tokens[e]] for e in edges],
            answer_tokens=None if self.long is None else self.answer_tokens,
        )
