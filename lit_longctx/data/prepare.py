"""`lit_longctx prepare`: documents → litdata chunks, a manifest and a token ledger.

Tokens stand flat, BOS before and EOS after every document, cut into chunks of whole blocks, so that
any window length that is a multiple of the block can be served and no chunk loses its tail. The
last block is filled up with BOS, which is never a target. The folder appears whole or not at all.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from litdata import TokensLoader
from litdata.streaming.writer import BinaryWriter

from lit_longctx import manifest
from lit_longctx.data.documents import Document, Faults, Reader
from lit_longctx.data.tokenizer import Ids, Tokenizer, open_tokenizer

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
    """One BOS and one EOS per document."""
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

    def count(self, length: int) -> None:
        """Enter a document of `length` tokens, BOS and EOS included."""
        self.documents += 1
        self.text_tokens += length - 2
        self.boundary_tokens += 2
        bucket = max(edge for edge in BUCKETS if edge <= length)
        self.lengths[bucket] += 1
        self.length_tokens[bucket] += length


class SplitWriter:
    """Writes one split: a litdata folder whose chunks hold whole blocks."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, chunk_tokens: int) -> None:
        self.ledger = Ledger()
        self.bos, self.eos = tokenizer.bos, tokenizer.eos
        self.dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
        self.chunk_tokens = chunk_tokens
        self.pieces: list[Ids] = []
        self.waiting = 0
        self.chunks = 0
        self.writer = BinaryWriter(str(folder), chunk_size=1, item_loader=TokensLoader())

    def add(self, ids: Ids) -> None:
        """Append a document."""
        document = np.concatenate([[self.bos], ids, [self.eos]]).astype(self.dtype)
        self.ledger.count(len(document))
        self._append(document)

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
        """Fill the last block with BOS, write the last chunk and litdata's index."""
        self.ledger.padding = -self.waiting % BLOCK
        self._append(np.full(self.ledger.padding, self.bos, self.dtype))
        if self.waiting:
            self._chunk(np.concatenate(self.pieces))
        self.writer.done()
        self.writer.merge()


def prepare(
    input: list[str],
    output: str,
    tokenizer: str = "bytes",
    source: str | None = None,
    held_out: float = 0.02,
    chunk_tokens: int = 2**22,
    bos: str | None = None,
    eos: str | None = None,
    reader: Reader = Reader(),
    tolerated: float = 0.01,
) -> dict[str, Any]:
    """Tokenise documents into OUTPUT/train and OUTPUT/held_out.

    Args:
        input: Files, folders or globs (jsonl, parquet, text; .gz and .zst too), `code:DIR` for a
            source tree with one document per package, or `stdlib` for Python's own sources.
        output: Folder to make; must not exist.
        tokenizer: `bytes`, a tokenizer.json or a folder that holds one.
        source: Name of the source in reports; default: the output folder's name.
        held_out: Share of documents kept for evaluation, chosen by a hash of their names.
        chunk_tokens: Tokens per chunk file, a multiple of 256; windows cannot be longer.
        bos: Token that begins documents; default: tokenizer_config.json's.
        eos: Token that ends documents; default: tokenizer_config.json's.
        reader: Which fields of rows hold text and name, and the largest document.
        tolerated: Largest share of broken documents; above it nothing is written.

    Returns:
        The manifest.
    """
    if chunk_tokens % BLOCK or chunk_tokens <= 0:
        raise ValueError(f"chunk_tokens {chunk_tokens} is no multiple of {BLOCK}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out {held_out} is no share; expected 0 ≤ held_out < 1")
    coder = open_tokenizer(tokenizer, bos, eos)
    faults = Faults(tolerated)
    with manifest.whole_folder(Path(output)) as folder:
        writers = {split: SplitWriter(folder / split, coder, chunk_tokens) for split in SPLITS}
        for document, ids in encoded(progress(reader.documents(input, faults)), coder, faults):
            split = "held_out" if share_of(document.id) < held_out else "train"
            writers[split].add(ids)
        faults.check()
        if not writers["train"].ledger.documents:
            raise ValueError(f"input {input} holds no document to train on")
        for writer in writers.values():
            if writer.ledger.documents:
                writer.finish()
        (folder / "tokenizer").mkdir()
        coder.save(folder / "tokenizer")
        content = describe(writers, coder, source or Path(output).name, chunk_tokens, faults)
        manifest.seal(folder, manifest.hash_files(folder), **content)
    print(report(content))
    print(f"wrote {output}")
    return content


def encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, faults: Faults
) -> Iterator[tuple[Document, Ids]]:
    """Pair documents with their ids, a batch of texts at a time; drops what forges BOS."""
    for batch in batched(documents):
        for document, ids in zip(batch, tokenizer.encode([d.text for d in batch]), strict=True):
            if (ids == tokenizer.bos).any():
                faults.read -= 1
                faults.add("BOS in text", document.id)
            else:
                yield document, ids


def batched(documents: Iterable[Document], characters: int = 2**22) -> Iterator[list[Document]]:
    """Group documents into batches of about so many characters."""
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document.text)
        if held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def share_of(name: str) -> float:
    """Number in [0, 1) that depends on the name alone."""
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def progress(documents: Iterable[Document], every: float = 2.0) -> Iterator[Document]:
    """Print how far the reading got, every few seconds."""
    characters = 0
    begin = last = time.monotonic()
    for count, document in enumerate(documents, 1):
        yield document
        characters += len(document.text)
        if (now := time.monotonic()) - last > every:
            last = now
            read = characters / 1e6
            print(
                f"prepare: {count:,} documents, {read:,.1f} M characters, "
                f"{read / (now - begin):.1f} M/s"
            )


def describe(
    writers: dict[str, SplitWriter],
    tokenizer: Tokenizer,
    source: str,
    chunk_tokens: int,
    faults: Faults,
) -> dict[str, Any]:
    """Return the manifest's content: tokenizer, ledger and lengths of each split, faults."""
    splits = {}
    for split, writer in writers.items():
        ledger = writer.ledger
        splits[split] = {
            "documents": ledger.documents,
            "tokens": ledger.tokens,
            "text_tokens": ledger.text_tokens,
            "boundary_tokens": ledger.boundary_tokens,
            "padding": ledger.padding,
            "chunks": writer.chunks,
            "lengths": [
                [e, ledger.lengths[e], ledger.length_tokens[e]] for e in sorted(ledger.lengths)
            ],
        }
    return {
        "format": 1,
        "source": source,
        "block": BLOCK,
        "chunk_tokens": chunk_tokens,
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos": tokenizer.bos,
            "eos": tokenizer.eos,
        },
        "splits": splits,
        "broken": {k: {"count": n, "first": faults.examples[k]} for k, n in faults.kinds.items()},
    }


def report(content: dict[str, Any]) -> str:
    """Token ledger and document lengths as a table."""
    lines = [f"source {content['source']}: token ledger"]
    for split, ledger in content["splits"].items():
        lines.append(
            f"  {split:9} {ledger['tokens']:>13,} = {ledger['text_tokens']:,} text"
            f" + {ledger['boundary_tokens']:,} BOS and EOS + {ledger['padding']:,} padding"
            f" in {ledger['documents']:,} documents, {ledger['chunks']} chunks"
        )
    train = content["splits"]["train"]["lengths"]
    total = sum(tokens for *_, tokens in train)
    lines.append("  document length    documents         tokens   share")
    for edge, documents, tokens in train:
        lines.append(f"  ≥ {edge:>9,} tokens {documents:>10,} {tokens:>14,} {tokens / total:>7.1%}")
    for kind, fault in content["broken"].items():
        lines.append(f"  skipped {fault['count']:,}: {kind}, first at {fault['first']}")
    return "\n".join(lines)
