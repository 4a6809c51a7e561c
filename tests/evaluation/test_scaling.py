"""Recovering the four curves of Llama 2 Long, Fig. 1, from noisy samples of them."""

import json

import numpy as np
import pytest

from lit_longctx.evaluation.loss.held_out import law_table
from lit_longctx.evaluation.statistics.scaling import (
    PowerLaw,
    extrapolate,
    fit_power_law,
    fit_scaling,
)

PAPER = {
    "7B": PowerLaw(25.4, 0.45, 1.56),
    "13B": PowerLaw(19.5, 0.48, 1.45),
    "34B": PowerLaw(17.7, 0.50, 1.41),
    "70B": PowerLaw(17.9, 0.51, 1.35),
}
LENGTHS = [2**i for i in range(7, 15)]
HELD_OUT = [32_768, 131_072]


@pytest.mark.parametrize(
    ("name", "short", "long"),
    [("7B", 1.6615, 1.5998), ("13B", 1.5268, 1.4783), ("70B", 1.4126, 1.3717)],
)
def test_losses_of_the_papers_laws(name, short, long):
    np.testing.assert_allclose(PAPER[name]([4096, 32_768]), [short, long], atol=6e-5)


@pytest.mark.parametrize("law", PAPER.values(), ids=PAPER)
def test_without_noise_the_law_comes_back(law):
    found = fit_power_law(LENGTHS, law(LENGTHS))
    np.testing.assert_allclose(found, law, rtol=2e-3)


@pytest.mark.slow
def test_no_law_near_it_fits_better():
    """Against a slow search over all three parameters, by the same robust loss."""
    generator = np.random.default_rng(0)
    losses = PAPER["7B"](LENGTHS) + generator.normal(0, 0.003, len(LENGTHS))
    found = fit_power_law(LENGTHS, losses)

    def huber(law):
        residuals = np.abs(losses - law(LENGTHS))
        limit = 1.345 * 1.4826 * np.median(np.abs(losses - found(LENGTHS)))
        inside = residuals <= limit
        return np.where(inside, residuals**2 / 2, limit * (residuals - limit / 2)).sum()

    best = huber(found)
    for alpha in np.geomspace(found.alpha / 3, found.alpha * 3, 25):
        for beta in np.linspace(found.beta * 0.7, found.beta * 1.3, 25):
            for gamma in np.linspace(found.gamma - 0.05, found.gamma + 0.05, 25):
                assert huber(PowerLaw(alpha, beta, gamma)) >= best * (1 - 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_the_papers_curves_lie_in_the_bootstrap_intervals(name):
    law = PAPER[name]
    generator = np.random.default_rng(len(name))
    documents = generator.normal(0, 0.05, (64, 1)) + generator.normal(0, 0.02, (64, len(LENGTHS)))
    fitted = fit_scaling(LENGTHS, law(LENGTHS) + documents - documents.mean(), draws=200)
    for low, true, high in zip(fitted.low, law, fitted.high, strict=True):
        assert low <= true <= high
    low, high = fitted.interval(HELD_OUT)
    assert (low <= law(HELD_OUT)).all()
    assert (law(HELD_OUT) <= high).all()
    assert (high - low < 0.1).all()


@pytest.mark.slow
def test_intervals_cover_as_often_as_they_say():
    """40 repetitions: a 90 % interval of the loss at a held-out length misses rarely."""
    law, hits = PAPER["13B"], 0
    for seed in range(40):
        generator = np.random.default_rng(1000 + seed)
        losses = law(LENGTHS) + generator.normal(0, 0.03, (40, len(LENGTHS)))
        fitted = fit_scaling(LENGTHS, losses, draws=50, seed=seed)
        low, high = fitted.interval([32_768], share=0.9)
        hits += bool(low[0] <= law([32_768])[0] <= high[0])
    assert 29 <= hits <= 40  # 36 expected, 1.9 its deviation


def test_an_outlier_hardly_moves_the_law():
    losses = PAPER["7B"](LENGTHS)
    losses[3] += 0.3
    found = fit_power_law(LENGTHS, losses)
    np.testing.assert_allclose(found(HELD_OUT), PAPER["7B"](HELD_OUT), atol=0.02)


def test_the_seed_decides_the_draws():
    losses = PAPER["7B"](LENGTHS) + np.random.default_rng(0).normal(0, 0.02, (10, len(LENGTHS)))
    one, same, other = (fit_scaling(LENGTHS, losses, 10, seed=seed).draws for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(
    ("context", "losses", "message"),
    [
        ([256, 512], [2.0, 1.9], "3 different lengths or more; got 2"),
        ([256, 256, 512], [2.0, 2.1, 1.9], "3 different lengths or more; got 2"),
        ([256, 512, 1024], [2.0, float("nan"), 1.9], "losses finite"),
        ([0, 512, 1024], [2.0, 1.9, 1.8], "lengths must be above 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(context, losses, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(context, losses)


def test_one_sample_has_no_interval():
    with pytest.raises(ValueError, match="intervals need 2 samples or more; got 1"):
        fit_scaling(LENGTHS, PAPER["7B"](LENGTHS)[None])


def test_the_longest_context_is_predicted_from_the_others():
    random = np.random.default_rng(0)
    law = PAPER["7B"]
    losses = law(LENGTHS) + random.normal(0, 0.003, (40, len(LENGTHS)))
    found = extrapolate(LENGTHS, losses, draws=60)
    middle, low, high = found.predicted
    assert low < law([LENGTHS[-1]])[0] < high
    assert high - low < 0.02
    assert low < middle < high
    told = json.loads(json.dumps(found.results()))
    assert told["identified"] is True
    assert told["context"] == LENGTHS


@pytest.mark.parametrize("losses", [[2.0, 2.1, 2.2, 2.3, 2.4], [3.0, 3.0, 3.0, 3.0, 3.0]])
def test_what_does_not_fall_is_a_constant_and_no_law(losses):
    """The least squares of a constant are its mean."""
    context = [128, 256, 512, 1024, 2048]
    law = fit_power_law(context, losses)
    np.testing.assert_allclose(law(context), np.mean(losses), atol=1e-3)
    random = np.random.default_rng(0)
    rows = np.array(losses) + random.normal(0, 1e-4, (10, 5))
    found = extrapolate(context, rows, draws=20)
    assert json.dumps(found.results()["identified"]) == "false"
    assert law_table({"a": found, "b": found}) == (
        "no power law can be told from these losses: a, b"
    )
