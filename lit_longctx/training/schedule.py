"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import cos, inf, pi
from typing import final


class Schedule(ABC):
    """Factor on the peak learning rate."""

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """Factor of update number `step`, counted from 0, of a run of `steps` updates."""


def updates(number: float, steps: int) -> int:
    """Return a number of updates that may be given as a share of all of them."""
    return round(number * steps if number < 1 else number)


@dataclass(frozen=True)
class Warmup(Schedule):
    """Linear warm-up to the peak; what follows it, a subclass says."""

    warmup_steps: float = 0
    """Updates until the peak is reached; below 1: share of all updates."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps < inf:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must be 0 or more: updates, or below 1 a share "
                "of all of them"
            )

    def check(self, steps: int) -> None:
        """Raise ValueError if a run of `steps` updates ends before its warm-up does."""
        if updates(self.warmup_steps, steps) > steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps:g} would never end: the run, or its stage, has "
                f"{steps} steps; set fewer, or a share such as 0.1"
            )

    def factor(self, step: int, steps: int) -> float:
        """Rise to 1 in warmup_steps updates."""
        rising = updates(self.warmup_steps, steps)
        if step < rising:
            return (step + 1) / rising
        return self.after_warmup(step, rising, steps)

    @abstractmethod
    def after_warmup(self, step: int, rising: int, steps: int) -> float:
        """Factor of an update after the first `rising` ones."""


@final
@dataclass(frozen=True)
class WarmupCosine(Warmup):
    """Linear warm-up, then half a cosine down to `final` (arXiv:1608.03983, eq. 5)."""

    final: float = 0.1
    """Factor at the last update."""

    def after_warmup(self, step: int, rising: int, steps: int) -> float:
        """Reach `final` at the last update."""
        done = (step - rising) / max(1, steps - 1 - rising)
        return self.final + (1 - self.final) * (1 + cos(pi * min(1.0, done))) / 2


@final
@dataclass(frozen=True)
class WarmupLinear(Warmup):
    """Linear warm-up, then a line down to `final` (YaRN's and LongRoPE's training scripts)."""

    final: float = 0.0
    """Factor that the update after the last would have."""

    def factor(self, step: int, steps: int) -> float:
        """Rise from 0: the first update has none, as in transformers' schedule of that name."""
        rising = updates(self.warmup_steps, steps)
        return step / rising if step < rising else self.after_warmup(step, rising, steps)

    def after_warmup(self, step: int, rising: int, steps: int) -> float:
        """Fall by equal steps."""
        left = max(0.0, (steps - step) / max(1, steps - rising))
        return self.final + (1 - self.final) * left


@final
@dataclass(frozen=True)
class WarmupConstant(Warmup):
    """Linear warm-up, then the peak (Fu et al. 2024, arXiv:2402.10171)."""

    def after_warmup(self, step: int, rising: int, steps: int) -> float:
        """Stay."""
        return 1.0
