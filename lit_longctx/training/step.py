"""One optimizer step's loss and gradients, exact to the token however its rows are spread."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_longctx.batch import Batch, StepBatch
from lit_longctx.model import Llama
from lit_longctx.model.keys import KeySource
from lit_longctx.training.long_ce import LongCE


class StepResult(NamedTuple):
    """What a step's forward and backward passes found, over all processes."""

    loss: Float[Tensor, ""]
    """Mean nats of the targets by their weights; float64."""
    grad_norm: Float[Tensor, ""]
    """Norm of the gradients before clipping."""

    @property
    def is_finite(self) -> bool:
        """Whether the weights may be updated."""
        return bool(self.loss.isfinite() and self.grad_norm.isfinite())


def describe_blow_up(number: int, step: StepBatch, found: StepResult) -> str:
    """Return what a loss or gradient norm that is not finite is refused with."""
    samples = [int(s) for batch in step.micro_batches for s in batch.samples]
    rank = dist.get_rank() if dist.is_initialized() else 0
    return (
        f"step {number}: loss {float(found.loss)}, gradient norm {float(found.grad_norm)}, samples "
        f"{samples[0]} to {samples[-1]} on rank {rank}; weights are as before the step; resume "
        "from the last checkpoint with a lower learning rate"
    )


def accumulate_gradients(
    llama: Llama,
    micro_batches: Sequence[Batch],
    sources: Sequence[KeySource],
    backward: Callable[[Tensor], None],
    gradient_clip: float,
    context_parallel_size: int = 1,
    long_ce: LongCE | None = None,
) -> StepResult:
    """Run forward and backward of all micro-batches and clip the gradients.

    Each micro-batch backpropagates Σ nats·w · G / W, with G the processes whose gradients are
    averaged and W the weights of all their micro-batches: the mean over targets, however they are
    spread. A mean of means would weigh short micro-batches too much.

    Args:
        llama: The model, sharded or not.
        micro_batches: This process's rows.
        sources: Where the keys of each micro-batch come from.
        backward: What runs the backward pass of a loss.
        gradient_clip: Largest gradient norm.
        context_parallel_size: Processes that have these rows too and compute other tokens of them.
        long_ce: What multiplies loss weights; W stays the sum of those before.
    """
    device = micro_batches[0].input_ids.device
    zero = torch.zeros((), dtype=torch.float64, device=device)
    weights = sum((b.loss_weights.sum(dtype=torch.float64) for b in micro_batches), zero)
    total = (sum_over_processes(weights) / context_parallel_size).clamp(
        min=1e-8
    )  # no target at all: loss 0, not NaN
    processes = dist.get_world_size() if dist.is_initialized() else 1
    loss = zero.clone()
    for batch, source in zip(micro_batches, sources, strict=True):
        weighed = batch if long_ce is None else long_ce.weighed(llama, batch)
        summed, _ = llama.loss(weighed, source)
        backward(summed * (processes / total).to(summed.dtype))
        loss += summed.detach()
    return StepResult(sum_over_processes(loss) / total, clip_gradients(llama, gradient_clip))


def sum_over_processes(value: Tensor) -> Tensor:
    """Return the sum of every process's value; the value itself stays."""
    value = value.clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def clip_gradients(llama: Llama, largest: float) -> Float[Tensor, ""]:
    """Scale gradients to at most this norm; return their norm before."""
    parameters = [p for p in llama.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
