"""A probe in the words of synthetic documents: the value of one key among as many as there is room.

Every line is hay for every other, so that a model must tell keys apart, not notice what is odd. A
model trained on `data.synthetic.KeyValues` is asked in the words it learned.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import final

from lit_longctx.data.making.synthetic import HEAD, key_value, keys, number
from lit_longctx.data.tokens.tokenizer import Tokenizer
from lit_longctx.evaluation.retrieval.prompts import (
    Haystack,
    Hidden,
    TaskExample,
    hide_in_lines,
    pieces,
)
from lit_longctx.evaluation.retrieval.tasks import Seeded, Task


@final
@dataclass(frozen=True)
class KeyValues(Task):
    """Lines `key: value`, then `key:` for one of them (structure: Liu et al. 2023, 2307.03172)."""

    max_new_tokens: int = 16
    """Tokens that a generated answer may have."""

    def draw(self, hay: Haystack, length: int, depth: float, seeded: Seeded) -> TaskExample:
        """Put the asked line behind `depth` percent of the others; one more fills up, cut short.

        The haystack gives the tokenizer alone. Costs tokenizing as many lines as there are.
        """
        names = keys(seeded)
        key, value = next(names), number(seeded)
        needle = Hidden(depth, key_value(key, value))
        others = _lines(hay.tokenizer, names, seeded)
        tail = f"\n{key}:"
        return hide_in_lines(hay.tokenizer, length, HEAD, [needle], others, tail, [value], value)

    def score(self, sample: TaskExample, response: str) -> float:
        """Whether the response begins with the value, as a whole number.

        Teacher forcing says the same of greedy decoding, but where the number goes on with another
        digit (teacher-forced 1, here 0), or where the value comes in other tokens or behind other
        white space (teacher-forced 0, here 1).
        """
        found = re.match(r"\s*(\d+)", response)
        return float(found is not None and found[1] == sample.references[0])


def _lines(
    tokenizer: Tokenizer, names: Iterator[str], seeded: random.Random
) -> Iterator[list[int]]:
    """Ids of one line after the other, without end."""
    while True:
        lines = [key_value(name, number(seeded)) for name in islice(names, 256)]
        yield from pieces(tokenizer, lines, before=lines[0][-1])
