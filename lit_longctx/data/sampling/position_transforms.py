"""Positions of a long context for short documents: transforms of a batch's position ids.

What a model learns of distance depends on positions, not on how much text lies between. Each
transform draws from a generator that is seeded with the sample number of the row and nothing else:
a sample has the same positions on any rank, worker or micro-batch, and after a resume.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, final

import numpy as np
import torch
from jaxtyping import Bool, Int, Num
from torch import Tensor

from lit_longctx.batch import NO_TARGET, Batch

FIRST_TOKENS = 4
"""First tokens of a document, which E2-LLM does not move: attention sinks (arXiv:2309.17453)."""


class PositionTransform(ABC):
    """Replaces the position ids of each document; nothing else of a batch changes.

    Documents without a target, such as padding, keep their positions. Works on the host, in a
    loader's process; costs a few NumPy calls per document.
    """

    dtype = torch.long
    """Type of the position ids."""

    def __call__(self, batch: Batch, answers: Bool[Tensor, "batch seq"] | None = None) -> Batch:
        """Give every document new position ids.

        Args:
            batch: Documents with position ids 0, 1, 2, …; `samples` are the seeds.
            answers: Input tokens that belong to the assistant's answers, for transforms that need
                to know the turns of a dialogue.

        Raises:
            ValueError: A document is too long for the transform, or `answers` are missing.
        """
        boundaries = batch.documents.boundaries.tolist()
        row_length = batch.input_ids.shape[1]
        has_target = (batch.labels != NO_TARGET).flatten().cpu().numpy()
        answered = None if answers is None else answers.flatten().cpu().numpy()
        # + 1 since rows of padding are sample −1
        generators = [np.random.default_rng(sample + 1) for sample in batch.samples.tolist()]
        found = [
            self.position_ids(
                end - begin, generators[begin // row_length], _part(answered, begin, end)
            )
            if has_target[begin:end].any()
            else np.arange(end - begin)
            for begin, end in pairwise(boundaries)
        ]
        positions = torch.from_numpy(np.concatenate(found)).view(batch.input_ids.shape)
        return batch.with_position_ids(positions.to(batch.input_ids.device, self.dtype))

    @property
    @abstractmethod
    def context(self) -> int:
        """Tokens of the context that the model then knows, as it is."""

    @abstractmethod
    def position_ids(
        self,
        length: int,
        generator: np.random.Generator,
        answers: Bool[np.ndarray, " length"] | None,
    ) -> Num[np.ndarray, " length"]:
        """Return the positions of one document of `length` tokens, upwards."""


def _part(flags: np.ndarray | None, begin: int, end: int) -> np.ndarray | None:
    return None if flags is None else flags[begin:end]


def _room(length: int, context: int, name: str) -> int:
    """Return the positions that a document leaves free."""
    if length > context:
        raise ValueError(
            f"expected documents of at most {name} {context} tokens; got one of {length}; "
            f"raise {name} or shorten the window"
        )
    return context - length


@final
@dataclass(frozen=True)
class PoSE(PositionTransform):
    """Two chunks, the second moved away (Zhu et al. 2023, arXiv:2309.10400).

    Of n tokens the first m ~ U{1 … ⌈n/2⌉} keep their positions, and token i ≥ m stands at i + u,
    with u ~ U{0 … target_context − n}; drawn as in the authors' code (dwzhu-pku/PoSE), which may
    also leave out text between the chunks. Here the text stays whole.
    """

    target_context: int
    """Positions of the context to learn, in tokens; the last is target_context − 1."""

    @property
    def context(self) -> int:
        """target_context."""
        return self.target_context

    def position_ids(
        self,
        length: int,
        generator: np.random.Generator,
        answers: Bool[np.ndarray, " length"] | None,
    ) -> Int[np.ndarray, " length"]:
        """0 … m − 1, then m + u … n − 1 + u."""
        room = _room(length, self.target_context, "target_context")
        split = generator.integers(1, (length + 1) // 2, endpoint=True)
        shift = generator.integers(0, room, endpoint=True)
        positions = np.arange(length)
        return positions + shift * (positions >= split)


@final
@dataclass(frozen=True)
class SkipAlign(PositionTransform):
    """Positions skipped between the parts of a dialogue (Wu et al. 2024, arXiv:2405.03939).

    From the i-th boundary on, tokens are moved by u_i = s_1 + … + s_i, with skips s_i.
    Reimplemented from descriptions of the paper, without its code. Ours is how skips are drawn: the
    u_i are as many draws from U{0 … target_context − n} as the document has boundaries, sorted. So
    Σ s_i ≤ target_context − n, one boundary gets the shift of PoSE, and there can be more
    boundaries than room: where draws agree, s_i is 0, not > 0 as in the paper.
    """

    target_context: int
    """Positions of the context to learn, in tokens; the last is target_context − 1."""
    mode: Literal["all", "inner", "outer"] = "all"
    """Skip before every token, before answers (inner), or before what follows answers (outer)."""

    @property
    def context(self) -> int:
        """target_context."""
        return self.target_context

    def position_ids(
        self,
        length: int,
        generator: np.random.Generator,
        answers: Bool[np.ndarray, " length"] | None,
    ) -> Int[np.ndarray, " length"]:
        """Token t, behind i boundaries, stands at t + u_i."""
        room = _room(length, self.target_context, "target_context")
        boundaries = self._boundaries(length, answers)
        shifts = generator.integers(0, room, len(boundaries), endpoint=True)
        shifts.sort()
        positions = np.arange(length)
        behind = np.searchsorted(boundaries, positions, side="right")
        return positions + np.append(0, shifts)[behind]

    def _boundaries(
        self, length: int, answers: Bool[np.ndarray, " length"] | None
    ) -> Int[np.ndarray, " boundaries"]:
        """Tokens before which positions may be skipped; never the first."""
        if self.mode == "all":
            return np.arange(1, length)
        if answers is None:
            raise ValueError(
                f"expected answers for SkipAlign mode {self.mode}; got None; "
                "give the tokens of answers, or use mode all"
            )
        before, after = answers[:-1], answers[1:]
        found = after & ~before if self.mode == "inner" else before & ~after
        return np.flatnonzero(found) + 1


@final
@dataclass(frozen=True)
class E2LLM(PositionTransform):
    """PI by a random factor, at a random offset (Liu et al. 2024, arXiv:2401.06951).

    Token n stands at (n + t)/g, with g ~ U{1 … max_factor} and t ~ U{0 … g·R − R} for each
    document, R = trained_context; the first 4 tokens at n/g. A context of L tokens is then read
    with `PositionInterpolation(factor=⌈L/R⌉)`. That g and t are drawn for each training sample is
    the paper's; their distributions, and that it is 4 tokens, are from memory and not verified.

    All positions are below R. In float32 they are off by at most g·R/2²⁴ of the spacing 1/g: 1 % up
    to a context g·R of 167,772 tokens, 6 % at a million; the angles of PI are rounded as coarsely.
    """

    trained_context: int
    """R: tokens per sequence the starting checkpoint was trained on; documents are no longer."""
    max_factor: int
    """Largest g: the longest context over R."""

    dtype = torch.float32

    @property
    def context(self) -> int:
        """R: longer ones are read with another position scheme than the trained one."""
        return self.trained_context

    def __post_init__(self) -> None:
        if self.max_factor < 1:
            raise ValueError(
                f"expected a max_factor of 1 or more; got {self.max_factor}; "
                "set it to the longest context over trained_context"
            )

    def position_ids(
        self,
        length: int,
        generator: np.random.Generator,
        answers: Bool[np.ndarray, " length"] | None,
    ) -> Num[np.ndarray, " length"]:
        """n/g for the first tokens, then (n + t)/g; float64, rounded once afterwards."""
        _room(length, self.trained_context, "trained_context")
        factor = generator.integers(1, self.max_factor, endpoint=True)
        offset = generator.integers(0, (factor - 1) * self.trained_context, endpoint=True)
        positions = np.arange(length)
        return (positions + offset * (positions >= FIRST_TOKENS)) / factor
