"""LightningDataModule of continual pretraining: windows of packed documents."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from pathlib import Path

import numpy as np
import torch

from lit_longctx.batch import NO_TARGET, Batch, pack
from lit_longctx.data.sampling.contiguous import ContiguousSampler
from lit_longctx.data.sampling.packing import BestFit
from lit_longctx.data.sampling.position_transforms import PositionTransform
from lit_longctx.data.sampling.sample_index import SampleIndex
from lit_longctx.data.sampling.stages import ENDLESS, Packing, Stage, StageSchedule
from lit_longctx.data.sampling.steps import (
    Rows,
    StepData,
    ValidationWindow,
    check_shares,
    common_tokenizer,
    given_weights,
)
from lit_longctx.data.store.mds import MDSWindows, open_windows
from lit_longctx.data.store.storage import ObjectStorage
from lit_longctx.data.store.windows import Windows
from lit_longctx.data.tokens.info import TokenizerInfo
from lit_longctx.data.tokens.opening import open_tokenizer, tokenizer_info

SHUFFLED_CHUNKS = 4
"""Chunks whose windows are shuffled together."""
WindowReader = Windows | MDSWindows | BestFit


@dataclass(frozen=True)
class Source:
    """A prepared folder and its part in the mixture."""

    folder: str
    """Output folder of `lit_longctx prepare`, or its URL (s3://…); or a folder of MDS shards."""
    weight: float | None = None
    """Share of the samples, in any unit; for all sources or none (then: in proportion to size)."""
    tokenizer: str | None = None
    """Tokenizer of MDS shards (`bytes`, a file or a folder); prepared folders know their own."""

    def open(self, split: str, length: int, storage: ObjectStorage) -> Windows | MDSWindows:
        """Return the windows of a split."""
        if self.tokenizer is None:
            return open_windows(self.folder, split, length, storage)
        return open_windows(self.folder, split, length, storage, _tokenizer_info(self.tokenizer))


@lru_cache
def _tokenizer_info(tokenizer: str) -> TokenizerInfo:
    return tokenizer_info(open_tokenizer(tokenizer))


class PretrainData(StepData):
    """Windows of packed documents from one or several prepared folders.

    Args:
        sources: Prepared folders by name; the names appear in reports and metrics.
        window: Tokens per row, a multiple of 256.
        batch_tokens: Tokens per optimizer step, over all processes; a multiple of `window`.
        micro_batch_size: Rows that one process takes through the model at a time.
        seed: Decides the order of samples.
        num_workers: Loader processes per training process; 0 reads in the training process.
        held_out_windows: Windows of each source's held-out split to validate on, spread evenly.
        validation_window: Held-out rows have the window, sources and micro-batch size of the stage
            that is being trained (`stage`), or always those of the longest window (`longest`).
        contiguous: Let rows walk through documents, for a model with memory, instead of shuffling.
        packing: `concatenate` joins documents and cuts the stream every `window` tokens;
            `best_fit` cuts only documents longer than the window, and pads.
        document_mask: Whether attention keeps documents apart. Without it a row is one document:
            positions run on, the BOS of the next document is a target too, and BOS and EOS are all
            that separates. Held-out rows keep documents apart.
        storage: Cache and access for sources in object storage.
        position_transform: Draws positions of a longer context to train at; default: the tokens'
            own positions.
        stages: Stretches of the run with another window, batch, mix, packing, mask, position scheme
            or learning rate, one after the other; default: one, with the settings above.
        allow_changed_data: Let a resume go on with other sources, seed, window, weights or packing.
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
        validation_window: ValidationWindow = "stage",
        contiguous: bool = False,
        packing: Packing = "concatenate",
        document_mask: bool = True,
        storage: ObjectStorage = ObjectStorage(),
        position_transform: PositionTransform | None = None,
        stages: list[Stage] | None = None,
        allow_changed_data: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(window, batch_tokens, micro_batch_size, held_out_windows)
        check_shares(sources)
        if contiguous and (stages or position_transform or packing == "best_fit"):
            raise ValueError(
                "contiguous rows take no stages, no position_transform and no best_fit"
            )
        self.sources = sources
        self.seed = seed
        self.num_workers = num_workers
        self.held_out_windows = held_out_windows
        self.validation_window = validation_window
        self.contiguous = contiguous
        self.packing: Packing = packing
        self.document_mask = document_mask
        self.position_transform = position_transform
        self.storage = storage
        self.allow_changed_data = allow_changed_data
        run = Stage(ENDLESS, window, batch_tokens, micro_batch_size, given_weights(sources))
        self.staged = bool(stages)
        self.stage_schedule = StageSchedule([stage.completed(run) for stage in stages or [run]])
        self.window = max(stage.window for stage in self.stage_schedule.stages)
        self._check_stages()
        opened = {n: s.open("train", self._shortest(n), storage) for n, s in sources.items()}
        self._check_opened(opened)
        self.tokenizer = common_tokenizer(opened.values())
        self.contents = {name: windows.content_hash for name, windows in opened.items()}
        self.tokenizer_folder = self._first_tokenizer_folder(opened)

    def _check_stages(self) -> None:
        """Refuse stages that name a source which is not there."""
        for stage in self.stage_schedule.stages:
            if unknown := set(stage.weights or {}) - set(self.sources):
                raise ValueError(
                    f"a stage names source {unknown.pop()}; sources are {', '.join(self.sources)}"
                )

    def _check_opened(self, opened: Mapping[str, Windows | MDSWindows]) -> None:
        """Refuse sources of different tokenizers, and packed ones that are to be packed anew."""
        packings = {stage.packing or self.packing for stage in self.stage_schedule.stages}
        first, *_ = tokenizers = [replace(w.tokenizer, largest_id=None) for w in opened.values()]
        for (name, other), tokenizer in zip(opened.items(), tokenizers, strict=True):
            if tokenizer != first:
                raise ValueError(
                    f"source {name} was prepared with another tokenizer; prepare all with one"
                )
            if isinstance(other, MDSWindows) and (self.contiguous or "best_fit" in packings):
                raise ValueError(f"source {name} is packed: leave out contiguous and best_fit")

    def _first_tokenizer_folder(self, opened: Mapping[str, Windows | MDSWindows]) -> Path | None:
        """Return a folder that holds the sources' tokenizer; None if there is none."""
        own = [w.tokenizer_folder for w in opened.values() if isinstance(w, Windows)]
        names = [source.tokenizer for source in self.sources.values()]
        named = [Path(name) for name in names if name not in (None, "bytes")]
        folders = own + [path if path.is_dir() else path.parent for path in named]
        return folders[0] if folders else None

    def _shortest(self, name: str) -> int:
        """Shortest window that a source is read in; the longest of all if none reads it."""
        windows = [
            stage.window for stage in self.stage_schedule.stages if name in self.names(stage)
        ]
        return min(windows, default=self.window)

    def names(self, stage: Stage) -> list[str]:
        """Return the sources that a stage reads."""
        return [name for name in self.sources if not stage.weights or name in stage.weights]

    def open(self, split: str, stage: Stage) -> dict[str, Windows | MDSWindows]:
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

    def readers(self, stage: Stage) -> dict[str, WindowReader]:
        """Return what serves a stage's windows, by source."""
        opened = self.open("train", stage)
        if (stage.packing or self.packing) == "concatenate":
            return dict(opened)
        return {name: self._best_fit(windows) for name, windows in opened.items()}

    def _best_fit(self, windows: Windows | MDSWindows) -> BestFit:
        assert isinstance(windows, Windows)
        return BestFit(windows, SHUFFLED_CHUNKS * windows.chunk_tokens)

    def order(
        self,
        readers: Mapping[str, WindowReader],
        stage: Stage,
        read: Mapping[str, int] | None = None,
    ) -> SampleIndex | ContiguousSampler:
        """Return a stage's order of samples; `read` tokens of each source count as drawn."""
        lengths = [len(reader) for reader in readers.values()]
        weights = [stage.weights[name] for name in readers] if stage.weights else None
        if self.contiguous:
            return ContiguousSampler(lengths, weights, self.seed, stage.rows)
        groups = [_groups(reader) for reader in readers.values()]
        begun = [ceil((read or {}).get(name, 0) / stage.window) for name in readers]
        keys = [list(self.sources).index(name) for name in readers]
        return SampleIndex(lengths, weights, self.seed, groups, begun, keys)

    def held_out(self, stage: Stage) -> dict[str, Windows | MDSWindows]:
        """Return what serves held-out windows: joined documents, whatever the packing."""
        return self.open("held_out", stage)

    def batch(
        self,
        readers: Mapping[int, WindowReader],
        rows: Rows,
        training: bool,
        document_mask: bool | None = None,
    ) -> Batch:
        """Read rows of packed documents; in validation all stands where it stands."""
        masked = self.document_mask if document_mask is None else document_mask
        batch = read_batch(readers, rows, self.tokenizer.bos, masked or not training)
        return self.position_transform(batch) if training and self.position_transform else batch


def _check_sizes(
    window: int, batch_tokens: int, micro_batch_size: int, held_out_windows: int
) -> None:
    """Raise ValueError if one of them is too small."""
    if min(window, batch_tokens, micro_batch_size) < 1:
        raise ValueError(
            f"window {window}, batch_tokens {batch_tokens} and micro_batch_size "
            f"{micro_batch_size} must be 1 or more"
        )
    if held_out_windows < 0:
        raise ValueError(f"held_out_windows {held_out_windows} must be 0 or more")


def read_batch(
    readers: Mapping[int, WindowReader], rows: Rows, bos: int, document_mask: bool = True
) -> Batch:
    """Pack rows given as (source, window, sample); window −1 is padding, without targets.

    Without a document mask each row is one document, beside its padding.
    """
    length = next(reader.length for reader in readers.values())
    padding = np.full(length + 1, NO_TARGET), np.zeros(length + 1, dtype=bool)
    found = [padding if window < 0 else _row(readers[source], window) for source, window, _ in rows]
    tokens, starts = zip(*found, strict=True)
    batch = pack(
        torch.from_numpy(np.stack(tokens)),
        bos,
        torch.from_numpy(np.stack(starts) & document_mask),
        sources=torch.tensor([source for source, *_ in rows]),
        samples=torch.tensor([sample for *_, sample in rows]),
    )
    masked = False
    for labels, (source, window, _) in zip(batch.labels, rows, strict=True):
        reader = readers[source] if window >= 0 else None
        if isinstance(reader, MDSWindows) and (targets := reader.targets(window)) is not None:
            labels[~torch.from_numpy(targets[1:])] = NO_TARGET
            masked = True
    return batch._replace(loss_weights=(batch.labels != NO_TARGET).float()) if masked else batch


def _row(reader: WindowReader, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of a window, and True where a document starts."""
    return reader.with_starts(window) if isinstance(reader, Windows) else reader[window]


def _groups(reader: WindowReader) -> list[int]:
    """Windows of each group that is shuffled together, those that begin in the same few chunks.

    The number of groups does not depend on the window, so that stages of different windows go
    through them in the same order.
    """
    if isinstance(reader, BestFit):
        return reader.plan.groups
    tokens = SHUFFLED_CHUNKS * reader.chunk_tokens
    total = len(reader) * reader.length if isinstance(reader, MDSWindows) else reader.tokens
    edges = np.arange(0, total + tokens, tokens)
    return np.diff(np.minimum(-(-edges // reader.length), len(reader))).tolist()
