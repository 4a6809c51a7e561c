"""Figures that notebooks, the command line, reports and the logger share; each returns a Figure."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def _axes(width: float = 7.0, height: float = 4.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def loss_by_position(
    edges: Sequence[int], curves: dict[str, Sequence[float]], trained: int | None = None
) -> Figure:
    """Draw mean nats against the tokens that came before, one line per checkpoint.

    Args:
        edges: Bucket edges in tokens, one more than values.
        curves: Nats per token of each bucket, by name.
        trained: Context of the first checkpoint, drawn as a vertical line.
    """
    figure, axes = _axes()
    middles = [(max(low, 1) * high) ** 0.5 for low, high in zip(edges[:-1], edges[1:], strict=True)]
    for name, values in curves.items():
        axes.plot(middles, values, marker="o", label=name)
    if trained:
        axes.axvline(trained, color="grey", linestyle="--", linewidth=1, label=f"{trained:,} tokens")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(edges[1:]), [f"{edge:,}" for edge in edges[1:]])
    axes.set_xlabel("tokens of the document before")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.legend(frameon=False)
    return figure
