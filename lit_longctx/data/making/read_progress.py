"""How much of an input has been read, said in lines: documents, characters, files, time left."""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from lit_longctx.data.reading.documents import FilePart
from lit_longctx.data.reading.faults import Faults
from lit_longctx.data.sampling.conversations import Conversation
from lit_longctx.progress import EVERY, Heartbeat, TimeLeft

TERMINAL = 2.0
"""Seconds between two lines in a terminal."""


class ReadProgress:
    """Counts what is read of an input; prints a line at the beginning, then regularly.

    The time left is that of the files' bytes, or, where they are not known, of their number. Within
    a file, bytes are estimated from the characters read; within a first file that is packed, they
    are not known.

    Args:
        file_parts: What will be read; read `self.file_parts` in their place.
        every: Most seconds between two lines; default: 2 in a terminal, else 30.
    """

    def __init__(self, file_parts: Sequence[FilePart], every: float | None = None) -> None:
        sizes = [file_part.bytes for file_part in file_parts]
        self.sizes = [float(size or 1) if all(sizes) else 1.0 for size in sizes]
        self.known = all(sizes)
        self.file_parts = [
            file_part._replace(read=partial(self._read, file_part, size))
            for file_part, size in zip(file_parts, self.sizes, strict=True)
        ]
        self.clock = TimeLeft(sum(self.sizes))
        self.documents, self.characters = 0, 0
        self.files, self.finished, self.finished_characters = 0, 0.0, 0
        if every is None:
            every = TERMINAL if sys.stdout.isatty() else EVERY
        self.heartbeat = Heartbeat(self.line, every)

    def __enter__(self) -> "ReadProgress":
        size = f", {self.clock.total / 1e6:,.1f} MB" if self.known else ""
        files = f"{len(self.file_parts)} file{'s' * (len(self.file_parts) > 1)}"
        self.heartbeat.say(f"prepare: reading {files}{size}")
        self.heartbeat.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.heartbeat.__exit__()

    def _read(self, file_part: FilePart, size: float, faults: Faults) -> Iterator[Any]:
        for item in file_part.read(faults):
            yield item
            self.documents += 1
            self.characters += characters(item)
            self.clock.done = self.finished + min(size, self._bytes_read(file_part))
        self.files += 1
        self.finished += size
        self.finished_characters = self.characters
        self.clock.done = self.finished

    def _bytes_read(self, file_part: FilePart) -> float:
        """Bytes of the file that is being read, from its characters; 0 where they do not tell."""
        here = self.characters - self.finished_characters
        if not self.known:
            return 0.0
        if self.finished_characters:
            return here * self.finished / self.finished_characters
        return here if file_part.plain else 0.0

    def line(self) -> str:
        """Return how far the reading got."""
        read = self.characters / 1e6
        rate = read / max(1e-9, self.clock.passed)
        return (
            f"prepare: {self.documents:,} documents, {read:,.1f} M characters, {rate:.1f} M/s, "
            f"{self.files} of {len(self.file_parts)} files  {self.clock}"
        )


def characters(item: Any) -> int:
    """Characters of a document or of a conversation's messages."""
    if isinstance(item, Conversation):
        return sum(len(message.content) for message in item.messages)
    return len(item.text)
