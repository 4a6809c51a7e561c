"""Where one process of a run fails, all end, and the first error is the one that is shown."""

import errno
import os
import sys
import threading
import time
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.distributed_c10d import _get_default_store

from lit_longctx.stop_signals import Preempted

FAULTS = "lit_longctx/faults"
EVERY = 1.0
"""Seconds between two looks at the other processes."""
GRACE = 3.0
"""Seconds that a process has to end by itself once another has failed."""


class Watchdog(Callback):
    """Ends this process soon after another has failed, whatever it is waiting for.

    A process that fails says so in the store by which the processes found each other; a collective
    that another never joins fails after `trainer.strategy.timeout_minutes`. A thread in each looks
    there, so that also those end that sleep, wait for data or hang in a kernel.
    """

    def __init__(self) -> None:
        self.store: Any = None
        self.ended = threading.Event()
        self.another_failed = False
        """Whether what this process raises only follows from another's failure."""

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Begin to look."""
        if (
            trainer.world_size > 1
            and dist.is_initialized()
            and (not self.store or self.ended.is_set())
        ):
            self.ended = threading.Event()
            self.store = _get_default_store().clone()
            arguments = self.store.clone(), self.ended
            threading.Thread(target=self._watch, args=arguments, daemon=True).start()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Look no more, in any process, once all of them have come here."""
        trainer.strategy.barrier()
        self.ended.set()

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Do the same."""
        self.on_train_end(trainer, module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Do the same where nothing but the validation was asked for."""
        if trainer.state.fn == "validate":
            self.on_train_end(trainer, module)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Look no more."""
        self.ended.set()

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        """Tell the others, unless one of them has told this process."""
        self.ended.set()
        known = self.another_failed or isinstance(exception, Preempted)
        if known or trainer.world_size == 1 or not dist.is_initialized():
            return
        try:
            store = self.store or _get_default_store().clone()
            self.another_failed = store.add(FAULTS, 1) > 1
        except RuntimeError:  # it has ended with the process that had it
            return
        if not self.another_failed:
            time.sleep(2 * EVERY)  # the store may end with this process

    def _watch(self, store: Any, ended: threading.Event) -> None:
        while not ended.wait(EVERY):
            lost = False
            try:
                self.another_failed = store.check([FAULTS])
            except RuntimeError:
                lost = True
            if (lost or self.another_failed) and not ended.wait(GRACE):
                if lost:
                    line = "lit_longctx: error: the first process has ended without a word"
                    print(f"{line}; go on with --ckpt_path last", file=sys.stderr, flush=True)
                os._exit(1)


def explain(error: BaseException) -> BaseException:
    """Return what to tell of an error; one of communication follows from another process."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OSError(f"{text}: make room there and go on with --ckpt_path last")
    if not isinstance(error, RuntimeError) or not (
        isinstance(error, dist.DistError) or "gloo" in text.lower()
    ):
        return error
    if "address already in use" in text.lower():  # of the port by which processes find each other
        return error
    if "timed out" in text.lower() or "timeout" in text.lower():
        what = "another process has not answered within trainer.strategy.timeout_minutes"
    else:
        what = "another process has ended without a word, or the network failed"
    return ConnectionError(f"{what}; go on with --ckpt_path last")
