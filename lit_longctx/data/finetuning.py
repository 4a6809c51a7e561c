"""LightningDataModule of fine-tuning: rows of whole conversations, weighed by who says what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import torch

from lit_longctx.batch import NO_TARGET, Batch, pack
from lit_longctx.checkpoint.companions import CHAT_TEMPLATE
from lit_longctx.data.sampling.conversations import ConversationRows, Conversations
from lit_longctx.data.sampling.position_transforms import PositionTransform
from lit_longctx.data.sampling.sample_index import SampleIndex
from lit_longctx.data.sampling.stages import ENDLESS, Stage, StageSchedule
from lit_longctx.data.sampling.steps import (
    Rows,
    StepData,
    check_shares,
    common_tokenizer,
    given_weights,
)
from lit_longctx.data.sampling.weights import Mean, weigh
from lit_longctx.data.store.storage import ObjectStorage

TEMPLATE = f"tokenizer/{CHAT_TEMPLATE}"
PAD_MULTIPLE = 64
"""Micro-batches are cut to their longest row, rounded up to so many tokens."""


@dataclass(frozen=True)
class ChatSource:
    """A folder prepared with `--chat true`, and its part in the mixture."""

    folder: str
    """Output folder of `lit_longctx prepare --chat true`, or its URL."""
    weight: float | None = None
    """Share of the rows, in any unit; for all sources or none (then: in proportion to size)."""
    packing: Literal["best_fit", "none"] = "best_fit"
    """`best_fit` fills rows with whole conversations, which do not see each other; `none` gives
    each a row of its own, padded on the right, as Llama 2 Long does with long ones."""


class FinetuneData(StepData):
    """Rows of whole conversations from one or several prepared folders.

    Args:
        sources: Folders of conversations by name; the names appear in reports and metrics.
        window: Most tokens per row, a multiple of 256. Of a conversation that is longer, the long
            document loses its end; one without such a document is left out, and counted.
        batch_tokens: Tokens per optimizer step, over all processes, padding included; a multiple
            of `window`.
        micro_batch_size: Rows that one process takes through the model at a time.
        input_loss: Weight of targets that the user says: from 0, answers only, to 1, the whole
            sequence (Llama 2 Long's loss on the long input).
        mean: What counts alike: every `token`, every row (`sequence`), or every conversation
            (`longalign`).
        position_transform: Draws positions of a longer context to train at; default: the tokens'
            own positions.
        sorted: Put conversations of like length into one step (LongAlign's sorted batching);
            sources need packing none. Every step is of one source.
        seed: Decides the order of samples.
        num_workers: Loader processes per training process; 0 reads in the training process.
        held_out_windows: Rows of each source's held-out split to validate on, spread evenly; their
            loss is that of answers, whatever `input_loss`.
        storage: Cache and access for sources in object storage.
        allow_changed_data: Let a resume go on with other sources, seed, window, weights or packing.
    """

    def __init__(
        self,
        sources: dict[str, ChatSource],
        window: int = 4096,
        batch_tokens: int = 4096 * 16,
        micro_batch_size: int = 1,
        input_loss: float = 0.0,
        mean: Mean = "token",
        position_transform: PositionTransform | None = None,
        sorted: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        held_out_windows: int = 32,
        storage: ObjectStorage = ObjectStorage(),
        allow_changed_data: bool = False,
    ) -> None:
        super().__init__()
        check_shares(sources)
        if held_out_windows < 0 or min(micro_batch_size, batch_tokens) < 1:
            raise ValueError(
                "expected micro_batch_size and batch_tokens of 1 or more, held_out_windows of 0 or "
                f"more; got {micro_batch_size}, {batch_tokens} and {held_out_windows}"
            )
        if not 0 <= input_loss <= 1:
            raise ValueError(f"expected an input_loss between 0 and 1; got {input_loss}")
        if sorted and any(source.packing != "none" for source in sources.values()):
            raise ValueError("sorted batching needs packing none in every source; set it")
        self.sources = sources
        self.input_loss = input_loss
        self.mean: Mean = mean
        self.position_transform = position_transform
        self.sorted = sorted
        self.seed = seed
        self.num_workers = num_workers
        self.held_out_windows = held_out_windows
        self.storage = storage
        self.allow_changed_data = allow_changed_data
        self.packing = ", ".join(f"{name} {source.packing}" for name, source in sources.items())
        stage = Stage(ENDLESS, window, batch_tokens, micro_batch_size, given_weights(sources))
        self.stage_schedule = StageSchedule([stage])
        self.window = window
        opened = [self._open(name, "train") for name in sources]
        self._check_opened(opened)
        self.tokenizer = common_tokenizer(each.windows for each in opened)
        hashes = [each.windows.content_hash for each in opened]
        self.contents = dict(zip(sources, hashes, strict=True))
        self.tokenizer_folder = opened[0].windows.tokenizer_folder

    def _check_opened(self, opened: Sequence[Conversations]) -> None:
        """Refuse conversations beyond the transform, and sources of different templates or ids."""
        longest = max(int(each.lengths.max()) for each in opened)
        if self.position_transform and longest > self.position_transform.context:
            raise ValueError(
                f"a conversation has {longest} tokens, position_transform knows "
                f"{self.position_transform.context}; raise them or shorten the window"
            )
        told = [each.windows.manifest.files.get(TEMPLATE) for each in opened]
        if any(other != told[0] for other in told):
            raise ValueError(
                "sources were prepared with different chat templates; prepare all with one"
            )
        tokenizers = [each.windows.manifest.tokenizer for each in opened]
        if any(other != tokenizers[0] for other in tokenizers):
            raise ValueError(
                "sources were prepared with different tokenizers; prepare all with one"
            )

    def _open(self, name: str, split: str) -> Conversations:
        found = Conversations(self.sources[name].folder, split, self.window, self.storage)
        if split == "train" and not len(found):
            raise ValueError(f"source {name}, {split}: no conversation fits {self.window} tokens")
        return found

    def readers(self, stage: Stage) -> dict[str, ConversationRows]:
        """Return the rows of every source."""
        return {
            name: ConversationRows(self._open(name, "train"), source.packing)
            for name, source in self.sources.items()
        }

    def held_out(self, stage: Stage) -> dict[str, ConversationRows]:
        """Return the held-out rows of every source."""
        return {
            name: ConversationRows(self._open(name, "held_out"), source.packing)
            for name, source in self.sources.items()
        }

    def order(
        self,
        readers: Mapping[str, ConversationRows],
        stage: Stage,
        read: Mapping[str, int] | None = None,
    ) -> "SampleIndex | Sorted":
        """Return the order of samples."""
        weights = list(stage.weights.values()) if stage.weights else None
        if self.sorted:
            lengths = [reader.conversations.lengths for reader in readers.values()]
            return Sorted(lengths, weights, self.seed, stage.rows)
        groups = [reader.groups for reader in readers.values()]
        return SampleIndex([len(reader) for reader in readers.values()], weights, self.seed, groups)

    def batch(
        self,
        readers: Mapping[int, ConversationRows],
        rows: Rows,
        training: bool,
        document_mask: bool | None = None,
    ) -> Batch:
        """Read rows; in validation the targets are the answers, and all stands where it stands.

        Conversations are always kept apart.
        """
        padding = next(iter(readers.values())).padding()
        found = [padding if row < 0 else readers[source][row] for source, row, _ in rows]
        longest = max(1, *(int((row.tokens != NO_TARGET).sum()) for row in found))
        width = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, self.window) + 1
        tokens, starts, answers = (
            torch.from_numpy(np.stack(column)[:, :width]) for column in zip(*found, strict=True)
        )
        batch = pack(
            tokens,
            self.tokenizer.bos,
            starts,
            sources=torch.tensor([source for source, *_ in rows]),
            samples=torch.tensor([sample for *_, sample in rows]),
        )
        if not training:
            return batch._replace(labels=batch.labels.masked_fill(~answers[:, 1:], NO_TARGET))
        batch = weigh(batch, answers[:, 1:], self.input_loss, self.mean)
        return self.position_transform(batch, answers[:, :-1]) if self.position_transform else batch


@final
class Sorted:
    """Global sample number → (source, conversation): every step takes conversations of like length.

    Sorted by length, cut into groups of a step's rows, groups in random order (Bai et al. 2024,
    arXiv:2401.18058, §3.2). What is left over makes a last group with the longest of the others.
    A pure function of its arguments, like `SampleIndex`.

    Args:
        lengths: Tokens of each source's conversations.
        weights: Share of the steps that each source gets; default: its share of the groups.
        seed: Decides the order of groups.
        rows: Conversations of an optimizer step, over all processes.
    """

    def __init__(
        self,
        lengths: Sequence[np.ndarray],
        weights: Sequence[float] | None,
        seed: int,
        rows: int,
    ) -> None:
        if (fewest := min(map(len, lengths))) < rows:
            raise ValueError(
                f"sorted batching needs {rows} conversations of a source for a step; one has "
                f"{fewest}; lower batch_tokens"
            )
        self.rows = rows
        self.by_length = [np.argsort(each, kind="stable") for each in lengths]
        self.order = SampleIndex([-(-len(each) // rows) for each in lengths], weights, seed)

    def __call__(self, sample: int) -> tuple[int, int]:
        """Return source and conversation of a sample."""
        step, row = divmod(sample, self.rows)
        source, group = self.order(step)
        windows = self.by_length[source]
        first = min(group * self.rows, len(windows) - self.rows)
        return source, int(windows[first + row])
