"""Which window is the n-th sample of a run: a pure function of seed, sources and n.

Nothing here has a state, so a resume is exact on any number of processes, workers and
micro-batches, and costs no time however far the run has come.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import floor, inf

import numpy as np

PERIOD = 10_000
"""Weights are kept to 1/PERIOD, after which the schedule of sources repeats."""


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Smallest whole numbers in the proportion of the weights, their sum at most PERIOD."""
    if not all(0 < weight < inf for weight in weights):
        raise ValueError(f"every weight must be above 0; got {list(weights)}")
    total = sum(Fraction(str(weight)) for weight in weights)
    exact = [Fraction(str(weight)) / total * PERIOD for weight in weights]
    shares = [max(1, floor(share)) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: max(0, PERIOD - sum(shares))]:
        shares[i] += 1
    common = int(np.gcd.reduce(shares))
    return [share // common for share in shares]


def quota_schedule(shares: Sequence[int]) -> list[int]:
    """SampleIndex sources so that after every n samples each has its share of n to within one.

    Tijdeman 1980, The chairman assignment problem: of the sources that are due, take the one whose
    deadline comes first. Exact whole-number arithmetic, sum(shares) entries.
    """
    period, number = sum(shares), len(shares)
    if number == 1:
        return [0]
    counts = [0] * number
    schedule = []
    slack = 2 * number - 2
    for n in range(1, period + 1):
        due = [n * share - count * period for share, count in zip(shares, counts, strict=True)]
        ready = [i for i in range(number) if due[i] * slack >= period]
        chosen = min(
            ready, key=lambda i: Fraction(period * (slack - 1) - due[i] * slack, shares[i])
        )
        counts[chosen] += 1
        schedule.append(chosen)
    return schedule


class SampleIndex:
    """Global sample number → (source, window).

    Args:
        windows: Windows that each source holds.
        weights: Share of samples that each source gets, in any unit; default: its share of the
            windows.
        seed: Decides every shuffle.
        group: Windows of each source that are shuffled together, one number or the sizes of all
            groups; a group is read through before the next begins, so that streaming stays
            sequential. Default: all of them.
        begun: Windows of each source that count as drawn before the first sample.
        keys: A number for each source that decides its shuffles; default: its place.

    A source that ends begins its next epoch in another order.
    """

    def __init__(
        self,
        windows: Sequence[int],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        group: Sequence[int | Sequence[int]] | None = None,
        begun: Sequence[int] | None = None,
        keys: Sequence[int] | None = None,
    ) -> None:
        if min(windows) < 1:
            raise ValueError(f"every source needs a window at least; got {list(windows)}")
        self.windows = list(windows)
        self.seed = seed
        self.groups = [_sizes(w, g) for w, g in zip(windows, group or windows, strict=True)]
        self.begun = list(begun or [0] * len(windows))
        self.keys = list(keys or range(len(windows)))
        self.shares = whole_shares(weights or windows)
        self.schedule = np.array(quota_schedule(self.shares))
        self.rank = np.zeros(len(self.schedule), dtype=np.int64)
        for source in range(len(windows)):
            turns = self.schedule == source
            self.rank[turns] = np.arange(turns.sum())

    def __call__(self, sample: int) -> tuple[int, int]:
        """Return source and window of a sample."""
        period, turn = divmod(sample, len(self.schedule))
        source = int(self.schedule[turn])
        drawn = self.begun[source] + period * self.shares[source] + int(self.rank[turn])
        epoch, place = divmod(drawn, self.windows[source])
        return source, self._shuffled(source, epoch, place)

    def drawn(self, samples: int) -> list[int]:
        """Windows that the first samples take from each source."""
        periods, turns = divmod(samples, len(self.schedule))
        rest = np.bincount(self.schedule[:turns], minlength=len(self.shares))
        return [periods * share + int(r) for share, r in zip(self.shares, rest, strict=True)]

    def _shuffled(self, source: int, epoch: int, place: int) -> int:
        """Window at a place of an epoch: groups in random order, windows random within theirs."""
        sizes, key = self.groups[source], self.keys[source]
        order = _permutation(self.seed, key, epoch, -1, len(sizes))
        ends = sizes[order].cumsum()
        turn = int(np.searchsorted(ends, place, side="right"))
        group, size = int(order[turn]), int(sizes[order[turn]])
        inside = _permutation(self.seed, key, epoch, group, size)
        return int(sizes[:group].sum() + inside[place - ends[turn] + size])


def _sizes(windows: int, group: int | Sequence[int]) -> np.ndarray:
    """Windows of each group."""
    if isinstance(group, Sequence):
        return np.array(group)
    begins = np.arange(0, windows, group)
    return np.append(begins[1:], windows) - begins


@lru_cache(maxsize=256)
def _permutation(seed: int, source: int, epoch: int, group: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, source, epoch, group + 1]).permutation(length)
