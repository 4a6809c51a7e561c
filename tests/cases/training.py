"""Short runs on one process, as `fit` makes them."""

from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule
from training.runs import own_process_group, quiet_trainer

from lit_longctx.training.callbacks import KeepTokenizer
from lit_longctx.training.checkpoints import Checkpoints


def trained(
    module: LightningModule,
    data: LightningDataModule,
    run: Path,
    steps: int,
    resumed: str | None = None,
) -> dict[str, float]:
    """Train so many steps; return the last metrics."""
    with own_process_group():
        trainer = quiet_trainer(run, steps, [Checkpoints(), KeepTokenizer()])
        trainer.fit(module, data, ckpt_path=resumed)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}
