"""Factors of the learning rate against their closed forms."""

from math import cos, pi, sqrt

import pytest

from lit_longctx.data.sampling.stages import Stage, StageSchedule
from lit_longctx.model.layers import Layers
from lit_longctx.position import RoPE
from lit_longctx.training.schedule import Schedule, WarmupConstant, WarmupCosine, WarmupLinear
from lit_longctx.training.settings import StageSettings

STEPS = 101


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 1 / 20),
        (9, 1 / 2),
        (19, 1.0),  # warm-up ends at the peak
        (20, 1.0),  # the cosine begins there
        (20 + 20, 0.1 + 0.9 * (1 + sqrt(1 / 2)) / 2),  # a quarter of its course: cos 45°
        (20 + 40, 0.55),  # half: midway between 1 and 0.1
        (20 + 60, 0.1 + 0.9 * (1 - sqrt(1 / 2)) / 2),
        (100, 0.1),  # the last update
    ],
)
def test_warmup_cosine(step: int, factor: float):
    schedule = WarmupCosine(warmup_steps=20, final=0.1)
    assert schedule.factor(step, STEPS) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_cosine_without_warmup_is_the_papers_equation_5(final: float):
    schedule = WarmupCosine(final=final)
    for step in range(STEPS):
        expected = final + 0.5 * (1 - final) * (1 + cos(pi * step / (STEPS - 1)))
        assert schedule.factor(step, STEPS) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_cosine_stays_at_its_end_beyond_the_run():
    assert WarmupCosine(final=0.1).factor(STEPS + 50, STEPS) == pytest.approx(0.1, rel=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_cosine_of_a_run_as_short_as_its_warmup_is_a_factor(warmup: int, steps: int):
    factors = [WarmupCosine(warmup_steps=warmup).factor(step, steps) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:warmup] == [(step + 1) / warmup for step in range(min(warmup, steps))]


@pytest.mark.parametrize(("step", "factor"), [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (100, 1.0)])
def test_warmup_constant(step: int, factor: float):
    assert WarmupConstant(warmup_steps=10).factor(step, STEPS) == pytest.approx(factor, rel=1e-12)


def test_constant_without_warmup_is_the_peak_from_the_first_update():
    assert [WarmupConstant().factor(step, STEPS) for step in (0, 1, 100)] == [1, 1, 1]


@pytest.mark.parametrize("final", [0.0, 0.2])
def test_linear_decay_is_transformers_own(final: float):
    import torch
    from transformers import get_linear_schedule_with_warmup

    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, 10, STEPS)
    ours = WarmupLinear(warmup_steps=10, final=final)
    for step in range(STEPS):
        optimizer.step()
        (factor,) = theirs.get_last_lr()  # 0 at the first update
        expected = factor if step < 10 else final + (1 - final) * factor
        assert ours.factor(step, STEPS) == pytest.approx(expected, rel=1e-9)
        theirs.step()


@pytest.mark.parametrize("kind", [WarmupConstant, WarmupCosine, WarmupLinear])
def test_warmup_may_be_a_share_of_the_run(kind: type):
    share, updates = kind(warmup_steps=0.1), kind(warmup_steps=20)
    assert all(share.factor(step, 200) == updates.factor(step, 200) for step in range(200))


def settings(schedule: Schedule, *stages: Stage) -> StageSettings:
    return StageSettings(
        StageSchedule(stages), [Layers.uniform(RoPE(), 1)] * len(stages), 1.0, schedule
    )


@pytest.mark.parametrize("kind", [WarmupConstant, WarmupCosine, WarmupLinear])
@pytest.mark.parametrize("warmup", [-1, -0.1, float("nan"), float("inf")])
def test_a_warmup_that_is_negative_or_never_ends_is_refused(kind: type, warmup: float):
    with pytest.raises(ValueError, match=f"warmup_steps {warmup} must be 0 or more"):
        kind(warmup_steps=warmup)


@pytest.mark.parametrize(("warmup", "fits"), [(0, True), (0.999, True), (4, True), (5, False)])
def test_a_warmup_longer_than_the_run_is_refused(warmup: float, fits: bool):
    """It fits just where an update of the run has the peak's learning rate."""
    run = settings(WarmupConstant(warmup_steps=warmup), Stage(2**40, 256, 256))
    assert (max(run.learning_rate_at(step, 4) for step in range(4)) == 1) == fits
    if fits:
        run.check(4)
        return
    with pytest.raises(ValueError, match=r"warmup_steps 5 .* 4 steps"):
        run.check(4)


def test_a_warmup_longer_than_a_stage_that_warms_up_anew_is_refused():
    stages = [Stage(steps, 256, 256, learning_rate=1.0) for steps in (20, 9)]
    settings(WarmupCosine(warmup_steps=9), *stages).check(29)
    with pytest.raises(ValueError, match=r"warmup_steps 10 .* 9 steps"):
        settings(WarmupCosine(warmup_steps=10), *stages).check(29)
