"""The LM head in chunks: nats per token, never all logits at once.

131,072 tokens × 128,256 words would be 67 GB of float32 logits; here a chunk of rows exists at a
time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_longctx.batch import NO_TARGET
from lit_longctx.model.recompute import recomputed

LOGITS_AT_ONCE = {"cpu": 2**23, "cuda": 2**27, "meta": 2**27}
"""Logits that exist at a time: 32 MiB in float32, a processor's cache, or 512 MiB on a GPU."""


def rows_at_once(weight: Float[Tensor, "vocab width"]) -> int:
    """Tokens per chunk by memory; at least 256, below which the matrix products lose speed."""
    return max(256, LOGITS_AT_ONCE.get(weight.device.type, 2**24) // len(weight))


def token_nats(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    labels: Int[Tensor, " tokens"],
    chunk_tokens: int | None = None,
) -> Float[Tensor, " tokens"]:
    """−ln p(label) of each token, 0 where there is no target; recomputes the logits in backward.

    Can be weighted in any way afterwards. Costs one more product with the vocabulary than
    `weighted_loss`.
    """
    rows = (labels != NO_TARGET).nonzero().flatten()
    chunks = rows.split(chunk_tokens or rows_at_once(weight))
    found = [
        recomputed(_nats, hidden[chunk], weight, labels[chunk]) for chunk in chunks if len(chunk)
    ]
    nats = hidden.new_zeros(len(labels), dtype=torch.float32)
    if not found:  # keeps every parameter in the graph, so that all ranks run the same collectives
        return nats + (hidden.sum() + weight.sum()) * 0
    return nats.index_put((rows,), torch.cat(found))


def _nats(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")


@torch.no_grad()
def token_top1_correct(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    labels: Int[Tensor, " tokens"],
    chunk_tokens: int | None = None,
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Return nats of each token, and whether it is the likeliest; 0 and False without target.

    No gradient: to read answers, not to learn.
    """
    nats = hidden.new_zeros(len(labels), dtype=torch.float32)
    top1_correct = torch.zeros_like(labels, dtype=torch.bool)
    rows = (labels != NO_TARGET).nonzero().flatten()
    for chunk in rows.split(chunk_tokens or rows_at_once(weight)):
        logits = (hidden[chunk] @ weight.T).float()
        nats[chunk] = F.cross_entropy(logits, labels[chunk], reduction="none")
        top1_correct[chunk] = logits.argmax(-1) == labels[chunk]
    return nats, top1_correct


def weighted_loss(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    labels: Int[Tensor, " tokens"],
    loss_weights: Float[Tensor, " tokens"],
    chunk_tokens: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " tokens"]]:
    """Return (Σ w·nats with gradient, nats detached); gradients are taken during the forward pass.

    The weights are given, so nothing has to be recomputed: three products with the vocabulary in
    all.
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    chunk_tokens = chunk_tokens or rows_at_once(weight)
    inputs = (hidden, weight, labels, loss_weights, needs_grad, chunk_tokens)
    loss, nats = _WeightedLoss.apply(*inputs)  # pyright: ignore[reportGeneralTypeIssues]
    return loss, nats


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_weights: Tensor,
        needs_grad: bool,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        nats = hidden.new_zeros(len(labels), dtype=torch.float32)
        grad_hidden = torch.zeros_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        rows = (labels != NO_TARGET).nonzero().flatten()
        # one buffer for all chunks: fresh pages would cost the CPU as much as the product itself
        buffer = hidden.new_empty(min(len(rows), chunk_tokens), len(weight))
        for chunk in rows.split(max(1, len(buffer))):
            h, label = hidden[chunk], labels[chunk].unsqueeze(1)
            logits = torch.mm(h, weight.T, out=buffer[: len(h)]).float()
            largest = logits.amax(dim=1, keepdim=True)
            likelihood = logits.gather(1, label) - largest
            exponentials = logits.sub_(largest).exp_()
            normaliser = exponentials.sum(dim=1, keepdim=True)
            nats[chunk] = (normaliser.log() - likelihood).squeeze(1)
            if grad_hidden is None or grad_weight is None:
                continue
            # d(w·nats)/d logits = w·(softmax − onehot), built in place of the logits
            w = loss_weights[chunk].unsqueeze(1).float()
            grad = exponentials.mul_(w / normaliser).scatter_add_(1, label, -w).to(h.dtype)
            grad_hidden[chunk] = grad @ weight
            if grad.dtype == torch.float32:
                grad_weight.addmm_(grad.T, h)
            else:
                grad_weight += grad.T @ h
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nats)
        return (nats * loss_weights).sum(), nats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden, grad_weight = grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss)
        return grad_hidden, grad_weight.to(ctx.weight_dtype), None, None, None, None
