r"""Conversation → token ids that know which of them are answers, by a chat template.

The template runs twice: over the messages, and over a mark in place of each. The marks cut the
second text into the template's own words and the places of the messages, and the first text must be
just that, filled in. Then the tokenizer reads everything at once, so that the ids are those of
`transformers`' `apply_chat_template`, but for one thing: special tokens are special only in the
template's own words. What a user pastes, `<|im_end|>` say, stays text. A tokenizer whose special
tokens have names with \0, which no message has, does both (`renamed`).
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, final

import numpy as np
from jaxtyping import Bool, Integer

from lit_longctx.data.reading.documents import unfit
from lit_longctx.data.tokens.chats import Conversation, Malformed, Message, Rendered
from lit_longctx.data.tokens.marked_text import MARK, mark, reader
from lit_longctx.data.tokens.template_process import TemplateFails, TemplateOverLimit, render
from lit_longctx.data.tokens.templates import find_template, one_line, variables
from lit_longctx.data.tokens.tokenizer import Tokenizer

PROBE = (Message("user", "Why?"), Message("assistant", "Because."))


class TextSegment(NamedTuple):
    """A part of the text that has one meaning."""

    text: str
    kind: str
    """`template`, `special` (one token of the template's, by its mark), `answer`, `document` or
    `asked` (whatever else is said, such as answers not to learn)."""


@final
class ChatTemplate:
    """How a tokenizer's model wants to be talked to.

    Args:
        tokenizer: Whose ids.
        template: File with a Jinja template, or `plain` for one that any tokenizer can speak.
            Default: the tokenizer's chat_template.jinja, or the one in its tokenizer_config.json;
            for bytes, the plain one. Templates that ask for the date get today's.

    A template that needs more time or memory than a template may is a ValueError, whatever the
    messages: it is not put to the next.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.source, self._place = find_template(tokenizer, template)
        """The Jinja text, to be saved beside the model as chat_template.jinja."""
        self.variables = variables(tokenizer)
        specials, self._encode = reader(tokenizer, self.source)
        longest_first = sorted(specials, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, longest_first)))
        self._marks = {text: mark(number) for text, number in specials.items()}
        self._named = {mark(number): f"\0{text}\0" for text, number in specials.items()}
        try:
            self._lead = self._space_before_answers()
            probe = self.render(Conversation(PROBE, "probe", ""))
            last = int(probe.ids[probe.answers][-1])
            self.end_of_turn = last if last in specials.values() else tokenizer.eos
            """Token by which the assistant ends what it says."""
        except Malformed as error:
            raise ValueError(f"{self._place} cannot be trained on: {one_line(error)}") from None

    def render(self, conversation: Conversation) -> Rendered:
        """Return a conversation's ids, with BOS in front if the tokenizer adds it.

        If the template writes it too, there is one still.

        An answer, if it is one to learn, is the message, the whitespace that the template puts
        between the prompt for generation and it, and the next special token, by which the model
        learns to stop. Where there is none before the next message, it is the message alone; at the
        end EOS is added. A token belongs to where its first character is that is no space. Within a
        conversation the template may write BOS again (Llama 2 does): BOS does not tell where one
        begins.

        Raises:
            Malformed: The template refuses the messages, or does not show each as it is, but for
                space around it.
        """
        segments = self._segments(conversation)
        ids, offsets = self._encode("".join(piece.text for piece in segments))
        starts, stops = np.array(offsets).T
        edges = np.cumsum([0, *(len(piece.text) for piece in segments)])
        owners = np.clip(np.searchsorted(edges, starts, "right") - 1, 0, len(segments) - 1)
        said = self._said(segments)
        kinds = np.array([piece.kind for piece in segments])
        lasts = np.clip(np.searchsorted(edges, stops - 1, "right") - 1, 0, len(segments) - 1)
        for at in np.flatnonzero((kinds[owners] == "template") & (kinds[lasts] == "answer")):
            piece = segments[owners[at]].text
            if not piece[starts[at] - edges[owners[at]] :].strip(" "):
                owners[at] = lasts[at]  # " Yes": the space is the template's, the word is said
        inside = (kinds[owners] == "document") & (stops <= edges[owners + 1])
        unended = bool(said[-1]) and kinds[-1] != "special"
        return self._bordered(np.array(ids, dtype=np.int32), said[owners], inside, unended)

    def prompt(self, messages: Sequence[Message]) -> Integer[np.ndarray, "tokens"]:
        """Return the ids of messages and of what makes the assistant answer, as `render` has them.

        Raises:
            Malformed: As for `render`.
        """
        if broken := next((found for each in messages if (found := unfit(each.content))), None):
            raise Malformed(broken.kind)
        segments = self._segments(Conversation(tuple(messages), "prompt", ""), generation=True)
        ids, _ = self._encode("".join(piece.text for piece in segments))
        begin = [] if ids[:1] == [self.tokenizer.bos] else self.tokenizer.prefix
        return np.array([*begin, *ids], dtype=np.int32)

    def marked_prompt(self, messages: Sequence[Message], continued: bool = False) -> str:
        r"""Return the text of a prompt, each special token of the template's between two NULs.

        Other text may be put behind it; `encode_marked` reads the whole.

        Args:
            messages: As for `prompt`.
            continued: Whether the prompt ends with the last message, which the assistant goes on
                with; default: with what makes the assistant answer.

        Raises:
            Malformed: As for `render`.
        """
        conversation = Conversation(tuple(messages), "prompt", "")
        segments = self._segments(conversation, generation=not continued)
        while continued and segments[-1].kind in ("template", "special"):
            segments.pop()
        return "".join(self._named.get(piece.text, piece.text) for piece in segments)

    def encode_marked(self, text: str) -> list[int]:
        """Return the ids of what `marked_prompt` wrote, and of text behind it; no BOS is added."""
        for special, named in self._named.items():
            text = text.replace(named, special)
        return self._encode(text)[0]

    def _bordered(
        self,
        ids: Integer[np.ndarray, "tokens"],
        answers: Bool[np.ndarray, "tokens"],
        inside: Bool[np.ndarray, "tokens"],
        unended: bool,
    ) -> Rendered:
        """Add BOS and EOS where they are missing; `inside` says which tokens are the document's."""
        bos, eos = self.tokenizer.bos, self.tokenizer.eos
        added = (int(bool(self.tokenizer.prefix) and ids[0] != bos), int(unended))
        at = np.flatnonzero(np.pad(inside, added))
        return Rendered(
            np.pad(ids, added, constant_values=(bos, eos)),
            np.pad(answers, added, constant_values=(False, True)),
            (int(at[0]), int(at[-1]) + 1) if len(at) else None,
        )

    def _said(self, segments: Sequence[TextSegment]) -> Bool[np.ndarray, "segments"]:
        """Say which segments the assistant says: answers, each with what ends the turn."""
        bos, eos = self.tokenizer.bos, self.tokenizer.eos
        begin = mark(bos) if bos != eos else None
        said = np.zeros(len(segments), dtype=bool)
        for at, piece in enumerate(segments):
            if piece.kind == "answer":
                said[at : end_of_turn(segments, at, begin)] = True
        return said

    def _text(self, messages: Sequence[Message], generation: bool = False) -> str:
        said = [{"role": message.role, "content": message.content} for message in messages]
        known = {"messages": said, "add_generation_prompt": generation, **self.variables}
        try:
            return render(self.source, known)
        except TemplateFails as error:
            raise Malformed(f"the chat template fails: {error}") from None
        except TemplateOverLimit as error:
            raise ValueError(
                f"{self._place} was stopped: it {error}; do not use a template you do not trust"
            ) from None

    def _cut(self, messages: Sequence[Message], generation: bool = False) -> list[str]:
        """Return the template's words before, between and after the messages' numbers."""
        marks = [Message(message.role, mark(i)) for i, message in enumerate(messages)]
        cut = MARK.split(self._text(marks, generation))
        if sorted(map(int, cut[1::2])) != list(range(len(messages))):
            raise Malformed("the chat template drops, repeats or rewrites a message")
        return cut

    def _space_before_answers(self) -> str:
        """Whitespace that the model says before an answer, since the prompt ends before it.

        Llama 2's prompt ends with "[/INST]", and its answers begin with a space.
        """
        prompt, whole = self._cut(PROBE[:1], generation=True)[-1], self._cut(PROBE)[2]
        rest = whole.removeprefix(prompt) if whole.startswith(prompt) else ""
        return rest if rest.isspace() else ""

    def _filled(
        self, messages: Sequence[Message], generation: bool
    ) -> Iterator[tuple[str, int | None]]:
        """Yield the text in turns: the template's words, with None; a message, with its number."""
        text, cut = self._text(messages, generation), self._cut(messages, generation)
        yield cut[0], None
        at = len(cut[0])
        for number, words in zip(map(int, cut[1::2]), cut[2::2], strict=True):
            said = messages[number].content
            shown = (said, said.rstrip(), said.lstrip(), said.strip())
            kept = next((kept for kept in shown if text.startswith(kept + words, at)), None)
            if kept is None:
                raise Malformed("the chat template depends on what a message says")
            yield kept, number
            yield words, None
            at += len(kept) + len(words)
        if at != len(text) or not text.startswith(cut[0]):
            raise Malformed("the chat template depends on what a message says")

    def _segments(self, conversation: Conversation, generation: bool = False) -> list[TextSegment]:
        segments: list[TextSegment] = []
        messages = conversation.messages
        asked = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if any("\0" in message.content for message in messages):
            raise Malformed("NUL in text")
        for text, number in self._filled(messages, generation):
            if number is None:
                segments += self._template_segments(text)
            elif messages[number].role == "assistant" and messages[number].learnt:
                segments += led(segments, self._lead), TextSegment(text, "answer")
            else:
                long = conversation.document if number == asked else 0
                document = max(0, long - messages[number].content.index(text))
                segments.append(TextSegment(text[:document], "document"))
                segments.append(TextSegment(text[document:], "asked"))
        return [piece for piece in segments if piece.text]

    def _template_segments(self, words: str) -> Iterator[TextSegment]:
        at = 0
        for special in self._specials.finditer(words):
            yield TextSegment(words[at : special.start()], "template")
            yield TextSegment(self._marks[special[0]], "special")
            at = special.end()
        yield TextSegment(words[at:], "template")


def led(segments: list[TextSegment], lead: str) -> TextSegment:
    """Take the space that the model says before an answer away from the template's words."""
    words = segments.pop().text
    kept = words.removesuffix(lead)
    segments.append(TextSegment(kept, "template"))
    return TextSegment(words[len(kept) :], "answer")


def end_of_turn(segments: Sequence[TextSegment], at: int, begin: str | None) -> int:
    """Return where an answer ends: behind the next special token, unless that begins a turn."""
    for end, piece in enumerate(segments[at + 1 :], at + 2):
        if piece.kind == "special" and piece.text != begin:
            return end
        if piece.kind != "template":
            return at + 1
    return len(segments)
