"""What training asks of its data, and nothing more."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from lit_longctx.data.sampling.stages import ENDLESS, Stage, StageSchedule
from lit_longctx.data.tokens.info import TokenizerInfo


@dataclass(frozen=True)
class DataDescription:
    """What training must know of its data beforehand; the defaults hold where nothing is known."""

    sources: tuple[str, ...] = ("data",)
    """Names, in the order of `Batch.sources`."""
    window: int | None = None
    """Tokens of the longest row."""
    validation_window: int | None = None
    """Tokens of a held-out row at this point of the run; default: as the longest row."""
    stage_schedule: StageSchedule = field(
        default_factory=lambda: StageSchedule([Stage(ENDLESS, 1, 1)])
    )
    """Stage schedule; one endless stage by default."""
    staged: bool = False
    """Whether the stages were given, and so must be the same after a resume."""
    contiguous: bool = False
    """Whether row r of a step follows row r of the step before, as a memory needs it."""
    context: int | None = None
    """Tokens of the context whose positions are trained on shorter rows, if they are."""
    tokenizer: TokenizerInfo | None = None
    """What the tokens were made with."""
    tokenizer_folder: Path | None = None
    """Folder of that tokenizer, to be kept with the run."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What decides which tokens a sample number stands for: contents of sources, seed, window, …"""
    allow_changed_data: bool = False
    """Whether a resume may go on with another identity."""

    def check_resumed(self, before: dict[str, Any] | None) -> None:
        """Refuse to go on with other data than the run had, whose identity `before` was."""
        if before is None or self.allow_changed_data:  # None: checkpoints of earlier versions
            return
        changed = [
            f"{name} was {before.get(name, 'not there')}, is {self.identity.get(name, 'not there')}"
            for name in {**before, **self.identity}
            if before.get(name) != self.identity.get(name)
        ]
        if changed:
            raise ValueError(
                f"the run's data has changed: {'; '.join(changed)}; go on with what it began with "
                "(lit_longctx prepare makes the same again), or knowingly with "
                "--data.init_args.allow_changed_data true"
            )

    def window_until(self, step: int) -> int | None:
        """Tokens of the longest row that the steps before this one have read."""
        if not self.staged:
            return self.window
        last = self.stage_schedule.at(max(0, step - 1))
        return max(stage.window for stage in self.stage_schedule.stages[: last + 1])

    def stages_until(self, step: int) -> list[dict[str, Any]]:
        """Return what decided the steps before this one; a resume must find the same."""
        if not self.staged:
            return []
        last = self.stage_schedule.at(max(0, step - 1))
        begun = [stage.as_json() for stage in self.stage_schedule.stages[: last + 1]]
        del begun[-1]["steps"]  # the stage that goes on may become longer or shorter
        return begun


class TrainingData(LightningDataModule, ABC):
    """A data module that says what training asks; any other is taken with `DataDescription()`."""

    samples_consumed: int = 0
    """Samples that the run has read; training sets it on resume and after every step."""

    @abstractmethod
    def description(self) -> DataDescription:
        """Return what training must know."""


def describe_data(data: Any) -> DataDescription:
    """Return what a data module says of itself; of one that is not ours, or of none, nothing."""
    return data.description() if isinstance(data, TrainingData) else DataDescription()
