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
    Span,
    TaskExample,
    complete,
    piece,
    pieces,
    room_for_context,
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
        tokenizer, names = hay.tokenizer, keys(seeded)
        key, value = next(names), number(seeded)
        line, tail = key_value(key, value), f"\n{key}:"
        head_ids = [*tokenizer.prefix, *tokenizer.encode([HEAD])[0].tolist()]
        line_ids, tail_ids = (
            piece(tokenizer, line, before=value),
            piece(tokenizer, tail, before=value),
        )
        needed = sum(map(len, (head_ids, line_ids, tail_ids)))
        others, left = [], room_for_context(length, needed)
        for ids in _lines(tokenizer, names, seeded):
            if len(ids) > left:
                others.append(ids[:left])
                break
            others.append(ids)
            left -= len(ids)
        before = round((len(others) - 1) * depth / 100)
        ids = [*head_ids, *(i for other in others[:before] for i in other)]
        span = Span(line.strip(), len(ids), len(ids) + len(line_ids))
        ids += [*line_ids, *(i for other in others[before:] for i in other), *tail_ids]
        return complete(tokenizer, ids, tail, [value], [span])

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
