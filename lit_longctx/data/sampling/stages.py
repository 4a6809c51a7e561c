"""Stage schedule of a run: stages with their own window, batch, mix, positions and optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf
from typing import Any, Literal

from lit_longctx.checkpoint import describe_position
from lit_longctx.model.layers import LayerPattern
from lit_longctx.position import PositionScheme

Packing = Literal["concatenate", "best_fit"]
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
    position: PositionScheme | LayerPattern | None = None
    """Position scheme of all layers, which keep their windows, or a pattern of kinds of layers; no
    scheme with weights. Default: the model's position."""
    packing: Packing | None = None
    """How documents become rows; default: as the run."""
    document_mask: bool | None = None
    """Whether attention keeps documents apart; default: as the run."""
    fresh_optimizer: bool = False
    """Whether the stage begins with moments of zero, in place of those that the last one left."""

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
        own = {n: v for n, v in vars(self).items() if v not in (getattr(Stage, n, None), {})}
        return replace(run, **own)

    def as_json(self) -> dict[str, Any]:
        """Return what decides the stage's steps, as checkpoints keep it; rows at a time do not."""
        found = dict(vars(self))
        del found["micro_batch_size"]
        if self.position is not None:
            found["position"] = describe_position(self.position)
        for name in ("position", "packing", "document_mask", "fresh_optimizer"):
            if found[name] is getattr(Stage, name):
                del found[name]  # checkpoints of earlier versions have none
        return found


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
