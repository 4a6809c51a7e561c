"""Spike guard: which steps are left out, and that nothing else of the run changes."""

import re
from math import inf, nan
from pathlib import Path

import pytest
import torch
from training import runs

from lit_longctx.training.spikes import SpikeGuard


def by_torch(values: list[tuple[float, float]], deviations: float, steps: int) -> list[bool]:
    """The rule of OLMo-core's SkipStepAdamW, over tensors."""
    found = []
    for i, value in enumerate(values):
        before = torch.tensor(values[max(0, i - steps) : i], dtype=torch.float64)
        if i < steps // 2:
            found.append(False)
            continue
        std, mean = torch.std_mean(before, dim=0)
        found.append(bool((torch.tensor(value).double() - mean > deviations * std).any()))
    return found


@pytest.mark.parametrize(("deviations", "steps"), [(1.0, 8), (2.0, 20), (3.0, 50)])
def test_the_rule_is_that_of_olmo_core(deviations: float, steps: int):
    generator = torch.Generator().manual_seed(0)
    values = [tuple(row) for row in torch.randn(200, 2, generator=generator).double().tolist()]
    guard = SpikeGuard(deviations, steps)
    found = [guard.is_spike(*row) for row in values]
    assert found == by_torch(values, deviations, steps)
    assert guard.skipped == sum(found) > 0


def test_what_is_no_number_is_a_spike_once_there_is_a_past_and_not_part_of_it():
    guard = SpikeGuard(steps=4)
    assert [guard.is_spike(v, 1.0) for v in (nan, 1.0, 1.1, inf, 1.05, nan)] == [
        False, False, False, True, False, True,
    ]  # fmt: skip
    assert [loss for loss, _ in guard.history] == [1.0, 1.1, 1.05]


def test_a_resumed_guard_finds_the_same():
    values = [(float(x), 1.0) for x in torch.randn(60, generator=torch.manual_seed(1))]
    whole = SpikeGuard(1.5, 10)
    expected = [whole.is_spike(*row) for row in values]
    first, second = SpikeGuard(1.5, 10), SpikeGuard(1.5, 10)
    found = [first.is_spike(*row) for row in values[:30]]
    second.load_state_dict(first.state_dict())
    assert found + [second.is_spike(*row) for row in values[30:]] == expected
    assert second.skipped == whole.skipped


@pytest.mark.parametrize("options", [{"deviations": 0.0}, {"deviations": nan}, {"steps": 3}])
def test_settings_that_no_guard_can_have_are_refused(options: dict[str, float]):
    with pytest.raises(ValueError, match="spike_guard"):
        SpikeGuard(**options)  # pyright: ignore[reportArgumentType]


GUARD = ["--model.init_args.spike_guard", '{"deviations": 0.5, "steps": 8}']


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_skipped_updates_are_counted_said_and_resumed(ranks: int, tmp_path: Path):
    """Spikes are found in what the run logged, by torch; weights after one are those before."""
    ran = runs.fit(tmp_path / "whole", *GUARD, ranks=ranks).succeeded()
    entries = runs.witnessed(ran.folder)
    norms = dict(runs.scalars(ran.folder)["train/grad_norm"])
    expected = by_torch([(entries[n].loss, norms[n]) for n in sorted(entries)], 0.5, 8)
    skipped = [n for n, spike in zip(sorted(entries), expected, strict=True) if spike]
    assert 0 < len(skipped) < 20
    assert runs.scalars(ran.folder)["train/skipped_steps"][-1][1] == len(skipped)
    said = re.findall(r"step (\d+): no update, as loss", ran.out + ran.err)
    assert [int(n) + 1 for n in said] == skipped

    start = ran.folder / "checkpoints" / "step-00000010"
    again = runs.fit(tmp_path / "again", *GUARD, "--ckpt_path", start, ranks=ranks).succeeded()
    found = runs.witnessed(again.folder)
    assert found == {n: e for n, e in entries.items() if n > 10}
