"""`lit_longctx plan`: memory, FLOPs and time of a config, before anything is loaded."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from lit_longctx.training import estimate
from lit_longctx.training.estimate import MemoryByKind
from lit_longctx.training.fit import CLI, quiet, run_cli
from lit_longctx.training.hardware import GIB, HARDWARE, SHAPES, Hardware
from lit_longctx.training.memory_count import parameter_counts
from lit_longctx.training.planned_run import (
    PlanSettings,
    RunPlan,
    check_fits,
    lengths_of,
    read_run,
    shares_of,
)
from lit_longctx.training.watchdog import Watchdog

DISK = 1e9
"""Bytes per second that a node is taken to write and hash of a checkpoint."""
NODE = 8
"""GPUs of a host."""


def plan(arguments: Sequence[str]) -> None:
    """Print what a config of `fit` takes; arguments are those of `fit` and the plan's own.

    Raises:
        UnknownShape: Neither a checkpoint nor a shape is there (exit code 2).
        DoesNotFit: A stage needs more memory than a device has (exit code 3).
    """
    parser = argparse.ArgumentParser(
        "lit_longctx plan",
        description="Memory, FLOPs and time of a config of fit; all options of fit change it.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", help="config of lit_longctx fit")
    parser.add_argument("--shape", help=" | ".join(SHAPES))
    parser.add_argument("--hardware", help=" | ".join((*HARDWARE, "cpu")))
    parser.add_argument("--gpus", type=int, help="devices in all")
    parser.add_argument("--efficiency", type=float, help="share of the device's peak, causal MFU")
    parser.add_argument(
        "--solve", choices=("window", "gpus"), help="longest window, or fewest GPUs, that fit"
    )
    own, rest = parser.parse_known_args(arguments)
    if own.config is None:
        raise ValueError("plan needs --config, a config of lit_longctx fit such as abf_32k.yaml")
    options = options_given(["--config", own.config, *rest])
    given = {n: v for n in ("shape", "hardware", "gpus") if (v := getattr(own, n)) is not None}
    run = read_run(options, replace(options_of(options.plan), **given))
    print(f"plan of {own.config}")
    for line in report(run, own.efficiency):
        print(line, flush=True)
    if own.solve:
        print("\n".join(solved(run, own.solve)))
    else:
        check_fits(run)


def options_given(arguments: Sequence[str]) -> Any:
    """Return the options of `fit` that these arguments give; nothing is built."""
    quiet()
    run_cli(["fit", *arguments], Watchdog(), Parsed)
    return Parsed.parsed


class Parsed(CLI):
    """The command line of `fit`, stopped before it builds anything."""

    parsed: Any = None

    def before_instantiate_classes(self) -> None:
        """Nothing is guarded, since nothing runs."""

    def instantiate_classes(self) -> None:
        """Nothing is built."""

    def _run_subcommand(self, subcommand: str) -> None:
        type(self).parsed = self.config[subcommand]


def options_of(given: Any) -> PlanSettings:
    """Return the config's own part of a plan."""
    return given if isinstance(given, PlanSettings) else PlanSettings(**given.as_dict())


def solved(run: RunPlan, what: str) -> Iterator[str]:
    """Yield, for each stage, the longest window or the fewest devices that fit."""
    for number, work in enumerate(run.works):
        stage = f"stage {number + 1}: " if len(run.works) > 1 else ""
        if what == "window":
            tokens = estimate.longest_window(work, run.hardware)
            on = f"{work.processes} × {run.hardware.name}"
            yield f"{stage}longest window on {on}, micro_batch_size 1: {tokens:,} tokens"
        else:
            fewest = estimate.fewest_devices(work, run.hardware)
            yield f"{stage}fewest {run.hardware.name} for window {work.window:,}: " + (
                f"{fewest:,}" if fewest else "none are enough; see --solve window"
            )


# ---- the report


def report(run: RunPlan, efficiency: float | None) -> Iterator[str]:
    """Yield the lines of the plan."""
    work, hardware = run.works[0], run.hardware
    block, root = parameter_counts(run.config)
    parameters = block * run.config.num_hidden_layers + root
    device = "process" if hardware.is_cpu else "GPU"
    yield f"{parameters:,} parameters on {work.processes} × {hardware.name}"
    peak = hardware.flops or (cpu_peak(work.cpu_dtype) if hardware.is_cpu else None)
    efficiency = efficiency or hardware.efficiency
    memory = [estimate.memory_by_kind(each, hardware.reserved) for each in run.works]
    yield from _table(
        ["", *(f"stage {i + 1}" if len(run.stages) > 1 else "run" for i in range(len(memory)))],
        [
            ["steps", *(f"{s.steps:,}" for s in run.stages)],
            ["window, tokens", *(f"{s.window:,}" for s in run.stages)],
            ["tokens per step", *(f"{s.batch_tokens:,}" for s in run.stages)],
            ["micro-batches of a process", *(f"{w.micro_batches:,}" for w in run.works)],
            *_memory_rows(memory, device, hardware),
            *_time_rows(run, peak, efficiency),
        ],
    )
    yield from _epochs(run)
    moments = estimate.MOMENT_BYTES[work.levers.optimizer]
    saved = parameters * (4 + moments)
    yield f"a checkpoint: {saved / GIB:,.1f} GiB, {saved / DISK:,.0f} s at {DISK / 1e9:g} GB/s"
    yield "assumed: " + "; ".join(_assumptions(run, peak, efficiency))


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        yield "  ".join(cells).rstrip()


MEMORY = {
    "weights": "master weights",
    "moments": "moments",
    "gradients": "gradients",
    "gathered": "gathered by FSDP2",
    "block_inputs": "kept for backward",
    "widest": "widest block or head",
    "gathered_keys": "  of it keys and values gathered",
    "reserved": "reserve",
    "device": "in all",
}
"""Rows of the table: what is shown of `MemoryByKind`."""


def _memory_rows(
    memory: Sequence[MemoryByKind], device: str, hardware: Hardware
) -> Iterator[list[str]]:
    yield [f"GiB per {device}, of {hardware.bytes / GIB:,.1f}", *("" for _ in memory)]
    for name, shown in MEMORY.items():
        values = [getattr(each, name) for each in memory]
        if any(values):
            yield [f"  {shown}", *(f"{value / GIB:,.2f}" for value in values)]
    if any(each.host for each in memory):
        per_host = 1 if hardware.is_cpu else NODE
        yield [
            f"GiB per host of {per_host}, offloaded",
            *(f"{each.host * per_host / GIB:,.1f}" for each in memory),
        ]


def _time_rows(run: RunPlan, peak: float | None, efficiency: float) -> Iterator[list[str]]:
    flops, seconds, busiest = [], [], []
    for stage, layers, work in zip(run.stages, run.layers, run.works, strict=True):
        known = lengths_of(run.ledgers, shares_of(stage, run))
        lengths = known if stage.document_mask else None
        flops.append(estimate.flops_per_token(work, layers, lengths))
        busiest.append(estimate.busiest_share(work, lengths))
        if peak:
            seconds.append(estimate.seconds_per_step(work, flops[-1], peak, efficiency))
    yield ["GFLOPs per token, causal", *(f"{each / 1e9:,.2f}" for each in flops)]
    if any(each > 1 for each in busiest):
        yield ["attention of the busiest process", *(f"{each:.2f} ×" for each in busiest)]
    if not seconds:
        return
    yield ["seconds per step", *(f"{each:,.1f}" for each in seconds)]
    days = [s.steps * each / 86_400 for s, each in zip(run.stages, seconds, strict=True)]
    yield ["days", *(f"{each:,.2f}" for each in days)]
    daily = (s.batch_tokens / each * 86_400 for s, each in zip(run.stages, seconds, strict=True))
    yield ["tokens per day", *(f"{each:,.0f}" for each in daily)]


def _epochs(run: RunPlan) -> Iterator[str]:
    """Yield how often each source is read; of what is not there nothing is known."""
    read = dict.fromkeys(run.sources, 0.0)
    for stage in run.stages:
        for name, share in shares_of(stage, run).items():
            read[name] += share * stage.steps * stage.batch_tokens
    for name, tokens in read.items():
        if name in run.ledgers:
            share = tokens / max(1, run.ledgers[name].tokens)
            yield f"source {name}: {tokens:,.0f} tokens, {share:,.2f} epochs"
    if missing := [name for name in run.sources if name not in run.ledgers]:
        yield f"no data there, epochs unknown: {', '.join(missing)}"


def _assumptions(run: RunPlan, peak: float | None, efficiency: float) -> Iterator[str]:
    hardware = run.hardware
    if peak is None:
        yield f"no peak of {hardware.name} is known, so no time"
    else:
        measured = "measured now" if hardware.is_cpu else "bfloat16, dense"
        yield f"--efficiency {efficiency:g} of {peak / 1e12:,.2f} TFLOP/s ({measured})"
    yield "document lengths of the data" if run.ledgers else "every row is one document"
    yield "torch's own kernels of this CPU" if hardware.is_cpu else "FlashAttention 2's memory"
    if not hardware.is_cpu:
        yield f"{hardware.reserved / GIB:g} GiB for CUDA, NCCL and gaps; {NODE} GPUs a host"


def cpu_peak(dtype: torch.dtype | None) -> float:
    """Measure what the processor's matrix products reach, in FLOP/s, within half a second."""
    size = 1024
    x = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        begin = perf_counter()
        torch.mm(x, x)
        best = min(best, perf_counter() - begin)
    return 2 * size**3 / best
