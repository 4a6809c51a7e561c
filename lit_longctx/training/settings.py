"""What the stages of a run change in its model and optimizer, resolved for every step."""

from collections.abc import Sequence
from dataclasses import dataclass

from lit_longctx.data.sampling.stages import StageSchedule
from lit_longctx.model.layers import Layers
from lit_longctx.training.schedule import Schedule, Warmup


@dataclass(frozen=True)
class StageSettings:
    """Layers, learning rate and optimizer state of every step, as its stage says."""

    stage_schedule: StageSchedule
    layers: Sequence[Layers]
    """Of each stage."""
    learning_rate: float
    """Peak of stages that name none."""
    schedule: Schedule

    def check(self, max_steps: int) -> None:
        """Raise ValueError if a run of `max_steps`, or a stage of it, ends before its warm-up."""
        if isinstance(self.schedule, Warmup):
            anew = [s.steps for s in self.stage_schedule.stages if s.learning_rate is not None]
            self.schedule.check(min(anew, default=max_steps))

    def layers_at(self, step: int) -> Layers:
        """Return the layers of a step."""
        return self.layers[self.stage_schedule.at(step)]

    def is_fresh(self, step: int) -> bool:
        """Whether the optimizer forgets its moments before this step."""
        number = self.stage_schedule.at(step)
        begins = step == self.stage_schedule.steps[number]
        return begins and self.stage_schedule.stages[number].fresh_optimizer

    def learning_rate_at(self, step: int, max_steps: int) -> float:
        """Return the rate of a step of a run of `max_steps`; a stage's own rate begins anew."""
        number = self.stage_schedule.at(step)
        own, begin = self.stage_schedule.stages[number], self.stage_schedule.steps[number]
        if own.learning_rate is None:
            return self.learning_rate * self.schedule.factor(step, max_steps)
        return own.learning_rate * self.schedule.factor(step - begin, own.steps)
