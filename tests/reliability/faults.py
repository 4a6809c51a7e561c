"""Callbacks that do to a run what machines, schedulers and colleagues do to it."""

import gc
import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_longctx import manifest
from lit_longctx.batch import StepBatch
from lit_longctx.data.sampling.steps import Steps


class SendSignal(Callback):
    """Sends one rank a signal inside of backward, of a save, of a validation or between steps.

    Args:
        place: `backward`, `save`, `validation` or `step`.
        step: In which step, counted from 1; a save or a validation is the next one.
        rank: Which process.
        name: Of the signal.
        every_s: Seconds that a step takes at least.
    """

    def __init__(
        self, place: str, step: int, rank: int = 0, name: str = "SIGTERM", every_s: float = 0.0
    ) -> None:
        self.place, self.step, self.rank, self.every_s = place, step, rank, every_s
        self.number = signal.Signals[name]
        self.trainer: Trainer | None = None
        self.sent = False

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.trainer = trainer
        hash_files = manifest.hash_files

        def signalling(*args: Any) -> dict[str, str]:
            self.send("save")
            return hash_files(*args)

        manifest.hash_files = signalling

    def send(self, place: str, done: int = 0) -> None:
        """Send it if this is the time and place; `done` of the steps counted here are not yet."""
        assert self.trainer
        step, rank = self.trainer.global_step + done, self.trainer.global_rank
        if (place, rank) == (self.place, self.rank) and step >= self.step and not self.sent:
            self.sent = True
            Path(self.trainer.default_root_dir, "signalled").write_text(repr(time.time()))
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: StepBatch, i: int
    ) -> None:
        time.sleep(self.every_s)
        self.send("step", 1)

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        loss.register_hook(lambda _: self.send("backward", 1))

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, index: int, loader: int = 0
    ) -> None:
        if index == 1:
            self.send("validation")


class SlowSave(Callback):
    """Lets every save take so long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        hash_files = manifest.hash_files

        def slow(*args: Any) -> dict[str, str]:
            time.sleep(self.seconds)
            return hash_files(*args)

        manifest.hash_files = slow


class Fail(Callback):
    """Lets one rank fail in its fifth step, by itself or in its loader's worker."""

    def __init__(self, fault: str, rank: int) -> None:
        self.fault, self.rank = fault, rank

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if trainer.global_rank != self.rank or "loader" not in self.fault:
            return
        read, log = Steps.__getitem__, Path(trainer.default_root_dir, "failed")

        def failing(steps: Steps, step: int) -> StepBatch:
            if step == 5:
                self.fail(log)
            return read(steps, step)

        Steps.__getitem__ = failing

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: StepBatch, i: int
    ) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, 5) and (
            "loader" not in self.fault
        ):
            self.fail(Path(trainer.default_root_dir, "failed"))

    def fail(self, log: Path) -> None:
        log.parent.mkdir(exist_ok=True)
        log.write_text(repr(time.time()))
        match self.fault.split()[0]:
            case "raises":
                where = "no such chunk" if "loader" in self.fault else f"of rank {self.rank}"
                raise ValueError(f"ValueError {where}")
            case "sleeps":
                time.sleep(600)
            case "dies":
                os.kill(os.getpid(), signal.SIGKILL)


class FileLimit(Callback):
    """Lets no file grow beyond so many bytes after step 15."""

    def __init__(self, bytes: int) -> None:
        self.bytes = bytes

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: StepBatch, i: int
    ) -> None:
        if trainer.global_step == 15:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.bytes, resource.RLIM_INFINITY))


class Measured(Callback):
    """Writes down memory and open files every so many steps."""

    def __init__(self, every: int = 500) -> None:
        self.every = every
        self.found: dict[int, dict[str, int]] = {}

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: StepBatch, i: int
    ) -> None:
        step = trainer.global_step + 1
        if step % self.every == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files = len(os.listdir("/proc/self/fd"))
            self.found[step] = {"rss": pages * resource.getpagesize(), "files": files}
            log = Path(trainer.default_root_dir, "measured.json")
            log.write_text(json.dumps(self.found))
