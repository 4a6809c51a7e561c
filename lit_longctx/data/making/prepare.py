"""`lit_longctx prepare`: documents → litdata chunks, a manifest and a token ledger.

The folder appears whole or not at all. Many machines may each make a part of it; the parts are then
joined.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from lit_longctx import hub, manifest
from lit_longctx.checkpoint import open_checkpoint
from lit_longctx.checkpoint.companions import CHAT_TEMPLATE, GENERATION
from lit_longctx.data.making.attention_dependency import AttentionFilter, AttentionScorer
from lit_longctx.data.making.dependency import DependencyFilter, DependencyScorer
from lit_longctx.data.making.document_scorer import DocumentScorer
from lit_longctx.data.making.hard_negatives import HardNegatives
from lit_longctx.data.making.interleave import Interleave
from lit_longctx.data.making.ledger_report import ledger_report
from lit_longctx.data.making.read_progress import ReadProgress
from lit_longctx.data.making.scale import Executor, in_parts
from lit_longctx.data.reading.documents import Document, DocumentReader, Faults, FilePart, part_of
from lit_longctx.data.reading.inputs import Selection
from lit_longctx.data.sampling.conversations import conversation_file_parts, rendered, set_apart_by
from lit_longctx.data.store.chunks import BLOCK, SPLITS, SplitWriter
from lit_longctx.data.store.data_manifest import Manifest
from lit_longctx.data.tokens.chat_template import ChatTemplate
from lit_longctx.data.tokens.encode import encoded
from lit_longctx.data.tokens.info import TokenizerInfo
from lit_longctx.data.tokens.opening import (
    check_tokenizer,
    describe_borders,
    open_tokenizer,
    round_trip,
    tokenizer_info,
)
from lit_longctx.data.tokens.special_tokens import AddBos
from lit_longctx.data.tokens.tokenizer import Ids, Tokenizer

OWN = ("output", "source", "part", "parts", "executor")
"""Arguments that are not the same for every part."""
SAMPLE, EXCERPT = 100, 4096
"""Documents, and characters of each, on which is tried whether ids decode to their text."""


def prepare(
    input: list[str] | str,
    output: str,
    tokenizer: str = "bytes",
    source: str | None = None,
    held_out: float = 0.02,
    chunk_tokens: int = 2**22,
    bos: str | None = None,
    eos: str | None = None,
    add_bos: AddBos = "auto",
    reader: DocumentReader = DocumentReader(),
    tolerated: float = 0.01,
    filter: DependencyFilter | None = None,
    attention_filter: AttentionFilter | None = None,
    interleave: Interleave | None = None,
    hard_negatives: HardNegatives | None = None,
    chat: bool = False,
    chat_template: str | None = None,
    part: int = 0,
    parts: int = 1,
    executor: Executor | None = None,
) -> dict[str, Any] | None:
    """Tokenise documents into OUTPUT/train and OUTPUT/held_out.

    Args:
        input: File, folder, glob or URL, or a list of them (jsonl, JSON arrays, parquet, text;
            .gz, .zst, .xz and .bz2 too; what `Dataset.save_to_disk` wrote), `code:DIR` for
            repositories that lie side by side, one document each, or `stdlib` for Python's own
            sources.
        output: Folder to make; must not exist.
        tokenizer: `bytes`, a tokenizer.json, a sentencepiece tokenizer.model, or a folder or Hub
            name (org/name, org/name@revision) that holds one.
        source: Name of the source in reports; default: the output folder's name.
        held_out: Share of documents kept for evaluation, chosen by a hash of their names; of
            conversations, by that of their document or first question.
        chunk_tokens: Tokens per chunk file, a multiple of 256; windows cannot be longer.
        bos: Token that begins documents; default: tokenizer_config.json's.
        eos: Token that ends documents; default: tokenizer_config.json's.
        add_bos: Whether documents begin with BOS; `auto`: if --bos names one, else as
            `transformers` has it of the tokenizer's files.
        reader: Which fields of rows hold text and name, and the largest document.
        tolerated: Largest share of broken documents; above it nothing is written.
        filter: Keep only training documents whose long-dependency score is high enough.
        attention_filter: The same by a score of attention to what is far away, in its place.
        interleave: Join every few training documents into one, their chunks in turn.
        hard_negatives: Put chunks of other training documents that resemble it after each chunk.
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
    given = Preparation(**{k: v for k, v in locals().items() if k != "executor"})
    given.check(in_parts=executor is not None or parts > 1)
    if executor:
        return in_parts(partial(prepare, **given.shared()), executor, Path(output), source)
    return run(given)


@dataclass(frozen=True)
class Preparation:
    """The arguments of `prepare`, which describes them; those of one part."""

    input: list[str] | str
    output: str
    tokenizer: str
    source: str | None
    held_out: float
    chunk_tokens: int
    bos: str | None
    eos: str | None
    add_bos: AddBos
    reader: DocumentReader
    tolerated: float
    filter: DependencyFilter | None
    attention_filter: AttentionFilter | None
    interleave: Interleave | None
    hard_negatives: HardNegatives | None
    chat: bool
    chat_template: str | None
    part: int
    parts: int

    def check(self, in_parts: bool) -> None:
        """Raise ValueError if settings exclude each other or are out of range."""
        steps = (self.filter, self.attention_filter, self.interleave, self.hard_negatives)
        if self.chat and (in_parts or any(steps)):
            raise ValueError(
                "conversations are prepared in one part, without filters, interleave and "
                "hard_negatives"
            )
        for names in (("filter", "attention_filter"), ("interleave", "hard_negatives")):
            if all(getattr(self, name) for name in names):
                raise ValueError(f"{' and '.join(names)} exclude each other; give one")
        if self.chunk_tokens % BLOCK or self.chunk_tokens <= 0:
            raise ValueError(f"chunk_tokens {self.chunk_tokens} is no multiple of {BLOCK}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out {self.held_out} is no share; expected 0 ≤ held_out < 1")

    @property
    def inputs(self) -> list[str]:
        """All inputs, of which there may be one."""
        return [self.input] if isinstance(self.input, str) else self.input

    def shared(self) -> dict[str, Any]:
        """Arguments that are the same for every part, with local paths in full."""
        same = {name: value for name, value in vars(self).items() if name not in OWN}
        return same | {"input": anywhere(self.input), "tokenizer": anywhere(self.tokenizer)}

    def settings(self, file_parts: list[FilePart]) -> dict[str, Any]:
        """What decides the documents' tokens and split: all parts must agree on it."""
        return {
            "units": hashed(file_part.name for file_part in file_parts),
            "held_out": self.held_out,
            "reader": vars(self.reader),
            "filter": self.filter and vars(self.filter),
            "interleave": self.interleave and vars(self.interleave),
            **({"hard_negatives": self.hard_negatives.settings} if self.hard_negatives else {}),
            **({"attention_filter": vars(self.attention_filter)} if self.attention_filter else {}),
        }


class Stored(NamedTuple):
    """What a pipeline reports besides the tokens that it wrote."""

    file_parts: list[FilePart]
    """What was read, by name."""
    selection: Selection
    """Which files were taken and left."""
    round_trip: float = 1.0
    """Share of the first texts that come back exactly from their ids."""
    filtered: dict[str, Any] | None = None
    """Report of the filter; None if there is none."""


def run(given: Preparation) -> dict[str, Any]:
    """Read the input, write the folder and return its manifest."""
    tokenizer = open_tokenizer(given.tokenizer, given.bos, given.eos, given.add_bos)
    print(describe_borders(tokenizer, given.chat))
    template = ChatTemplate(tokenizer, given.chat_template) if given.chat else None
    faults = Faults(given.tolerated)
    with manifest.whole_folder(Path(given.output)) as folder:
        about = tokenizer_info(tokenizer)
        writers = {
            s: SplitWriter(folder / s, about, given.chunk_tokens, given.chat) for s in SPLITS
        }
        if template:
            stored = store_conversations(given, template, writers, faults)
        else:
            stored = store_documents(given, tokenizer, writers, faults)
        faults.check()
        if given.parts == 1 and not writers["train"].ledger.documents:
            raise ValueError(f"input {given.input} holds no document to train on")
        write(folder, writers, tokenizer, template)
        made = data_manifest(given, about, writers, faults, stored)
        manifest.seal(folder, manifest.hash_files(folder), **made.as_json())
    print(ledger_report(made))
    print(f"wrote {given.output}")
    return made.as_json()


def store_documents(
    given: Preparation, tokenizer: Tokenizer, writers: dict[str, SplitWriter], faults: Faults
) -> Stored:
    """Write documents: read, encoded, held out by name, then filtered and joined."""
    scorer = opened_scorer(given, tokenizer_info(tokenizer))
    selection = Selection()
    file_parts = given.reader.file_parts(given.inputs, selection)
    print(selection.report(), end="")
    excerpts: list[str] = []
    with ReadProgress(part_of(file_parts, given.part, given.parts)) as reading:
        documents = chain.from_iterable(file_part.read(faults) for file_part in reading.file_parts)
        pairs = encoded(sampled(documents, excerpts), tokenizer, faults)
        pairs = set_aside(pairs, given.held_out, writers["held_out"])
        for step in (scorer, given.interleave):
            pairs = step(pairs) if step else pairs
        if given.hard_negatives:
            pairs = given.hard_negatives.extended(pairs, tokenizer)
        for _, ids in pairs:
            writers["train"].add(ids)
    return Stored(file_parts, selection, round_trip(tokenizer, excerpts), scorer and scorer.report)


def opened_scorer(given: Preparation, about: TokenizerInfo) -> DocumentScorer | None:
    """Return the filter's scorer, if any; ValueError if its model has not the data's tokenizer."""
    if given.filter:
        scorer = DependencyScorer(given.filter)
    elif given.attention_filter:
        scorer = AttentionScorer(given.attention_filter)
    else:
        return None
    opened = open_checkpoint(scorer.settings.checkpoint)
    about = replace(about, largest_id=max(about.bos, about.eos))  # others when they are scored
    check_tokenizer(about, opened.config.vocab_size, opened.tokenizer)
    return scorer


def store_conversations(
    given: Preparation, template: ChatTemplate, writers: dict[str, SplitWriter], faults: Faults
) -> Stored:
    """Write conversations; questions on one document are all held out, or none."""
    selection = Selection()
    file_parts = conversation_file_parts(given.inputs, given.reader, selection)
    print(selection.report(), end="")
    with ReadProgress(file_parts) as reading:
        for file_part in reading.file_parts:
            for found, tokens in rendered(file_part.read(faults), template, faults):
                split = SPLITS[share_of(set_apart_by(found)) < given.held_out]
                writers[split].add_conversation(tokens)
    return Stored(file_parts, selection)


def write(
    folder: Path,
    writers: dict[str, SplitWriter],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
) -> None:
    """Finish the splits that hold documents and add the tokenizer, with its chat template."""
    for writer in writers.values():
        if writer.ledger.documents:
            writer.finish()
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    if template:
        (folder / "tokenizer" / CHAT_TEMPLATE).write_text(template.source)
        ends = json.dumps({"eos_token_id": [template.end_of_turn]})
        (folder / "tokenizer" / GENERATION).write_text(ends + "\n")


def data_manifest(
    given: Preparation,
    about: TokenizerInfo,
    writers: dict[str, SplitWriter],
    faults: Faults,
    stored: Stored,
) -> Manifest:
    """Return the folder's manifest, but for its files."""
    return Manifest(
        source=given.source or Path(given.output).name,
        block=BLOCK,
        chunk_tokens=given.chunk_tokens,
        tokenizer=about,
        round_trip=stored.round_trip,
        part=(given.part, given.parts),
        settings=given.settings(stored.file_parts),
        splits={split: writer.info() for split, writer in writers.items()},
        inputs=stored.selection.described(),
        broken=faults.described(),
        notes=faults.notes,
        filter=stored.filtered,
        chat=given.chat,
    )


def anywhere(names: Any) -> Any:
    """Return local paths in full, since parts may be prepared in another working folder."""
    if isinstance(names, list):
        return [anywhere(name) for name in names]
    kind, mark, path = names.rpartition(":") if names.startswith("code:") else ("", "", names)
    plain = "://" in names or (not mark and names in ("stdlib", "bytes")) or hub.is_name(names)
    return names if plain else f"{kind}{mark}{os.path.abspath(path)}"


def hashed(names: Iterable[str]) -> str:
    """Hash of a list of names."""
    return hashlib.sha256("\n".join(names).encode(errors="surrogatepass")).hexdigest()


def set_aside(
    pairs: Iterable[tuple[Document, Ids]], share: float, writer: SplitWriter
) -> Iterator[tuple[Document, Ids]]:
    """Write held-out documents, chosen by name, before any step sees them; yield the others."""
    for document, ids in pairs:
        if share_of(document.id) < share:
            writer.add(ids)
        else:
            yield document, ids


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
