"""Rows → conversations: chat messages, Alpaca, ShareGPT, questions on long documents.

A row that does not hold exactly what its format promises is `Malformed`: refused, so that its
reader counts it by the reason, and never mended into something to train on.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Bool, Integer

from lit_longctx.data.documents import unfit
from lit_longctx.data.faults import Broken

FIELDS = ("messages", "conversations", "document", "question", "answer")
FIELDS += ("instruction", "input", "output", "id")
"""Fields that the formats read, for readers of tables."""
UNREAD = ("system", "history", "tools")
"""Fields that would change what is said, and have no place in a conversation here."""
FIELDS += UNREAD
SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system"}
"""ShareGPT's names of the roles."""


@final
class Malformed(ValueError):
    """A row that cannot be trained on; its text is one of few reasons, for `Faults.add`."""


class Message(NamedTuple):
    """What one side says in one turn."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


class Conversation(NamedTuple):
    """Messages in turn: perhaps a system prompt, then user and assistant, who has the last word."""

    messages: tuple[Message, ...]
    id: str
    """Name that is unique within its source."""
    source: str
    """What the row came from, for reports."""
    document: int = 0
    """Characters of a long document with which the first message begins; 0: there is none."""


class Rendered(NamedTuple):
    """A conversation as tokens; begins with BOS."""

    ids: Integer[np.ndarray, "tokens"]
    answers: Bool[np.ndarray, "tokens"]
    """Whether the assistant says the token: its answers, each with what ends the turn."""
    document: tuple[int, int] | None = None
    """First token of the long document, and the first behind it; None: there is none."""


def conversation(row: Any, name: str, source: str) -> Conversation:
    """Return what a row of any known format says.

    Args:
        row: `{"messages": [{"role", "content"}]}`, ShareGPT's `{"conversations": [{"from",
            "value"}]}`, Alpaca's `{"instruction", "input", "output"}` or `{"document", "question",
            "answer"}`; the first that fits. An `id` in the row comes before the name.
        name: What to call the row otherwise, such as its file and number.
        source: What it came from.

    Raises:
        Malformed: The row is none of them, or its turns are not as `Conversation` wants them.
    """
    if isinstance(row, Broken):
        raise Malformed(row.kind)
    if not isinstance(row, dict):
        raise Malformed("row is no object")
    parse = next((parse for key, parse in FORMATS.items() if row.get(key) is not None), None)
    if parse is None:
        raise Malformed("unknown format")
    if unread := next((name for name in UNREAD if row.get(name)), None):
        raise Malformed(f"field {unread} is not read")
    messages, document = parse(row)
    check_turns(messages)
    key = row.get("id")
    return Conversation(messages, name if key in (None, "") else str(key), source, document)


Parsed = tuple[tuple[Message, ...], int]


def _chat(row: dict[str, Any]) -> Parsed:
    return _messages(row["messages"], "role", "content", {}), 0


def _sharegpt(row: dict[str, Any]) -> Parsed:
    return _messages(row["conversations"], "from", "value", SHAREGPT), 0


def _document(row: dict[str, Any]) -> Parsed:
    """Document, blank line, question: its end can be cut, and the question stays."""
    document, question = text_of(row["document"]), text_of(row.get("question"))
    asked = Message("user", f"{document}\n\n{question}")
    return (asked, Message("assistant", text_of(row.get("answer")))), len(document)


def _alpaca(row: dict[str, Any]) -> Parsed:
    """Instruction, blank line, input if there is one, without the words Alpaca puts around them."""
    instruction = text_of(row["instruction"])
    more = row.get("input")
    asked = f"{instruction}\n\n{text_of(more)}" if more not in (None, "") else instruction
    return (Message("user", asked), Message("assistant", text_of(row.get("output")))), 0


FORMATS: dict[str, Callable[[dict[str, Any]], Parsed]] = {
    "messages": _chat,
    "conversations": _sharegpt,
    "document": _document,
    "instruction": _alpaca,
}
"""The field by which a format is known → how to read it."""


def _messages(found: Any, role: str, content: str, names: dict[str, str]) -> tuple[Message, ...]:
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise Malformed("messages are no list")
    if not all(isinstance(message, dict) for message in found):
        raise Malformed("message is no object")
    if any(message.get("weight", 1) not in (1, None) for message in found):
        raise Malformed("message weights")
    if any(message.get("tool_calls") for message in found):
        raise Malformed("tool calls")
    return tuple(
        Message(_role(message.get(role), names), text_of(message.get(content))) for message in found
    )


def _role(found: Any, names: dict[str, str]) -> str:
    role = names.get(str(found)) if names else found
    if role not in ("system", "user", "assistant"):
        raise Malformed("unknown role")
    return role


def text_of(content: Any) -> str:
    """Return a content that is fit for training: a string, or a list of text parts, joined."""
    if isinstance(content, list):
        content = "".join(_text_part(part) for part in content)
    if not isinstance(content, str):
        raise Malformed("content is no string")
    if broken := unfit(content):
        raise Malformed(broken.kind)
    return content


def _text_part(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise Malformed("content has parts other than text")
    if not isinstance(part.get("text"), str):
        raise Malformed("content is no string")
    return part["text"]


def check_turns(messages: Sequence[Message]) -> None:
    """Raise Malformed unless user and assistant take turns and the assistant ends."""
    roles = [message.role for message in messages]
    if not roles:
        raise Malformed("no messages")
    if "assistant" not in roles:
        raise Malformed("no assistant turn")
    turns = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[at % 2] for at, role in enumerate(turns)):
        raise Malformed("roles out of order")
    if turns[-1] != "assistant":
        raise Malformed("no answer to the last question")
