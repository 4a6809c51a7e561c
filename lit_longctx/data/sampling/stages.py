"""Stage schedule of a run: stages with their own window, batch, mix, theta and learning rate."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf

ENDLESS = 2**40
"""Steps of the one stage of a run whose stages are not given."""


@dataclass(frozen=True)
class Stage:
    """Consecutive steps that share overrides; fields left open inherit from the run."""

    steps: int
    """Optimizer steps."""
    window: int = 0
    """Tokens per row, a multiple of 256; 0: as the run."""
    batch_tokens: int = 0
    """Tokens per optimizer step, over all processes, a multiple of `window`; 0: as the run."""
    micro_batch_size: int = 0
    """Rows that one process takes through the model at a time; 0: as the run."""
    weights: dict[str, float] | None = None
    """Share of the samples by source; sources that are not named rest. Default: as the run."""
    theta: float | None = None
    """Rotary base; default: as the model's position says."""
    learning_rate: float | None = None
    """Peak learning rate; with it the schedule, warm-up included, begins anew in every stage."""

    def __post_init__(self) -> None:
        for name in ("window", "batch_tokens", "micro_batch_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"a stage's {name} {getattr(self, name)} must be 1 or more")
        for name in ("theta", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise ValueError(f"a stage's {name} {value} must be above 0")

    @property
    def rows(self) -> int:
        """Windows per optimizer step."""
        return self.batch_tokens // self.window

    def completed(self, run: "Stage") -> "Stage":
        """Return the stage with what it leaves open taken from the run's own settings."""
        open_values = (0, None, {})
        own = {n: v for n, v in vars(self).items() if n == "steps" or v not in open_values}
        return replace(run, **own)


class StageSchedule:
    """Where each stage begins, in steps and samples (rows).

    Args:
        stages: Completed stages in order.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        for stage in stages:
            if stage.steps < 1:
                raise ValueError(f"stages need 1 step or more; got {stage.steps}")
            if stage.batch_tokens % stage.window:
                raise ValueError(
                    f"batch_tokens {stage.batch_tokens} is no multiple of window {stage.window}"
                )
        rates = [stage.learning_rate is not None for stage in stages]
        if any(rates) != all(rates):
            raise ValueError("stages need a learning_rate each, or none of them one")
        self.stages = list(stages)
        self.steps = [0, *accumulate(stage.steps for stage in stages)]
        self.samples = [0, *accumulate(stage.steps * stage.rows for stage in stages)]
        self.tokens_before = [0, *accumulate(stage.steps * stage.batch_tokens for stage in stages)]

    def at(self, step: int) -> int:
        """Number of the stage that a step, counted from 0, belongs to; after the end, the last."""
        return max(i for i, first in enumerate(self.steps[:-1]) if first <= step)

    def of_last(self, samples: int) -> int:
        """Number of the stage that the last of so many samples belongs to; of none, the first."""
        return max(i for i, first in enumerate(self.samples[:-1]) if i == 0 or first < samples)

    def first_sample(self, step: int) -> int:
        """Samples that all steps before this one read."""
        number = self.at(step)
        return self.samples[number] + (step - self.steps[number]) * self.stages[number].rows

    def tokens(self, sample: int, step: int) -> int:
        """Stride tokens of all samples before this one, which belongs to the stage of a step."""
        number = self.at(step)
        return (
            self.tokens_before[number]
            + (sample - self.samples[number]) * self.stages[number].window
        )
