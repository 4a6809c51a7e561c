"""Evaluation on several processes: each group takes items of its own, and shares their rows."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lit_longctx.context_parallel import ContextParallel, ContextParallelName, context_parallel


class Processes(NamedTuple):
    """The processes of an evaluation, and which of them this is."""

    group: int = 0
    """Number of this process's group; all of a group measure the same item."""
    groups: int = 1
    first: bool = True
    """Whether this is the process that keeps values and writes reports."""
    context: ContextParallel | None = None
    """How a group divides the rows of its items; None where each process is a group."""

    def from_first(self, value: Any) -> Any:
        """Return the first process's value to all."""
        if not dist.is_initialized():
            return value
        held = [value]
        dist.broadcast_object_list(held)
        return held[0]

    def from_groups(self, value: Any) -> list[Any]:
        """Return every group's value, in their order."""
        if not dist.is_initialized():
            return [value]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, value)
        return found[:: len(found) // self.groups]

    def rounds(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        """Cut items into rounds of one for each group."""
        return [numbers[i : i + self.groups] for i in range(0, len(numbers), self.groups)]


@contextmanager
def started_processes(
    device: str, context_parallel_size: int, name: ContextParallelName
) -> Iterator[tuple[Processes, str]]:
    """Join the processes that torchrun started, if it did; give the device of this one too.

    Raises:
        ValueError: The processes do not divide by `context_parallel_size`.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if context_parallel_size < 1 or world % context_parallel_size:
        raise ValueError(
            f"{world} processes do not divide by context_parallel_size {context_parallel_size}; "
            "start so many with torchrun --nproc_per_node"
        )
    if world == 1:
        yield Processes(), device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    kind = torch.device(device).type
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        groups, rank = world // context_parallel_size, dist.get_rank()
        context = None
        if context_parallel_size > 1:
            shape, names = (groups, context_parallel_size), ("data", "context")
            mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
            context = context_parallel(name, mesh.get_group("context"))
        with (
            Path(os.devnull).open("w") as nowhere,
            redirect_stdout(nowhere if rank else sys.stdout),
        ):
            yield Processes(rank // context_parallel_size, groups, rank == 0, context), device
    finally:
        dist.destroy_process_group()
