"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import cos, pi


class Schedule(ABC):
    """Factor on the peak learning rate."""

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """Factor of update number `step`, counted from 0, of a run of `steps` updates."""


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """Linear warm-up, then half a cosine down to `final` (arXiv:1608.03983, eq. 5)."""

    warmup_steps: int = 0
    """Updates until the peak is reached."""
    final: float = 0.1
    """Factor at the last update."""

    def factor(self, step: int, steps: int) -> float:
        """Rise to 1 in warmup_steps updates, reach `final` at the last."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, steps - 1 - self.warmup_steps)
        return self.final + (1 - self.final) * (1 + cos(pi * min(1.0, done))) / 2


@dataclass(frozen=True)
class WarmupConstant(Schedule):
    """Linear warm-up, then the peak (Fu et al. 2024, arXiv:2402.10171)."""

    warmup_steps: int = 0
    """Updates until the peak is reached."""

    def factor(self, step: int, steps: int) -> float:
        """Rise to 1 in warmup_steps updates and stay."""
        return min(1.0, (step + 1) / max(1, self.warmup_steps))
