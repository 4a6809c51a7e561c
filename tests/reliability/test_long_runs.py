"""What a run of thousands of steps must not lose: memory, open files, digits (5, 8, 21)."""

import json
from pathlib import Path

import pytest
import torch
from figures import figure
from thorough import thorough
from training import runs

from lit_longctx.checkpoint import load_pretrained
from lit_longctx.data.sampling.steps import StepSampler

LAST = thorough(2000, 1000)
RARELY = ["--trainer.val_check_interval", 1000, "--checkpoints.every_n_steps", 1000]


def test_the_sampler_has_the_length_of_the_whole_run():
    """Lightning reads a batch ahead, and loses it on resume, where a loader has no length."""
    assert len(StepSampler(14, 30)) == 30
    assert list(StepSampler(14, 30)) == list(range(14, 30))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_and_open_files_stay(tmp_path: Path):
    # the first validation opens the held-out windows, for good
    steps = ["--trainer.max_steps", LAST, "--trainer.val_check_interval", 400]
    measured = ["--trainer.callbacks+", "reliability.faults.Measured"]
    runs.Running(runs.fitting(tmp_path, *RARELY, *steps, *measured), tmp_path).wait(
        1000
    ).succeeded()
    found = json.loads((tmp_path / "measured.json").read_text())
    first, last = found["500"], found[str(LAST)]
    grown = (last["rss"] - first["rss"]) / 1e6
    figure(
        f"steps 500 to {LAST:,}: {grown:+.1f} MB, open files {first['files']} to {last['files']}"
    )
    assert grown < 5
    assert last["files"] == first["files"]


@pytest.mark.slow
def test_a_run_repeats_in_every_bit(tmp_path: Path):
    folders, steps = [tmp_path / "first", tmp_path / "second"], thorough(200, 60)
    for folder in folders:
        runs.fit(folder, "--trainer.max_steps", steps, *RARELY).succeeded()
    found, again = (runs.witnessed(folder) for folder in folders)
    assert found == again
    weights, same = (load_pretrained(folder).state_dict() for folder in folders)
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    figure(f"{steps} steps twice: losses, gradient norms and weights equal in every bit")
