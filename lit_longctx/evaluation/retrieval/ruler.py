"""Tasks like RULER's (Hsieh et al. 2024, arXiv:2404.06654): its structures, counts and score.

The wording is ours and so are the words, drawn from syllables, so that none is part of another. So
compare models with these tasks, but not with the paper's numbers: they are none of niah_multikey_1,
niah_multivalue, niah_multiquery, vt, cwe and fwe. All 13 tasks by RULER's own names run through
lm-evaluation-harness (`lit_longctx.evaluation.harness`, --tasks ruler).
"""

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, final

import numpy as np

from lit_longctx.data.tokens.tokenizer import Tokenizer
from lit_longctx.evaluation.retrieval.prompts import (
    Haystack,
    Hidden,
    TaskExample,
    complete,
    hide,
    piece,
    pieces,
    room_for_context,
)
from lit_longctx.evaluation.retrieval.tasks import Seeded, Task

ALPHA = 2.0
"""The n-th most frequent word stands 1/n^ALPHA times as often as the first, dots to be ignored."""


class Ruler(Task):
    """A task with one or more references, each looked for in the response."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} {value} must be 1 or more")

    def score(self, sample: TaskExample, response: str) -> float:
        """Share of references that the response holds, whatever their case."""
        found = [reference.lower() in response.lower() for reference in sample.references]
        return sum(found) / len(found)


@final
@dataclass(frozen=True)
class MultiKey(Ruler):
    """One number among several under other keys."""

    keys: int = 4
    """Needles; all but one are distractors."""
    max_new_tokens: int = 128
    """Tokens that a generated answer may have."""

    def draw(self, hay: Haystack, length: int, depth: float, seeded: Seeded) -> TaskExample:
        """Hide the number that is asked for at `depth`, the others anywhere."""
        keys, numbers = drawn_keys(seeded, self.keys), drawn_numbers(seeded, self.keys)
        pairs = list(zip(keys, numbers, strict=True))
        return _magic_numbers(hay, length, depth, seeded, pairs, keys[:1])


@final
@dataclass(frozen=True)
class MultiValue(Ruler):
    """All numbers under one key."""

    values: int = 4
    """Needles, all asked for."""
    max_new_tokens: int = 128
    """Tokens that a generated answer may have."""

    def draw(self, hay: Haystack, length: int, depth: float, seeded: Seeded) -> TaskExample:
        """Hide the first at `depth`, the others anywhere."""
        (key,) = drawn_keys(seeded, 1)
        pairs = [(key, number) for number in drawn_numbers(seeded, self.values)]
        return _magic_numbers(hay, length, depth, seeded, pairs, [key])


@final
@dataclass(frozen=True)
class MultiQuery(Ruler):
    """Numbers under several keys, all asked for in one question."""

    queries: int = 4
    """Needles, each with a key of its own."""
    max_new_tokens: int = 128
    """Tokens that a generated answer may have."""

    def draw(self, hay: Haystack, length: int, depth: float, seeded: Seeded) -> TaskExample:
        """Hide the first at `depth`, the others anywhere."""
        keys, numbers = drawn_keys(seeded, self.queries), drawn_numbers(seeded, self.queries)
        pairs = list(zip(keys, numbers, strict=True))
        return _magic_numbers(hay, length, depth, seeded, pairs, keys)


@final
@dataclass(frozen=True)
class VariableTracking(Ruler):
    """Name all variables that hold a value through a chain of assignments."""

    hops: int = 4
    """Assignments after the first."""
    max_new_tokens: int = 30
    """Tokens that a generated answer may have."""

    def draw(self, hay: Haystack, length: int, depth: float, seeded: Seeded) -> TaskExample:
        """Assign the value at `depth`, and hop on anywhere after it."""
        names = [word[:5].upper() for word in islice(_syllables(seeded, 5), self.hops + 1)]
        (value,) = drawn_numbers(seeded, 1)
        depths = [depth, *sorted(seeded.uniform(depth, 100) for _ in names[1:])]
        values = [value, *(f"VAR {name}" for name in names[:-1])]
        return hide(
            hay.noise,
            length,
            "The text below hides assignments of variables. Keep track of them.\n",
            [
                Hidden(place, f"\nVAR {name} = {held}.\n")
                for place, name, held in zip(depths, names, values, strict=True)
            ],
            f"\nWhich variables hold the value {value}? These {len(names)} variables hold it:",
            names,
        )


@final
@dataclass(frozen=True)
class CommonWords(Ruler):
    """Ten words that stand more often in a list than all others."""

    uses_depth: ClassVar[bool] = False
    common: int = 10
    """Words to name."""
    repeats: int = 30
    """Times that each of them stands in the list, ten times as often as others; fewer, down to 2,
    where they would fill more than half of it."""
    max_new_tokens: int = 120
    """Tokens that a generated answer may have."""

    def draw(self, hay: Haystack, length: int, depth: float, seeded: Seeded) -> TaskExample:
        """Shuffle the list; its last word is cut to the token. Answers as they first appear."""
        tokenizer, stream = hay.tokenizer, _syllables(seeded)
        names = list(islice(stream, self.common))
        common = _spaced(tokenizer, names)
        head = "Below is a list of words. Some stand in it more often than others.\n"
        tail = f"\nWhich {self.common} words are the most common in the list? They are:"
        cost = sum(map(len, common))
        room, head_ids, tail_ids = _frame(tokenizer, length, head, tail, 2 * cost)
        repeats = max(2, min(self.repeats, room // (2 * cost) + 1))
        words, left = common * repeats, room - (repeats - 2) * cost
        for word in _rare(tokenizer, stream):
            times = min(max(1, repeats // 10), left // len(word))
            words += [word] * times
            left -= times * len(word)
            if left < len(word):
                break
        seeded.shuffle(words)
        body = [i for word in words for i in word] + word[:left]
        first = [words.index(ids) for ids in common]
        references = [name for _, name in sorted(zip(first, names, strict=True))]
        return complete(tokenizer, [*head_ids, *body, *tail_ids], tail, references)


@final
@dataclass(frozen=True)
class FrequentWords(Ruler):
    """The three most frequent of words whose frequencies fall with their rank (Zipf's law)."""

    uses_depth: ClassVar[bool] = False
    max_new_tokens: int = 50
    """Tokens that a generated answer may have."""

    def draw(self, hay: Haystack, length: int, depth: float, seeded: Seeded) -> TaskExample:
        """Shuffle the text; dots fill it to the token."""
        tokenizer = hay.tokenizer
        names = list(islice(_syllables(seeded), 1000))
        words = _spaced(tokenizer, ["...", *names])
        head = "Below is a coded text. Count its words and leave out the dots.\n"
        tail = "\nWhich three words are the most frequent? They are:"
        probs = np.arange(1, len(words) + 1) ** -ALPHA
        probs /= probs.sum()
        costs = np.array([len(word) for word in words])

        def tokens(number: int) -> int:
            return int(costs @ (probs * number).astype(int))

        # from here on ranks 4 and 5 differ in number, the third of the words and the fourth
        least = int(1 / (probs[3] - probs[4])) + 1
        room, head_ids, tail_ids = _frame(tokenizer, length, head, tail, tokens(least))
        room += tokens(least)
        number = bisect_right(range(room + 1), room, key=tokens) - 1
        counts = (probs * number).astype(int)
        chosen = [word for word, times in zip(words, counts, strict=True) for _ in range(times)]
        seeded.shuffle(chosen)
        body = [i for word in chosen for i in word]
        dots = (words[0] * room)[: room - len(body)]
        return complete(tokenizer, [*head_ids, *body, *dots, *tail_ids], tail, names[:3])


def _magic_numbers(
    hay: Haystack,
    length: int,
    depth: float,
    seeded: random.Random,
    pairs: Sequence[tuple[str, str]],
    asked: Sequence[str],
) -> TaskExample:
    """Hide the first pair at `depth`, others anywhere; answers key by key, as they stand."""
    depths = [depth, *(seeded.uniform(0, 100) for _ in pairs[1:])]
    placed = sorted(zip(depths, pairs, strict=True))
    keys = ", ".join(asked)
    return hide(
        hay,
        length,
        "The text below hides special magic numbers. Remember them.\n",
        [
            Hidden(place, f"\nOne of the special magic numbers for {key} is: {number}.\n")
            for place, (key, number) in placed
        ],
        f"\nWhat are all the special magic numbers for {keys}? They are:",
        [number for query in asked for _, (key, number) in placed if key == query],
    )


def _syllables(seeded: random.Random, letters: int = 6) -> Iterator[str]:
    """Different words of alternating consonants and vowels, without end."""
    seen: set[str] = set()
    while True:
        pairs = (seeded.choice("bdfgklmnprstvwz") + seeded.choice("aeiou") for _ in range(3))
        word = "".join(pairs)[:letters]
        if word not in seen:
            seen.add(word)
            yield word


def drawn_keys(seeded: random.Random, number: int) -> list[str]:
    """Return so many keys, two made-up words each, such as `bafuge-tilopa`."""
    words = _syllables(seeded)
    return [f"{next(words)}-{next(words)}" for _ in range(number)]


def drawn_numbers(seeded: random.Random, number: int) -> list[str]:
    """Return so many different numbers of 7 digits."""
    return [str(found) for found in seeded.sample(range(10**6, 10**7), number)]


def _spaced(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[int]]:
    return pieces(tokenizer, [f" {word}" for word in words])


def _rare(tokenizer: Tokenizer, words: Iterator[str]) -> Iterator[list[int]]:
    while True:
        yield from _spaced(tokenizer, list(islice(words, 256)))


def _frame(
    tokenizer: Tokenizer, length: int, head: str, tail: str, least: int
) -> tuple[int, list[int], list[int]]:
    """Tokens between head and tail beyond the least there must be, and the ids of both."""
    head_ids = [*tokenizer.prefix, *tokenizer.encode([head])[0].tolist()]
    tail_ids = piece(tokenizer, tail)
    return room_for_context(length, len(head_ids) + len(tail_ids) + least), head_ids, tail_ids
