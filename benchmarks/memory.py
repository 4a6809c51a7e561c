"""How long a row fits: GPU and host memory by model, levers and number of GPUs, counted.

    python benchmarks/memory.py            # minutes on a CPU: nothing is trained, no GPU is needed
    python benchmarks/memory.py --claims   # Llama-3-8B on 8 GPUs alone

Activations are counted on the meta device at two lengths (lit_longctx/training/memory_count.py) and
grow in proportion between and beyond. See docs/memory.md for what is assumed.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from lit_longctx.model import LlamaConfig
from lit_longctx.training.memory_count import Levers, row_memory, sharded_memory

GIB = 2**30
GPU_GIB = 80
RESERVED_GIB = 3
"""For the CUDA context, NCCL and gaps in torch's allocator."""
COUNTED_AT = (2**16, 2**17)
"""Tokens of one process at which activations are counted."""
LENGTHS = [2**n for n in range(15, 21)]
TILE = 4096

LLAMA: dict[str, LlamaConfig] = {
    "Llama-2-7B": LlamaConfig(32_000, 4096, 11_008, 32, 32),
    "Llama-3-8B": LlamaConfig(128_256, 4096, 14_336, 32, 32, 8),
    "Llama-3.2-1B": LlamaConfig(128_256, 2048, 8192, 16, 32, 8, 64, tie_word_embeddings=True),
}

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


@dataclass(frozen=True)
class Line:
    """Bytes as a function of a row's tokens."""

    fixed: float
    per_token: float

    def at(self, tokens: int) -> float:
        """Bytes of a row."""
        return self.fixed + self.per_token * tokens


@cache
def activations(model: str, levers: Levers) -> tuple[Line, Line]:
    """Bytes of activations on a GPU, and of block inputs in its host's memory."""
    levers = replace(levers, optimizer="adamw", cpu_offload=False)
    first, last = (n * levers.context_parallel_size for n in COUNTED_AT)
    counted = (row_memory(LLAMA[model], tokens, levers) for tokens in (first, last))
    slopes = ((a, (b - a) / (last - first)) for a, b in zip(*counted, strict=True))
    device, host = (Line(a - slope * first, slope) for a, slope in slopes)
    return device, host


def lines(model: str, gpus: int, levers: Levers) -> tuple[Line, Line]:
    """Bytes on a GPU, and in its host's memory for it."""
    device, host = activations(model, levers)
    states, gathered = sharded_memory(LLAMA[model], gpus, levers)
    if levers.cpu_offload:
        return replace(device, fixed=device.fixed + gathered), replace(host, fixed=states)
    return replace(device, fixed=device.fixed + gathered + states), host


def longest(line: Line) -> int:
    """Tokens of the longest row that fits a GPU; 0 if not even the states do."""
    return max(0, int(((GPU_GIB - RESERVED_GIB) * GIB - line.fixed) / line.per_token))


def shown(line: Line, tokens: int) -> str:
    gib = line.at(tokens) / GIB
    return f"**{gib:,.0f}**" if gib <= GPU_GIB - RESERVED_GIB else f"{gib:,.0f}"


def rows(model: str, gpus: int) -> Iterator[str]:
    for levers, name in NAMES.items():
        if levers.context_parallel_size > gpus:
            continue
        device, host = lines(model, gpus, levers)
        most = longest(device)
        on_host = host.at(most) * min(gpus, 8) / GIB if most else 0
        cells = [shown(device, tokens) for tokens in LENGTHS]
        yield " | ".join([f"| {name}", *cells, f"{most:,}", f"{on_host:,.0f} |"])


def claims() -> None:
    print("Llama-3-8B, 8 GPUs:\n\n| levers | KiB a token | longest row | aimed at | host GiB |")
    print("|---|---|---|---|---|")
    for levers in (BLOCK, *WANTED):
        device, host = lines("Llama-3-8B", 8, levers)
        most = longest(device)
        per_token = device.per_token * levers.context_parallel_size / 2**10
        wanted = f"{WANTED[levers]:,}" if levers in WANTED else ""
        on_host = host.at(most) * 8 / GIB
        print(f"| {NAMES[levers]} | {per_token:.0f} | {most:,} | {wanted} | {on_host:,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="how long a row fits")
    parser.add_argument("--claims", action="store_true", help="Llama-3-8B on 8 GPUs alone")
    arguments = parser.parse_args()
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
