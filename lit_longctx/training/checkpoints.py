"""When a run saves: every few steps, by the clock, when it is asked to stop, and at its end."""

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_longctx import manifest
from lit_longctx.progress import say
from lit_longctx.stop_signals import GO_ON, Preempted, StopSignals
from lit_longctx.training.background import BackgroundWork
from lit_longctx.training.callbacks import run_folder
from lit_longctx.training.parallel import FSDP2Strategy
from lit_longctx.training.run_lock import RunLock
from lit_longctx.training.watchdog import Watchdog

PREEMPTED = "preempted"
"""File in the run folder: a signal stopped the run, which can go on; JSON. A start removes it."""


class Checkpoints(Callback):
    """Saves to RUN/checkpoints/step-N every few steps, by the clock, and at the end.

    SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 to any of the processes: all of them end that step, save,
    and stop with exit code 75; the first writes RUN/preempted. A second signal ends a process at
    once. A validation that is cut short is made anew when the run goes on.

    Args:
        every_n_steps: Steps between two checkpoints.
        every_minutes: Minutes after which a step is saved in any case; by the first process' clock.
        keep: Checkpoints kept; older ones are deleted once a newer one is whole.
        async_save: Write from a copy in host memory while training goes on. A copy is as large as
            what a process holds of weights and moments.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        keep: int = 2,
        every_minutes: float = 30.0,
        async_save: bool = False,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep {keep}: at least one checkpoint must stay")
        if every_n_steps < 1:
            raise ValueError(f"checkpoints.every_n_steps {every_n_steps} must be 1 or more")
        if every_minutes <= 0:
            raise ValueError(f"checkpoints.every_minutes {every_minutes} must be above 0")
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.saved_at = time.monotonic()
        self.keep = keep
        self.async_save = async_save
        self.background: BackgroundWork | None = None
        self.saved = -1
        """Step that was saved last, or is being written."""
        self.lock: RunLock | None = None
        self.signals: StopSignals | None = None
        self.stopped_by: signal.Signals | None = None
        self.unvalidated: int | None = None
        """Step whose validation an earlier process began and did not end."""

    # ---- beginning

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Take the run folder for this run alone; every process learns of it if that fails."""
        fault = None
        guarded = stage == "fit" or self.unvalidated is not None
        if guarded and trainer.is_global_zero:
            try:
                self.lock = RunLock(run_folder(trainer))
                self.unvalidated = read_preempted(run_folder(trainer))
            except (OSError, ValueError) as error:
                fault = str(error)
        fault, self.unvalidated = trainer.strategy.broadcast((fault, self.unvalidated))
        if fault:
            raise ValueError(fault)
        if self.async_save and stage == "fit":
            strategy = trainer.strategy
            if not isinstance(strategy, FSDP2Strategy):
                raise ValueError("checkpoints.async_save needs trainer.strategy FSDP2Strategy")
            self.background = strategy.background = BackgroundWork(strategy._timeout)
        if guarded and threading.current_thread() is threading.main_thread():
            self.signals = StopSignals(lambda: end_launched(trainer))
            # Lightning's own, which save and talk to the other processes inside of a handler
            trainer._signal_connector.register_signal_handlers = lambda: None

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Let another run have the folder."""
        self._finish_saving()
        if isinstance(trainer.strategy, FSDP2Strategy):
            trainer.strategy.background = self.background = None
        if self.signals:
            self.signals.restore()
            self.signals = None
        if self.lock:
            self.lock.release()
            self.lock = None

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        """Do the same, as Lightning does not tear down what raised; stopped, the process ends.

        What is being written is written first: other processes end once they learn of this.
        """
        if self.background:
            fault, self.background = self.background.join(), None
            if fault and fault is not exception:
                say(str(fault))
        if not isinstance(exception, Preempted):
            self.teardown(trainer, module, "")

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Say so if only the end will be saved; remove what an earlier process left half saved."""
        self.saved_at = time.monotonic()
        every, end = self.every_n_steps, trainer.max_steps
        if trainer.is_global_zero:
            if end // every == trainer.global_step // every:
                print(
                    f"checkpoints: none before the end at step {end}, as every_n_steps is {every}"
                )
            for torn in (run_folder(trainer) / "checkpoints").glob("*.tmp-*"):
                shutil.rmtree(torn) if torn.is_dir() else torn.unlink()
        self._agree(trainer)
        if self.stopped_by:
            self._stop(trainer, unvalidated=self.unvalidated == trainer.global_step)
        self.finish_preempted(trainer, lambda: validate(trainer))

    def finish_preempted(self, trainer: Trainer, validate: Callable[[], Any]) -> None:
        """Make this step's validation if a stop cut it short; nothing is left of the stop then."""
        if self.unvalidated == trainer.global_step:
            self.saved = trainer.global_step  # it goes on from there
            validate()
        self.unvalidated = None
        if trainer.is_global_zero:
            (run_folder(trainer) / PREEMPTED).unlink(missing_ok=True)

    # ---- between two steps

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, i: int
    ) -> None:
        """Stop before the next step, where `trainer.min_steps` kept Lightning from it."""
        if self.stopped_by:
            self._stop(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        """Save when it is time; have Lightning log this step and then stop, if that was asked."""
        late = self._agree(trainer)
        if self.stopped_by or late or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)
        if self.stopped_by and trainer.global_step < trainer.max_steps:
            trainer.should_stop = True

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop before a validation: that of this step, or one that Lightning adds as it stops."""
        if self.stopped_by:
            every = trainer.val_check_batch
            due = isinstance(every, int) and trainer.global_step % every == 0
            self._stop(trainer, unvalidated=due)

    def on_validation_batch_end(
        self, trainer: Trainer, module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Stop inside of a validation."""
        self.stop_validation_if_asked(trainer)

    def stop_validation_if_asked(self, trainer: Trainer) -> None:
        """Save and stop if any process was asked to; all of them must call it in a validation."""
        if not self.signals:
            return
        self._agree(trainer)
        if not self.stopped_by:
            return
        if trainer.global_step != self.saved:
            # as it would be had it been saved at the end of the step, before the validation
            loop = trainer.fit_loop.epoch_loop
            loop.batch_progress.total.completed -= 1
            loop.batch_progress.current.completed -= 1
            loop.val_loop.batch_progress.reset()
            self._save(trainer)
        self._stop(trainer, unvalidated=True)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Save the last state, and wait until it is written."""
        if trainer.global_step != self.saved:
            self._save(trainer)
        self._finish_saving()
        if self.stopped_by and trainer.global_step != trainer.max_steps:
            self._stop(trainer)
        if trainer.is_global_zero:
            print(f"wrote {run_folder(trainer)} (checkpoint step-{trainer.global_step:08d})")

    # ----

    def _agree(self, trainer: Trainer) -> bool:
        """Take note if any process was asked to stop; return if the first one's clock says save.

        Raises what went wrong in the background, in any process.
        """
        late = time.monotonic() - self.saved_at > 60 * self.every_minutes
        asked = self.signals.received if self.signals else 0
        failed = self.background is not None and self.background.fault is not None
        found = torch.tensor([asked, trainer.is_global_zero and late, failed])
        found = found.to(trainer.strategy.root_device)
        if dist.is_initialized():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        asked, late, failed = found.tolist()
        if failed:
            self._finish_saving()
        if asked:
            self.stopped_by = signal.Signals(asked)
        return bool(late)

    def _stop(self, trainer: Trainer, unvalidated: bool = False) -> NoReturn:
        """End this process for now; what it leaves is on the disk before any process ends.

        For torchrun ends all others as soon as one has ended.
        """
        assert self.stopped_by
        self._finish_saving()
        step, name = trainer.global_step, self.stopped_by.name
        for logger in trainer.loggers:
            logger.save()
        if trainer.is_global_zero:
            left = {"step": step, "signal": name, "unvalidated": unvalidated}
            manifest.write_text(run_folder(trainer) / PREEMPTED, json.dumps(left) + "\n")
        message = f"stopped by {name} at step {step}; go on with --ckpt_path last"
        say(message)
        trainer.strategy.barrier()
        for each in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(each, Watchdog):
                each.ended.set()
        # Lightning's own launcher ends the first process if it finds another that failed
        code = 0 if launched(trainer) and not trainer.is_global_zero else GO_ON
        raise Preempted(message, code)

    def _save(self, trainer: Trainer) -> None:
        self._finish_saving()  # of the one before
        folder, step = run_folder(trainer) / "checkpoints", trainer.global_step
        trainer.save_checkpoint(folder / f"step-{step:08d}")
        self.saved, self.saved_at = step, time.monotonic()
        if self.background:
            self.background.do(partial(self._remove_older, trainer, step))
        else:
            self._remove_older(trainer, step)

    def _remove_older(self, trainer: Trainer, than: int) -> None:
        """Remove checkpoints that are not to be kept, once a newer one is whole."""
        folder = run_folder(trainer) / "checkpoints"
        steps = sorted(p for p in folder.glob("step-????????") if p.is_dir())
        older = [p for p in steps if int(p.name[5:]) < than]
        for path in older[: max(0, len(older) + 1 - self.keep)]:
            trainer.strategy.remove_checkpoint(path)

    def _finish_saving(self) -> None:
        """Wait until what is written in the background is whole; raise what went wrong there."""
        if self.background:
            self.background.wait()


def checkpoints_of(trainer: Any) -> list[Checkpoints]:
    """Return what saves a trainer's run."""
    return [each for each in trainer.callbacks if isinstance(each, Checkpoints)]


def read_preempted(run: Path) -> int | None:
    """Return the step whose validation RUN/preempted says was cut short, if any."""
    try:
        left = json.loads((run / PREEMPTED).read_text())
        return left["step"] if left["unvalidated"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def validate(trainer: Trainer) -> None:
    """Make the validation of the step that a run goes on from."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False  # it counts from 0
    trainer.validating = True
    loop.run()
    trainer.training = True


def launched(trainer: Trainer) -> bool:
    """Whether Lightning started the other processes, as neither torchrun nor Slurm did."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and trainer.world_size > 1


def end_launched(trainer: Trainer) -> None:
    """End the processes that Lightning started."""
    launcher: Any = trainer.strategy.launcher
    if launched(trainer) and launcher is not None:
        launcher.kill(signal.SIGKILL)
