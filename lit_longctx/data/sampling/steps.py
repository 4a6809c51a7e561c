"""Numbered samples → whole optimizer steps, elastic and resumable: what data modules share."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_longctx.batch import Batch, StepBatch
from lit_longctx.data.sampling.contiguous import ContiguousSampler
from lit_longctx.data.sampling.data_description import DataDescription, TrainingData
from lit_longctx.data.sampling.position_transforms import PositionTransform
from lit_longctx.data.sampling.sample_index import SampleIndex
from lit_longctx.data.sampling.stages import Stage, StageSchedule
from lit_longctx.data.tokens.info import TokenizerInfo
from lit_longctx.stop_signals import outlive_stop_signals

ValidationWindow = Literal["stage", "longest"]
Rows = list[tuple[int, int, int]]
"""(source, window, sample) of each row; window −1 is padding, without targets."""


class StepData(TrainingData, ABC):
    """Samples by number: a subclass says which windows there are, and how rows become a batch.

    The n-th sample is a function of n alone, so that a resume is exact on any number of processes,
    workers and micro-batches; one counter is the whole state.
    """

    sources: Mapping[str, Any]
    """By name; what a source is, the subclass knows."""
    stage_schedule: StageSchedule
    tokenizer: TokenizerInfo
    """What the windows were made with."""
    tokenizer_folder: Path | None
    window: int
    """Tokens of the longest row."""
    num_workers: int
    held_out_windows: int
    validation_window: ValidationWindow = "stage"
    position_transform: PositionTransform | None
    contiguous: bool = False
    staged: bool = False
    sorted: bool = False
    seed: int
    packing: str | None = None
    document_mask: bool = True
    contents: Mapping[str, str]
    """Hash of each source's tokens."""
    allow_changed_data: bool = False

    def description(self) -> DataDescription:
        """Return what training must know."""
        return DataDescription(
            sources=tuple(self.sources),
            window=self.window,
            validation_window=self.stage_schedule.stages[self.validation_stage].window,
            stage_schedule=self.stage_schedule,
            staged=self.staged,
            contiguous=self.contiguous,
            context=self.position_transform.context if self.position_transform else None,
            tokenizer=self.tokenizer,
            tokenizer_folder=self.tokenizer_folder,
            identity=self._identity(),
            allow_changed_data=self.allow_changed_data,
        )

    def _identity(self) -> dict[str, Any]:
        """Return what decides a sample; a run's stages are compared for themselves."""
        found: dict[str, Any] = {f"source {name}": text for name, text in self.contents.items()}
        found |= {"seed": self.seed, "packing": self.packing, "contiguous": self.contiguous}
        if not self.document_mask:  # checkpoints of earlier versions do not say that they have one
            found["document_mask"] = False
        if not self.staged:
            stage = self.stage_schedule.stages[0]
            found |= {"window": stage.window, "weights": stage.weights}
        return found

    @abstractmethod
    def readers(self, stage: Stage) -> Mapping[str, Any]:
        """Return what serves a stage's windows, by source: it has a length, and items."""

    @abstractmethod
    def held_out(self, stage: Stage) -> Mapping[str, Any]:
        """Return what serves held-out windows of a stage's sources."""

    @abstractmethod
    def order(
        self, readers: Mapping[str, Any], stage: Stage, read: Mapping[str, int] | None = None
    ) -> SampleIndex | ContiguousSampler:
        """Return a stage's order of samples; `read` tokens of each source count as drawn."""

    @abstractmethod
    def batch(
        self,
        readers: Mapping[int, Any],
        rows: Rows,
        training: bool,
        document_mask: bool | None = None,
    ) -> Batch:
        """Read rows, given the readers by number of their source.

        Training only: `document_mask` says whether documents are kept apart; default: as the run.
        """

    @property
    def longest(self) -> Stage:
        """The stage of the longest window."""
        return max(self.stage_schedule.stages, key=lambda stage: stage.window)

    @property
    def validation_stage(self) -> int:
        """Number of the stage whose window, sources and micro-batch size held-out rows have now."""
        if self.validation_window == "longest":
            return self.stage_schedule.stages.index(self.longest)
        return self.stage_schedule.of_last(self.samples_consumed)

    def train_dataloader(self) -> DataLoader:
        """Whole steps of this rank, from the sample the model has come to."""
        trainer = self.trainer
        assert trainer is not None
        rank, ranks = data_rank(trainer)
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                "set Trainer(use_distributed_sampler=False): the order of samples is ours"
            )
        for stage in self.stage_schedule.stages:
            if stage.rows % ranks:
                raise ValueError(
                    f"{stage.rows} windows per step do not divide among {ranks} processes"
                )
        if trainer.max_steps < 1:
            raise ValueError(
                "set trainer.max_steps: the run's length is counted in optimizer steps"
            )
        if self.staged and trainer.max_steps != self.stage_schedule.steps[-1]:
            raise ValueError(
                f"the stages have {self.stage_schedule.steps[-1]} steps; got trainer.max_steps "
                f"{trainer.max_steps}, set it to their sum"
            )
        consumed = self.samples_consumed
        shift = consumed - self.stage_schedule.first_sample(trainer.global_step)
        if self.staged and shift:
            raise ValueError(
                f"at step {trainer.global_step} the stages have read {consumed - shift} samples, "
                f"the run had read {consumed}; go on with the stages it began with"
            )
        if self.sorted and shift:
            raise ValueError(
                f"sorted steps depend on batch_tokens: {trainer.global_step} of them have read "
                f"{consumed - shift} samples, the run had read {consumed}; go on with its own"
            )
        steps = Steps(self, rank, ranks, shift)
        if trainer.global_rank == 0:
            for line in steps.reports():
                print(line)
        return self._loader(steps, StepSampler(trainer.global_step, trainer.max_steps))

    def val_dataloader(self) -> DataLoader:
        """Held-out windows of this rank; each pass reads those of the stage that it falls in."""
        trainer = self.trainer
        assert trainer is not None
        held_out = HeldOut(self, *data_rank(trainer))
        return self._loader(held_out, HeldOutSampler(held_out))

    test_dataloader = val_dataloader

    def _loader(self, dataset: Dataset, sampler: Sampler) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=outlive_stop_signals,
        )


def data_rank(trainer: Any) -> tuple[int, int]:
    """Return the number of this process among those that read rows of their own, and theirs."""
    if not isinstance(trainer.strategy, ParallelStrategy):
        return trainer.global_rank, trainer.world_size
    place = trainer.strategy.distributed_sampler_kwargs
    return place["rank"], place["num_replicas"]


def check_shares(sources: Mapping[str, Any]) -> None:
    """Raise ValueError unless there is a source, and all or none of them have a weight."""
    given = [source.weight is not None for source in sources.values()]
    if not given or any(given) != all(given):
        raise ValueError(
            "sources need a weight each, or none of them one; and there must be a source"
        )


def given_weights(sources: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the sources' weights by name; None if they have none."""
    return {n: s.weight for n, s in sources.items() if s.weight is not None} or None


def common_tokenizer(opened: Iterable[Any]) -> TokenizerInfo:
    """Return the tokenizer of windows that have the same, with the largest id that any uses."""
    tokenizers = [windows.tokenizer for windows in opened]
    largest = [each.largest_id for each in tokenizers if each.largest_id is not None]
    known = len(largest) == len(tokenizers)
    return replace(tokenizers[0], largest_id=max(largest) if known else None)


class StepSampler(Sampler[int]):
    """Counts from `start` to `end`, but has the length of the whole run.

    Lightning compares its step counter, restored on resume, with the loader's length; and only with
    a loader that has one does it not read (and then lose) a batch ahead.
    """

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __len__(self) -> int:
        return self.end


class Steps(Dataset):
    """Optimizer step → this rank's micro-batches.

    A later stage goes on in each source's epoch where the one before it stopped, to within the
    group of chunks that was being read.
    """

    def __init__(self, data: StepData, rank: int, ranks: int, shift: int = 0) -> None:
        self.data, self.stage_schedule = data, data.stage_schedule
        self.rank, self.ranks, self.shift = rank, ranks, shift
        self.readers: list[dict[int, Any]] = []  # by stage, then by number of the source
        self.names = list(data.sources)
        self.orders: list[SampleIndex | ContiguousSampler] = []
        read = dict.fromkeys(data.sources, 0)
        for stage in data.stage_schedule.stages:
            readers = data.readers(stage)
            order = data.order(readers, stage, read)
            self.readers.append({self.names.index(name): r for name, r in readers.items()})
            self.orders.append(order)
            if isinstance(order, SampleIndex) and data.staged:
                drawn = order.drawn(stage.steps * stage.rows)
                for name, begun, windows in zip(readers, order.begun, drawn, strict=True):
                    read[name] = (begun + windows) * stage.window

    def reports(self) -> list[str]:
        """Return what best-fit packing does to each source."""
        return [
            f"{self.names[source]}, window {reader.length}: {reader.report()}"
            for readers in self.readers
            for source, reader in readers.items()
            if hasattr(reader, "report")
        ]

    def __getitem__(self, step: int) -> StepBatch:
        """Read one step."""
        number = self.stage_schedule.at(step)
        stage, order = self.stage_schedule.stages[number], self.orders[number]
        readers, sources = self.readers[number], list(self.readers[number])
        begin = self.stage_schedule.first_sample(step) + self.shift
        share = stage.rows // self.ranks
        rows = []
        for sample in range(begin + self.rank * share, begin + (self.rank + 1) * share):
            source, window = order(sample - self.stage_schedule.samples[number])
            rows.append((sources[source], window, sample))
        size = stage.micro_batch_size
        parts = [
            self.data.batch(readers, rows[i : i + size], True, stage.document_mask)
            for i in range(0, share, size)
        ]
        restart = isinstance(order, ContiguousSampler) and order.restarts(begin)
        after = begin + stage.rows
        return StepBatch(parts, after, self.stage_schedule.tokens(after, step), restart)


class HeldOut(Dataset):
    """Held-out micro-batches of one rank, by number of the stage and within it.

    Ranks that run out get padding: all stay in step.
    """

    def __init__(self, data: StepData, rank: int, ranks: int) -> None:
        self.data, self.rank, self.ranks = data, rank, ranks
        self.readers: dict[int, dict[int, Any]] = {}  # by stage, then by number of the source
        self.rows: dict[int, list[Rows]] = {}
        numbers = range(len(data.stage_schedule.stages))
        for stage in numbers if data.validation_window == "stage" else [data.validation_stage]:
            self._add(stage)

    def _add(self, number: int) -> None:
        """Choose the rows of a stage."""
        data, stage = self.data, self.data.stage_schedule.stages[number]
        numbers = {name: i for i, name in enumerate(data.sources)}
        readers = {numbers[name]: each for name, each in data.held_out(stage).items()}
        chosen = []
        for source, windows in readers.items():
            most = min(len(windows), data.held_out_windows)
            spread = np.linspace(0, len(windows) - 1, most).round().astype(int) if most else []
            chosen += [(source, int(window), i) for i, window in enumerate(spread)]
        size = stage.micro_batch_size
        chosen += [(next(iter(readers)), -1, -1)] * (-len(chosen) % (size * self.ranks))
        firsts = range(self.rank * size, len(chosen), size * self.ranks)
        self.readers[number] = readers
        self.rows[number] = [chosen[i : i + size] for i in firsts]

    def __getitem__(self, index: tuple[int, int]) -> Batch:
        """Read one micro-batch."""
        stage, number = index
        return self.data.batch(self.readers[stage], self.rows[stage][number], training=False)


class HeldOutSampler(Sampler[tuple[int, int]]):
    """Indices of the held-out micro-batches at the window of the stage that is being trained.

    The length is that of the stage with the most, since Lightning asks for it once.
    """

    def __init__(self, held_out: HeldOut) -> None:
        self.held_out = held_out

    def __iter__(self) -> Iterator[tuple[int, int]]:
        stage = self.held_out.data.validation_stage
        return iter([(stage, i) for i in range(len(self.held_out.rows[stage]))])

    def __len__(self) -> int:
        return max(len(rows) for rows in self.held_out.rows.values())
