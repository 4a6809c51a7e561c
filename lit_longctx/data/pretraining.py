"""LightningDataModule of continual pretraining: whole optimizer steps, elastic and resumable."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_longctx.batch import NO_TARGET, Batch, Step, pack
from lit_longctx.data.lanes import Lanes
from lit_longctx.data.order import Order
from lit_longctx.data.windows import Windows

SHUFFLED_CHUNKS = 4
"""Chunks whose windows are shuffled together."""


@dataclass(frozen=True)
class Source:
    """A prepared folder and its part in the mixture."""

    folder: str
    """Output folder of `lit_longctx prepare`."""
    weight: float | None = None
    """Share of the samples, in any unit; for all sources or none (then: in proportion to size)."""


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
    ) -> None:
        super().__init__()
        if min(window, batch_tokens, micro_batch_size) < 1:
            raise ValueError(
                f"window {window}, batch_tokens {batch_tokens} and micro_batch_size "
                f"{micro_batch_size} must be 1 or more"
            )
        if held_out_windows < 0:
            raise ValueError(f"held_out_windows {held_out_windows} must be 0 or more")
        if batch_tokens % window:
            raise ValueError(f"batch_tokens {batch_tokens} is no multiple of window {window}")
        given = [source.weight is not None for source in sources.values()]
        if not given or any(given) != all(given):
            raise ValueError(
                "sources need a weight each, or none of them one; and there must be a source"
            )
        self.sources = sources
        self.window = window
        self.batch_windows = batch_tokens // window
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.held_out_windows = held_out_windows
        self.lanes = lanes
        manifests = [self._windows(source, "train").manifest for source in sources.values()]
        self.tokenizer: dict[str, Any] = manifests[0]["tokenizer"]
        for name, other in zip(sources, manifests, strict=True):
            if other["tokenizer"] != self.tokenizer:
                raise ValueError(
                    f"source {name} was prepared with another tokenizer; prepare all with one"
                )
        self.tokenizer_folder = Path(next(iter(sources.values())).folder) / "tokenizer"

    def _windows(self, source: Source, split: str) -> Windows:
        return Windows(source.folder, split, self.window)

    def open(self, split: str) -> dict[str, Windows]:
        """Return each source's windows; ValueError if a source has too few tokens for one."""
        found = {name: self._windows(source, split) for name, source in self.sources.items()}
        for name, windows in found.items():
            if not len(windows) and split == "train":
                raise ValueError(
                    f"source {name} holds {windows.tokens} {split} tokens, "
                    f"less than a window of {self.window}"
                )
        return found

    def order(self) -> Order | Lanes:
        """Return the run's order of samples."""
        windows = list(self.open("train").values())
        weights = [s.weight for s in self.sources.values() if s.weight is not None]
        if self.lanes:
            lengths = [len(w) for w in windows]
            return Lanes(lengths, weights or None, self.seed, self.batch_windows)
        per_group = [SHUFFLED_CHUNKS * w.manifest["chunk_tokens"] // self.window for w in windows]
        return Order([len(w) for w in windows], weights or None, self.seed, per_group)

    def train_dataloader(self) -> DataLoader:
        """Whole steps of this rank, from the sample the model has come to."""
        trainer = self.trainer
        assert trainer is not None
        ranks = trainer.world_size
        if ranks > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                "set Trainer(use_distributed_sampler=False): the order of samples is ours"
            )
        if self.batch_windows % ranks:
            raise ValueError(
                f"{self.batch_windows} windows per step do not divide among {ranks} processes"
            )
        if trainer.max_steps < 1:
            raise ValueError(
                "set trainer.max_steps: the run's length is counted in optimizer steps"
            )
        consumed = int(getattr(trainer.lightning_module, "samples_consumed", 0))
        steps = Steps(
            self, trainer.global_rank, ranks, consumed - trainer.global_step * self.batch_windows
        )
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

    def batch(self, windows: dict[str, Windows], rows: list[tuple[int, int, int]]) -> Batch:
        """Pack rows given as (source, window, sample); window −1 is padding, without targets."""
        opened = list(windows.values())
        padding = np.full(self.window + 1, NO_TARGET)
        tokens = [padding if window < 0 else opened[source][window] for source, window, _ in rows]
        return pack(
            torch.from_numpy(np.stack(tokens)),
            self.tokenizer["bos"],
            sources=torch.tensor([source for source, *_ in rows]),
            samples=torch.tensor([sample for *_, sample in rows]),
        )


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
    """Optimizer step → this rank's micro-batches."""

    def __init__(self, data: PretrainData, rank: int, ranks: int, first_sample: int) -> None:
        self.data = data
        self.first_sample = first_sample
        self.windows = data.open("train")
        self.order = data.order()
        self.rows = data.batch_windows // ranks
        self.offset = rank * self.rows

    def __getitem__(self, step: int) -> Step:
        """Read one step."""
        begin = self.first_sample + step * self.data.batch_windows
        mine = range(begin + self.offset, begin + self.offset + self.rows)
        rows = [(*self.order(sample), sample) for sample in mine]
        size = self.data.micro_batch_size
        batches = [
            self.data.batch(self.windows, rows[i : i + size]) for i in range(0, len(rows), size)
        ]
        restart = isinstance(self.order, Lanes) and self.order.restarts(begin)
        return Step(batches, begin + self.data.batch_windows, restart)


class HeldOut(Dataset):
    """Held-out micro-batches of one rank; ranks that run out get padding: all stay in step."""

    def __init__(self, data: PretrainData, rank: int, ranks: int) -> None:
        self.data = data
        self.windows = data.open("held_out")
        chosen = []
        for source, windows in enumerate(self.windows.values()):
            number = min(len(windows), data.held_out_windows)
            places = np.linspace(0, len(windows) - 1, number).round().astype(int) if number else []
            chosen += [(source, int(window), i) for i, window in enumerate(places)]
        size = data.micro_batch_size
        chosen += [(0, -1, -1)] * (-len(chosen) % (size * ranks))
        self.rows = [chosen[i : i + size] for i in range(rank * size, len(chosen), size * ranks)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """Read one micro-batch."""
        return self.data.batch(self.windows, self.rows[index])
