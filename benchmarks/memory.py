"""How long a row fits: GPU and host memory by model, levers and number of GPUs, counted.

    python benchmarks/memory.py            # minutes on a CPU: nothing is trained, no GPU is needed
    python benchmarks/memory.py --claims   # Llama-3-8B on 8 GPUs alone
    python benchmarks/memory.py --figure docs/memory.png
    python benchmarks/memory.py --recipes  # from the repository's root: the configs for GPUs

The counts are those of `lit_longctx plan` (lit_longctx/training/estimate.py). See docs/memory.md
for what is assumed.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from matplotlib.figure import Figure

from lit_longctx.training.estimate import (
    MemoryByKind,
    Workload,
    flops_per_token,
    longest_window,
    memory_by_kind,
    seconds_per_step,
)
from lit_longctx.training.hardware import GIB, HARDWARE, SHAPES
from lit_longctx.training.memory_count import Levers
from lit_longctx.training.plan import options_given, options_of
from lit_longctx.training.planned_run import read_run

LENGTHS = [2**n for n in range(15, 21)]
TILE = 4096

LLAMA = {"Llama-2-7B": "llama2-7b", "Llama-3-8B": "llama3-8b", "Llama-3.2-1B": "llama3.2-1b"}
H100 = HARDWARE["h100_80gb"]

BLOCK = Levers()
TILED = replace(BLOCK, mlp_tile_tokens=TILE)
OFFLOADED = replace(BLOCK, offload="block_inputs")
BOTH = replace(TILED, offload="block_inputs")
SMALL = replace(BOTH, optimizer="adamw_bf16_moments")
ON_HOST = replace(BOTH, cpu_offload=True)
CONTEXT = replace(BLOCK, context_parallel_size=8)
CONTEXT_TILED = replace(CONTEXT, mlp_tile_tokens=TILE, kv_heads_at_once=1)
ULYSSES = replace(CONTEXT, context_parallel="ulysses", mlp_tile_tokens=TILE)
ALL = replace(CONTEXT_TILED, offload="block_inputs")
ALL_ULYSSES = replace(ULYSSES, offload="block_inputs")
ALL_64 = replace(ALL, context_parallel_size=64)

NAMES = {
    replace(BLOCK, recompute="elementwise"): "`recompute: elementwise` (default)",
    replace(BLOCK, recompute="attention_kept"): "`recompute: attention_kept`",
    BLOCK: "`recompute: block`",
    TILED: "block, tiled MLP",
    OFFLOADED: "block, block inputs offloaded",
    BOTH: "block, tiled MLP, block inputs offloaded",
    SMALL: "the same, `adamw_bf16_moments`",
    ON_HOST: "the same, `cpu_offload`",
    CONTEXT: "block, zigzag over 8",
    CONTEXT_TILED: "the same, tiled MLP, `kv_heads_at_once: 1`",
    ULYSSES: "block, ulysses over 8, tiled MLP",
    ALL: "all of it, zigzag over 8, `kv_heads_at_once: 1`",
    ALL_ULYSSES: "all of it, ulysses over 8",
    ALL_64: "all of it, zigzag over 64, `kv_heads_at_once: 1`",
}
WANTED = {
    TILED: 160_000,
    OFFLOADED: 240_000,
    BOTH: 450_000,
    CONTEXT: 850_000,
    CONTEXT_TILED: 1_000_000,
    ULYSSES: 1_000_000,
    ALL: 3_500_000,
    ALL_ULYSSES: 3_500_000,
}
"""Tokens that Llama-3-8B on 8 GPUs is to reach."""


def workload(model: str, gpus: int, levers: Levers, tokens: int) -> Workload:
    """A step of one row of a group, of many micro-batches."""
    return Workload(SHAPES[LLAMA[model]], levers, tokens, 2**40, 1, gpus)


@cache
def memory(model: str, gpus: int, levers: Levers, tokens: int) -> MemoryByKind:
    return memory_by_kind(workload(model, gpus, levers, tokens), H100.reserved)


def longest(model: str, gpus: int, levers: Levers) -> int:
    """Tokens of the longest row that fits a GPU; 0 if not even the states do."""
    return longest_window(workload(model, gpus, levers, 1), H100)


def shown(needed: MemoryByKind) -> str:
    gib = needed.device / GIB
    return f"**{gib:,.0f}**" if needed.device <= H100.bytes else f"{gib:,.0f}"


def on_host(model: str, gpus: int, levers: Levers, tokens: int) -> float:
    """GiB in the memory of a node of up to 8 GPUs."""
    return memory(model, gpus, levers, tokens).host * min(gpus, 8) / GIB if tokens else 0.0


def rows(model: str, gpus: int) -> Iterator[str]:
    for levers, name in NAMES.items():
        if levers.context_parallel_size > gpus:
            continue
        most = longest(model, gpus, levers)
        cells = [shown(memory(model, gpus, levers, tokens)) for tokens in LENGTHS]
        host = f"{on_host(model, gpus, levers, most):,.0f} |"
        yield " | ".join([f"| {name}", *cells, f"{most:,}", host])


def claims() -> None:
    print("Llama-3-8B, 8 GPUs:\n\n| levers | KiB a token | longest row | aimed at | host GiB |")
    print("|---|---|---|---|---|")
    for levers in (BLOCK, *WANTED):
        most = longest("Llama-3-8B", 8, levers)
        size = levers.context_parallel_size
        low, high = (memory("Llama-3-8B", 8, levers, n * size).device for n in (2**17, 2**18))
        wanted = f"{WANTED[levers]:,}" if levers in WANTED else ""
        host = on_host("Llama-3-8B", 8, levers, most)
        per_token = (high - low) / 2**17 / 2**10
        print(f"| {NAMES[levers]} | {per_token:.0f} | {most:,} | {wanted} | {host:,.0f} |")


def figure(file: Path) -> None:
    """Draw memory against the row's length, a line per lever: Llama-3-8B on 8 GPUs."""
    drawn = Figure(figsize=(9.5, 4.5), layout="constrained")
    axes = drawn.subplots()
    for levers, name in NAMES.items():
        if levers.context_parallel_size <= 8:
            lengths = [2**n for n in range(13, 22)]
            gib = [memory("Llama-3-8B", 8, levers, n).device / GIB for n in lengths]
            style = "-" if levers.context_parallel_size == 1 else "--"
            axes.plot(lengths, gib, style, marker=".", label=name.replace("`", ""))
    axes.axhline(H100.bytes / GIB, color="black", linewidth=1)
    axes.set(xscale="log", ylim=(0, 160), xlabel="tokens of a row", ylabel="GiB per GPU")
    axes.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
    axes.set_xticks([], minor=True)
    drawn.legend(loc="outside right upper", fontsize=7)
    drawn.savefig(file, dpi=150)


def recipes() -> None:
    """Print what every recipe for GPUs takes on the hardware that its own plan names."""
    print("| config | GPUs | window | GiB of 80 | seconds per step | days |\n" + "|---" * 6 + "|")
    for file in sorted(Path("config").glob("*.yaml")):
        if "\nplan:" not in file.read_text():
            continue
        options = options_given(["--config", str(file)])
        run = read_run(options, options_of(options.plan))
        for stage, layers, work in zip(run.stages, run.layers, run.works, strict=True):
            needed = memory_by_kind(work, H100.reserved).device / GIB
            assert H100.flops
            flops = flops_per_token(work, layers)
            seconds = seconds_per_step(work, flops, H100.flops, H100.efficiency)
            cells = [file.stem, str(work.processes), f"{stage.window:,}", f"{needed:.1f}"]
            cells += [f"{seconds:,.1f}", f"{seconds * stage.steps / 86_400:,.2f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="how long a row fits")
    parser.add_argument("--claims", action="store_true", help="Llama-3-8B on 8 GPUs alone")
    parser.add_argument("--figure", type=Path, help="draw Llama-3-8B on 8 GPUs to this file")
    parser.add_argument("--recipes", action="store_true", help="what the recipes of config/ take")
    arguments = parser.parse_args()
    if arguments.recipes:
        return recipes()
    if arguments.figure:
        return figure(arguments.figure)
    claims()
    if arguments.claims:
        return
    for model in LLAMA:
        for gpus in (1, 8, 64):
            print(f"\n{model}, {gpus} GPU{'s' * (gpus > 1)}, GiB on a GPU by tokens of the row:\n")
            heads = [f"{tokens // 1024}K" for tokens in LENGTHS]
            print(" | ".join(["| levers", *heads, "longest row", "host GiB a node |"]))
            print("|---" * (len(heads) + 3) + "|")
            for row in rows(model, gpus):
                print(row, flush=True)


if __name__ == "__main__":
    main()
