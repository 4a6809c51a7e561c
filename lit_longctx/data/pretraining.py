"""LightningDataModule of continual pretraining: whole optimizer steps, elastic and resumable."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_longctx.batch import NO_TARGET, Batch, Step, pack
from lit_longctx.data.lanes import Lanes
from lit_longctx.data.mds import Packs, open_windows
from lit_longctx.data.order import Order
from lit_longctx.data.packing import BestFit
from lit_longctx.data.stages import ENDLESS, Course, Stage
from lit_longctx.data.storage import ObjectStorage
from lit_longctx.data.tokenizer import described, open_tokenizer
from lit_longctx.data.windows import Windows

SHUFFLED_CHUNKS = 4
"""Chunks whose windows are shuffled together."""
Reader = Windows | Packs | BestFit


@dataclass(frozen=True)
class Source:
    """A prepared folder and its part in the mixture."""

    folder: str
    """Output folder of `lit_longctx prepare`, or its URL (s3://…); or a folder of MDS shards."""
    weight: float | None = None
    """Share of the samples, in any unit; for all sources or none (then: in proportion to size)."""
    tokenizer: str | None = None
    """Tokenizer of MDS shards (`bytes`, a file or a folder); prepared folders know their own."""

    def open(self, split: str, length: int, storage: ObjectStorage) -> Windows | Packs:
        """Return the windows of a split."""
        if self.tokenizer is None:
            return open_windows(self.folder, split, length, storage)
        return open_windows(self.folder, split, length, storage, _described(self.tokenizer))


@lru_cache
def _described(tokenizer: str) -> dict[str, Any]:
    return described(open_tokenizer(tokenizer))


class PretrainData(LightningDataModule):
    """Windows of packed documents from one or several prepared folders.

    Args:
        sources: Prepared folders by name; the names appear in reports and metrics.
        window: Tokens per row, a multiple of 256.
        batch_tokens: Tokens per optimizer step, over all processes; a multiple of `window`.
        micro_batch_size: Rows that one process takes through the model at a time.
        seed: Decides the order of samples.
        num_workers: Loader processes per training process; 0 reads in the training process.
        held_out_windows: Windows of each source's held-out split to validate on, spread evenly.
        lanes: Let rows walk through documents, for a model with memory, instead of shuffling.
        packing: `concatenate` joins documents and cuts the stream every `window` tokens;
            `best_fit` cuts only documents longer than the window, and pads.
        storage: Cache and access for sources in object storage.
        stages: Stretches of the run with another window, batch, mix, theta or learning rate, one
            after the other; default: one, with the settings above.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        window: int = 4096,
        batch_tokens: int = 4096 * 16,
        micro_batch_size: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        held_out_windows: int = 32,
        lanes: bool = False,
        packing: Literal["concatenate", "best_fit"] = "concatenate",
        storage: ObjectStorage = ObjectStorage(),
        stages: list[Stage] | None = None,
    ) -> None:
        super().__init__()
        if min(window, batch_tokens, micro_batch_size) < 1:
            raise ValueError(
                f"window {window}, batch_tokens {batch_tokens} and micro_batch_size "
                f"{micro_batch_size} must be 1 or more"
            )
        if held_out_windows < 0:
            raise ValueError(f"held_out_windows {held_out_windows} must be 0 or more")
        given = [source.weight is not None for source in sources.values()]
        if not given or any(given) != all(given):
            raise ValueError(
                "sources need a weight each, or none of them one; and there must be a source"
            )
        if lanes and (stages or packing == "best_fit"):
            raise ValueError("lanes walk through documents: they take no stages and no best_fit")
        self.sources = sources
        self.seed = seed
        self.num_workers = num_workers
        self.held_out_windows = held_out_windows
        self.lanes = lanes
        self.packing = packing
        weights = {n: s.weight for n, s in sources.items() if s.weight is not None}
        run = Stage(ENDLESS, window, batch_tokens, micro_batch_size, weights or None)
        self.staged = bool(stages)
        self.course = Course([stage.completed(run) for stage in stages or [run]])
        self.window = max(stage.window for stage in self.course.stages)
        for stage in self.course.stages:
            if unknown := set(stage.weights or {}) - set(sources):
                raise ValueError(
                    f"a stage names source {unknown.pop()}; sources are {', '.join(sources)}"
                )
        self.storage = storage
        opened = {n: s.open("train", self._shortest(n), storage) for n, s in sources.items()}
        first = next(iter(opened.values()))
        self.tokenizer: dict[str, Any] = first.manifest["tokenizer"]
        for name, other in opened.items():
            if other.manifest["tokenizer"] != self.tokenizer:
                raise ValueError(
                    f"source {name} was prepared with another tokenizer; prepare all with one"
                )
            if isinstance(other, Packs) and (lanes or packing == "best_fit"):
                raise ValueError(f"source {name} is packed already: leave out lanes and best_fit")
        own = [w.tokenizer_folder for w in opened.values() if isinstance(w, Windows)]
        named = [Path(s.tokenizer) for s in sources.values() if s.tokenizer not in (None, "bytes")]
        folders = own + [path if path.is_dir() else path.parent for path in named]
        self.tokenizer_folder = folders[0] if folders else None

    def _shortest(self, name: str) -> int:
        """Shortest window that a source is read in; the longest of all if none reads it."""
        windows = [stage.window for stage in self.course.stages if name in self.names(stage)]
        return min(windows, default=self.window)

    def names(self, stage: Stage) -> list[str]:
        """Return the sources that a stage reads."""
        return [name for name in self.sources if not stage.weights or name in stage.weights]

    @property
    def longest(self) -> Stage:
        """The stage of the longest window: the held-out splits of its sources are validated on."""
        return max(self.course.stages, key=lambda stage: stage.window)

    def open(self, split: str, stage: Stage) -> dict[str, Windows | Packs]:
        """Return a stage's windows by source; ValueError if one has too few tokens for any."""
        length = stage.window
        found = {n: self.sources[n].open(split, length, self.storage) for n in self.names(stage)}
        for name, windows in found.items():
            if not len(windows) and split == "train":
                raise ValueError(
                    f"source {name} holds {windows.tokens} {split} tokens, "
                    f"less than a window of {length}"
                )
        return found

    def readers(self, stage: Stage) -> dict[str, Reader]:
        """Return what serves a stage's windows, by source."""
        opened = self.open("train", stage)
        if self.packing == "concatenate":
            return dict(opened)
        return {name: self._best_fit(windows) for name, windows in opened.items()}

    def _best_fit(self, windows: Windows | Packs) -> BestFit:
        assert isinstance(windows, Windows)
        return BestFit(windows, SHUFFLED_CHUNKS * windows.manifest["chunk_tokens"])

    def order(
        self, readers: Mapping[str, Reader], stage: Stage, read: Mapping[str, int] | None = None
    ) -> Order | Lanes:
        """Return a stage's order of samples; `read` tokens of each source count as drawn."""
        lengths = [len(reader) for reader in readers.values()]
        weights = [stage.weights[name] for name in readers] if stage.weights else None
        if self.lanes:
            return Lanes(lengths, weights, self.seed, stage.rows)
        groups = [_groups(reader) for reader in readers.values()]
        begun = [ceil((read or {}).get(name, 0) / stage.window) for name in readers]
        keys = [list(self.sources).index(name) for name in readers]
        return Order(lengths, weights, self.seed, groups, begun, keys)

    def train_dataloader(self) -> DataLoader:
        """Whole steps of this rank, from the sample the model has come to."""
        trainer = self.trainer
        assert trainer is not None
        ranks = trainer.world_size
        if ranks > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                "set Trainer(use_distributed_sampler=False): the order of samples is ours"
            )
        for stage in self.course.stages:
            if stage.rows % ranks:
                raise ValueError(
                    f"{stage.rows} windows per step do not divide among {ranks} processes"
                )
        if trainer.max_steps < 1:
            raise ValueError(
                "set trainer.max_steps: the run's length is counted in optimizer steps"
            )
        if self.staged and trainer.max_steps != self.course.steps[-1]:
            raise ValueError(
                f"the stages have {self.course.steps[-1]} steps; got trainer.max_steps "
                f"{trainer.max_steps}, set it to their sum"
            )
        consumed = int(getattr(trainer.lightning_module, "samples_consumed", 0))
        shift = consumed - self.course.first_sample(trainer.global_step)
        if self.staged and shift:
            raise ValueError(
                f"at step {trainer.global_step} the stages have read {consumed - shift} samples, "
                f"the run had read {consumed}; go on with the stages it began with"
            )
        steps = Steps(self, trainer.global_rank, ranks, shift)
        if trainer.global_rank == 0:
            for line in steps.reports():
                print(line)
        return self._loader(steps, Upward(trainer.global_step, trainer.max_steps))

    def val_dataloader(self) -> DataLoader:
        """Held-out windows of this rank."""
        trainer = self.trainer
        assert trainer is not None
        rows = HeldOut(self, trainer.global_rank, trainer.world_size)
        return self._loader(rows, Upward(0, len(rows)))

    test_dataloader = val_dataloader

    def _loader(self, dataset: Dataset, sampler: Sampler) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )


def read_batch(readers: Mapping[int, Reader], rows: list[tuple[int, int, int]], bos: int) -> Batch:
    """Pack rows given as (source, window, sample); window −1 is padding, without targets."""
    length = next(reader.length for reader in readers.values())
    padding = np.full(length + 1, NO_TARGET), np.zeros(length + 1, dtype=bool)
    found = [padding if window < 0 else readers[source][window] for source, window, _ in rows]
    tokens = [row[0] if isinstance(row, tuple) else row for row in found]
    starts = [row[1] if isinstance(row, tuple) else row == bos for row in found]
    return pack(
        torch.from_numpy(np.stack(tokens)),
        bos,
        torch.from_numpy(np.stack(starts)),
        sources=torch.tensor([source for source, *_ in rows]),
        samples=torch.tensor([sample for *_, sample in rows]),
    )


def _groups(reader: Reader) -> list[int]:
    """Windows of each group that is shuffled together, those that begin in the same few chunks.

    The number of groups does not depend on the window, so that stages of different windows go
    through them in the same order.
    """
    if isinstance(reader, BestFit):
        return reader.plan.groups
    tokens = SHUFFLED_CHUNKS * reader.manifest["chunk_tokens"]
    total = len(reader) * reader.length if isinstance(reader, Packs) else reader.tokens
    edges = np.arange(0, total + tokens, tokens)
    return np.diff(np.minimum(-(-edges // reader.length), len(reader))).tolist()


class Upward(Sampler[int]):
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

    def __init__(self, data: PretrainData, rank: int, ranks: int, shift: int = 0) -> None:
        self.course, self.bos = data.course, data.tokenizer["bos"]
        self.rank, self.ranks, self.shift = rank, ranks, shift
        self.readers: list[dict[int, Reader]] = []  # by stage, then by number of the source
        self.names = list(data.sources)
        self.orders: list[Order | Lanes] = []
        read = dict.fromkeys(data.sources, 0)
        for stage in data.course.stages:
            readers = data.readers(stage)
            order = data.order(readers, stage, read)
            self.readers.append({self.names.index(name): r for name, r in readers.items()})
            self.orders.append(order)
            if isinstance(order, Order) and data.staged:
                drawn = order.drawn(stage.steps * stage.rows)
                for name, begun, windows in zip(readers, order.begun, drawn, strict=True):
                    read[name] = (begun + windows) * stage.window

    def reports(self) -> list[str]:
        """Return what best-fit packing does to each source."""
        return [
            f"{self.names[source]}, window {reader.length}: {reader.report()}"
            for readers in self.readers
            for source, reader in readers.items()
            if isinstance(reader, BestFit)
        ]

    def __getitem__(self, step: int) -> Step:
        """Read one step."""
        number = self.course.at(step)
        stage, order = self.course.stages[number], self.orders[number]
        readers, sources = self.readers[number], list(self.readers[number])
        begin = self.course.first_sample(step) + self.shift
        share = stage.rows // self.ranks
        rows = []
        for sample in range(begin + self.rank * share, begin + (self.rank + 1) * share):
            source, window = order(sample - self.course.samples[number])
            rows.append((sources[source], window, sample))
        size = stage.micro_batch_size
        parts = [read_batch(readers, rows[i : i + size], self.bos) for i in range(0, share, size)]
        restart = isinstance(order, Lanes) and order.restarts(begin)
        after = begin + stage.rows
        return Step(parts, after, self.course.tokens(after, step), restart)


class HeldOut(Dataset):
    """Held-out micro-batches of one rank; ranks that run out get padding: all stay in step."""

    def __init__(self, data: PretrainData, rank: int, ranks: int) -> None:
        self.bos = data.tokenizer["bos"]
        numbers = {name: number for number, name in enumerate(data.sources)}
        opened = data.open("held_out", data.longest)
        self.windows = {numbers[name]: windows for name, windows in opened.items()}
        chosen = []
        for source, windows in self.windows.items():
            number = min(len(windows), data.held_out_windows)
            places = np.linspace(0, len(windows) - 1, number).round().astype(int) if number else []
            chosen += [(source, int(window), i) for i, window in enumerate(places)]
        size = data.longest.micro_batch_size
        padding = next(iter(self.windows))
        chosen += [(padding, -1, -1)] * (-len(chosen) % (size * ranks))
        self.rows = [chosen[i : i + size] for i in range(rank * size, len(chosen), size * ranks)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """Read one micro-batch."""
        return read_batch(self.windows, self.rows[index], self.bos)
