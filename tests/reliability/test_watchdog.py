"""Where one of two processes fails, both end, and the first error is shown once (19)."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from figures import figure
from training import runs

pytestmark = pytest.mark.slow
TIMEOUT_S = 6
"""Of a collective; a run's own default is 30 minutes."""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raises", "ValueError of rank {rank}"),
        ("raises in the loader", "no such chunk"),
        ("dies in the loader", "DataLoader worker"),
        ("sleeps", "another process has not answered within trainer.strategy.timeout_minutes"),
        ("sleeps in the loader", "another process has not answered within"),
        ("dies", "another process has ended without a word"),
    ],
)
def test_all_end_and_the_first_error_is_shown_once(
    fault: str, message: str, rank: int, tmp_path: Path
):
    failing = {"class_path": "reliability.faults.Fail", "init_args": {"fault": fault, "rank": rank}}
    options: list[Any] = ["--trainer.callbacks+", json.dumps(failing)]
    options += ["--trainer.strategy.timeout_minutes", TIMEOUT_S / 60]
    options += ["--data.init_args.num_workers", 1 if "loader" in fault else 0]
    running = runs.Running(runs.fitting(tmp_path, *options), tmp_path, 2)
    ran = running.wait()
    ended, begun = time.time(), float((tmp_path / "failed").read_text())
    shown = [line for line in ran.err.splitlines() if "lit_longctx: error: " in line]
    print(ran.out, ran.err)
    figure(f"a process {fault}, rank {rank} of 2: all ended after {ended - begun:.1f} s")
    assert ended - begun < TIMEOUT_S + 10
    assert len(shown) == 1
    assert message.format(rank=rank) in shown[0]
    assert ran.code != 0
