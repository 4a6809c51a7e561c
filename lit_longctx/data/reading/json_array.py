"""A file that is one JSON array → its elements, one in memory at a time."""

import json
from codecs import getincrementaldecoder
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any

from lit_longctx.data.reading.faults import Broken

PIECE = 2**20
"""Bytes read at a time, at least."""


class Text:
    """Text of a stream, as much of it as was asked for; `at` is how far it is understood."""

    def __init__(self, stream: BufferedIOBase) -> None:
        self.stream = stream
        self.decoder = getincrementaldecoder("utf-8-sig")("surrogatepass")
        self.held, self.at, self.ended = "", 0, False

    def more(self) -> bool:
        """Read on, each time as much as is waiting; False at the end."""
        if self.ended:
            return False
        piece = self.stream.read(max(PIECE, self.waiting))
        self.ended = not piece
        self.held = self.held[self.at :] + self.decoder.decode(piece, final=self.ended)
        self.at = 0
        return True

    @property
    def waiting(self) -> int:
        """Characters that are read and not understood yet."""
        return len(self.held) - self.at

    def next(self) -> str:
        """Return the next character that is no space, and leave it; nothing at the end."""
        while True:
            while self.at < len(self.held):
                if not self.held[self.at].isspace():
                    return self.held[self.at]
                self.at += 1
            if not self.more():
                return ""


def elements(stream: BufferedIOBase, largest: int) -> Iterator[Any]:
    """Yield the elements of an array; what is `Broken` about it ends it.

    An element of more than `largest` characters is Broken as well; none is looked for behind one
    whose end is not in sight by then. A value is parsed anew each time that twice as much is read.
    """
    text, decoder = Text(stream), json.JSONDecoder()
    expected = "["
    try:
        while (found := text.next()) and found in expected:
            text.at += 1
            if found == "]":
                if text.next():
                    break
                return
            if expected == "[" and text.next() == "]":
                expected = "]"
                continue
            text.next()
            value, end = _value(text, decoder, largest)
            yield value
            if end is None:
                return
            text.at = end
            expected = ",]"
    except UnicodeDecodeError:
        yield Broken("bad UTF-8")
        return
    yield Broken("broken JSON")


def _value(text: Text, decoder: json.JSONDecoder, largest: int) -> tuple[Any, int | None]:
    """Return a value and where it ends, which may not be known of a Broken one."""
    while True:
        try:
            value, end = decoder.raw_decode(text.held, text.at)
            whole = end < len(text.held) and text.held[end] in ",] \n\r\t"
            if whole or text.waiting > largest or not text.more():  # else a number may go on
                return (Broken("too large") if end - text.at > largest else value), end
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            if text.waiting > largest:
                return Broken("too large"), None
            if isinstance(error, RecursionError) or not text.more():
                return Broken("broken JSON"), None
