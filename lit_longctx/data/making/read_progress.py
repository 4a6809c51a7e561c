"""How much of an input has been read, said in lines: documents, characters, files, time left."""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from lit_longctx.data.reading.documents import Unit
from lit_longctx.data.reading.faults import Faults
from lit_longctx.data.sampling.conversations import Conversation
from lit_longctx.progress import EVERY, Heartbeat, TimeLeft

TERMINAL = 2.0
"""Seconds between two lines in a terminal."""


class Reading:
    """Counts what is read of an input; prints a line at the beginning, then regularly.

    The time left is that of the files' bytes, or, where they are not known, of their number. Within
    a file, bytes are estimated from the characters read; within a first file that is packed, they
    are not known.

    Args:
        units: What will be read; read `self.units` in their place.
        every: Most seconds between two lines; default: 2 in a terminal, else 30.
    """

    def __init__(self, units: Sequence[Unit], every: float | None = None) -> None:
        sizes = [unit.bytes for unit in units]
        self.sizes = [float(size or 1) if all(sizes) else 1.0 for size in sizes]
        self.known = all(sizes)
        self.units = [
            unit._replace(read=partial(self._read, unit, size))
            for unit, size in zip(units, self.sizes, strict=True)
        ]
        self.clock = TimeLeft(sum(self.sizes))
        self.documents, self.characters = 0, 0
        self.files, self.finished, self.finished_characters = 0, 0.0, 0
        if every is None:
            every = TERMINAL if sys.stdout.isatty() else EVERY
        self.heartbeat = Heartbeat(self.line, every)

    def __enter__(self) -> "Reading":
        size = f", {self.clock.total / 1e6:,.1f} MB" if self.known else ""
        files = f"{len(self.units)} file{'s' * (len(self.units) > 1)}"
        self.heartbeat.say(f"prepare: reading {files}{size}")
        self.heartbeat.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.heartbeat.__exit__()

    def _read(self, unit: Unit, size: float, faults: Faults) -> Iterator[Any]:
        for item in unit.read(faults):
            yield item
            self.documents += 1
            self.characters += characters(item)
            self.clock.done = self.finished + min(size, self._bytes_read(unit))
        self.files += 1
        self.finished += size
        self.finished_characters = self.characters
        self.clock.done = self.finished

    def _bytes_read(self, unit: Unit) -> float:
        """Bytes of the file that is being read, from its characters; 0 where they do not tell."""
        here = self.characters - self.finished_characters
        if not self.known:
            return 0.0
        if self.finished_characters:
            return here * self.finished / self.finished_characters
        return here if unit.plain else 0.0

    def line(self) -> str:
        """Return how far the reading got."""
        read = self.characters / 1e6
        rate = read / max(1e-9, self.clock.passed)
        return (
            f"prepare: {self.documents:,} documents, {read:,.1f} M characters, {rate:.1f} M/s, "
            f"{self.files} of {len(self.units)} files  {self.clock}"
        )


def characters(item: Any) -> int:
    """Characters of a document or of a conversation's messages."""
    if isinstance(item, Conversation):
        return sum(len(message.content) for message in item.messages)
    return len(item.text)
