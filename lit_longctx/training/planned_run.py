"""A run as its config describes it, before anything of it is built, and whether it fits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lit_longctx import manifest
from lit_longctx.checkpoint import open_checkpoint
from lit_longctx.data.sampling.stages import ENDLESS, Stage
from lit_longctx.data.store.data_manifest import Manifest, SplitInfo
from lit_longctx.model import LlamaConfig, layers_of
from lit_longctx.model.layers import LayerKind, LayerPattern, Layers
from lit_longctx.position import RoPE
from lit_longctx.training import estimate
from lit_longctx.training.estimate import DoesNotFit, Lengths, Workload
from lit_longctx.training.hardware import GIB, SHAPES, Hardware, named_hardware
from lit_longctx.training.memory_count import Levers


class UnknownShape(ValueError):
    """Neither a checkpoint nor a shape says how large the model is."""

    exit_code = 2


@dataclass(frozen=True)
class PlanSettings:
    """What `lit_longctx plan` takes for granted; of no effect on training."""

    shape: str | None = None
    """Shape of the model where its checkpoint is not there, by name: llama3-8b, …"""
    hardware: str | None = None
    """a100_80gb, h100_80gb, h200_141gb, b200_192gb or cpu; default: what this machine has."""
    gpus: int | None = None
    """Devices in all; default: as the trainer says, or what this machine has."""


@dataclass(frozen=True)
class RunPlan:
    """A run as its config describes it."""

    config: LlamaConfig
    layers: list[Layers]
    """Of each stage."""
    stages: list[Stage]
    works: list[Workload]
    """One for each stage."""
    hardware: Hardware
    sources: Mapping[str, Any]
    """The config's sources, by name."""

    @cached_property
    def ledgers(self) -> dict[str, SplitInfo]:
        """Training ledgers of the local folders that are there, by source; read when needed."""
        found = {}
        for name, source in self.sources.items():
            folder = Path(source.folder)
            if (folder / manifest.NAME).is_file():
                found[name] = Manifest.from_json(manifest.read(folder), folder).splits["train"]
        return found

    @property
    def is_small(self) -> bool:
        """Whether a bound far above what is used fits, so that nothing need be counted."""
        return all(estimate.bound(work) < self.hardware.bytes / 2 for work in self.works)


# ---- a config

MODEL_OPTIONS = """checkpoint config position compute_dtype recompute offload mlp_tile_tokens
head_chunk_tokens optimizer cpu_offload"""
DATA_OPTIONS = "sources window batch_tokens micro_batch_size"


def read_run(options: Any, settings: PlanSettings) -> RunPlan:
    """Return the run that parsed options of `fit` describe; nothing of it is built.

    Raises:
        UnknownShape: There is no checkpoint and no shape, or a class of the user's own decides.
    """
    model, data, trainer = options.model.init_args, options.data.init_args, options.trainer
    for given, names in ((model, MODEL_OPTIONS), (data, DATA_OPTIONS)):
        for name in names.split():
            if name not in given:
                raise UnknownShape(f"a class of yours has no option {name}, which plan needs")
    config, layers = _shape(model, settings.shape)
    hardware = named_hardware(settings.hardware)
    sizes = data.window, data.batch_tokens, data.micro_batch_size
    run = Stage(ENDLESS, *sizes, document_mask=data.get("document_mask", True))
    given = [_stage(each) for each in data.get("stages") or []]
    stages = list(_until(trainer.max_steps, [stage.completed(run) for stage in given or [run]]))
    layers = [_pattern(stage.position, config) or layers for stage in stages]
    strategy = getattr(trainer.strategy, "init_args", None) or {}
    processes = settings.gpus or _devices(trainer, hardware)
    size = strategy.get("context_parallel_size", 1)
    replicas = strategy.get("replicate_size", 1)
    for name, value in (("context_parallel_size", size), ("replicate_size", replicas)):
        if processes % value:
            raise ValueError(f"{processes} processes do not divide by {name} {value}")
    levers = Levers(
        model.recompute,
        model.offload,
        model.mlp_tile_tokens,
        model.head_chunk_tokens,
        model.optimizer,
        model.cpu_offload,
        size,
        strategy.get("context_parallel", "zigzag"),
        strategy.get("kv_heads_at_once"),
    )
    cpu_dtype = getattr(torch, model.compute_dtype) if hardware.is_cpu else None
    works = [
        Workload(
            config,
            levers,
            stage.window,
            stage.batch_tokens,
            stage.micro_batch_size,
            processes,
            replicas,
            cpu_dtype,
        )
        for stage in stages
    ]
    return RunPlan(config, layers, stages, works, hardware, data.sources)


def _shape(model: Any, name: str | None) -> tuple[LlamaConfig, Layers]:
    checkpoint = model.checkpoint
    if checkpoint is not None and Path(checkpoint).exists():
        start = open_checkpoint(checkpoint)
        return start.config, _pattern(model.position, start.config) or start.layers
    if model.config is not None:
        config = LlamaConfig(**model.config.as_dict())
    elif name is None:
        raise UnknownShape(
            f"checkpoint {checkpoint} is not there: name the model's shape, "
            f"--shape {' | '.join(SHAPES)}"
        )
    elif (config := SHAPES.get(name)) is None:
        raise UnknownShape(f"shape {name!r} unknown; expected one of {', '.join(SHAPES)}")
    return config, _pattern(model.position, config) or layers_of(RoPE(), config)


def _pattern(position: Any, config: LlamaConfig) -> Layers | None:
    """Return layers with the windows of a config's pattern, if it has one; schemes cost alike."""
    if not (position and position.get("layers")):
        return None
    kinds = {name: LayerKind(RoPE(), kind.window) for name, kind in position.kinds.items()}
    return layers_of(LayerPattern(position.layers, kinds), config)


def _stage(given: Any) -> Stage:
    if isinstance(given, Stage):
        return given
    return Stage(**{**given.as_dict(), "position": given.get("position")})


def _until(steps: int, stages: Sequence[Stage]) -> Iterator[Stage]:
    """Cut stages off where the run ends; a run without an end has one of a step."""
    left = steps if steps > 0 else 1
    for stage in stages:
        if left > 0:
            yield replace(stage, steps=min(left, stage.steps))
        left -= stage.steps


def _devices(trainer: Any, hardware: Hardware) -> int:
    devices = trainer.devices
    if isinstance(devices, list):
        devices = len(devices)
    if not str(devices).isdigit():
        devices = 1 if hardware.is_cpu else max(1, torch.cuda.device_count())
    return int(devices) * int(trainer.num_nodes)


def lengths_of(ledgers: Mapping[str, SplitInfo], shares: Mapping[str, float]) -> Lengths | None:
    """Return document lengths of a mixture, each bucket by its mean; None if nothing is known."""
    found = []
    for name, ledger in ledgers.items():
        tokens = sum(bucket[2] for bucket in ledger.lengths) or 1
        share = shares.get(name, 0.0) / tokens
        found += [(n / documents, n * share) for _, documents, n in ledger.lengths if documents]
    return found or None


def shares_of(stage: Stage, run: RunPlan) -> dict[str, float]:
    """Return the share of a stage's tokens by source, from weights or else from sizes."""
    given = stage.weights or {n: s.weight for n, s in run.sources.items() if s.weight is not None}
    given = given or {name: float(ledger.tokens) for name, ledger in run.ledgers.items()}
    total = sum(given.values()) or 1.0
    return {name: value / total for name, value in given.items()}


# ---- what would fit


def remedies(work: Workload, hardware: Hardware) -> list[str]:
    """Return single settings by which a step that does not fit would; if none, those together."""
    levers = work.levers
    whole = "block" if levers.recompute in ("none", "elementwise") else levers.recompute
    size = levers.context_parallel_size
    changes: list[tuple[str, Callable[[Workload], Workload]]] = [
        ("micro_batch_size 1", lambda w: replace(w, rows=1)),
        ("recompute block", lambda w: _with(w, recompute="block")),
        ("mlp_tile_tokens 4096", lambda w: _with(w, mlp_tile_tokens=4096)),
        ("offload block_inputs", lambda w: _with(w, recompute=whole, offload="block_inputs")),
        ("optimizer adamw_bf16_moments", lambda w: _with(w, optimizer="adamw_bf16_moments")),
    ]
    parts = (n for n in (2, 4, 8) if n > size and work.processes % n == 0)
    if part := max(parts, default=0):
        changes.append(
            (f"context_parallel_size {part}", lambda w: _with(w, context_parallel_size=part))
        )
    if not hardware.is_cpu:
        changes.append(("cpu_offload true", lambda w: _with(w, cpu_offload=True)))
    single = [
        name
        for name, change in changes
        if change(work) != work and estimate.fits(change(work), hardware)
    ]
    if single:
        return single
    together, names = work, []
    for name, change in changes:
        if change(together) != together:
            together = change(together)
            names.append(name)
        if estimate.fits(together, hardware):
            return [" with ".join((", ".join(names[:-1]), names[-1])) if names[1:] else names[0]]
    return []


def _with(work: Workload, **levers: Any) -> Workload:
    return replace(work, levers=replace(work.levers, **levers))


def check_fits(run: RunPlan, otherwise: str = "") -> None:
    """Raise DoesNotFit, which says what would, if a stage needs more than a device has.

    Args:
        run: What is to run.
        otherwise: Said at the end of the message.
    """
    for number, work in enumerate(run.works):
        needed = estimate.needed(work, run.hardware)
        if needed <= run.hardware.bytes:
            continue
        stage = f"stage {number + 1}, " if len(run.works) > 1 else ""
        ways = remedies(work, run.hardware)
        way = f"any of these would: {'; '.join(ways)}" if ways else "take more GPUs"
        raise DoesNotFit(
            f"{stage}window {work.window:,} does not fit: {needed / GIB:,.1f} GiB of "
            f"{run.hardware.bytes / GIB:,.1f} on {run.hardware.name}; {way}"
            + (f"; {otherwise}" if otherwise else "")
        )
