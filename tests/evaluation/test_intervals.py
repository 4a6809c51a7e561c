"""Paired bootstrap intervals: against closed forms, and how often they hold the truth."""

import numpy as np
import pytest

from lit_longctx.evaluation.statistics.intervals import Sums, paired_differences, wilson


def sums(values: np.ndarray) -> Sums:
    return Sums(values[:, None], np.ones((len(values), 1)))


def test_what_is_hard_for_both_cancels():
    """Differences of 0.1 ± 0.01 on units that spread by 5: t-interval of the differences."""
    random = np.random.default_rng(0)
    hard = random.normal(0, 5, 200)
    apart = random.normal(0.1, 0.01, 200)
    ((mean, low, high),) = paired_differences(sums(hard), sums(hard + apart))
    error = 1.96 * apart.std(ddof=1) / 200**0.5
    assert mean == pytest.approx(apart.mean())
    assert (low, high) == pytest.approx((mean - error, mean + error), abs=0.1 * error)


def test_units_weigh_as_much_as_they_hold():
    first = Sums(np.array([[10.0], [0.0]]), np.array([[9.0], [1.0]]))
    other = Sums(np.array([[1.0], [4.0]]), np.array([[9.0], [1.0]]))
    ((mean, low, high),) = paired_differences(first, other)
    assert mean == pytest.approx(-0.5)
    assert (low, high) == pytest.approx((-1.0, 4.0))  # only one of the two units was drawn


def test_the_interval_holds_the_truth_as_often_as_it_says():
    random = np.random.default_rng(1)
    held = 0
    for seed in range(300):
        first, other = random.exponential(1.0, (2, 60))
        ((_, low, high),) = paired_differences(sums(first), sums(other), draws=300, seed=seed)
        held += low <= 0 <= high
    assert 0.90 <= held / 300 <= 0.985  # binomial, four deviations around .94


def test_nothing_has_no_mean_and_a_single_unit_no_interval():
    number = np.array([[0.0, 3.0], [0.0, 0.0]])
    empty, single = paired_differences(Sums(number, number), Sums(2 * number, number))
    assert np.isnan(empty).all()
    assert single.mean == 1.0
    assert np.isnan([single.low, single.high]).all()


@pytest.mark.parametrize(("hits", "number"), [(0, 1), (1, 1), (2, 3), (4, 4), (0, 8), (37, 100)])
def test_an_interval_of_a_share_is_scipys(hits: int, number: int):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(hits, number).proportion_ci(0.95, method="wilson")
    assert wilson(hits / number, number) == pytest.approx((expected.low, expected.high), abs=1e-12)
