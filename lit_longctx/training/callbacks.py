"""What watches a run: the progress line, throughput, checkpoints, the run folder."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_longctx.batch import Step
from lit_longctx.checkpoint import Checkpoint
from lit_longctx.companions import keep
from lit_longctx.data.interface import describe_data


def run_folder(trainer: Trainer) -> Path:
    """Return the folder in which a run keeps config, logs, tokenizer and checkpoints."""
    return Path(trainer.default_root_dir)


class ProgressLine(Callback):
    """Prints one line every few steps: step, loss, tokens per second, time left; logs perf/*.

    Args:
        every_n_steps: Steps between two lines.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start the clock."""
        self._restart()
        self.begin = time.monotonic()
        self.first_step = trainer.global_step
        self.fetched = time.monotonic()

    def _restart(self) -> None:
        self.last = time.monotonic()
        self.tokens = 0
        self.waited = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, i: int
    ) -> None:
        """Note how long the step waited for its data."""
        self.waited += time.monotonic() - self.fetched

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Step, i: int
    ) -> None:
        """Count the step's tokens; print and log when it is time."""
        self.tokens += sum(b.input_ids.numel() for b in batch.micro_batches)
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            self._report(trainer, module, step)
        self.fetched = time.monotonic()

    def _report(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        passed = time.monotonic() - self.last
        rate = self.tokens / passed
        values = {
            "perf/tokens_per_s_per_gpu": rate,
            "perf/data_wait_pct": 100 * self.waited / passed,
        }
        if torch.cuda.is_available():
            active = torch.cuda.memory_stats()["active_bytes.all.peak"]
            values["mem/max_active_gib"] = active / 2**30
        module.log_dict(values)
        if trainer.is_global_zero:
            seen = trainer.callback_metrics
            done = step - self.first_step
            left = (time.monotonic() - self.begin) / done * (trainer.max_steps - step)
            print(
                f"step {step}/{trainer.max_steps}  loss {float(seen['train/loss']):.4f}  "
                f"grad {float(seen['train/grad_norm']):.2f}  lr {float(seen['train/lr']):.2e}  "
                f"{rate * trainer.world_size:,.0f} tok/s  ETA {_clock(left)}",
                flush=True,
            )
        self._restart()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Print the held-out loss; its time does not count as training."""
        if trainer.is_global_zero and "val/loss" in trainer.callback_metrics:
            loss = float(trainer.callback_metrics["val/loss"])
            print(f"step {trainer.global_step}  held-out loss {loss:.4f}", flush=True)
        if hasattr(self, "last"):
            self._restart()
            self.fetched = time.monotonic()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class Checkpoints(Callback):
    """Saves to RUN/checkpoints/step-N every few steps and at the end; keeps the newest.

    Args:
        every_n_steps: Steps between two checkpoints.
        keep: Checkpoints kept; older ones are deleted once a newer one is whole.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep {keep}: at least one checkpoint must stay")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.saved = -1

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Remove what an earlier process of this run began to save and did not finish."""
        if trainer.is_global_zero:
            for torn in (run_folder(trainer) / "checkpoints").glob("*.tmp-*"):
                shutil.rmtree(torn) if torn.is_dir() else torn.unlink()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        """Save when it is time."""
        if trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Save the last state."""
        if trainer.global_step != self.saved:
            self._save(trainer)
        if trainer.is_global_zero:
            print(f"wrote {run_folder(trainer)} (checkpoint step-{trainer.global_step:08d})")

    def _save(self, trainer: Trainer) -> None:
        folder = run_folder(trainer) / "checkpoints"
        trainer.save_checkpoint(folder / f"step-{trainer.global_step:08d}")
        self.saved = trainer.global_step
        steps = sorted(p for p in folder.glob("step-????????") if p.is_dir())
        older = [p for p in steps if int(p.name[5:]) < self.saved]
        for path in older[: max(0, len(older) + 1 - self.keep)]:
            trainer.strategy.remove_checkpoint(path)


class KeepTokenizer(Callback):
    """Copies the data's tokenizer, and what belongs to the start, into the run folder.

    So a run can be used and exported by itself.
    """

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Copy once."""
        start = getattr(module, "start", None)
        if isinstance(start, Checkpoint) and trainer.is_global_zero:
            keep(start.companions, start.tokens, run_folder(trainer))
        source = describe_data(getattr(trainer, "datamodule", None)).tokenizer_folder
        if source and trainer.is_global_zero:
            shutil.copytree(source, run_folder(trainer) / "tokenizer", dirs_exist_ok=True)
