"""Memory of a training step, counted on the meta device: no weights, no GPU, any length.

The forward and backward pass of one row run with tensors that have no data, and the bytes of those
alive at a time are added up, for two and for three blocks; further blocks add what the third does.
Kernels of CUDA are stood in for by operators that keep and need what those do. What FSDP2 holds is
added by formula.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast, final
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lit_longctx.batch import Batch, Documents, one_document
from lit_longctx.context_parallel import ContextParallelName, Ulysses, Zigzag, collectives
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.backend import AttentionBackend
from lit_longctx.model.kernels import VarlenMask
from lit_longctx.model.keys import OWN, KeySource, View
from lit_longctx.position import RoPE
from lit_longctx.training import offload
from lit_longctx.training.activations import Offload, Recompute, apply_levers
from lit_longctx.training.optimizers import OptimizerName

MOMENT_BYTES: dict[OptimizerName, float] = {
    "adamw": 8,
    "adamw_bf16_moments": 4,
    "adamw8bit": 2 + 8 / 256,  # a float32 scale for 256 values of each moment
}
"""Bytes of both moments per parameter."""


@dataclass(frozen=True)
class Levers:
    """Settings that decide how much memory a row of tokens takes."""

    recompute: Recompute = "block"
    offload: Offload = "none"
    mlp_tile_tokens: int | None = None
    head_chunk_tokens: int | None = None
    optimizer: OptimizerName = "adamw"
    cpu_offload: bool = False
    context_parallel_size: int = 1
    context_parallel: ContextParallelName = "zigzag"
    kv_heads_at_once: int | None = None


class StepMemory(NamedTuple):
    """Bytes of one process at the widest point of a step."""

    states: float
    """Master weights, gradients and moments: this process's shards."""
    gathered: float
    """Weights that FSDP2 has gathered, and gradients that it has not yet reduced."""
    activations: float
    """What the model keeps and computes with."""
    host: float
    """In host memory: offloaded block inputs and states."""

    @property
    def device(self) -> float:
        """All that is on the GPU."""
        return self.states + self.gathered + self.activations


def step_memory(config: LlamaConfig, tokens: int, shards: int, levers: Levers) -> StepMemory:
    """Count the memory of a step on one row.

    Args:
        config: Shape of the model.
        tokens: Of the row, all processes of a context-parallel group together.
        shards: Processes that the states are divided among.
        levers: What saves memory.
    """
    states, gathered = sharded_memory(config, shards, levers)
    activations, offloaded = row_memory(config, tokens, levers)
    if levers.cpu_offload:
        return StepMemory(0.0, gathered, activations, offloaded + states)
    return StepMemory(states, gathered, activations, offloaded)


def row_memory(config: LlamaConfig, tokens: int, levers: Levers) -> tuple[float, float]:
    """Return bytes of activations at the widest point, and of block inputs in host memory."""
    two, three = (count_row(config, tokens, levers, layers) for layers in (2, 3))
    more = config.num_hidden_layers - 2
    return two.most + more * (three.kept - two.kept), two.host + more * (three.host - two.host)


def sharded_memory(config: LlamaConfig, shards: int, levers: Levers) -> tuple[float, float]:
    """Return bytes of a process's states, and of what FSDP2 has gathered while a block runs.

    Gathered in bfloat16: the root group, a block, the next block and the buffer that it comes in;
    besides, a block's gradients, and those in float32 to be reduced. With `cpu_offload` also two
    float32 shards of a block, on their way between host and device.
    """
    block, root = _parameters(config)
    parameters = config.num_hidden_layers * block + root
    states = parameters * (4 + 4 + MOMENT_BYTES[levers.optimizer]) / shards
    gathered = 2 * (root + 3 * block) + (2 + 4) * block
    return states, gathered + (8 * block / shards if levers.cpu_offload else 0)


def _parameters(config: LlamaConfig) -> tuple[int, int]:
    """Return how many one block has, and how many embedding, head and final norm have."""
    with torch.device("meta"):
        llama = Llama(replace(config, num_hidden_layers=1), RoPE())
    block = sum(weight.numel() for weight in llama.model.layers[0].parameters())
    return block, sum(weight.numel() for weight in llama.parameters()) - block


class RowMemory(NamedTuple):
    """Bytes of activations of one process for a model of few blocks, without weights."""

    kept: int
    """Alive between forward and backward."""
    most: int
    """Alive at the widest point."""
    host: int
    """Block inputs that were offloaded."""


def count_row(config: LlamaConfig, tokens: int, levers: Levers, layers: int) -> RowMemory:
    """Run forward and backward of one row on the meta device, as on CUDA in bfloat16."""
    with torch.device("meta"):
        llama = Llama(replace(config, num_hidden_layers=layers), RoPE()).bfloat16()
    _stand_in(llama)
    apply_levers(
        llama,
        levers.recompute,
        levers.offload,
        levers.mlp_tile_tokens,
        levers.head_chunk_tokens,
    )
    for weight in llama.model.layers.parameters():  # FSDP2 reduces a block's gradients at once
        weight.register_post_accumulate_grad_hook(_drop_gradient)
    copies = _Counted()
    counted = LiveBytes(llama.parameters())
    stand_in = patch.object(offload, "Copies", copies.same)
    with _divided(tokens, levers) as (batch, source), stand_in, counted:
        loss, _ = llama.loss(batch, source)
        kept = counted.live
        loss.backward()
    return RowMemory(kept, counted.most, copies.bytes)


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of meta tensors that are made under it, as long as they live.

    Args:
        weights: Tensors that are not counted, and neither are views of them.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.most = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._known.update(weight.untyped_storage() for weight in weights)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator and note what it returns; every token has a target."""
        if func is torch.ops.aten.nonzero.default:  # of unknown size on the meta device
            return torch.arange(len(args[0]), device="meta").unsqueeze(1)
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._note(tensor.untyped_storage())
        return found

    def _note(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.live += (size := storage.nbytes())
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.live -= size


@final
class _Counted(offload.Copies):
    """Copies to a host of which only the bytes are counted."""

    def __init__(self) -> None:
        self.bytes = 0

    def same(self) -> "_Counted":
        """Return this one, where a new one would be made."""
        return self

    def out(self, tensor: Tensor) -> tuple[Any, Any]:
        """Count."""
        self.bytes += tensor.nbytes
        return None, None

    def back(self, host: Any, tensor: Tensor) -> None:
        """Nothing is there to be copied."""


# ---- a row, or a process's part of it


@contextmanager
def _divided(tokens: int, levers: Levers) -> Iterator[tuple[Batch, KeySource]]:
    """Give a row that is one document, on the meta device, and where its keys come from."""
    size = levers.context_parallel_size
    if size == 1:
        yield _meta(_row(tokens)), OWN
        return
    kinds: dict[str, Any] = {"zigzag": Zigzag, "ulysses": Ulysses}
    context = object.__new__(kinds[levers.context_parallel])  # no process group is asked
    context.group, context.rank, context.size = None, 0, size
    context.kv_heads_at_once = levers.kv_heads_at_once
    share = context.share(_row(tokens))

    def gather(x: Tensor, _: Any) -> Tensor:
        return x.contiguous().new_empty(size, *x.shape)

    def exchange(parts: Tensor, _: Any) -> Tensor:
        return torch.empty_like(parts.contiguous(), memory_format=torch.contiguous_format)

    with patch.multiple(collectives, gather=gather, exchange=exchange):
        yield _meta(share.batch), _MetaSource(share.source)


def _row(tokens: int) -> Batch:
    ids = torch.zeros(1, tokens, dtype=torch.long)
    one = torch.zeros(1, dtype=torch.long)
    documents = one_document(1, tokens)
    return Batch(ids, ids, torch.ones(1, tokens), ids, one, one, documents)


def _meta(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.to("meta"), tree)


@final
class _MetaSource(KeySource):
    """A source that laid out a row on the CPU, its codes and masks moved to the meta device."""

    def __init__(self, source: KeySource) -> None:
        self.source = source
        self.layer = source.layer  # pyright: ignore[reportAttributeAccessIssue]
        self.advance = source.advance  # pyright: ignore[reportAttributeAccessIssue]

    def views(self, *arguments: Any) -> list[View]:
        """Move what the source says."""
        return _meta(self.source.views(*arguments))

    def layer(self, index: int) -> Any:
        """Replaced by the source's."""

    def advance(self, batch: Batch) -> None:
        """Replaced by the source's."""


# ---- stand-ins for kernels of CUDA


def _stand_in(llama: Llama) -> None:
    """Replace attention and norms by what keeps the tensors that their CUDA kernels keep."""
    for module in llama.modules():
        if isinstance(module, nn.RMSNorm):
            cast(Any, module).forward = partial(_Norm.apply, module.weight)
        elif isinstance(getattr(module, "backend", None), AttentionBackend):
            cast(Any, module).backend = _Flash()


class _Norm(torch.autograd.Function):
    """The fused norm keeps its input and one float32 per token."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(weight, x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        weight, x, _ = ctx.saved_tensors
        return torch.empty_like(weight), torch.empty_like(x)


@final
class _Flash(AttentionBackend):
    """FlashAttention 2's kernel for packed rows, as `varlen` and `flash_attention_2` run it."""

    def prepare(self, queries: Documents, keys: Documents, window: int | None = None) -> VarlenMask:
        """Return the boundaries."""
        return VarlenMask(queries, keys, window)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
        """Return the output of flattened rows."""
        out, _ = _counted_attention(*(x.flatten(0, 1) for x in (q, k, v)))
        return out.view(q.shape)


@torch.library.custom_op("lit_longctx::counted_attention", mutates_args=())
def _counted_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Nothing is computed: output and log-sum-exp of [tokens, heads, head_dim]."""
    raise NotImplementedError("for the meta device only")


@_counted_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)


def _attention_backward(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hold the kernel's workspaces: dq in float32, row sums, dk and dv for every query head."""
    q, k, v, *_ = ctx.saved_tensors
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    workspaces = [grad.contiguous(), torch.empty_like(q, dtype=torch.float32)]
    workspaces += [q.new_empty(q.shape[:2], dtype=torch.float32)]
    if k.shape[1] != q.shape[1]:
        workspaces += [k.new_empty(len(k), *q.shape[1:]) for _ in range(2)]
    return dq, dk, dv


_counted_attention.register_autograd(_attention_backward, setup_context=_keep)
