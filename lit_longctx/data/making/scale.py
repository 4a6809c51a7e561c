"""`prepare` in parts, on one machine or many.

datatrove runs the parts; `join` makes one folder of them.
"""

import importlib
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lit_longctx import manifest
from lit_longctx.data.store.chunks import BLOCK, SPLITS, SplitWriter
from lit_longctx.data.store.data_manifest import Manifest, SplitInfo
from lit_longctx.data.store.windows import Windows

SAME = ("format", "block", "chunk_tokens", "tokenizer", "settings")
"""What the manifests of all parts must agree on."""
STRETCH = 2**22
"""Tokens that are copied at a time."""
Prepare = Callable[..., Any]


@dataclass(frozen=True)
class Executor:
    """One of datatrove's executors (Local-, Slurm- or RayPipelineExecutor); extra `scale`."""

    name: str = "datatrove.executor.LocalPipelineExecutor"
    """Which one, by its import path."""
    options: dict[str, Any] = field(default_factory=lambda: {"tasks": 1})
    """Its arguments but the pipeline; `tasks` is the number of parts."""

    def run(self, step: Callable[[Any, int, int], None], logs: Path) -> None:
        """Run every part whose folder is not there yet; Slurm's returns once they are queued."""
        module, _, kind = self.name.rpartition(".")
        try:
            executor = getattr(importlib.import_module(module), kind)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"executor {self.name} not found ({error}); "
                "install it with pip install 'lit_longctx[scale]'"
            ) from None
        executor(**{"pipeline": [step], "logging_dir": str(logs), **self.options}).run()


@dataclass(frozen=True)
class Part:
    """A step of a datatrove pipeline: prepares one part, unless it is there already."""

    prepare: Prepare
    folder: Path

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """Prepare part `rank` of `world_size`."""
        if not (target := part_folder(self.folder, rank)).exists():
            self.prepare(output=str(target), part=rank, parts=world_size)


def part_folder(folder: Path, part: int) -> Path:
    """Where a part lies."""
    return folder / f"{part:05d}"


def in_parts(
    prepare: Prepare, executor: Executor, output: Path, source: str | None
) -> dict[str, Any] | None:
    """Run the parts that are missing into OUTPUT.parts; once all are there, join them to OUTPUT."""
    if output.exists():
        raise ValueError(f"{output} exists already; choose another folder or remove it")
    number = int(executor.options.get("tasks", 1))
    if number < 1:
        raise ValueError(f"executor's tasks {number} must be 1 or more, the number of parts")
    folder = output.with_name(f"{output.name}.parts")
    logs = folder / "logs"
    folders = [part_folder(folder, part) for part in range(number)]
    for part, target in enumerate(folders):
        if not target.exists():  # datatrove would take its own mark for the folder
            (logs / "completions" / f"{part:05d}").unlink(missing_ok=True)
    executor.run(Part(prepare, folder.resolve()), logs.resolve())
    missing = [target.name for target in folders if not target.exists()]
    if missing:
        print(
            f"{number - len(missing)} of {number} parts are in {folder}; give the same command "
            "again when the others are there"
        )
        return None
    return join(folders, output, source)


def join(folders: list[Path], output: Path, source: str | None = None) -> dict[str, Any]:
    """Make one prepared folder of all parts.

    It holds the same bytes as if it had been prepared at once, but for `interleave` and
    `hard_negatives`, whose groups end with their part. Every file's hash, the parts' settings and
    the sums of tokens are checked. Costs a copy.

    Args:
        folders: Parts in order.
        output: Folder to make; must not exist.
        source: Name of the source in reports; default: the output folder's name.

    Raises:
        ValueError: A part is missing, altered, of another run, or tokens do not add up.
    """
    parts = [_verified(folder, i, len(folders)) for i, folder in enumerate(folders)]
    first = parts[0]
    for folder, part in zip(folders, parts, strict=True):
        for name in SAME:
            if getattr(part, name) != getattr(first, name):
                raise ValueError(
                    f"{folder} was prepared otherwise than {folders[0]}: expected {name} "
                    f"{getattr(first, name)}, got {getattr(part, name)}; remove the parts that are "
                    "wrong, run again"
                )
    with manifest.whole_folder(output) as target:
        writers = {}
        for split in SPLITS:
            writer = SplitWriter(target / split, first.tokenizer, first.chunk_tokens)
            for folder, part in zip(folders, parts, strict=True):
                if part.splits[split].documents:
                    copy(Windows(folder, split, BLOCK), writer)
            if writer.ledger.documents:
                writer.finish()
            _compare(writer.info(), [part.splits[split] for part in parts])
            writers[split] = writer
        shutil.copytree(folders[0] / "tokenizer", target / "tokenizer")
        joined = replace(
            first,
            source=source or output.name,
            round_trip=min(part.round_trip for part in parts),
            part=(0, 1),
            splits={split: writer.info() for split, writer in writers.items()},
            broken=_summed([part.broken for part in parts]),
            notes=_summed([part.notes for part in parts]),
            filter=_filtered([part.filter for part in parts]),
        ).as_json()
        manifest.seal(target, manifest.hash_files(target), **joined)
    print(f"joined {len(parts)} parts with {writers['train'].ledger.tokens:,} tokens to train on")
    print(f"wrote {output}; {folders[0].parent} can be removed")
    return joined


def _verified(folder: Path, number: int, parts: int) -> Manifest:
    """Return the manifest of a part whose files are all as it says."""
    if not folder.is_dir():
        raise ValueError(f"part {folder} is missing; prepare it, then join again")
    try:
        found = Manifest.from_json(manifest.verify(folder), folder)
    except ValueError as error:
        raise ValueError(f"{error}; remove {folder} and run again") from None
    if found.part != (number, parts):
        raise ValueError(
            f"{folder} is part {found.part[0]} of {found.part[1]}, expected {number} of "
            f"{parts}; remove it and run again"
        )
    return found


def copy(windows: Windows, writer: SplitWriter) -> None:
    """Append all documents of a split, without the padding at its end."""
    lengths = windows.document_lengths()
    ends = lengths.cumsum(dtype=np.int64)
    cuts = [0, *np.searchsorted(ends, np.arange(STRETCH, ends[-1], STRETCH)).tolist(), len(lengths)]
    for first, last in pairwise(cuts):
        if first < last:
            begin, end = int(ends[first] - lengths[first]), int(ends[last - 1])
            writer.extend(windows.read(begin, end), lengths[first:last].tolist())


def _compare(found: SplitInfo, expected: list[SplitInfo]) -> None:
    """ValueError unless the joined documents and tokens are the sums of the parts'."""
    for name in ("documents", "text_tokens"):
        total = sum(getattr(part, name) for part in expected)
        if (joined := getattr(found, name)) != total:
            raise ValueError(f"the parts hold {total} {name}, joined they are {joined}")


def _summed(parts: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Faults of all parts; the first example of each kind."""
    counts = Counter[str]()
    first: dict[str, str] = {}
    for part in parts:
        for kind, fault in part.items():
            counts[kind] += fault["count"]
            first.setdefault(kind, fault["first"])
    return {kind: {"count": number, "first": first[kind]} for kind, number in counts.items()}


def _filtered(parts: list[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """What the filter kept and dropped in all parts; scores are in the parts' own manifests."""
    reports = [part for part in parts if part]
    sums = ("kept", "dropped", "kept_tokens", "dropped_tokens")
    return {name: sum(report[name] for report in reports) for name in sums} if reports else None
