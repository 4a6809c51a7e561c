"""Conversations of a prepared folder: from rows to marked tokens, and back in windows."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from lit_longctx.batch import NO_TARGET
from lit_longctx.data.reading.documents import DocumentReader, FilePart
from lit_longctx.data.reading.faults import Faults
from lit_longctx.data.reading.inputs import File, Names, Selection
from lit_longctx.data.reading.rows import READERS
from lit_longctx.data.reading.saved_datasets import input_files
from lit_longctx.data.sampling.packing import best_fit
from lit_longctx.data.store.storage import ObjectStorage
from lit_longctx.data.store.windows import ANSWER, Windows
from lit_longctx.data.tokens.chat_template import ChatTemplate
from lit_longctx.data.tokens.chats import Conversation, Malformed, Rendered, conversation

TOGETHER = 2**14
"""Conversations that are packed and shuffled together."""


def conversation_file_parts(
    inputs: Sequence[str], reader: DocumentReader, selection: Selection
) -> list[FilePart]:
    """Return what is read one after the other: every file of rows."""
    names, file_parts = Names(), []
    for name in inputs:
        for file in input_files(name, selection):
            own = names.of(file.name, file.path)
            file_parts.append(FilePart(own, partial(_conversations, file, own, reader)))
    return file_parts


def _conversations(
    file: File, name: str, reader: DocumentReader, faults: Faults
) -> Iterator[Conversation]:
    if file.kind not in READERS:
        raise ValueError(f"expected rows of conversations in {file.path}; got text; give jsonl")
    labels = frozenset(reader.labels)
    for number, row in READERS[file.kind](file, None, reader.largest):
        try:
            found = conversation(row, f"{name}:{number}", name, labels)
        except Malformed as reason:
            faults.add(str(reason), f"{file.path}:{number}")
        else:
            faults.read += 1
            yield found


def rendered(
    conversations: Iterator[Conversation], template: ChatTemplate, faults: Faults
) -> Iterator[tuple[Conversation, Rendered]]:
    """Pair conversations with their tokens; what the template cannot say is counted as broken."""
    for each in conversations:
        try:
            yield each, template.render(each)
        except Malformed as reason:
            faults.read -= 1
            faults.add(str(reason), each.id)


def set_apart_by(found: Conversation) -> str:
    """Text by which a conversation is held out: its document or first question, with all others."""
    asked = next(message.content for message in found.messages if message.role == "user")
    return asked[: found.document or None]


class Conversations:
    """Conversations of one split, each in at most `window` tokens; [i] gives ids and answers.

    Of one that is longer, its long document loses its end; without such a document it is left out.
    """

    def __init__(
        self, folder: str, split: str, window: int, storage: ObjectStorage = ObjectStorage()
    ) -> None:
        self.windows = Windows(folder, split, window, storage, chat=True)
        self.window = window
        held = self.windows.manifest.splits[split].documents
        lengths = self.windows.document_lengths().astype(np.int64) if held else np.zeros(0, int)
        long = self.windows.long_documents().astype(np.int64) if held else np.zeros((0, 2), int)
        over = (lengths - window).clip(0)
        fits = (over == 0) | (over < long[:, 1] - long[:, 0])
        self.left_out = int((~fits).sum())
        self.begins = (lengths.cumsum() - lengths)[fits]
        self.ends = (self.begins + lengths[fits]).tolist()
        self.over, self.behind = over[fits], long[fits, 1]
        self.lengths = lengths[fits] - self.over

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: int) -> tuple[Int[np.ndarray, " seq"], Bool[np.ndarray, " seq"]]:
        """Return ids, and which of them the assistant says."""
        begin, end = int(self.begins[index]), self.ends[index]
        behind = begin + int(self.behind[index])
        marked = self.windows.read(begin, end)
        if over := int(self.over[index]):
            marked = np.delete(marked, slice(behind - over - begin, behind - begin))
        return marked & (ANSWER - 1), marked >= ANSWER

    def report(self) -> str:
        """Return what the window does to the conversations."""
        cut = int((self.over > 0).sum())
        text = f"{len(self):,} conversations"
        if cut:
            text += f", {cut:,} documents cut by {int(self.over.sum()):,} tokens"
        if self.left_out:
            text += f", {self.left_out:,} left out: longer than the window"
        return text


class Row(NamedTuple):
    """One row of a batch."""

    tokens: Int[np.ndarray, " row"]
    """Conversations one after the other; padding is −100."""
    starts: Bool[np.ndarray, " row"]
    """Whether a conversation, or the padding, begins."""
    answers: Bool[np.ndarray, " row"]
    """Whether the assistant says the token."""


class ConversationRows:
    """Rows of whole conversations; [i] gives window + 1 tokens, the rest of them padding.

    Args:
        conversations: What stands in the rows.
        packing: `best_fit` puts as many into a row as fit, `none` one alone.
    """

    def __init__(
        self, conversations: Conversations, packing: Literal["best_fit", "none"] = "best_fit"
    ) -> None:
        self.conversations = conversations
        self.length = conversations.window
        self.rows: list[list[int]] = []
        self.groups: list[int] = []
        for first in range(0, len(conversations), TOGETHER):
            lengths = conversations.lengths[first : first + TOGETHER]
            found = [[i] for i in range(len(lengths))]
            if packing == "best_fit":
                found = list(best_fit(lengths, self.length))
            self.rows += [[first + i for i in row] for row in found]
            self.groups.append(len(found))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row = self.padding()
        at = 0
        for number in self.rows[index]:
            ids, answers = self.conversations[number]
            row.tokens[at : at + len(ids)] = ids
            row.answers[at : at + len(ids)] = answers
            row.starts[at] = True
            at += len(ids)
        row.starts[at] = True
        return row

    def padding(self) -> Row:
        """Return a row without conversations."""
        flags = np.zeros((2, self.length + 1), dtype=bool)
        return Row(np.full(self.length + 1, NO_TARGET, dtype=np.int64), *flags)

    def report(self) -> str:
        """Return what the window does to the conversations, and how full the rows are."""
        full = self.conversations.lengths.sum() / (len(self) * self.length)
        return f"{self.conversations.report()}, in {len(self):,} rows, {full:.1%} full"
