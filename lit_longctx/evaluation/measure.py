"""What all measures share: items measured one by one, and checkpoints set side by side."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from lit_longctx.evaluation.statistics.intervals import Interval, Sums, paired_differences
from lit_longctx.model import Llama
from lit_longctx.result_cache import CacheKey

EvalItem = CacheKey
"""What decides one value, besides the checkpoint."""


def spread(places: Sequence[int], number: int) -> list[int]:
    """Return so many of the places, or all if there are fewer, evenly spread from first to last."""
    chosen = np.linspace(0, len(places) - 1, min(number, len(places))).round()
    return [places[int(i)] for i in chosen]


class Section(NamedTuple):
    """One part of a report."""

    results: dict[str, Any]
    """Entries of results.json."""
    tables: dict[str, str]
    """Markdown by the name of its file."""
    figures: dict[str, Figure]
    """By the name of their file."""


class Measure(ABC):
    """Something to measure of every checkpoint on the same items."""

    version: int = 1
    """Raised whenever values change, so that none is answered from what older code measured."""

    @abstractmethod
    def eval_items(self) -> list[EvalItem]:
        """Return what is measured one by one, the same for every checkpoint.

        Raises:
            ValueError: Something in it cannot be measured.
        """

    @abstractmethod
    def measure(self, llama: Llama, item: EvalItem) -> Any:
        """Return the value of an item; JSON can hold it."""

    @abstractmethod
    def report(self, values: dict[str, list[Any]], trained: int) -> Section:
        """Return the results of checkpoints, given their values in the order of `eval_items`.

        Args:
            values: By checkpoint; the first is the baseline.
            trained: Tokens of context that the first was trained on.
        """


class Comparison:
    """Means of checkpoints over the same items, and how the later ones differ from the first.

    Args:
        sums: What each checkpoint got; the first is the baseline.
        unit: What is drawn together, such as "window".
        option: The option that gives more of them.
    """

    def __init__(self, sums: dict[str, Sums], unit: str, option: str) -> None:
        self.unit, self.option = unit, option
        (_, baseline), *others = sums.items()
        self.means = {name: each.means().flatten().tolist() for name, each in sums.items()}
        self.number = baseline.number.sum(0).flatten().tolist()
        self.differences = {name: paired_differences(baseline, each) for name, each in others}

    def table(self, head: str, counted: str, rows: Sequence[str], digits: int = 4) -> str:
        """Return a Markdown table; cells without anything have no row.

        Args:
            head: What the rows are.
            counted: What was averaged.
            rows: Name of each cell.
            digits: After the point.
        """
        columns = [head, counted]
        for name in self.means:
            columns += [name, "Δ [95 %]"] if name in self.differences else [name]
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for i, row in enumerate(rows):
            cells = [row, f"{self.number[i]:,.0f}"]
            for name, means in self.means.items():
                cells.append(f"{means[i]:.{digits}f}")
                if name in self.differences:
                    cells.append(signed(self.differences[name][i], digits))
            if self.number[i]:
                lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + self.missing()

    def missing(self) -> str:
        """Say below a table why a difference has no interval, if one has none."""
        differences = (each for found in self.differences.values() for each in found)
        if not any(each.mean == each.mean and each.low != each.low for each in differences):
            return ""
        return (
            f"\n\n[–]: an interval needs two {self.unit}s or more that reach there; one does; "
            f"raise {self.option}"
        )


def signed(difference: Interval, digits: int = 4) -> str:
    """Return a difference as text, with its interval; [–] where it has none."""
    mean, low, high = difference
    interval = f"[{low:+.{digits}f}, {high:+.{digits}f}]" if low == low else "[–]"
    return f"{mean:+.{digits}f} {interval}"
