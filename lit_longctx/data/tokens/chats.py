"""Rows → conversations: chat messages, Alpaca, ShareGPT, questions on long documents.

Every key of a row is read, or one of the labels that change nothing of what is said, or empty. A
row with any other, and one that does not hold exactly what its format promises, is `Malformed`:
refused, so that its reader counts it by the reason, and never mended into something to train on.
"""

from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Bool, Integer

from lit_longctx.data.reading.documents import unfit
from lit_longctx.data.reading.faults import Broken

LABELS = frozenset(
    [
        "id",
        "prompt_id",
        "conversation_id",
        "hash",
        "source",
        "dataset",
        "category",
        "task",
        "topic",
        "language",
        "lang",
        "model",
        "license",
        "url",
        "length",
        "num_turns",
    ]
)
"""Keys of rows and messages that say where they come from, and change nothing of what is said."""
MADE = frozenset(["made", "seed", "chunk", "style", "critique", "prompts"])
"""Keys by which `lit_longctx synthesize` says how a question came to be."""
SYSTEM = ("system", "system_prompt")
"""Spellings of the system prompt beside a row's messages."""
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""Spellings of the roles, in messages and in ShareGPT's conversations."""
LEARNT = ("train", "weight")
"""Spellings of whether a message is learnt: axolotl's, true or false, and OpenAI's, 1 or 0."""


@final
class Malformed(ValueError):
    """A row that cannot be trained on; its text is one of few reasons, for `Faults.add`."""


class Message(NamedTuple):
    """What one side says in one turn."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str
    learnt: bool = True
    """Whether an answer is one to learn; only read otherwise."""


class Conversation(NamedTuple):
    """Messages in turn: perhaps a system prompt, then user and assistant, who has the last word."""

    messages: tuple[Message, ...]
    id: str
    """Name that is unique within its source."""
    source: str
    """What the row came from, for reports."""
    document: int = 0
    """Characters of a long document with which the first question begins; 0: there is none."""


class Rendered(NamedTuple):
    """A conversation as tokens; begins with BOS."""

    ids: Integer[np.ndarray, "tokens"]
    answers: Bool[np.ndarray, "tokens"]
    """Whether the assistant says the token: its answers, each with what ends the turn."""
    document: tuple[int, int] | None = None
    """First token of the long document, and the first behind it; None: there is none."""


Parsed = tuple[tuple[Message, ...], int]
"""Messages, and characters of the long document with which the first question begins."""


def conversation(row: Any, name: str, source: str, labels: Set[str] = frozenset()) -> Conversation:
    """Return what a row of any known format says.

    Args:
        row: `{"messages": [{"role", "content"}]}`, ShareGPT's `{"conversations": [{"from",
            "value"}]}`, `{"document", "question", "answer"}` or Alpaca's `{"instruction", "input",
            "output"}`, which Dolly calls `context` and `response`; the first that fits. Beside
            each, a system prompt. An `id` in the row comes before the name.
        name: What to call the row otherwise, such as its file and number.
        source: What it came from.
        labels: Keys that change nothing of what is said, besides `LABELS`.

    Raises:
        Malformed: The row is none of them, has a key that is not read, or its turns are not as
            `Conversation` wants them.
    """
    if isinstance(row, Broken):
        raise Malformed(row.kind)
    if not isinstance(row, dict):
        raise Malformed("row is no object")
    parse = next((parse for key, parse in FORMATS.items() if row.get(key) is not None), None)
    if parse is None:
        raise Malformed("unknown format")
    fields = Fields(row, LABELS | labels)
    messages, document = parse(fields)
    if not says_nothing(system := fields.take(*SYSTEM)):
        if messages and messages[0].role == "system":
            raise Malformed("two system prompts")
        messages = (Message("system", text_of(system)), *messages)
    fields.check({message.content for message in messages})
    check_turns(messages)
    key = row.get("id")
    return Conversation(messages, name if key in (None, "") else str(key), source, document)


class Fields:
    """Fields of a row or a message, each of which is taken, a label, empty, or refused.

    Args:
        row: The row or message.
        labels: Keys that change nothing of what is said.
    """

    def __init__(self, row: dict[str, Any], labels: Set[str]) -> None:
        self.labels = labels
        self.left = dict(row)

    def take(self, *names: str) -> Any:
        """Return the field that goes by one of the names; empty ones do not count beside it."""
        found = {name: self.left.pop(name) for name in names if name in self.left}
        full = [name for name, value in found.items() if not says_nothing(value)]
        if len(full) > 1:
            raise Malformed(f"fields {full[0]} and {full[1]} together")
        return found[full[0]] if full else next(iter(found.values()), None)

    def check(self, said: Set[str] = frozenset()) -> None:
        """Raise Malformed if a field is left that is no label, not empty, and no message again."""
        for key, value in self.left.items():
            repeats = isinstance(value, str) and value in said
            if not (key in self.labels or says_nothing(value) or repeats):
                name = repr(key[:40])
                raise Malformed(f"field {name} is not read (a label? --reader.labels [{name}])")


def says_nothing(value: Any) -> bool:
    """Whether a field's value is as if the field were not there."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _chat(fields: Fields) -> Parsed:
    return _messages(fields.take("messages"), fields.labels), 0


def _sharegpt(fields: Fields) -> Parsed:
    return _messages(fields.take("conversations"), fields.labels), 0


def _document(fields: Fields) -> Parsed:
    """Document, blank line, question: its end can be cut, and the question stays."""
    fields.labels |= MADE
    document, question = text_of(fields.take("document")), text_of(fields.take("question"))
    asked = Message("user", f"{document}\n\n{question}")
    return (asked, Message("assistant", text_of(fields.take("answer")))), len(document)


def _alpaca(fields: Fields) -> Parsed:
    """Instruction, blank line, input if there is one, without the words Alpaca puts around them."""
    instruction = text_of(fields.take("instruction"))
    more = fields.take("input", "context")
    asked = instruction if says_nothing(more) else f"{instruction}\n\n{text_of(more)}"
    answer = text_of(fields.take("output", "response"))
    return (Message("user", asked), Message("assistant", answer)), 0


FORMATS: dict[str, Callable[[Fields], Parsed]] = {
    "messages": _chat,
    "conversations": _sharegpt,
    "document": _document,
    "instruction": _alpaca,
}
"""The field by which a format is known → how to read it."""


def _messages(found: Any, labels: Set[str]) -> tuple[Message, ...]:
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise Malformed("messages are no list")
    if not all(isinstance(message, dict) for message in found):
        raise Malformed("message is no object")
    return tuple(_message(Fields(message, labels)) for message in found)


def _message(fields: Fields) -> Message:
    """Read what one side says, with any of the spellings that mean the same."""
    if not says_nothing(fields.take("tool_calls")):
        raise Malformed("tool calls")
    found = fields.take("role", "from")
    role = ROLES.get(found) if isinstance(found, str) else None
    if role is None:
        raise Malformed("unknown role")
    content = fields.take("content", "value")
    train, weight = (_truth(fields.take(name)) for name in LEARNT)
    if train and role != "assistant":
        raise Malformed("a question to learn")
    fields.check()
    return Message(role, text_of(content), False not in (train, weight))


def _truth(found: Any) -> bool | None:
    if not (found is None or found in (0, 1)):
        raise Malformed("message weights")
    return None if found is None else bool(found)


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
    if not any(message.learnt for message in messages if message.role == "assistant"):
        raise Malformed("no answer to learn")
