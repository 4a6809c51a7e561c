"""Documents → token ids, a few batches at a time, while others are read and written."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from lit_longctx.data.reading.documents import Document
from lit_longctx.data.reading.faults import Faults
from lit_longctx.data.tokens.tokenizer import Ids, Tokenizer

AHEAD = 2**22
"""Characters that are encoded at a time, but for a document that is larger."""


def encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, faults: Faults
) -> Iterator[tuple[Document, Ids]]:
    """Pair documents with their ids, in order; drops what forges BOS.

    A few batches are encoded at a time while others are read and written, since a large document
    keeps one core busy alone.
    """
    waiting: deque[tuple[list[Document], Future[list[Ids]]]] = deque()
    with ThreadPoolExecutor(3) as pool:
        for batch in batched(documents):
            while waiting and sum(map(characters, [batch, *(b for b, _ in waiting)])) > AHEAD:
                yield from unforged(*waiting.popleft(), tokenizer.bos, faults)
            texts = [document.text for document in batch]
            waiting.append((batch, pool.submit(tokenizer.encode, texts)))
        while waiting:
            yield from unforged(*waiting.popleft(), tokenizer.bos, faults)


def unforged(
    batch: list[Document], found: Future[list[Ids]], bos: int, faults: Faults
) -> Iterator[tuple[Document, Ids]]:
    """Pair a batch with its ids; a document with BOS in its text is counted as broken."""
    for document, ids in zip(batch, found.result(), strict=True):
        if (ids == bos).any():
            faults.read -= 1
            faults.add("BOS in text", document.id)
        else:
            yield document, ids


def batched(documents: Iterable[Document], size: int = 2**20) -> Iterator[list[Document]]:
    """Group documents into batches of about so many characters."""
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document.text)
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def characters(batch: list[Document]) -> int:
    """Characters of all texts."""
    return sum(len(document.text) for document in batch)
