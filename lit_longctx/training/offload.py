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

    A block's input is copied out while the block computes and is on its device until the next block
    begins; it is copied back while the block after it is recomputed. Two are there at a time.
    """

    def __init__(self) -> None:
        self.latest: OffloadedTensor | None = None
        """Input of the block before, in this forward pass."""
        self.copies: Copies | None = None

    @torch.compiler.disable(recursive=False)
    def call(self, index: int, forward: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        """Run block number `index`, whose recomputation keeps `x` alone."""
        if not torch.is_grad_enabled():
            return forward(x, *rest)
        if index == 0:
            self.latest = None
        if self.copies is None:
            self.copies = StreamedCopies(x.device) if x.is_cuda else Copies()
        copies = self.copies
        memory, shape = x.untyped_storage()._cdata, x.shape  # not x, which the graph would keep

        def pack(saved: Tensor) -> "Tensor | OffloadedTensor":
            if saved.untyped_storage()._cdata != memory or saved.shape != shape:
                return saved
            self.latest = OffloadedTensor(saved.detach(), self.latest, copies)
            return self.latest

        with saved_tensors_hooks(pack, self._unpack):
            return forward(x, *rest)

    def _unpack(self, packed: "Tensor | OffloadedTensor") -> Tensor:
        self.latest = None  # backward has begun: hold nothing that it is done with
        return packed.fetched() if isinstance(packed, OffloadedTensor) else packed


class Copies:
    """Copies between device and host that are done when the call returns."""

    def out(self, tensor: Tensor) -> tuple[Any, Any]:
        """Return a copy in host memory, and what to wait for before the tensor is let go."""
        return tensor.clone(), None

    def back(self, host: Any, tensor: Tensor) -> Any:
        """Fill a tensor from its copy; return what to wait for before it is read."""
        tensor.copy_(host)

    def wait(self, copied: Any) -> None:
        """Let what is computed from now on come after a copy."""


@final
class StreamedCopies(Copies):
    """Copies through pinned memory on a CUDA stream of their own, beside what is computed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def out(self, tensor: Tensor) -> tuple[list[Tensor], torch.Event]:
        """Return pinned buffers, and the copy's event."""
        parts = self._parts(tensor)
        host = [torch.empty_like(part, device="cpu", pin_memory=True) for part in parts]
        return host, self._copy(parts, host)

    def back(self, host: list[Tensor], tensor: Tensor) -> torch.Event:
        """Return the copy's event."""
        return self._copy(host, self._parts(tensor))

    def wait(self, copied: torch.Event) -> None:
        """Have the computing stream wait; the host does not."""
        torch.cuda.current_stream(self.device).wait_event(copied)

    def _parts(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.view(-1).split(PIECE_BYTES // tensor.element_size()))

    def _copy(self, sources: list[Tensor], targets: list[Tensor]) -> torch.Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
            return self.stream.record_event()  # pyright: ignore[reportReturnType]


@final
class OffloadedTensor:
    """A tensor that is in host memory, and on its device only around its uses.

    Args:
        tensor: What is offloaded.
        before: The one that was offloaded before, which backward needs next.
        copies: How it is copied.
    """

    def __init__(self, tensor: Tensor, before: "OffloadedTensor | None", copies: Copies) -> None:
        self.before = before
        self.copies = copies
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        if before is not None:
            before.leave()
        self.host, self.copied = copies.out(tensor)
        self.on_device: Tensor | None = tensor

    def leave(self) -> None:
        """Let go of the device's memory, once it is copied."""
        self.copies.wait(self.copied)
        self.on_device = None

    def prefetch(self) -> None:
        """Begin to copy back, into memory of the computing stream: it is freed in order there."""
        if self.on_device is None:
            self.on_device = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.copied = self.copies.back(self.host, self.on_device)

    def fetched(self) -> Tensor:
        """Return the tensor on its device, and begin to fetch the one before."""
        self.prefetch()
        self.copies.wait(self.copied)
        tensor, self.on_device = self.on_device, None
        if self.before is not None:
            self.before.prefetch()
        assert tensor is not None
        return tensor
