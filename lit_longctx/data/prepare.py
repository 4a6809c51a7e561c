"""`lit_longctx prepare`: documents → litdata chunks, a manifest and a token ledger.

The folder appears whole or not at all. Many machines may each make a part of it; the parts are then
joined.
"""

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from lit_longctx import manifest
from lit_longctx.checkpoint import CHAT_TEMPLATE, GENERATION, open_checkpoint
from lit_longctx.data.chat_template import ChatTemplate
from lit_longctx.data.chunks import BLOCK, SPLITS, SplitWriter
from lit_longctx.data.conversations import conversation_units, rendered, set_apart_by
from lit_longctx.data.dependency import DependencyFilter
from lit_longctx.data.documents import Document, Faults, Reader, Unit, read_share
from lit_longctx.data.interleave import Interleave
from lit_longctx.data.scale import Executor, in_parts
from lit_longctx.data.tokenizer import (
    Ids,
    Tokenizer,
    check_tokenizer,
    described,
    open_tokenizer,
    round_trip,
)

OWN = ("output", "source", "part", "parts", "executor")
"""Arguments that are not the same for every part."""
SAMPLE, EXCERPT = 100, 4096
"""Documents, and characters of each, on which is tried whether ids decode to their text."""
AHEAD = 2**22
"""Characters that are encoded at a time, but for a document that is larger."""


def prepare(
    input: list[str] | str,
    output: str,
    tokenizer: str = "bytes",
    source: str | None = None,
    held_out: float = 0.02,
    chunk_tokens: int = 2**22,
    bos: str | None = None,
    eos: str | None = None,
    reader: Reader = Reader(),
    tolerated: float = 0.01,
    filter: DependencyFilter | None = None,
    interleave: Interleave | None = None,
    chat: bool = False,
    chat_template: str | None = None,
    part: int = 0,
    parts: int = 1,
    executor: Executor | None = None,
) -> dict[str, Any] | None:
    """Tokenise documents into OUTPUT/train and OUTPUT/held_out.

    Args:
        input: File, folder, glob or URL, or a list of them (jsonl, parquet, text; .gz and .zst
            too; what `Dataset.save_to_disk` wrote), `code:DIR` for repositories that lie side by
            side, one document each, or `stdlib` for Python's own sources.
        output: Folder to make; must not exist.
        tokenizer: `bytes`, a tokenizer.json, a sentencepiece tokenizer.model or a folder that
            holds one.
        source: Name of the source in reports; default: the output folder's name.
        held_out: Share of documents kept for evaluation, chosen by a hash of their names; of
            conversations, by that of their document or first question.
        chunk_tokens: Tokens per chunk file, a multiple of 256; windows cannot be longer.
        bos: Token that begins documents; default: tokenizer_config.json's.
        eos: Token that ends documents; default: tokenizer_config.json's.
        reader: Which fields of rows hold text and name, and the largest document.
        tolerated: Largest share of broken documents; above it nothing is written.
        filter: Keep only training documents whose long-dependency score is high enough.
        interleave: Join every few training documents into one, their chunks in turn.
        chat: Rows are conversations for fine-tuning: messages, ShareGPT, Alpaca, or document,
            question and answer.
        chat_template: Jinja file, or `plain` for one of ours; default: the tokenizer's own.
        part: Which of the parts to read.
        parts: Equal shares of the input's files; one alone is a folder like any other.
        executor: What runs the parts, on this machine or many, before they are joined; the same
            command again goes on where it stopped.

    Returns:
        The manifest; None if parts are still missing.
    """
    if chat and (executor or filter or interleave or parts > 1):
        raise ValueError("conversations are prepared in one part, without filter and interleave")
    if executor:
        settings = {name: value for name, value in locals().items() if name not in OWN}
        settings |= {"input": anywhere(input), "tokenizer": anywhere(tokenizer)}
        return in_parts(partial(prepare, **settings), executor, Path(output), source)
    if chunk_tokens % BLOCK or chunk_tokens <= 0:
        raise ValueError(f"chunk_tokens {chunk_tokens} is no multiple of {BLOCK}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out {held_out} is no share; expected 0 ≤ held_out < 1")
    inputs = [input] if isinstance(input, str) else input
    coder = open_tokenizer(tokenizer, bos, eos)
    faults = Faults(tolerated)
    template = ChatTemplate(coder, chat_template) if chat else None
    with manifest.whole_folder(Path(output)) as folder:
        about = described(coder)
        if filter:
            scorer = open_checkpoint(filter.checkpoint)
            check_tokenizer(about, scorer.config.vocab_size, scorer.tokenizer)
        writers = {
            split: SplitWriter(folder / split, about, chunk_tokens, chat) for split in SPLITS
        }
        excerpts: list[str] = []
        if template:
            units = conversation_units(inputs, reader.largest)
            store_conversations(units, template, held_out, writers, faults)
        else:
            units = reader.units(inputs)
            documents = sampled(read_share(units, faults, part, parts), excerpts)
            pairs = encoded(progress(documents), coder, faults)
            pairs = set_aside(pairs, held_out, writers["held_out"])
            for step in (filter, interleave):
                pairs = step(pairs) if step else pairs
            for _, ids in pairs:
                writers["train"].add(ids)
        faults.check()
        if parts == 1 and not writers["train"].ledger.documents:
            raise ValueError(f"input {input} holds no document to train on")
        for writer in writers.values():
            if writer.ledger.documents:
                writer.finish()
        (folder / "tokenizer").mkdir()
        coder.save(folder / "tokenizer")
        if template:
            (folder / "tokenizer" / CHAT_TEMPLATE).write_text(template.source)
            ends = json.dumps({"eos_token_id": [template.end_of_turn]})
            (folder / "tokenizer" / GENERATION).write_text(ends + "\n")
        content = {
            "format": 1,
            "source": source or Path(output).name,
            "block": BLOCK,
            "chunk_tokens": chunk_tokens,
            "tokenizer": about,
            "round_trip": round_trip(coder, excerpts),
            "part": [part, parts],
            "settings": {
                "units": hashed(unit.name for unit in units),
                "held_out": held_out,
                "reader": vars(reader),
                "filter": filter and filter.settings,
                "interleave": interleave and vars(interleave),
            },
            "splits": {split: writer.describe() for split, writer in writers.items()},
            "broken": {
                kind: {"count": number, "first": faults.examples[kind]}
                for kind, number in faults.kinds.items()
            },
            "filter": filter and filter.report,
            "chat": chat,
        }
        manifest.seal(folder, manifest.hash_files(folder), **content)
    print(report(content))
    print(f"wrote {output}")
    return content


def anywhere(names: Any) -> Any:
    """Return local paths in full, since parts may be prepared in another working folder."""
    if isinstance(names, list):
        return [anywhere(name) for name in names]
    kind, mark, path = names.rpartition(":") if names.startswith("code:") else ("", "", names)
    plain = "://" in names or (not mark and names in ("stdlib", "bytes"))
    return names if plain else f"{kind}{mark}{os.path.abspath(path)}"


def hashed(names: Iterable[str]) -> str:
    """Hash of a list of names."""
    return hashlib.sha256("\n".join(names).encode(errors="surrogatepass")).hexdigest()


def store_conversations(
    units: list[Unit],
    template: ChatTemplate,
    held_out: float,
    writers: dict[str, SplitWriter],
    faults: Faults,
) -> None:
    """Write conversations; questions on one document are all held out, or none."""
    for unit in units:
        for found, tokens in rendered(unit.read(faults), template, faults):
            split = SPLITS[share_of(set_apart_by(found)) < held_out]
            writers[split].add_conversation(tokens)


def set_aside(
    pairs: Iterable[tuple[Document, Ids]], share: float, writer: SplitWriter
) -> Iterator[tuple[Document, Ids]]:
    """Write held-out documents, chosen by name, before any step sees them; yield the others."""
    for document, ids in pairs:
        if share_of(document.id) < share:
            writer.add(ids)
        else:
            yield document, ids


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


def sampled(documents: Iterable[Document], excerpts: list[str]) -> Iterator[Document]:
    """Keep how the first documents begin, to try whether ids decode to their text."""
    for document in documents:
        if len(excerpts) < SAMPLE:
            excerpts.append(document.text[:EXCERPT])
        yield document


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


def report(content: dict[str, Any]) -> str:
    """Token ledger and document lengths as a table."""
    lines = [f"source {content['source']}: token ledger"]
    for split, ledger in content["splits"].items():
        lines.append(
            f"  {split:9} {ledger['tokens']:>13,} = {ledger['text_tokens']:,} text"
            f" + {ledger['boundary_tokens']:,} BOS and EOS + {ledger['padding']:,} padding"
            f" in {ledger['documents']:,} documents, {ledger['chunks']} chunks"
        )
        if content["chat"]:
            lines.append(f"  {'':9} {ledger['answer_tokens']:>13,} of them answers")
    train = content["splits"]["train"]["lengths"]
    total = sum(tokens for *_, tokens in train)
    lines.append("  document length    documents         tokens   share")
    for edge, documents, tokens in train:
        lines.append(f"  ≥ {edge:>9,} tokens {documents:>10,} {tokens:>14,} {tokens / total:>7.1%}")
    if (found := content["filter"]) and found["quantiles"]:
        lines.append(
            f"  filter kept {found['kept']:,} documents ({found['kept_tokens']:,} tokens), dropped "
            f"{found['dropped']:,} ({found['dropped_tokens']:,}); median score "
            f"{found['quantiles']['0.5']:.3f}"
        )
    if content["round_trip"] < 1:
        share = 1 - content["round_trip"]
        lines.append(f"  {share:.0%} of the first texts do not come back exactly from their ids")
    for kind, fault in content["broken"].items():
        lines.append(f"  skipped {fault['count']:,}: {kind}, first at {fault['first']}")
    return "\n".join(lines)
