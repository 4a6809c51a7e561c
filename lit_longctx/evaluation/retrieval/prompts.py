"""Prompts of exactly as many tokens as asked for, whatever the tokenizer.

Pieces of text are tokenized one by one and joined as ids, so that it is known where a needle's
tokens stand; the hay between them is cut token by token. Nothing is tokenized a second time.
"""

import random
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain, product
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from lit_longctx.data.tokens.tokenizer import Tokenizer

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""Hay of the passkey task (Mohtashami & Jaggi 2023, arXiv:2305.16300)."""
SENTENCE = re.compile(r"(?<!\S)(?=\S)(?:[^\n.!?]|\n(?!\s*\n)|[.!?](?=\S))+[.!?](?=\s|$)")
"""Up to a full stop that white space follows; an empty line ends a paragraph, not a sentence."""

NEUTRAL_WORDS = """\
baker clerk driver farmer gardener miller painter porter sailor tailor
carries cleans counts lends mends moves paints sells sorts washes
blue empty heavy light narrow old round small wooden yellow
baskets benches bottles chairs crates kettles lamps mirrors pots tables
"""
"""Subjects, verbs, adjectives and objects of the built-in hay."""


class Span(NamedTuple):
    """Where a needle stands: prompt_ids[start:stop]."""

    text: str
    start: int
    stop: int


class Hidden(NamedTuple):
    """A text to hide in the hay."""

    depth: float
    """Share of the hay before it, in percent."""
    text: str
    """With the white space around it."""


class TaskExample(NamedTuple):
    """One question to a model, with its answer."""

    prompt_ids: Int[np.ndarray, " length"]
    """BOS, where the tokenizer adds it, context and question."""
    answer_ids: Int[np.ndarray, " answer"]
    """The answer as it continues the prompt."""
    answer: str
    """The text of answer_ids: all references in the order in which they are asked for."""
    references: tuple[str, ...]
    """What a free answer must hold."""
    spans: tuple[Span, ...]
    """Needles in the order in which they stand; none where the task hides none."""


class Haystack:
    """Text to hide needles in, and the tokenizer it is read with.

    Args:
        tokenizer: The model's.
        texts: Documents, read one after the other and from the start again where they end;
            default: sentences that say nothing.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str] | None = None) -> None:
        self.tokenizer = tokenizer
        self.text = "\n".join([neutral_text()] if texts is None else texts)
        if not self.text.strip():
            raise ValueError(
                "the haystack is empty; expected texts with words, or none for the built-in text"
            )
        self.ids = _without_ends(tokenizer, piece(tokenizer, self.text))

    @classmethod
    def of_tokens(cls, tokenizer: Tokenizer, ids: Integer[np.ndarray, " tokens"]) -> "Haystack":
        """Make one of stored tokens, such as a held-out split, whose BOS and EOS are left out."""
        ends = tokenizer.bos if tokenizer.prefix else tokenizer.eos
        documents = np.split(ids, np.flatnonzero(ids == ends))
        whole = [_without_ends(tokenizer, part).tolist() for part in documents]
        if ends == tokenizer.eos:  # then a document's end is split off, or the stream's
            whole = [part for part in whole if part]
        return cls(tokenizer, [tokenizer.decode(part) for part in whole])

    @cached_property
    def noise(self) -> "Haystack":
        """The passkey's hay for the same tokenizer, 2,000 times over as in YaRN's code."""
        return Haystack(self.tokenizer, [" ".join([NOISE] * 2000)])

    @cached_property
    def sentences(self) -> list[tuple[int, int]]:
        """Begin and end within the text of every sentence of 5 to 50 words."""
        found = SENTENCE.finditer(self.text)
        return [match.span() for match in found if 5 <= len(match[0].split()) <= 50]

    def take(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of the endlessly repeated text."""
        return self.ids.take(np.arange(start, stop), mode="wrap").tolist()

    def cut(self, place: int, after_sentence: bool = False) -> int:
        """Return the last place, at or before `place`, where a needle may go.

        That is `place` itself, unless it halves a character. To end a sentence, a few steps more;
        each decodes 8 tokens.
        """
        for stop in range(place, 0, -1):
            text = self.tokenizer.decode(self.take(max(0, stop - 8), stop))
            if not text.endswith("\ufffd") and (not after_sentence or text.rstrip().endswith(".")):
                return stop
        return 0


def neutral_text(sentences: int = 4000) -> str:
    """Different sentences about nothing, some 40 bytes each; always the same text."""
    frames = ("The {} {} {} {}.", "Every week a {} {} {} {}.", "Now and then the {} {} the {} {}.")
    choices = list(product(frames, *(line.split() for line in NEUTRAL_WORDS.splitlines())))
    chosen = random.Random(0).sample(choices, sentences)
    return " ".join(frame.format(*words) for frame, *words in chosen)


def pieces(tokenizer: Tokenizer, texts: Sequence[str], before: str = "\n") -> list[list[int]]:
    """Ids of texts as they are after other text.

    At the beginning of a text some tokenizers add a space; after other text all may join letters
    across the seam. So each is encoded behind `before`, or what else leaves its ids whole, and the
    ids of that are taken off.

    Raises:
        ValueError: The tokenizer joins a text to whatever stands before it.
    """
    for anchor in dict.fromkeys((before, "\n", "a", ".")):
        alone, *joined = tokenizer.encode([anchor, *(anchor + text for text in texts)])
        if all(np.array_equal(ids[: len(alone)], alone) for ids in joined):
            return [ids[len(alone) :].tolist() for ids in joined]
    raise ValueError(
        f"tokenizer joins {texts[0][:20]!r} to what stands before it; expected one that splits text"
    )


def piece(tokenizer: Tokenizer, text: str, before: str = "\n") -> list[int]:
    """Ids of one text as they are after other text."""
    return pieces(tokenizer, [text], before)[0]


def hide(
    hay: Haystack,
    length: int,
    head: str,
    needles: Sequence[Hidden],
    tail: str,
    references: Sequence[str],
    after_sentence: bool = False,
    restart: bool = False,
    first: int = 0,
) -> TaskExample:
    """Return a prompt of exactly `length` tokens: prefix, head, hay with the needles in it, tail.

    A needle at depth d stands behind d percent of the hay's tokens, rounded, or before the
    character that this would halve. The hay's end may halve one.

    Args:
        hay: What the needles are hidden in.
        length: Tokens of the prompt, with BOS.
        head: Text before the hay.
        needles: Texts in the hay.
        tail: Text after the hay.
        references: Parts of the answer.
        after_sentence: Whether needles move back to the end of a sentence, but for depth 100.
        restart: Whether the hay begins anew after a needle.
        first: Token of the hay that it begins with.
    """
    needles = sorted(needles, key=lambda needle: needle.depth)
    tokenizer = hay.tokenizer
    head_ids = tokenizer.encode([head])[0].tolist()
    tail_ids = piece(tokenizer, tail)
    hidden = [piece(tokenizer, needle.text) for needle in needles]
    head_ids = [*tokenizer.prefix, *head_ids]
    room = room_for_context(length, sum(map(len, (head_ids, tail_ids, *hidden))))

    def stretch(start: int, stop: int) -> list[int]:
        return hay.take(0, stop - start) if restart else hay.take(first + start, first + stop)

    ids, spans, last = [*head_ids], [], 0
    for needle, needle_ids in zip(needles, hidden, strict=True):
        place = round(room * needle.depth / 100)
        place = hay.cut(first + place, after_sentence and needle.depth < 100) - first
        place = max(last, place)
        ids += stretch(last, place)
        spans.append(Span(needle.text.strip(), len(ids), len(ids) + len(needle_ids)))
        ids += needle_ids
        last = place
    ids += stretch(last, room)
    return complete(tokenizer, [*ids, *tail_ids], tail, references, spans)


def hide_in_lines(
    tokenizer: Tokenizer,
    length: int,
    head: str,
    needles: Sequence[Hidden],
    others: Iterable[list[int]],
    tail: str,
    references: Sequence[str],
    before: str = "\n",
) -> TaskExample:
    """Return a prompt of exactly `length` tokens: needles among as many other lines as have room.

    A needle at depth d stands behind d percent of the other lines; the last of these is cut short.

    Args:
        tokenizer: The model's.
        length: Tokens of the prompt, with BOS.
        head: Text before the lines.
        needles: Lines with the white space around them.
        others: Ids of other lines, as many as are asked for.
        tail: Text after the lines.
        references: Parts of the answer.
        before: What stands before a line; see `pieces`.
    """
    needles = sorted(needles, key=lambda needle: needle.depth)
    head_ids = [*tokenizer.prefix, *tokenizer.encode([head])[0].tolist()]
    hidden = [piece(tokenizer, needle.text, before) for needle in needles]
    tail_ids = piece(tokenizer, tail, before)
    left = room_for_context(length, sum(map(len, (head_ids, tail_ids, *hidden))))
    lines = []
    for line in others:
        lines.append(line[:left])
        if len(line) > left:
            break
        left -= len(line)
    ids, spans, last = [*head_ids], [], 0
    for needle, needle_ids in zip(needles, hidden, strict=True):
        place = round((len(lines) - 1) * needle.depth / 100)
        ids += chain.from_iterable(lines[last:place])
        spans.append(Span(needle.text.strip(), len(ids), len(ids) + len(needle_ids)))
        ids += needle_ids
        last = place
    ids += chain.from_iterable(lines[last:])
    return complete(tokenizer, [*ids, *tail_ids], tail, references, spans)


def room_for_context(length: int, needed: int) -> int:
    """Tokens that are left for the context."""
    if length <= needed:
        raise ValueError(
            f"length {length} is shorter than the prompt: {needed} tokens without any context; "
            f"ask for {needed + 1} or more"
        )
    return length - needed


def complete(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    tail: str,
    references: Sequence[str],
    spans: Sequence[Span] = (),
) -> TaskExample:
    """Add the answer to a prompt and check that its needles can be read in it.

    Raises:
        ValueError: The tokenizer changes the text of a needle or of the answer.
    """
    ids = np.asarray(prompt_ids, dtype=np.int64)
    assert np.flatnonzero(ids == tokenizer.bos).tolist() == [0] * len(tokenizer.prefix)
    answer = " " + ", ".join(references)
    answer_ids = piece(tokenizer, answer, before=tail)
    around = [ids[max(0, span.start - 8) : span.stop + 8].tolist() for span in spans]
    for text, near in zip((answer, *(p.text for p in spans)), (answer_ids, *around), strict=True):
        found = tokenizer.decode(near)
        if " ".join(text.split()) not in " ".join(found.split()):
            raise ValueError(
                f"tokenizer gives back {found!r} for {text!r}; expected one that keeps text"
            )
    return TaskExample(
        ids, np.asarray(answer_ids, np.int64), answer, tuple(references), tuple(spans)
    )


def _without_ends(
    tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray
) -> Int[np.ndarray, " tokens"]:
    found = np.asarray(ids, dtype=np.int64)
    return found[(found != tokenizer.bos) & (found != tokenizer.eos)]
