"""What is written while training goes on is, in every bit, the state of the step that was saved."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from training import runs
from training.test_parallel import train

from lit_longctx import manifest
from lit_longctx.training.checkpoints import Checkpoints

HELD = "step-00000006"
"""Checkpoint whose writing does not end before another step has been made."""


class Held(Callback):
    """Holds a write, and lists what is there meanwhile."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.trained = threading.Event()
        self.listed: list[str] = []
        save = dcp.save

        def late(*args: Any, checkpoint_id: Path, **kwargs: Any) -> None:
            assert not checkpoint_id.name.startswith(HELD) or self.trained.wait(60)
            save(*args, checkpoint_id=checkpoint_id, **kwargs)

        patch.setattr(dcp, "save", late)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 7:
            folder = Path(trainer.default_root_dir, "checkpoints")
            whole = [p for p in folder.glob("step-*") if manifest.fault(p) is None]
            self.listed = [*sorted(p.name for p in whole), (folder / "latest").read_text().strip()]
            self.trained.set()


@pytest.mark.slow
def test_the_older_one_stays_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with runs.own_process_group():
        torch.manual_seed(1)
        train(tmp_path / "sync", 8, Checkpoints(every_n_steps=2))
        held = Held(monkeypatch)
        torch.manual_seed(1)
        train(tmp_path / "async", 8, Checkpoints(every_n_steps=2, async_save=True), held)
    assert held.listed == ["step-00000002", "step-00000004", "step-00000004"]
    for step in (HELD, "step-00000008"):
        (found, loop), (expected, same_loop) = (
            stored(tmp_path / name / "checkpoints" / step) for name in ("async", "sync")
        )
        assert loop == same_loop
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(found[key], value), key
            else:
                assert found[key] == value


def stored(step: Path) -> tuple[dict[str, Any], Any]:
    """Return what a checkpoint holds, by its flat names, and what Lightning keeps beside."""
    manifest.verify(step)
    state: dict[str, Any] = {}
    reader, planner = dcp.FileSystemReader(step), _EmptyStateDictLoadPlanner()
    _load_state_dict(state, storage_reader=reader, planner=planner, no_dist=True)
    tensors, _ = flatten_state_dict(state)
    return tensors, torch.load(step / "meta.pt", weights_only=True)
