"""How sure a mean is, and a difference between checkpoints.

They saw the same, so it is drawn anew together.
"""

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float


class Interval(NamedTuple):
    """A difference with its bootstrap interval."""

    mean: float
    low: float
    high: float


class Sums(NamedTuple):
    """What one checkpoint got; a unit is what is drawn together: a window, a document, a prompt."""

    total: Float[np.ndarray, "units *cells"]
    """Sum of what is averaged: nats, or scores."""
    number: Float[np.ndarray, "units *cells"]
    """How many were summed."""

    def over(self, *axes: int) -> "Sums":
        """Add up some axes of the cells."""
        return Sums(self.total.sum(axes), self.number.sum(axes))

    def means(self) -> Float[np.ndarray, "*cells"]:
        """Mean of each cell; nan where there is nothing."""
        return _ratio(self.total.sum(0), self.number.sum(0))

    def drawn(self, times: Float[np.ndarray, "draws units"]) -> Float[np.ndarray, "draws cells"]:
        """Means where each unit is taken so many times."""
        units = len(self.total)
        totals, numbers = (times @ found.reshape(units, -1) for found in self)
        return _ratio(totals, numbers)


def wilson(mean: float, number: int, share: float = 0.95) -> tuple[float, float]:
    """Interval of a mean of `number` scores, each of them 0 or 1 (Wilson 1927, eq. 12).

    Scores between 0 and 1 vary less at the same mean: then it is wider than it need be.
    """
    z = NormalDist().inv_cdf((1 + share) / 2)
    middle = (mean + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * (mean * (1 - mean) / number + (z / (2 * number)) ** 2) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def _ratio(total: Any, number: Any) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # nothing over nothing is nan
        return np.asarray(total / number)


def paired_differences(
    first: Sums, other: Sums, draws: int = 1000, share: float = 0.95, seed: int = 0
) -> list[Interval]:
    """Mean of `other` less mean of `first` in each cell, with percentile bootstrap intervals.

    Both take the same units in a draw (Efron & Tibshirani 1993, §8.3): what makes a unit hard for
    both cancels. The mean is nan where there is nothing, its interval where fewer than two units
    have anything. Costs draws × units × cells.

    Args:
        first: The baseline.
        other: Another checkpoint on the same units.
        draws: Bootstrap draws.
        share: Coverage of the intervals.
        seed: Decides the draws.
    """
    units = len(first.total)
    probs = np.full(units, 1 / units)
    times = np.random.default_rng(seed).multinomial(units, probs, size=draws).astype(np.float64)
    found = other.drawn(times) - first.drawn(times)
    found[:, np.count_nonzero(first.number.reshape(units, -1), axis=0) < 2] = np.nan
    means = (other.means() - first.means()).flatten()
    ends = [_ends(column[~np.isnan(column)], share) for column in found.T]
    return [Interval(float(mean), *pair) for mean, pair in zip(means, ends, strict=True)]


def _ends(values: np.ndarray, share: float) -> Sequence[float]:
    """Quantiles of the draws that have anything."""
    if not len(values):
        return (float("nan"), float("nan"))
    return np.quantile(values, [(1 - share) / 2, (1 + share) / 2]).tolist()
