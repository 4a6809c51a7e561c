"""Documents kept by a score that a model gives them, and a report of all scores."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from lit_longctx.checkpoint import load_pretrained
from lit_longctx.data.reading.documents import Document
from lit_longctx.data.tokens.tokenizer import Ids
from lit_longctx.model import Llama, chosen_device

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
EXAMPLES = 8
"""Documents whose scores the report names."""


@dataclass(frozen=True)
class ScoreSettings:
    """What every filter by a model's score has."""

    checkpoint: str
    """Model that scores, a Hugging Face folder or one of our runs; the data's tokenizer must be
    its own."""
    at_least: float
    """Least score of a document that is kept; look at the report of a first run."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the scoring model."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto` for CUDA where there is one."""


class DocumentScorer(ABC):
    """Scores the documents of one stream and keeps a report of them; loads its model when needed.

    Args:
        settings: What decides the scores.
    """

    def __init__(self, settings: ScoreSettings) -> None:
        self.settings = settings
        self.scores: list[float] = []
        """Score of every document seen so far."""
        self.tokens: list[int] = []
        """Tokens of every document seen so far."""
        self.examples: dict[str, float] = {}
        """Scores of the first documents, by name."""

    def __call__(self, pairs: Iterator[tuple[Document, Ids]]) -> Iterator[tuple[Document, Ids]]:
        """Yield the pairs whose documents are kept; loads the model at the first one."""
        for document, ids in pairs:
            score = self.score(ids)
            self.scores.append(score)
            self.tokens.append(len(ids))
            if len(self.examples) < EXAMPLES:
                self.examples[document.id] = score
            if score >= self.settings.at_least:
                yield document, ids

    @abstractmethod
    def score(self, ids: Ids) -> float:
        """Score of a document."""

    def _check(self, ids: Ids) -> None:
        """Refuse ids that the model does not have."""
        size = self.llama.config.vocab_size
        if len(ids) and ids.max() >= size:
            raise ValueError(
                f"token {ids.max()} is beyond {self.settings.checkpoint}'s vocabulary of {size}; "
                "prepare the data with that model's tokenizer"
            )

    @cached_property
    def llama(self) -> Llama:
        """The scoring model, loaded when first needed."""
        how = self.settings
        llama = load_pretrained(how.checkpoint).requires_grad_(False).eval()
        return llama.to(chosen_device(how.device), getattr(torch, how.compute_dtype))

    @property
    def report(self) -> dict[str, Any]:
        """What was kept and dropped, quantiles of all scores and the first few scores by name."""
        scores, tokens = np.array(self.scores), np.array(self.tokens, dtype=np.int64)
        kept = scores >= self.settings.at_least
        at = np.quantile(scores, QUANTILES).tolist() if len(scores) else []
        return {
            "checkpoint": self.settings.checkpoint,
            "at_least": self.settings.at_least,
            "kept": int(kept.sum()),
            "dropped": int((~kept).sum()),
            "kept_tokens": int(tokens[kept].sum()),
            "dropped_tokens": int(tokens[~kept].sum()),
            "quantiles": dict(zip(map(str, QUANTILES), at, strict=False)),
            "examples": dict(self.examples),
        }
