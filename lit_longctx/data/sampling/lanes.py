"""Rows that walk through documents: the order of windows for a model with a memory."""

from collections.abc import Sequence

import numpy as np

from lit_longctx.data.sampling.order import quota_schedule, whole_shares


class Lanes:
    """Global sample number → (source, window), such that row r of a step follows row r of the last.

    Each row of the batch is a lane: a stretch of one source, read window by window. All lanes are
    equally long; when they end, the next epoch begins with other stretches. A pure function of its
    arguments, like `Order`.

    Args:
        windows: Windows that each source holds.
        weights: Share of the lanes that each source gets; default: its share of the windows.
        seed: Decides where the lanes of an epoch begin.
        lanes: Rows of an optimizer step over all processes.
    """

    def __init__(
        self, windows: Sequence[int], weights: Sequence[float] | None, seed: int, lanes: int
    ) -> None:
        shares = whole_shares(weights or windows)
        schedule = quota_schedule(shares)
        self.source = [schedule[lane % len(schedule)] for lane in range(lanes)]
        self.windows = list(windows)
        self.seed = seed
        self.lanes = lanes
        used = set(self.source)
        self.span = min(windows[source] // self.source.count(source) for source in used)
        if not self.span:
            raise ValueError(f"{lanes} lanes are too many for sources of {list(windows)} windows")

    def __call__(self, sample: int) -> tuple[int, int]:
        """Return source and window of a sample."""
        step, lane = divmod(sample, self.lanes)
        epoch, place = divmod(step, self.span)
        source = self.source[lane]
        neighbours = self.source[:lane].count(source)
        spare = self.windows[source] - self.span * self.source.count(source)
        shift = int(np.random.default_rng([self.seed, source, epoch]).integers(spare + 1))
        return source, shift + neighbours * self.span + place

    def restarts(self, sample: int) -> bool:
        """Whether a row begins anew in the step that starts with this sample.

        After a change of the batch a step may start within a round of the lanes; then both rounds
        count.
        """
        rounds = (sample // self.lanes, (sample + self.lanes - 1) // self.lanes)
        return any(number % self.span == 0 for number in rounds)
