"""Memory of a process where several share a row: peak of a training step over what stands.

    python benchmarks/context_parallel.py                    # the table: 1, 2, 4 processes
    python benchmarks/context_parallel.py --figure OUT.png   # and a figure of it

CPU, gloo, float32, a thread a process. Keys and values that attention keeps of the whole row are
counted and subtracted in the second column: more processes do not make them fewer.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from train_step import SHAPE, fill, peak, reset_peak, resident, window

from lit_longctx.batch import Batch, pack
from lit_longctx.context_parallel import (
    ContextParallelName,
    apply_context_parallel,
    context_parallel,
)
from lit_longctx.model import Llama, LlamaConfig, initial_weight
from lit_longctx.position import RoPE
from lit_longctx.training.activations import apply_recompute

SMALL_HEAD: dict[str, Any] = {**SHAPE, "vocab_size": 2048}
"""The head's buffers do not depend on the number of tokens."""


def step(
    rank: int, size: int, store: str, tokens: int, name: ContextParallelName, found: Any
) -> None:
    """Measure this process's peak; the largest of all counts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    llama = Llama(LlamaConfig(**SMALL_HEAD), RoPE())
    apply_recompute(llama)
    if size > 1:
        apply_context_parallel(llama, context_parallel(name, None))
    fill(llama, initial_weight)
    for parameter in llama.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch, short = one_document(tokens), one_document(256)
    llama.loss(short)[0].backward()  # what is made once
    dist.barrier()
    standing = resident()
    reset_peak()
    llama.loss(batch)[0].backward()
    mine = torch.tensor(peak() - standing)
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    if rank == 0:
        found.append(float(mine))
    dist.destroy_process_group()


def one_document(tokens: int) -> Batch:
    ids = window(tokens, 1) % SMALL_HEAD["vocab_size"]
    starts = torch.zeros_like(ids, dtype=torch.bool)
    return pack(ids, bos=1, starts=starts)


def kept_keys(tokens: int, size: int) -> float:
    """Bytes of the keys and values that zigzag's attention keeps, over all layers."""
    heads, layers = SHAPE["num_key_value_heads"], SHAPE["num_hidden_layers"]
    head_dim = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    seen = tokens if size == 1 else tokens * (1 + 1 / (2 * size))  # both chunks have their own copy
    return layers * seen * 2 * heads * head_dim * 4


def measured(size: int, tokens: int, name: str, folder: Path) -> float:
    """Run one cell in fresh processes."""
    with torch.multiprocessing.Manager() as manager:
        found = manager.list()
        store = folder / f"store-{size}-{name}"
        store.unlink(missing_ok=True)
        arguments = (size, str(store), tokens, name, found)
        torch.multiprocessing.spawn(step, arguments, nprocs=size)
        return found[0]


def main(tokens: int, sizes: list[int], figure: str | None) -> None:
    """Print the table."""
    print(
        f"torch {torch.__version__}, {tokens:,} tokens in one document, peak over standing state\n"
    )
    print("| processes | zigzag MiB | of one | without keys and values | ulysses MiB | of one |")
    print("|---" * 6 + "|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            zigzag, ulysses = (
                measured(size, tokens, name, Path(folder)) for name in ("zigzag", "ulysses")
            )
            rows.append((size, zigzag, zigzag - kept_keys(tokens, size), ulysses))
            one = rows[0]
            print(
                f"| {size} | {zigzag / 2**20:,.0f} | {zigzag / one[1]:.2f} "
                f"| {rows[-1][2] / one[2]:.2f} | {ulysses / 2**20:,.0f} | {ulysses / one[3]:.2f} |",
                flush=True,
            )
    if figure:
        draw(rows, tokens, figure)


def draw(rows: list[tuple[int, float, float, float]], tokens: int, path: str) -> None:
    """Memory against processes, beside 1/n."""
    from matplotlib import pyplot

    sizes = [row[0] for row in rows]
    drawn, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for i, label in ((1, "zigzag"), (2, "zigzag, less keys and values"), (3, "ulysses")):
        axes.plot(sizes, [row[i] / 2**20 for row in rows], marker="o", label=label)
    axes.plot(sizes, [rows[0][1] / 2**20 / size for size in sizes], "k:", label="1/n")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("processes that share a row")
    axes.set_ylabel("MiB of a process over its standing state")
    axes.set_title(f"{tokens:,} tokens, forward and backward")
    axes.legend()
    drawn.savefig(path, dpi=150)


if __name__ == "__main__":
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back, and is not counted
    parser = argparse.ArgumentParser(description="memory of context parallelism")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--figure")
    arguments = parser.parse_args()
    main(arguments.tokens, arguments.sizes, arguments.figure)
