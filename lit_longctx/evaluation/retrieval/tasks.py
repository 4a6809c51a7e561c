"""Probes of long context: what was hidden in a prompt of exact length, and does the model find it.

Samples are functions of task, length, depth and seed: with one tokenizer every model gets the same
prompts, with another the same secrets. Lengths are tokens of the prompt with BOS; an answer comes
on top, `max_new_tokens` tokens of it at most where it is generated.
"""

import random
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import numpy as np

from lit_longctx.evaluation.retrieval.prompts import Haystack, Hidden, Span, TaskExample, hide

FU_LENGTHS = tuple(np.linspace(1000, 128_000, 40).round().astype(int).tolist())
"""Tokens per prompt in the needle's grid (Fu et al. 2024, arXiv:2402.10171)."""
FU_DEPTHS = tuple(np.linspace(0, 100, 10).round().astype(int).tolist())
"""Depths in percent in the same grid."""


class Seeded(random.Random):
    """Random choices of one sample, which knows its number."""

    number: int = 0
    """Seed of the sample, whatever its length and depth."""


class Task(ABC):
    """A family of samples and the score of an answer; fields are settings."""

    version: ClassVar[int] = 1
    """Raised whenever prompts or scores change, so that no value of older code is taken."""
    uses_depth: ClassVar[bool] = True
    """Whether depth changes the prompt; where not, one depth says all."""
    max_new_tokens: int
    """Tokens that a generated answer may have, on top of the prompt."""

    def sample(self, hay: Haystack, length: int, depth: float = 50, seed: int = 0) -> TaskExample:
        """Return the sample of a seed.

        Args:
            hay: Text to hide needles in, with the tokenizer.
            length: Tokens of the prompt, with BOS; exact. For a context of n tokens in all ask for
                n - max_new_tokens.
            depth: Percent of the hay before the (first) needle.
            seed: Number of the sample among those of its length and depth.

        Raises:
            ValueError: The length has no room for context, or the tokenizer changes the text.
        """
        if not 0 <= depth <= 100:
            raise ValueError(f"depth {depth} must be between 0 and 100 percent")
        seeded = Seeded(f"{type(self).__name__} {length} {float(depth)} {seed}")
        seeded.number = seed
        return self.draw(hay, length, depth, seeded)

    @abstractmethod
    def draw(self, hay: Haystack, length: int, depth: float, seeded: Seeded) -> TaskExample:
        """Return a sample whose secrets come from `seeded`."""

    @abstractmethod
    def score(self, sample: TaskExample, response: str) -> float:
        """Return how right a free answer is, from 0 to 1."""


@final
@dataclass(frozen=True)
class Passkey(Task):
    """A number in repeated noise: prompt and score of YaRN's code (Peng et al. 2023)."""

    max_new_tokens: int = 10
    """Tokens that a generated answer may have."""

    def draw(self, hay: Haystack, length: int, depth: float, seeded: Seeded) -> TaskExample:
        """Hide a number of up to 50,000 in noise; the haystack gives the tokenizer alone."""
        key = str(seeded.randint(1, 50_000))
        return hide(
            hay.noise,
            length,
            "There is an important info hidden inside a lot of irrelevant text. Find it and "
            "memorize them. I will quiz you about the important information there.\n",
            [Hidden(depth, f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")],
            "\nWhat is the pass key? The pass key is",
            [key],
            restart=True,
        )

    def score(self, sample: TaskExample, response: str) -> float:
        """Whether the first integer is the key."""
        found = re.search(r"\d+", response)
        return float(found is not None and int(found[0]) == int(sample.references[0]))


NEEDLE = "The best thing to do in {} is"
CITY = "San Francisco"
SECRET = "eat a sandwich and sit in Dolores Park on a sunny day."
OTHERS = (
    "Lisbon Nairobi Oslo Prague Quito Riga Seoul Tunis Utrecht Vienna Warsaw Zagreb",
    "pancake pretzel waffle mango cookie dumpling burger peach",
    "paint rest read sing write draw dance talk",
    "Linden Garden,Maple Square,Harbour Street,Castle Hill,River Court,Windmill Lane",
    "rainy windy snowy foggy cold warm quiet busy",
)
"""Cities, food, pastimes, places and weather of the other needles."""


def needle(number: int) -> tuple[str, str]:
    """Return a city and what is best to do there: number 0 is Kamradt's; all have 12 words."""
    if number == 0:
        return CITY, SECRET
    seeded = random.Random(f"needle {number}")
    lists = (each.split("," if "," in each else None) for each in OTHERS)
    city, food, pastime, place, weather = (seeded.choice(words) for words in lists)
    return city, f"eat a {food} and {pastime} in {place} on a {weather} day."


@final
@dataclass(frozen=True)
class Needle(Task):
    """One sentence in a haystack (Kamradt 2023) as Fu et al. 2024 (arXiv:2402.10171) ask for it.

    Seed 0 is theirs: San Francisco, the haystack from its beginning. Every other seed has another
    city, another secret, and a haystack that begins elsewhere, the same at every length and depth.
    """

    mode: Literal["exact", "fu"] = "exact"
    """`exact`: depth exact to the token, the question begins the answer, the secret must come
    whole. `fu`: as their script, with its prefix `<|im_start|>`: the needle follows a sentence, the
    model answers freely, and its score is the share of 12 words found, 11/12 at best since one
    stands twice."""
    max_new_tokens: int = 50
    """Tokens that a generated answer may have."""

    def __post_init__(self) -> None:
        if self.mode not in ("exact", "fu"):
            raise ValueError(f"mode {self.mode!r} unknown; expected 'exact' or 'fu'")

    def draw(self, hay: Haystack, length: int, depth: float, seeded: Seeded) -> TaskExample:
        """Hide the sentence of the sample's seed in the haystack from its place on."""
        fu = self.mode == "fu"
        city, secret = needle(seeded.number)
        begun = NEEDLE.format(city)
        question = f"What is the best thing to do in {city}?\nAnswer:"
        first = random.Random(f"haystack {seeded.number}").randrange(len(hay.ids))
        return hide(
            hay,
            length,
            "<|im_start|> " * fu + "This is a very long story book: <book> ",
            [Hidden(depth, f"\n{begun} {secret}\n")],
            " </book>.\n Based on the content of the book, Question: "
            + (question if fu else f"{question} {begun}"),
            [f"{begun} {secret}" if fu else secret],
            after_sentence=fu,
            first=hay.cut(first) if seeded.number else 0,
        )

    def score(self, sample: TaskExample, response: str) -> float:
        """Share of the secret's words, or whether all of it is there but for the full stop."""
        secret = sample.references[0].rpartition(" is ")[2]
        if self.mode == "fu":
            words = secret.lower().split()
            return len(set(words) & set(response.lower().split())) / len(words)
        return float(" ".join(_words(secret)) in " ".join(_words(response)))


@final
@dataclass(frozen=True)
class FirstSentence(Task):
    """Return the first sentence of the text (Xiong et al. 2023, arXiv:2309.16039): ROUGE-L.

    Wording and texts of the paper are unpublished; its axis is 256 to 30,000 tokens.
    """

    uses_depth: ClassVar[bool] = False
    max_new_tokens: int = 128
    """Tokens that a generated answer may have."""

    def draw(self, hay: Haystack, length: int, depth: float, seeded: Seeded) -> TaskExample:
        """Begin the haystack at one of its sentences; costs its tokenization from there on."""
        if not hay.sentences:
            raise ValueError("the haystack has no sentence of 5 to 50 words; give running text")
        begin, end = seeded.choice(hay.sentences)
        sentence = " ".join(hay.text[begin:end].split())
        enough = 8 * length  # letters; where tokens are longer the haystack begins anew
        rest = hay.text[end : end + enough]
        rest += "\n" + hay.text[: enough - len(rest)]
        tail = "\n\nQ: What is the first sentence of the text above?, A:"
        tokenizer = hay.tokenizer
        sample = hide(Haystack(tokenizer, [rest]), length, sentence, [], tail, [sentence])
        start = len(tokenizer.prefix)
        stop = start + len(tokenizer.encode([sentence])[0])
        return sample._replace(spans=(Span(sentence, start, stop),))

    def score(self, sample: TaskExample, response: str) -> float:
        """ROUGE-L of the first line: a base model goes on after its answer."""
        lines = response.strip().splitlines()
        return rouge_l(sample.references[0], lines[0]) if lines else 0.0


def rouge_l(reference: str, response: str) -> float:
    """F-score of the longest common subsequence of words (Lin 2004, ROUGE-L), from 0 to 1."""
    expected, found = _words(reference), _words(response)
    row = [0] * (len(found) + 1)
    for word in expected:
        previous = row
        row = [0]
        for i, other in enumerate(found):
            row.append(previous[i] + 1 if word == other else max(row[i], previous[i + 1]))
    return 2 * row[-1] / max(1, len(expected) + len(found))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())
