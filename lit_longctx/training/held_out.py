"""Validation of a training run: held-out loss by position and source."""

from lightning.pytorch import LightningModule

from lit_longctx.batch import Batch
from lit_longctx.data.sampling.data_description import DataDescription, describe_data
from lit_longctx.evaluation.loss.metrics import LossByPosition
from lit_longctx.model import Llama


class HeldOutValidation(LightningModule):
    """A LightningModule around a Llama that measures held-out loss in `validate` and `test`."""

    def __init__(self) -> None:
        super().__init__()
        self.llama: Llama | None = None
        self.held_out_loss: LossByPosition | None = None
        self.loaded_step = 0
        """Step of the checkpoint that was loaded."""

    @property
    def trained_steps(self) -> int:
        """Updates that made the weights; of a checkpoint that is only measured, its own."""
        return self.global_step or self.loaded_step

    def _log_step(self) -> None:
        """Have loggers count steps as the console does; Lightning would count from 0, by epoch."""
        self.log("step", float(self.trained_steps))

    @property
    def data(self) -> DataDescription:
        """What the data says of itself."""
        return describe_data(getattr(self.trainer, "datamodule", None))

    def on_validation_start(self) -> None:
        """Start counting anew."""
        data = self.data
        loss = LossByPosition(list(data.sources), data.validation_window or data.window or 4096)
        self.held_out_loss = loss.to(self.device)

    on_test_start = on_validation_start

    def validation_step(self, batch: Batch, index: int) -> None:
        """Count nats by position and source."""
        assert self.llama is not None
        assert self.held_out_loss is not None
        self.held_out_loss.update(self.llama.loss(batch)[1], batch)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log what was counted, over all ranks."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Log the same under the test's name."""
        self._log_held_out("test")

    def _log_held_out(self, prefix: str) -> None:
        assert self.held_out_loss is not None
        self.log_dict(self.held_out_loss.scalars(prefix), sync_dist=False)
        self._log_step()
        self.held_out_loss = None
