"""Block inputs in host memory: copied out during forward, fetched one block ahead in backward."""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

PIECE_BYTES = 2**26
"""Most bytes of one host buffer: torch rounds pinned memory up to powers of two."""


@final
class BlockInputs:
    """Offloads what the recomputation of blocks starts from; one for all blocks of a model.

    Copies run on a stream of their own: out while the block computes, back while the block after
    it recomputes. Two inputs are on the device at a time. On the CPU they are plain copies.
    """

    def __init__(self) -> None:
        self.latest: OffloadedTensor | None = None
        """Input of the block before, in this forward pass."""
        self.stream: Any = None

    @torch.compiler.disable(recursive=False)
    def call(self, index: int, forward: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        """Run block number `index`, whose recomputation keeps `x` alone."""
        if not torch.is_grad_enabled():
            return forward(x, *rest)
        if index == 0:
            self.latest = None
        if self.stream is None and x.is_cuda:
            self.stream = torch.cuda.Stream(x.device)
        memory, shape = x.untyped_storage()._cdata, x.shape  # not x, which the graph would keep

        def pack(saved: Tensor) -> "Tensor | OffloadedTensor":
            if saved.untyped_storage()._cdata != memory or saved.shape != shape:
                return saved
            self.latest = OffloadedTensor(saved.detach(), self.latest, self.stream)
            return self.latest

        with saved_tensors_hooks(pack, self._unpack):
            return forward(x, *rest)

    def _unpack(self, packed: "Tensor | OffloadedTensor") -> Tensor:
        self.latest = None  # backward has begun: let go of what it is done with
        return packed.fetched() if isinstance(packed, OffloadedTensor) else packed


@final
class OffloadedTensor:
    """A tensor in host memory, and on its device only around its use.

    Args:
        tensor: What is offloaded.
        before: The tensor that backward needs next.
        stream: Stream of copies; None: copy at once.
    """

    def __init__(self, tensor: Tensor, before: "OffloadedTensor | None", stream: Any) -> None:
        self.before = before
        self.stream = stream
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        if stream is None:
            self.on_device = None
            self.host = [tensor.clone()]
            return
        if before is not None:
            before.leave()
        self.on_device = tensor  # must not be written over before it is copied
        self.copied = self._copy(tensor, out=True)

    def _copy(self, tensor: Tensor, out: bool) -> Any:
        """Copy between device and host behind what the device does now; return the event."""
        flat = tensor.reshape(-1)
        parts = flat.split(PIECE_BYTES // flat.element_size())
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            if out:
                self.host = [torch.empty_like(p, device="cpu", pin_memory=True) for p in parts]
            for part, host in zip(parts, self.host, strict=True):
                to, of = (host, part) if out else (part, host)
                to.copy_(of, non_blocking=True)
            return self.stream.record_event()

    def leave(self) -> None:
        """Give the device's memory free, once it is copied."""
        torch.cuda.current_stream(self.device).wait_event(self.copied)
        self.on_device = None

    def prefetch(self) -> None:
        """Begin to copy back; memory is of the computing stream, so that it is freed in order."""
        if self.stream is not None and self.on_device is None:
            self.on_device = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.copied = self._copy(self.on_device, out=False)

    def fetched(self) -> Tensor:
        """Return the tensor on its device, and begin to fetch the next one."""
        if self.stream is None:
            return self.host[0]
        self.prefetch()
        torch.cuda.current_stream(self.device).wait_event(self.copied)
        tensor, self.on_device = self.on_device, None
        if self.before is not None:
            self.before.prefetch()
        assert tensor is not None
        return tensor
