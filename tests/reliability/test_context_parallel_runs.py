"""A run whose rows are divided among processes survives kills and other layouts (1, 4)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from figures import figure
from thorough import thorough
from training import runs
from training.test_resume import START, resume, supervised, traces

pytestmark = pytest.mark.slow
STEPS = thorough(60, 40)
KILLS = thorough(6, 2)
ROUNDING = 1e-6
"""Largest relative difference of a loss where only the order of sums changes, as documented. A sum
of n float32 terms of one sign is off by about √n · 2⁻²⁴: 2.7e-6 for a step's 2,048 tokens."""


def divided(name: str = "zigzag") -> list[Any]:
    """Return the options by which two processes share each row."""
    strategy = "--trainer.strategy"
    return [f"{strategy}.context_parallel_size", 2, f"{strategy}.context_parallel", name]


@runs.shared
def by_zigzag() -> runs.Ran:
    """30 uninterrupted steps on two processes that share each row."""
    return runs.fit(runs.workshop() / "by_zigzag", *divided(), ranks=2).succeeded()


def test_random_kills_leave_no_trace(tmp_path: Path):
    options = [*divided(), "--trainer.max_steps", STEPS, "--checkpoints.every_n_steps", 5]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs.fit(whole, *options, ranks=2).succeeded()
    supervised(killed, KILLS, 3, *options, ranks=2, steps=STEPS)
    lost, repeated = traces(killed, whole, KILLS, STEPS)
    figure(f"zigzag of 2: {KILLS} kills: {lost} samples lost, {repeated} repeated")
    assert (lost, repeated) == (0, 0)


@pytest.mark.parametrize(
    ("start", "options", "ranks"),
    [
        pytest.param(by_zigzag, divided("ulysses"), 2, id="zigzag of 2 to ulysses of 2"),
        pytest.param(by_zigzag, [], 1, id="zigzag of 2 to 1 process"),
        pytest.param(by_zigzag, [], 2, id="zigzag of 2 to 2 data-parallel"),
        pytest.param(runs.alone, divided("ulysses"), 2, id="1 process to ulysses of 2"),
        pytest.param(runs.together, divided(), 2, id="2 data-parallel to zigzag of 2"),
    ],
)
def test_a_run_goes_on_on_another_layout(
    start: Callable[[], runs.Ran],
    options: list[Any],
    ranks: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
):
    found = resume(tmp_path, start(), *options, ranks=ranks)
    before = runs.witnessed(start().folder)
    expected = {step: entry for step, entry in before.items() if step > START}
    assert [set(rows) for rows in runs.samples(found)] == [
        set(rows) for rows in runs.samples(expected)
    ]
    difference = runs.largest_difference(runs.losses(found), runs.losses(expected))
    figure(f"{request.node.callspec.id}: {difference:.0e}")
    assert difference <= ROUNDING
