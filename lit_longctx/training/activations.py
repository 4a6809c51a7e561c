"""What a model keeps of its activations for backward, and where: applied to it from outside.

Every function changes how a Llama computes, never what: losses and gradients stay the same to the
bit, except where a docstring names a rounding.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lit_longctx.model import MLP, Llama
from lit_longctx.model.recompute import recomputed
from lit_longctx.training.offload import BlockInputs

Recompute = Literal["none", "elementwise", "attention_kept", "block"]
"""What backward computes again."""
WHOLE_BLOCKS = ("attention_kept", "block")
"""Settings of `recompute` under which a block's input is all that it is computed from again."""
Offload = Literal["none", "block_inputs"]
"""What goes to host memory between forward and backward."""


def check_levers(
    recompute: Recompute,
    offload: Offload,
    mlp_tile_tokens: int | None,
    head_chunk_tokens: int | None,
) -> None:
    """Raise ValueError for settings that do not go together; see `apply_levers`."""
    if offload == "block_inputs" and recompute not in WHOLE_BLOCKS:
        raise ValueError(
            f"offload block_inputs needs recompute block or attention_kept; got {recompute}, which "
            "keeps more of a block than its input"
        )
    tokens = {"mlp_tile_tokens": mlp_tile_tokens, "head_chunk_tokens": head_chunk_tokens}
    for name, value in tokens.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more; got {value}; leave it out for the default")


def apply_levers(
    llama: Llama,
    recompute: Recompute = "elementwise",
    offload: Offload = "none",
    mlp_tile_tokens: int | None = None,
    head_chunk_tokens: int | None = None,
) -> None:
    """Apply what saves memory of activations: before sharding, after `parallel.apply_compile`.

    Recomputation of whole blocks must stand outside of compiled code.

    Args:
        llama: The model.
        recompute: What backward computes again.
        offload: What goes to host memory until then.
        mlp_tile_tokens: Tokens that an MLP computes at a time; None: all.
        head_chunk_tokens: Tokens whose logits exist at a time; None: by memory.

    Raises:
        ValueError: Settings that do not go together.
    """
    check_levers(recompute, offload, mlp_tile_tokens, head_chunk_tokens)
    llama.head_chunk_tokens = head_chunk_tokens
    if mlp_tile_tokens is not None:
        apply_mlp_tiles(llama, mlp_tile_tokens)
    apply_recompute(llama, recompute, offload)


def apply_recompute(
    llama: Llama, recompute: Recompute = "elementwise", offload: Offload = "none"
) -> None:
    """Choose what backward computes again in place of keeping it.

    - `none`: nothing.
    - `elementwise`: norms and the MLP's SiLU; it costs little time and most of a block's memory.
    - `attention_kept`: whole blocks but for attention, whose output and log-sum-exp are kept
      (selective recomputation, Korthikanti et al. 2022, arXiv:2205.05198, turned round: at long
      context attention is what is dear).
    - `block`: whole blocks; only their inputs are kept. A third more compute.

    Args:
        llama: The model.
        recompute: What is computed again.
        offload: `block_inputs` keeps the inputs of blocks in host memory; only where whole blocks
            are recomputed.
    """
    if recompute != "none":  # by class, not by instance, so that all blocks share compiled graphs
        for module in llama.modules():
            if type(module) is nn.RMSNorm:
                module.__class__ = RecomputedNorm
            elif type(module) is MLP:
                module.__class__ = RecomputedMLP
    if recompute not in WHOLE_BLOCKS:
        return
    options: dict[str, Any] = {}
    if recompute == "attention_kept":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
        if "respect_saved_tensors_hooks" in signature(checkpoint).parameters:  # torch ≥ 2.15
            options["respect_saved_tensors_hooks"] = True  # ours pass on what is no block input
    inputs = BlockInputs() if offload == "block_inputs" else None
    for index, block in enumerate(llama.model.layers):
        forward = partial(recomputed, block.forward, **options)
        block.forward = forward if inputs is None else partial(inputs.call, index, forward)


class RecomputedNorm(nn.RMSNorm):
    """RMSNorm that keeps its input alone, as torch's fused kernel on CUDA does by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; on a CPU backward normalises again."""
        return recomputed(super().forward, x) if x.device.type == "cpu" else super().forward(x)


class RecomputedMLP(MLP):
    """SwiGLU that keeps the outputs of its first two products, and computes SiLU again."""

    def down(self, gate: Tensor, up: Tensor) -> Tensor:
        """Second half of the map; backward repeats what is elementwise."""
        return recomputed(super().down, gate, up)


def _keep_attention(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    """Keep what attention kernels return, whichever back end they are of."""
    name = str(operator)
    kernel = "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if kernel else CheckpointPolicy.PREFER_RECOMPUTE


def apply_mlp_tiles(llama: Llama, tokens: int) -> None:
    """Compute every MLP so many tokens at a time, and again in backward.

    Nothing as wide as the MLP exists for more tokens than those (tiled MLP of ALST, Bekman et al.
    2025, arXiv:2506.13996, §3.1). Costs the MLP's forward once more. Gradients of weights are sums
    over tiles in float32, and differ from the plain ones by the rounding of their order; what a
    token gives differs where a product of fewer rows rounds otherwise (on CPUs, below some 50
    rows). Under FSDP2 the block's weights stay gathered, since a block is one group.
    """
    for module in llama.modules():
        if isinstance(module, MLP):
            forward = partial(_by_tiles, module, module.forward, tokens)
            cast(Any, module).forward = forward


@torch.compiler.disable
def _by_tiles(mlp: MLP, forward: Callable[[Tensor], Tensor], tokens: int, x: Tensor) -> Tensor:
    if x.shape[0] * x.shape[1] <= tokens:
        return forward(x)
    return cast(Tensor, _TiledMLP.apply(mlp, forward, tokens, x, *mlp.parameters()))


class _TiledMLP(torch.autograd.Function):
    """A function of single tokens, tile by tile; keeps its input, computes all else again."""

    @staticmethod
    def forward(
        ctx: Any,
        mlp: MLP,
        forward: Callable[[Tensor], Tensor],
        tokens: int,
        x: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        ctx.mlp, ctx.function, ctx.tokens = mlp, forward, tokens
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        for source, target in zip(_tiles(x, tokens), _tiles(out, tokens), strict=True):
            target.copy_(forward(source))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (grad,) = ctx.saved_tensors, grads
        weights = list(ctx.mlp.parameters())  # FSDP2 has gathered them again by now
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        grad_x = torch.empty_like(x)
        tiles = (_tiles(each, ctx.tokens) for each in (x, grad.contiguous(), grad_x))
        for source, grad_out, target in zip(*tiles, strict=True):
            source = source.detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.function(source)
            found, *grad_weights = torch.autograd.grad(out, [source, *weights], grad_out)
            target.copy_(found)
            for total, part in zip(sums, grad_weights, strict=True):
                total += part
        cast_sums = (total.to(w.dtype) for total, w in zip(sums, weights, strict=True))
        return None, None, None, grad_x, *cast_sums


def _tiles(x: Tensor, tokens: int) -> tuple[Tensor, ...]:
    """Cut [batch, seq, width] into [1, tokens, width], whatever row the tokens are of."""
    return x.view(1, -1, x.shape[-1]).split(tokens, dim=1)
