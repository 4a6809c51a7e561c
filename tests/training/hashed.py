"""Counts what a training process hashes, from the moment that its options are parsed."""

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_longctx import manifest

FILES: list[tuple[str, int]] = []
"""Path and bytes of every file that this process hashed."""
_digest = manifest.digest


def digest(path: Path) -> str:
    FILES.append((str(path), path.stat().st_size))
    return _digest(path)


manifest.digest = digest


class Hashed(Callback):
    """Writes what was hashed before the first step into the run folder."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        file = Path(trainer.default_root_dir) / f"hashed-{trainer.global_rank}.json"
        file.write_text(json.dumps(FILES))
