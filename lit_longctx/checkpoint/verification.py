"""Which of a run's checkpoints are whole: files' hashes are those of their manifest."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from lit_longctx import manifest
from lit_longctx.progress import say


def steps_of(run: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    return sorted((p for p in run.glob("step-*") if ".tmp-" not in p.name), reverse=True)


def newest_whole(run: Path, but: Path | None = None) -> Path:
    """Return the newest checkpoint whose hashes hold, naming on the way those that do not.

    Every file is hashed by one process. `but` is left out: it is known to be torn.
    """
    for step in steps_of(run):
        if step == but:
            continue
        fault = fault_in(step)
        if fault is None:
            return step
        say(f"skipping {step.name}: {fault}")
    raise ValueError(f"{run} holds no whole checkpoint; start the run anew")


def fault_in(folder: Path) -> str | None:
    """Hash a folder's files, each process its share; return the first fault, the same on all."""
    among = dist.is_available() and dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if among else (0, 1)
    faults: list[Any] = [manifest.fault(folder, rank, ranks)]
    if ranks > 1:
        mine, faults = faults[0], [None] * ranks
        dist.all_gather_object(faults, mine)
    return next((fault for fault in faults if fault), None)


def offer_whole(torn: Path) -> str:
    """Name the newest whole checkpoint beside one that is torn."""
    try:
        return f"the newest whole one is {newest_whole(torn.parent, but=torn)}"
    except ValueError:
        return "there is no whole one beside it"
