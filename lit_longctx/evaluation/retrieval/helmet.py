"""HELMET's recall tasks (Yen et al. 2024, arXiv:2410.02694): prompts, answer lengths and scores.

As in its data.py and configs/recall.yaml: three of RULER's needle tasks without shots, and JSON
look-up with two. Its test files are not read: keys and values are drawn here (a word is two words
of syllables), needles of `helmet_niah_mv` are hidden in the haystack at hand instead of essays, and
a prompt is filled to the token, for which its last line is cut short. So compare models with these
tasks; the paper's own figures need its files.
"""

import random
import re
import string
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, final

from lit_longctx.data.tokens.tokenizer import Tokenizer
from lit_longctx.evaluation.retrieval.prompts import (
    Haystack,
    Hidden,
    TaskExample,
    hide,
    hide_in_lines,
    pieces,
)
from lit_longctx.evaluation.retrieval.ruler import Ruler, drawn_keys, drawn_numbers
from lit_longctx.evaluation.retrieval.tasks import Seeded, Task

NEEDLE = "One of the special magic {}s for {} is: {}."
"""RULER's needle of a kind, key and value; HELMET's files were written by RULER's generator."""
PAIR = ' "{}": "{}",\n'
"""A line of the JSON object."""


class HelmetMultiKey(Ruler):
    """One of many needles, all of one form, is asked for; the others are the haystack."""

    kind: ClassVar[str]
    """What the values are called."""
    pair: ClassVar[Callable[[random.Random], tuple[str, str]]]
    """Draws a key with its value."""

    def draw(self, hay: Haystack, length: int, depth: float, seeded: Seeded) -> TaskExample:
        """Put the needle behind `depth` percent of the others; hay gives the tokenizer alone."""
        draw_pair = type(self).pair
        key, value = draw_pair(seeded)
        asked = f"the special magic {self.kind} for {key} mentioned in the provided text"
        return hide_in_lines(
            hay.tokenizer,
            length,
            f"A special magic {self.kind} is hidden within the following text. Make sure to "
            f"memorize it. I will quiz you about the {self.kind} afterwards.\n",
            [Hidden(depth, self._line(key, value))],
            _lines(hay.tokenizer, lambda: self._line(*draw_pair(seeded))),
            f"\nWhat is {asked}?\nThe{asked[3:]} is",
            [value],
        )

    def _line(self, key: str, value: str) -> str:
        return f"{NEEDLE.format(self.kind, key, value)}\n"


def _word_and_number(seeded: random.Random) -> tuple[str, str]:
    return drawn_keys(seeded, 1)[0], drawn_numbers(seeded, 1)[0]


def _two_uuids(seeded: random.Random) -> tuple[str, str]:
    return _uuid(seeded), _uuid(seeded)


@final
@dataclass(frozen=True)
class NiahMk2(HelmetMultiKey):
    """HELMET's ruler_niah_mk_2: words are keys, numbers of 7 digits the values."""

    kind: ClassVar[str] = "number"
    pair: ClassVar = staticmethod(_word_and_number)
    max_new_tokens: int = 50
    """Tokens that a generated answer may have."""


@final
@dataclass(frozen=True)
class NiahMk3(HelmetMultiKey):
    """HELMET's ruler_niah_mk_3: UUIDs are keys and values."""

    kind: ClassVar[str] = "uuid"
    pair: ClassVar = staticmethod(_two_uuids)
    max_new_tokens: int = 100
    """Tokens that a generated answer may have."""


@final
@dataclass(frozen=True)
class NiahMv(Ruler):
    """HELMET's ruler_niah_mv: all four numbers of one key, between sentences of the haystack."""

    max_new_tokens: int = 50
    """Tokens that a generated answer may have."""

    def draw(self, hay: Haystack, length: int, depth: float, seeded: Seeded) -> TaskExample:
        """Hide the first at `depth`, the others anywhere."""
        (key,), numbers = drawn_keys(seeded, 1), drawn_numbers(seeded, 4)
        depths = [depth, *(seeded.uniform(0, 100) for _ in numbers[1:])]
        placed = sorted(zip(depths, numbers, strict=True))
        asked = f"the special magic numbers for {key} mentioned in the provided text"
        return hide(
            hay,
            length,
            "Some special magic numbers are hidden within the following text. Make sure to "
            "memorize it. I will quiz you about the numbers afterwards.\n",
            [
                Hidden(place, f" {NEEDLE.format('number', key, number)} ")
                for place, number in placed
            ],
            f"\nWhat are all {asked}?\nThe{asked[3:]} are",
            [number for _, number in placed],
            after_sentence=True,
        )


@final
@dataclass(frozen=True)
class JsonKv(Task):
    """HELMET's json_kv: the value of a key in a JSON object of UUIDs (Liu et al. 2023, 2307.03172).

    Shots are other pairs of the same object, between the object and the question.
    """

    shots: int = 2
    """Pairs that are shown with their values before the question."""
    max_new_tokens: int = 100
    """Tokens that a generated answer may have."""

    def __post_init__(self) -> None:
        if self.shots < 0 or self.max_new_tokens < 1:
            raise ValueError(f"expected shots of 0 and max_new_tokens of 1 or more; got {self}")

    def draw(self, hay: Haystack, length: int, depth: float, seeded: Seeded) -> TaskExample:
        """Put the pair behind `depth` percent of the others; the haystack gives the tokenizer."""
        shown = [_two_uuids(seeded) for _ in range(self.shots)]
        key, value = _two_uuids(seeded)
        depths = [seeded.uniform(0, 100) for _ in shown]
        examples = "".join(f"Key: {k}\nCorresponding value: {v}\n\n" for k, v in shown)
        return hide_in_lines(
            hay.tokenizer,
            length,
            "{\n",
            [
                Hidden(place, PAIR.format(*pair))
                for place, pair in zip([depth, *depths], [(key, value), *shown], strict=True)
            ],
            _lines(hay.tokenizer, lambda: PAIR.format(*_two_uuids(seeded))),
            "\n}\n\nExtract the value corresponding to the specified key in the JSON object below."
            f"\n\n{examples}Key: {key}\nCorresponding value:",
            [value],
        )

    def score(self, sample: TaskExample, response: str) -> float:
        """Substring exact match: whether the value is in the response, both normalized."""
        return float(normalized(sample.references[0]) in normalized(response))


def normalized(text: str) -> str:
    """Lower case without punctuation, articles and white space at the ends (SQuAD's script)."""
    kept = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def _uuid(seeded: random.Random) -> str:
    return str(uuid.UUID(int=seeded.getrandbits(128), version=4))


def _lines(tokenizer: Tokenizer, draw_line: Callable[[], str]) -> Iterator[list[int]]:
    """Ids of one line after the other, without end."""
    while True:
        yield from pieces(tokenizer, [draw_line() for _ in range(64)])
