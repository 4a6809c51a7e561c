"""Long documents made from nothing, and questions whose answers are right by construction.

No model is asked: what a row or a cell holds was drawn before it was written down. Every example is
a row {"document", "question", "answer"}; those of one document follow each other and hold the very
same document. All is a function of the seed.
"""

import random
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from string import ascii_letters
from typing import TypedDict, TypeVar, final

HEAD = "Keys and values:"
"""First line of key-value documents."""
COLUMNS = ["age", "area", "cost", "depth", "height", "length", "mass", "price", "speed", "width"]
"""Names of a table's columns."""
WORDS = ["black", "blue", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow"]
"""What lists of words are made of."""
ALPHA = 2.0
"""The n-th most frequent word stands about 1/n^ALPHA times as often as the first."""


Item = TypeVar("Item")


@final
class Example(TypedDict):
    """A question about a document."""

    document: str
    question: str
    answer: str


class Synthetic(ABC):
    """A kind of document with questions; fields are settings."""

    @abstractmethod
    def draw(self, rows: int, seed: int = 0) -> list[Example]:
        """Return the questions about one document of so many rows."""

    def within(
        self, budget: int, measure: Callable[[str], int] = len, seed: int = 0
    ) -> list[Example]:
        """Return the questions about a document that fills a budget, to within about a row.

        Args:
            budget: Most that `measure` may say of `text`, document with questions and answers.
            measure: Length of a text; default: characters. Called some ten times.
            seed: Decides document and questions.

        Raises:
            ValueError: Not even one row fits.
        """

        def length(rows: int) -> int:
            return measure(text(self.draw(rows, seed)))

        least = self.least()
        if length(least) > budget:
            raise ValueError(
                f"expected a budget of {length(least)} or more; got {budget}; raise it or ask less"
            )
        # what bisection ends on was measured, so that it fits even if lengths do not rise evenly
        rows = bisect_right(range(budget), budget, lo=least, key=length) - 1
        return self.draw(max(least, rows), seed)

    def least(self) -> int:
        """Fewest rows of a document."""
        return 1


@final
@dataclass(frozen=True)
class KeyValues(Synthetic):
    """Lines `key: value`, and questions for the values of some keys; no key stands twice.

    With more hops a value is the key of another line, which may stand before or after it; the
    question is for the number at which the chain ends.

        Keys and values:
        ke: wo          question ke:  answer 41  (hops = 2)
        wo: 41
    """

    questions: int = 1
    """Keys that are asked for; the same one again only when all have been."""
    hops: int = 1
    """Lines to go through from the question to the answer."""

    def __post_init__(self) -> None:
        if min(self.questions, self.hops) < 1:
            raise ValueError(
                f"expected questions and hops of 1 or more; got {self.questions} and {self.hops}; "
                "raise them"
            )

    def least(self) -> int:
        """One chain."""
        return self.hops

    def draw(self, rows: int, seed: int = 0) -> list[Example]:
        """Return the questions about one document; rows beyond whole chains are single hops."""
        if rows < self.hops:
            raise ValueError(f"expected rows of {self.hops} or more; got {rows}; raise them")
        seeded = random.Random(seed)
        names = list(islice(keys(seeded), rows))
        chains = [names[i : i + self.hops] for i in range(0, rows - self.hops + 1, self.hops)]
        answers = {chain[0]: number(seeded) for chain in chains}
        lines = [
            key_value(key, value)
            for chain in chains
            for key, value in zip(chain, [*chain[1:], answers[chain[0]]], strict=True)
        ]
        lines += [key_value(key, number(seeded)) for key in names[len(lines) :]]
        seeded.shuffle(lines)
        document = HEAD + "".join(lines)
        asked = take_turns(list(answers), self.questions, seeded)
        return [
            Example(document=document, question=f"{key}:", answer=answers[key]) for key in asked
        ]


@final
@dataclass(frozen=True)
class Table(Synthetic):
    """A lengthy table (SynL of LongSkywork, Zhao et al. 2024, arXiv:2406.00605).

    The paper's code is not public: wording and sizes are ours. Half of the questions are for the
    cell of a row and a column, half for the row that holds a value, which no other row of that
    column does.

        name | age | area
        ke | 417 | 902     What is the age of ke? 417     Which name has 902 as its area? ke
    """

    columns: int = 4
    """Columns besides the names of the rows."""
    questions: int = 1
    """Cells that are asked for or about; the same one again only when all have been."""

    def __post_init__(self) -> None:
        if not 1 <= self.columns <= len(COLUMNS):
            raise ValueError(
                f"expected columns from 1 to {len(COLUMNS)}; got {self.columns}; choose one of them"
            )
        if self.questions < 1:
            raise ValueError(f"expected questions of 1 or more; got {self.questions}; raise them")

    def draw(self, rows: int, seed: int = 0) -> list[Example]:
        """Return the questions about one document."""
        if rows < 1:
            raise ValueError(f"expected rows of 1 or more; got {rows}; raise them")
        seeded = random.Random(seed)
        columns = seeded.sample(COLUMNS, self.columns)
        names = list(islice(keys(seeded), rows))
        values = range(100, max(1000, 10 * rows))
        cells = {column: seeded.sample(values, rows) for column in columns}
        lines = [["name", *columns], *zip(names, *cells.values(), strict=True)]
        document = "\n".join(" | ".join(map(str, line)) for line in lines)
        places = [(row, column) for row in range(rows) for column in columns]
        examples = []
        for row, column in take_turns(places, self.questions, seeded):
            name, value = names[row], str(cells[column][row])
            cell = f"What is the {column} of {name}?", value
            whose = f"Which name has {value} as its {column}?", name
            question, answer = seeded.choice((cell, whose))
            examples.append(Example(document=document, question=question, answer=answer))
        return examples


@final
@dataclass(frozen=True)
class FrequentWords(Synthetic):
    """A list of words, and the question which of them is the most frequent.

    As in RULER's frequent words (Hsieh et al. 2024, arXiv:2404.06654), frequencies fall with the
    rank by Zipf's law. The words are the same in all documents, their ranks differ.

        Words:
        grey
        red             question Which word is the most frequent?  answer grey
        grey
    """

    def draw(self, rows: int, seed: int = 0) -> list[Example]:
        """Return the question about one document; of its words one is more frequent than others."""
        if rows < 1:
            raise ValueError(f"expected rows of 1 or more; got {rows}; raise them")
        seeded = random.Random(seed)
        ranked = seeded.sample(WORDS, len(WORDS))
        weights = [(rank + 1) ** -ALPHA for rank in range(len(ranked))]
        while True:
            lines = seeded.choices(ranked, weights, k=rows)
            first, *others = Counter(lines).most_common(2)
            if not others or first[1] > others[0][1]:
                break
        question = "Which word is the most frequent?"
        document = "\n".join(["Words:", *lines])
        return [Example(document=document, question=question, answer=first[0])]


def text(examples: Sequence[Example]) -> str:
    """Return a document to train on: the examples' one document, then questions with answers."""
    asked = (f"\n{example['question']} {example['answer']}" for example in examples)
    return examples[0]["document"] + "".join(asked)


def key_value(key: str, value: str) -> str:
    """One line of a key-value document, with the line end before it."""
    return f"\n{key}: {value}"


def keys(seeded: random.Random) -> Iterator[str]:
    """All words of two letters, small or capital, in random order, then of three, and so on."""
    words = list(ascii_letters)
    for _ in count():
        words = [word + letter for word in words for letter in ascii_letters]
        yield from seeded.sample(words, len(words))


def number(seeded: random.Random) -> str:
    """A value: a number of two digits."""
    return str(seeded.randrange(10, 100))


def take_turns(items: Sequence[Item], times: int, seeded: random.Random) -> list[Item]:
    """Draw without putting back until all have been drawn, then again from all."""
    rounds = -(-times // len(items))
    drawn = [item for _ in range(rounds) for item in seeded.sample(items, len(items))]
    return drawn[:times]
