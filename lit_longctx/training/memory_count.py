"""Activations of a training step, counted without weights, without a GPU, at any length.

Forward and backward pass run with tensors that have no data, and the bytes of those alive at a time
are added up: on the meta device, with operators that keep and need what CUDA's kernels do, or as a
CPU would run them. What FSDP2 and the optimizer hold is not in it: see `estimate`.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast, final
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from lit_longctx.batch import Batch, Documents, one_document
from lit_longctx.context_parallel import ContextParallelName, Ulysses, Zigzag, collectives
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.backend import AttentionBackend
from lit_longctx.model.head import rows_at_once
from lit_longctx.model.kernels import VarlenMask
from lit_longctx.model.keys import OWN, KeySource, View
from lit_longctx.position import RoPE
from lit_longctx.training import offload
from lit_longctx.training.activations import Offload, Recompute, apply_levers
from lit_longctx.training.optimizers import OptimizerName


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


@lru_cache
def parameter_counts(config: LlamaConfig) -> tuple[int, int]:
    """Return how many parameters a block has, and how many embedding, head and final norm."""
    with torch.device("meta"):
        llama = Llama(replace(config, num_hidden_layers=1), RoPE())
    block = sum(weight.numel() for weight in llama.model.layers[0].parameters())
    return block, sum(weight.numel() for weight in llama.parameters()) - block


class RowMemory(NamedTuple):
    """Bytes of activations of one process for a model of few blocks, without weights.

    The gradients of one block at a time are among them, and those of embedding and head.
    """

    kept: int
    """Alive between forward and backward."""
    forward: int
    """Alive at the widest point of forward, mostly that of the head."""
    backward: int
    """Alive at the widest point of backward."""
    host: int
    """Block inputs that were offloaded."""


def count_row(
    config: LlamaConfig,
    tokens: int,
    levers: Levers,
    layers: int,
    rows: int = 1,
    cpu_dtype: torch.dtype | None = None,
) -> RowMemory:
    """Run forward and backward of rows without data, as on CUDA in bfloat16 or as on a CPU.

    Args:
        config: Shape of the model; its number of blocks does not count.
        tokens: Of each row, which is one document.
        levers: What saves memory.
        layers: Blocks to run.
        rows: Rows that are computed together.
        cpu_dtype: Dtype of products on a CPU; None: CUDA.
    """
    fake: Any = nullcontext()
    device, without_data = "meta", _meta
    if cpu_dtype is not None:
        fake = FakeTensorMode()
        device, without_data = "cpu", partial(_faked, fake)
    with fake, torch.device(device), _default_dtype(cpu_dtype or torch.bfloat16):
        llama = Llama(replace(config, num_hidden_layers=layers), RoPE(), "sdpa")
    if cpu_dtype is None:
        _stand_in(llama)
    apply_levers(
        llama,
        levers.recompute,
        levers.offload,
        levers.mlp_tile_tokens,
        levers.head_chunk_tokens,
    )
    for block in llama.model.layers:
        _reduce_gradients(list(block.parameters()))
    copies = _Counted()
    chunk = levers.head_chunk_tokens or rows_at_once(llama.head_weight)
    counted = LiveBytes(llama.parameters(), 2 * chunk)
    stand_in = patch.object(offload, "Copies", copies.same)
    with ExitStack() as stack:
        batch, source = stack.enter_context(_divided(tokens, levers, rows, without_data))
        for each in (stand_in, fake, counted):
            stack.enter_context(each)
        loss, _ = llama.loss(without_data(batch), source)
        kept, forward = counted.live, counted.most
        counted.most = kept
        loss.backward()
    return RowMemory(kept, forward, counted.most, copies.bytes)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _reduce_gradients(weights: list[nn.Parameter]) -> None:
    """Let go of a block's gradients when all of them are there, as FSDP2 does."""
    left = len(weights)

    def reduced(_: Tensor) -> None:
        nonlocal left
        left -= 1
        if not left:
            for weight in weights:
                weight.grad = None

    for weight in weights:
        weight.register_post_accumulate_grad_hook(reduced)


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of meta tensors that are made under it, as long as they live.

    Args:
        weights: Tensors that are not counted, and neither are views of them.
        targets: Most targets that the head is shown; more chunks of logits need no more memory.
    """

    def __init__(self, weights: Iterable[Tensor] = (), targets: int | None = None) -> None:
        super().__init__()
        self.targets = targets
        self.live = 0
        self.most = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._known.update(weight.untyped_storage() for weight in weights)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator and note what it returns; every token has a target."""
        if func is torch.ops.aten.nonzero.default:  # of unknown size on the meta device
            found = torch.arange(len(args[0]), device=args[0].device)
            self._note(found.untyped_storage())
            return found[: self.targets].unsqueeze(1)
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
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
def _divided(
    tokens: int, levers: Levers, rows: int, without_data: Callable[[Any], Any]
) -> Iterator[tuple[Batch, KeySource]]:
    """Give rows that are one document each, and where their keys come from."""
    size = levers.context_parallel_size
    if size == 1:
        batch = _rows(tokens, rows)
        yield batch, _NoData(OWN, batch, without_data)
        return
    kinds: dict[str, Any] = {"zigzag": Zigzag, "ulysses": Ulysses}
    context = object.__new__(kinds[levers.context_parallel])  # no process group is asked
    context.group, context.rank, context.size = None, 0, size
    context.kv_heads_at_once = levers.kv_heads_at_once
    share = context.share(_rows(tokens, rows))

    def gather(x: Tensor, _: Any) -> Tensor:
        return x.contiguous().new_empty(size, *x.shape)

    def exchange(parts: Tensor, _: Any) -> Tensor:
        return torch.empty_like(parts.contiguous(), memory_format=torch.contiguous_format)

    with patch.multiple(collectives, gather=gather, exchange=exchange):
        yield share.batch, _NoData(share.source, share.batch, without_data)


def _rows(tokens: int, rows: int) -> Batch:
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    zeros = torch.zeros(rows, dtype=torch.long)
    documents = one_document(rows, tokens)
    return Batch(ids, ids, torch.ones(rows, tokens), ids, zeros, zeros, documents)


def _meta(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.to("meta"), tree)


def _faked(mode: FakeTensorMode, tree: Any) -> Any:
    with _disable_current_modes():
        fakes = tree_map_only(Tensor, mode.from_tensor, tree)
    return tree_map_only(Tensor, Tensor.clone, fakes)


@final
class _NoData(KeySource):
    """A source that lays out rows on the CPU; its codes and masks then lose their data."""

    def __init__(self, source: KeySource, batch: Batch, without_data: Callable[[Any], Any]) -> None:
        self.source = source
        self.batch = batch
        self.without_data = without_data
        self.layer = source.layer  # pyright: ignore[reportAttributeAccessIssue]
        self.advance = source.advance  # pyright: ignore[reportAttributeAccessIssue]

    def views(self, _: Batch, *arguments: Any) -> list[View]:
        """Return what the source says of the rows, without data."""
        with _disable_current_modes():
            views = self.source.views(self.batch, *arguments)
        return self.without_data(views)

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
