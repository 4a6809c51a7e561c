"""Figures, measured in pixels: labels stand apart, and buckets have the room that is theirs."""

from itertools import pairwise

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lit_longctx import plots

EDGES = {
    "a power of two": [0, *(2**i for i in range(7, 18))],
    "a window just above one": [0, 128, 256, 512, 1024, 2048, 4096, 4352],
    "two buckets": [0, 128, 256],
    "one bucket": [0, 256],
}


def labels(figure):
    """Boxes of the labels that x has, from left to right, with their texts."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    shown = [t for t in axes.get_xticklabels() if low <= t.get_position()[0] <= high]
    return [(t.get_window_extent(canvas.get_renderer()), t.get_text()) for t in shown]


@pytest.mark.parametrize("name", EDGES)
def test_labels_of_positions_stand_apart_and_the_last_is_there(name):
    edges = EDGES[name]
    values = [3.0 - i / 10 for i in range(len(edges) - 1)]
    figure = plots.loss_by_position(edges, {"a": values}, trained=edges[-1] // 2)
    found = sorted(labels(figure), key=lambda label: label[0].x0)
    assert (found[0][1], found[-1][1]) == ("0", f"{edges[-1]:,}")
    assert all(before.x1 < after.x0 for (before, _), (after, _) in pairwise(found))


def test_the_first_bucket_is_as_wide_as_the_others():
    edges = EDGES["a power of two"]
    figure = plots.loss_by_position(edges, {"a": [3.0] * (len(edges) - 1)})
    (line,) = figure.axes[0].lines
    at = [figure.axes[0].transData.transform((x, 3.0))[0] for x in line.get_xdata()]
    steps = [after - before for before, after in pairwise(at)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_labels_of_windows_stand_apart_in_any_order():
    windows = [4352, 256, 512, 1024, 4096]
    figure = plots.perplexity(windows, {"a": [1.0, 5.0, 4.0, 3.0, 2.0]})
    found = sorted(labels(figure), key=lambda label: label[0].x0)
    assert all(before.x1 < after.x0 for (before, _), (after, _) in pairwise(found))
    (line,) = figure.axes[0].lines
    assert line.get_xdata().tolist() == sorted(windows)
    assert line.get_ydata().tolist() == [5.0, 4.0, 3.0, 2.0, 1.0]


def test_differences_stand_below_each_other_beside_0():
    intervals = {"a": (0.5, 0.25, 0.75), "b": (-1.0, float("nan"), float("nan"))}
    figure = plots.differences(intervals, "nats saved")
    (axes,) = figure.axes
    first, mean, *_, zero = axes.lines
    assert (first.get_xdata().tolist(), first.get_ydata().tolist()) == ([0.25, 0.75], [0, 0])
    assert (mean.get_xdata().tolist(), mean.get_ydata().tolist()) == ([0.5], [0])
    assert list(zero.get_xdata()) == [0, 0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert axes.get_xlabel() == "nats saved"
    height = axes.transData.transform([(0, 0), (0, 1)])[:, 1]
    assert height[0] > height[1]
