"""Rows that walk through documents: the order of windows for a model with a memory."""

from collections.abc import Sequence

import numpy as np

from lit_longctx.data.sampling.sample_index import quota_schedule, whole_shares


class ContiguousSampler:
    """Global sample number → (source, window), such that row r of a step follows row r of the last.

    Each row of the batch reads a stretch of one source, window by window. All stretches are
    equally long; when they end, the next epoch begins with other stretches. A pure function of its
    arguments, like `SampleIndex`.

    Args:
        windows: Windows that each source holds.
        weights: Share of the rows that each source gets; default: its share of the windows.
        seed: Decides where the stretches of an epoch begin.
        rows: Rows of an optimizer step over all processes.
    """

    def __init__(
        self, windows: Sequence[int], weights: Sequence[float] | None, seed: int, rows: int
    ) -> None:
        shares = whole_shares(weights or windows)
        schedule = quota_schedule(shares)
        self.source = [schedule[row % len(schedule)] for row in range(rows)]
        self.windows = list(windows)
        self.seed = seed
        self.rows = rows
        used = set(self.source)
        self.span = min(windows[source] // self.source.count(source) for source in used)
        if not self.span:
            raise ValueError(f"{rows} rows are too many for sources of {list(windows)} windows")

    def __call__(self, sample: int) -> tuple[int, int]:
        """Return source and window of a sample."""
        step, row = divmod(sample, self.rows)
        epoch, place = divmod(step, self.span)
        source = self.source[row]
        earlier = self.source[:row].count(source)
        spare = self.windows[source] - self.span * self.source.count(source)
        shift = int(np.random.default_rng([self.seed, source, epoch]).integers(spare + 1))
        return source, shift + earlier * self.span + place

    def restarts(self, sample: int) -> bool:
        """Whether a row begins anew in the step that starts with this sample.

        After a change of the batch a step may start within a round of the rows; then both rounds
        count.
        """
        rounds = (sample // self.rows, (sample + self.rows - 1) // self.rows)
        return any(number % self.span == 0 for number in rounds)
