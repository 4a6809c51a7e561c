"""What training asks of its data, and nothing more."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from lit_longctx.data.sampling.stages import ENDLESS, Course, Stage


@dataclass(frozen=True)
class DataDescription:
    """What training must know of its data beforehand; the defaults hold where nothing is known."""

    sources: tuple[str, ...] = ("data",)
    """Names, in the order of `Batch.sources`."""
    window: int | None = None
    """Tokens of the longest row."""
    course: Course = field(default_factory=lambda: Course([Stage(ENDLESS, 1, 1)]))
    """Stage schedule; one endless stage by default."""
    staged: bool = False
    """Whether the stages were given, and so must be the same after a resume."""
    lanes: bool = False
    """Whether row r of a step follows row r of the step before, as a memory needs it."""
    context: int | None = None
    """Tokens of the context whose positions are trained on shorter rows, if they are."""
    tokenizer: dict[str, Any] | None = None
    """What the tokens were made with."""
    tokenizer_folder: Path | None = None
    """Folder of that tokenizer, to be kept with the run."""

    def window_until(self, step: int) -> int | None:
        """Tokens of the longest row that the steps before this one have read."""
        if not self.staged:
            return self.window
        last = self.course.at(max(0, step - 1))
        return max(stage.window for stage in self.course.stages[: last + 1])

    def stages_until(self, step: int) -> list[dict[str, Any]]:
        """Return what decided the steps before this one; a resume must find the same."""
        if not self.staged:
            return []
        last = self.course.at(max(0, step - 1))
        begun = [asdict(stage) for stage in self.course.stages[: last + 1]]
        for stage in begun:
            del stage["micro_batch_size"]
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
