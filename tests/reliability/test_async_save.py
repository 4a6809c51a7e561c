"""A checkpoint that is written while training goes on is one that was saved at once (1, 7, 18)."""

import json
from pathlib import Path
from typing import Any

import pytest
from figures import figure
from reliability.test_disk import stops_cleanly
from reliability.test_preemption import OFTEN, ends_as_if_nothing_had_been, interrupted, signal_in
from thorough import thorough
from training import runs
from training.test_resume import supervised, traces

from lit_longctx.checkpoint import newest_whole

pytestmark = pytest.mark.slow
ASYNC = ["--checkpoints.async_save", "true"]
STEPS = 60


def slow_save(seconds: float) -> list[str]:
    """Return the options by which a run's saves take so long."""
    slow = {"class_path": "reliability.faults.SlowSave", "init_args": {"seconds": seconds}}
    return ["--trainer.callbacks+", json.dumps(slow)]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0)])
def test_kills_while_a_checkpoint_is_written_leave_no_trace(
    ranks: int, workers: int, tmp_path: Path
):
    """Against a run that saves before it goes on."""
    kills = thorough(4, 2)
    length = ["--trainer.max_steps", STEPS, "--data.init_args.num_workers", workers]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs.fit(whole, *length, ranks=ranks).succeeded()
    often = [*length, *ASYNC, "--checkpoints.every_n_steps", 2, "--checkpoints.keep", 1]
    options, how = [*often, *slow_save(0.2)], {"ranks": ranks, "steps": STEPS, "save_s": 0.2}
    saving = supervised(killed, kills, ranks, *options, **how)
    lost, repeated = traces(killed, whole, kills, STEPS)
    figure(
        f"async_save, {ranks} processes: {kills} kills, {saving} inside of a write: "
        f"{lost} samples lost, {repeated} repeated"
    )
    assert (lost, repeated) == (0, 0)
    assert saving > 0
    assert [p.name for p in (killed / "checkpoints").glob("step-*")] == [f"step-{STEPS:08d}"]


def test_a_signal_while_a_checkpoint_is_written_loses_nothing(tmp_path: Path):
    ranks = 2
    options = [*OFTEN, *ASYNC, *signal_in("save", 3, ranks - 1), *slow_save(0.1)]
    running = runs.Running(runs.fitting(tmp_path, *options), tmp_path, ranks)
    ran = running.wait()
    assert [process.exitcode for process in running.processes] == [75] * ranks, ran.err
    assert ran.err == ""
    assert not list(tmp_path.rglob("*.tmp-*"))
    interrupted(tmp_path, 3, "SIGTERM")
    ends_as_if_nothing_had_been(tmp_path, ranks, *ASYNC)


def test_a_full_disk_is_told_as_if_it_had_been_saved_at_once(tmp_path: Path):
    ranks = 2
    full = {"class_path": "reliability.faults.FileLimit", "init_args": {"bytes": 70_000}}
    options = ["--trainer.callbacks+", json.dumps(full), *ASYNC]
    stops_cleanly(tmp_path, options, ranks)
    last = max(runs.witnessed(tmp_path))
    figure(f"async_save, {ranks} processes: a full disk at step 20 is told after step {last}")
    assert last < 30


def test_what_is_being_written_is_whole_where_a_process_raises(tmp_path: Path):
    failing = {"class_path": "reliability.faults.Fail", "init_args": {"fault": "raises", "rank": 1}}
    options: list[Any] = ["--trainer.callbacks+", json.dumps(failing), *ASYNC, *slow_save(0.5)]
    ran = runs.fit(tmp_path, *options, "--checkpoints.every_n_steps", 5, ranks=2)
    assert ran.code == 1
    assert ran.err == "lit_longctx: error: ValueError of rank 1\n"
    assert newest_whole(tmp_path / "checkpoints").name == "step-00000005"
