"""What watches a run: the progress line and throughput; what its folder keeps beside."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_longctx.batch import StepBatch
from lit_longctx.checkpoint import Checkpoint
from lit_longctx.checkpoint.companions import keep, keep_tokenizer
from lit_longctx.data.sampling.data_description import TrainingData, describe_data
from lit_longctx.progress import EVERY, Heartbeat, TimeLeft
from lit_longctx.training.flops import model_flops, peak_flops
from lit_longctx.training.module import LanguageModule


def run_folder(trainer: Trainer) -> Path:
    """Return the folder in which a run keeps config, logs, tokenizer and checkpoints."""
    return Path(trainer.default_root_dir)


class ProgressLine(Callback):
    """Prints step, loss, tokens per second and time left; logs perf/* and mem/*.

    On a GPU the line also has tokens per second of one GPU, the share of its bfloat16 peak that the
    model's FLOPs are (MFU; see `flops.ModelFlops` for the two ways to count), and the largest
    memory that tensors have held.

    A line follows the first step, every few steps, and the last that ends within 30 seconds of the
    line before. Where a step, a validation or the wait for data takes longer, a line in between
    says how many micro-batches are done.

    Args:
        every_n_steps: Most steps between two lines.
    """

    peak: float | None = None
    """FLOP/s that MFU is a share of; None: not logged."""

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(f"progress.every_n_steps {every_n_steps} must be 1 or more")
        self.every_n_steps = every_n_steps
        self.every_s = EVERY
        self.heartbeat: Heartbeat | None = None
        self.module: LightningModule | None = None
        self.clock, self.timed_from = TimeLeft(0), 0
        self.what = ""
        self.done, self.parts = 0, 0.0

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Begin to watch the time."""
        self.module = module
        if trainer.is_global_zero:
            self.heartbeat = Heartbeat(self.line, self.every_s)
            self.heartbeat.__enter__()

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Stop it."""
        if self.heartbeat:
            self.heartbeat.__exit__()
            self.heartbeat = None

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        """Stop it, as Lightning does not tear down what raised."""
        self.teardown(trainer, module, "")

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start the clock; say so if the run ends before it is first validated."""
        self.first_step = trainer.global_step
        self._start_clock(self.first_step)
        self.fetched = self.ended = time.monotonic()
        if torch.cuda.is_available():
            self.peak = peak_flops(torch.cuda.get_device_name())
        self._restart()
        if trainer.is_global_zero and (reason := never_validated(trainer)):
            print(f"validation: never, as {reason}", flush=True)

    def _start_clock(self, step: int) -> None:
        assert self.module is not None
        self.timed_from = step
        self.clock = TimeLeft(self.module.trainer.max_steps - step)

    def _set_clock(self, steps: float) -> None:
        self.clock.done = steps - self.timed_from

    def _restart(self) -> None:
        self.last = time.monotonic()
        self.tokens = 0
        self.flops = torch.zeros(2, dtype=torch.float64)
        self.waited = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: StepBatch, i: int
    ) -> None:
        """Note how long the step waited for its data, and what it holds."""
        self.waited += time.monotonic() - self.fetched
        self._begin(f"step {trainer.global_step + 1}", len(batch.micro_batches))

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        """Count a micro-batch."""
        self.done += 1
        self._set_clock(trainer.global_step + self.done / self.parts)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: StepBatch, i: int
    ) -> None:
        """Count the step's tokens; print and log when it is time."""
        sharing = module.context_parallel_size if isinstance(module, LanguageModule) else 1
        self.tokens += sum(b.input_ids.numel() for b in batch.micro_batches) / sharing
        if self.peak and isinstance(module, LanguageModule) and module.llama:
            for micro in batch.micro_batches:  # on the device, so that nothing waits
                counted = torch.stack(model_flops(module.config, module.llama.layers, micro))
                self.flops = self.flops.to(counted.device) + counted / sharing
        self._begin("", 0)
        step, now = trainer.global_step, time.monotonic()
        self._set_clock(step)
        next_end = now + (now - self.ended)
        self.ended = now
        first, last = step == self.first_step + 1, step == trainer.max_steps
        if step % self.every_n_steps == 0 or first or last or next_end > self.last + self.every_s:
            self._report(trainer, module, step)
        if first:  # slower than the others: what is compiled or allocated once
            self._start_clock(step)
        self.fetched = time.monotonic()

    def _report(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        passed = time.monotonic() - self.last
        rate = self.tokens / passed
        values = {
            "perf/tokens_per_s_per_gpu": rate,
            "perf/data_wait_pct": 100 * self.waited / passed,
        }
        speed = f"{rate * trainer.world_size:,.0f} tok/s"
        if self.peak:
            causal, full = (self.flops / passed / self.peak).tolist()
            values |= {"perf/mfu_causal": causal, "perf/mfu_full": full}
            speed += f"  {rate:,.0f} a GPU  MFU {causal:.0%} causal, {full:.0%} full"
        if torch.cuda.is_available():
            active = torch.cuda.memory_stats()["active_bytes.all.peak"] / 2**30
            values["mem/max_active_gib"] = active
            speed += f"  peak {active:.1f} GiB"
        module.log_dict(values)
        seen = trainer.callback_metrics
        if self.heartbeat:
            self.heartbeat.say(
                f"step {step}/{trainer.max_steps}  loss {float(seen['train/loss']):.4f}  "
                f"grad {float(seen['train/grad_norm']):.2f}  lr {float(seen['train/lr']):.2e}  "
                f"{speed}  {self.clock}"
            )
        self._restart()

    def line(self) -> str:
        """Return where the run is, between two steps."""
        assert isinstance(self.module, LanguageModule)
        step = f"step {self.module.trained_steps}/{self.module.trainer.max_steps}"
        if not self.parts:
            return f"{step}  waiting for data, a checkpoint or other processes  {self.clock}"
        return f"{step}  {self.what}: {self.done} of {self.parts} micro-batches  {self.clock}"

    def _begin(self, what: str, parts: float) -> None:
        """Take note of what is done now, in so many micro-batches."""
        self.what, self.done, self.parts = what, 0, parts

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Take note of how much there is to read."""
        self._begin("validation", sum(trainer.num_val_batches))

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Take note of how much there is to read."""
        self._begin("test", sum(trainer.num_test_batches))

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Count a micro-batch."""
        self.done += 1

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        """Count a micro-batch."""
        self.done += 1

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Print the held-out loss; its time does not count as the training's speed."""
        self._say_held_out(module, "val/loss")
        if hasattr(self, "last"):
            self._restart()
            self.fetched = self.ended = time.monotonic()

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Print the held-out loss."""
        self._say_held_out(module, "test/loss")

    def _say_held_out(self, module: LightningModule, name: str) -> None:
        batches = self.done
        self._begin("", 0)
        assert isinstance(module, LanguageModule)
        if not self.heartbeat:
            return
        loss = module.trainer.callback_metrics.get(name)
        if not batches:
            window = module.data.validation_window
            self.heartbeat.say(
                f"step {module.trained_steps}  no held-out window of {window} tokens"
            )
        elif loss is not None:
            self.heartbeat.say(f"step {module.trained_steps}  held-out loss {float(loss):.4f}")


def never_validated(trainer: Trainer) -> str | None:
    """Return why the rest of a run is not validated, if it is not."""
    every, begin, end = trainer.val_check_batch, trainer.global_step, trainer.max_steps
    data: Any = getattr(trainer, "datamodule", None)
    if not trainer.enable_validation:
        return "validation is switched off"
    if isinstance(data, TrainingData) and not len(data.val_dataloader()):
        return "the data has no held-out windows"
    if isinstance(every, int) and end // every == begin // every:
        return f"val_check_interval is {every} steps and the run ends at step {end}"
    return None


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
            keep_tokenizer(source, run_folder(trainer))
