"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import cos, pi


class Schedule(ABC):
    """Factor on the peak learning rate."""

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """Factor of update number `step`, counted from 0, of a run of `steps` updates."""


def updates(number: float, steps: int) -> int:
    """Return a number of updates that may be given as a share of all of them."""
    return round(number * steps if number < 1 else number)


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """Linear warm-up, then half a cosine down to `final` (arXiv:1608.03983, eq. 5)."""

    warmup_steps: float = 0
    """Updates until the peak is reached; below 1: share of all updates."""
    final: float = 0.1
    """Factor at the last update."""

    def factor(self, step: int, steps: int) -> float:
        """Rise to 1 in warmup_steps updates, reach `final` at the last."""
        rising = updates(self.warmup_steps, steps)
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(1, steps - 1 - rising)
        return self.final + (1 - self.final) * (1 + cos(pi * min(1.0, done))) / 2


@dataclass(frozen=True)
class WarmupLinear(Schedule):
    """Linear warm-up, then a line down to `final` (YaRN's and LongRoPE's training scripts)."""

    warmup_steps: float = 0
    """Updates until the peak is reached; below 1: share of all updates."""
    final: float = 0.0
    """Factor that the update after the last would have."""

    def factor(self, step: int, steps: int) -> float:
        """Rise to 1 in warmup_steps updates, then fall by equal steps."""
        rising = updates(self.warmup_steps, steps)
        if step < rising:
            return (step + 1) / rising
        left = max(0.0, (steps - step) / max(1, steps - rising))
        return self.final + (1 - self.final) * left


@dataclass(frozen=True)
class WarmupConstant(Schedule):
    """Linear warm-up, then the peak (Fu et al. 2024, arXiv:2402.10171)."""

    warmup_steps: float = 0
    """Updates until the peak is reached; below 1: share of all updates."""

    def factor(self, step: int, steps: int) -> float:
        """Rise to 1 in warmup_steps updates and stay."""
        return min(1.0, (step + 1) / max(1, updates(self.warmup_steps, steps)))
