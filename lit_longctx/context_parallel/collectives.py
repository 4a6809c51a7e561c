"""Collective operations that gradients pass through."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def gather(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return every process's tensor, stacked; no gradient."""
    found = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(found, x.contiguous(), group=group)
    return found.view(-1, *x.shape)


def exchange(parts: Tensor, group: ProcessGroup | None) -> Tensor:
    """Send part i of the first axis to process i; return what each sent here; no gradient."""
    found = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(found, parts.contiguous(), group=group)
    return found


class Gather(torch.autograd.Function):
    """Every process's tensor, stacked; gradients are added in float32, in their order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        """Communicate."""
        ctx.group = group
        return gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return to each process what the others found for it, added."""
        (grad,) = grads
        return exchange(grad, ctx.group).sum(0, dtype=torch.float32).to(grad.dtype), None


class Exchange(torch.autograd.Function):
    """Send part i of the first axis to process i; get what each process sent here."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: ProcessGroup | None) -> Tensor:
        """Communicate."""
        ctx.group = group
        return exchange(parts, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Send back, the same way."""
        return exchange(grads[0], ctx.group), None
