"""Work in a thread while a run trains: writing a checkpoint from a copy of its state."""

import threading
from collections.abc import Callable, Mapping
from copy import deepcopy
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class BackgroundWork:
    """Does work in a thread, one piece after the other; once one has failed, none that follows.

    The processes of a run talk about it in a group of its own: collectives of two threads in one
    group would meet each other's. The thread does not keep a process from ending.

    Args:
        timeout: After how long a collective that a process never joins fails.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self.group: Any = dist.new_group(timeout=timeout, backend="gloo")
        self.fault: BaseException | None = None
        """What has gone wrong, if anything has."""
        self._last: threading.Thread | None = None

    def do(self, work: Callable[[], None]) -> None:
        """Begin a piece of work as soon as those before it are done."""
        arguments = work, self._last
        self._last = threading.Thread(target=self._run, args=arguments, daemon=True)
        self._last.start()

    def join(self) -> BaseException | None:
        """Wait until all is done, or one piece has failed; return what went wrong."""
        if self._last:
            self._last.join()
            self._last = None
        return self.fault

    def wait(self) -> None:
        """Wait until all is done; raise what went wrong."""
        if fault := self.join():
            raise fault

    def _run(self, work: Callable[[], None], before: threading.Thread | None) -> None:
        if before:
            before.join()
        if self.fault is None:
            try:
                work()
            except BaseException as fault:
                self.fault = fault


@torch.no_grad()
def copied(state: Any) -> Any:
    """Return a copy of nested state in host memory, which training no longer changes."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(copied, state))
    return deepcopy(state)
