"""A disk that is full stops a run in one line and leaves the older checkpoints whole (18)."""

import json
import subprocess
from pathlib import Path

import pytest
from figures import figure
from training import runs

from lit_longctx.checkpoint import newest_whole

pytestmark = pytest.mark.slow


def stops_cleanly(folder: Path, options: list[str], ranks: int = 1) -> None:
    ran = runs.fit(folder, *options, ranks=ranks)
    (line,) = ran.err.splitlines()
    assert ran.code == 1
    assert line.startswith(f"lit_longctx: error: {folder}/checkpoints/step-000000")
    assert "was not saved: " in line
    assert "MB are free there" in line
    assert not list(folder.rglob("*.tmp-*"))
    step = newest_whole(folder / "checkpoints").name
    assert step == "step-00000010"


def test_a_file_that_stops_growing_leaves_the_older_checkpoint(tmp_path: Path):
    """The limit of a file's size stands for the disk's: the n-th byte of any file is refused."""
    limits = [70_000, 123_457, 300_001]
    for limit in limits:
        full = {"class_path": "reliability.faults.FileLimit", "init_args": {"bytes": limit}}
        folder = tmp_path / str(limit)
        stops_cleanly(folder, ["--trainer.callbacks+", json.dumps(full)])
    runs.fit(folder, "--ckpt_path", "last").succeeded()
    assert runs.witnessed(folder) == runs.witnessed(runs.alone().folder)
    figure(f"{len(limits)} writes cut off at a byte: one line, the older checkpoint whole")


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(p.stat().st_size for p in runs.alone().folder.rglob("step-00000010/*"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size) + 200_000}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        stops_cleanly(disk / "run", [])
        figure("a full file system: one line, the older checkpoint whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
