"""Probes over lengths and depths: which cells of the heat map a checkpoint answers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float

from lit_longctx.data.tokenizer import Tokenizer
from lit_longctx.evaluation.probes import forced, generated
from lit_longctx.evaluation.prompts import Haystack
from lit_longctx.evaluation.tasks import Task
from lit_longctx.model import Llama


@dataclass(frozen=True)
class Grid:
    """Where a needle is hidden, and how often."""

    lengths: list[int] = field(default_factory=lambda: [1024, 2048, 4096])
    """Tokens of the prompts, with BOS; exact."""
    depths: list[float] = field(default_factory=lambda: [0.0, 25.0, 50.0, 75.0, 100.0])
    """Percent of the context before the needle."""
    samples: int = 4
    """Prompts per length and depth, the same for every checkpoint."""
    answers: Literal["forced", "generated"] = "forced"
    """`forced` reads the right answer in one forward pass and scores 1 where every token of it is
    the likeliest; `generated` lets the model write, and scores as the task does."""
    seed: int = 0
    """Decides the prompts."""

    def __post_init__(self) -> None:
        if not (self.lengths and self.depths and self.samples > 0 and min(self.lengths) > 0):
            raise ValueError("a grid needs lengths, depths and samples of 1 or more")

    def scores(
        self,
        llama: Llama,
        tokenizer: Tokenizer,
        task: Task,
        hay: Haystack,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> Float[np.ndarray, "lengths depths"]:
        """Return the mean score of every cell; a task without depth has one column."""
        depths = self.depths if task.uses_depth else [50.0]
        found = np.zeros((len(self.lengths), len(depths)))
        for i, length in enumerate(self.lengths):
            for j, depth in enumerate(depths):
                found[i, j] = self._cell(llama, tokenizer, task, hay, length, depth)
                progress(i * len(depths) + j + 1, found.size)
        return found

    @torch.inference_mode()
    def _cell(
        self,
        llama: Llama,
        tokenizer: Tokenizer,
        task: Task,
        hay: Haystack,
        length: int,
        depth: float,
    ) -> float:
        """Mean score of the prompts of one cell, one at a time: memory is that of one prompt."""
        scores = []
        for number in range(self.samples):
            sample = task.sample(hay, length, depth, self.seed + number)
            if self.answers == "forced":
                scores.append(float(forced(llama, [sample])[0].exact))
            else:
                scores.append(task.score(sample, generated(llama, tokenizer, task, [sample])[0]))
        return float(np.mean(scores))
