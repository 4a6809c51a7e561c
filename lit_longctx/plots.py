"""Figures that notebooks, the command line, reports and the logger share; each returns a Figure."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import pi
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def _axes(width: float = 7.0, height: float = 4.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, _plain(figure.add_subplot())


def _plain(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return axes


def loss_by_position(
    edges: Sequence[int], curves: Mapping[str, Sequence[float]], trained: int | None = None
) -> Figure:
    """Draw mean nats against the tokens that came before, one line per checkpoint.

    Args:
        edges: Bucket edges in tokens, one more than values.
        curves: Nats per token of each bucket, by name.
        trained: Context of the first checkpoint, drawn as a vertical line.
    """
    figure, axes = _axes()
    middles = [(max(low, 1) * high) ** 0.5 for low, high in pairwise(edges)]
    for name, values in curves.items():
        axes.plot(middles, values, marker="o", label=name)
    if trained:
        axes.axvline(
            trained, color="grey", linestyle="--", linewidth=1, label=f"{trained:,} tokens"
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(edges[1:]), [f"{edge:,}" for edge in edges[1:]])
    axes.set_xlabel("tokens of the document before")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.legend(frameon=False)
    return figure


def frequencies(curves: Mapping[str, Sequence[float]], trained: int | None = None) -> Figure:
    """Draw every pair's wavelength, 2π over its frequency, one line per position scheme.

    Args:
        curves: Radians per token of each pair, by name.
        trained: Context of the first checkpoint; pairs above that line never turned once in it.
    """
    figure, axes = _axes(width=9.0)
    for name, values in curves.items():
        axes.plot([2 * pi / value for value in values], label=name)
    if trained:
        axes.axhline(
            trained, color="grey", linestyle="--", linewidth=1, label=f"{trained:,} tokens"
        )
    axes.set_yscale("log")
    axes.set_xlabel("pair of features")
    axes.set_ylabel("wavelength (tokens per turn)")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def stretch(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Draw how many times slower than RoPE each pair turns, one line per position scheme.

    Args:
        curves: RoPE's frequency over the scheme's, for each pair, by name.
    """
    figure, axes = _axes(width=9.0)
    for name, values in curves.items():
        axes.plot(values, label=name)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}×")
    axes.set_xlabel("pair of features")
    axes.set_ylabel("stretch (RoPE's frequency over the scheme's)")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def score_by_distance(
    distances: Sequence[int], curves: Mapping[str, Sequence[float]], trained: int | None = None
) -> Figure:
    """Draw attention scores against the distance of query and key, a panel per position scheme.

    Args:
        distances: Tokens between query and key.
        curves: Score at each distance, by name.
        trained: Context of the first checkpoint, drawn as a vertical line.
    """
    figure = Figure(figsize=(7.0, 1.4 * len(curves) + 0.6), layout="constrained")
    panels = figure.subplots(len(curves), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, values) in zip(panels, curves.items(), strict=True):
        _plain(axes).plot(distances, values, linewidth=0.5)
        axes.set_title(name, loc="left", fontsize="medium")
        if trained:
            axes.axvline(trained, color="grey", linestyle="--", linewidth=1)
    panels[-1].xaxis.set_major_formatter("{x:,.0f}")
    panels[-1].set_xlabel("tokens between query and key")
    figure.supylabel("score, as a share of its value at distance 0")
    return figure


def document_lengths(report: dict[str, Any]) -> Figure:
    """Draw how each source's tokens spread over document lengths before and after a mix.

    Args:
        report: What `lit_longctx mix` writes to report.json.
    """
    sources = report["sources"]
    figure = Figure(figsize=(7.0, 1.8 * len(sources) + 0.6), layout="constrained")
    panels = figure.subplots(len(sources), sharex=True, sharey=True, squeeze=False)[:, 0]
    edges = sorted({b["from_tokens"] for source in sources.values() for b in source["buckets"]})
    for axes, (name, source) in zip(panels, sources.items(), strict=True):
        _plain(axes)
        for when, shift in (("before", -0.2), ("after", 0.2)):
            tokens = {b["from_tokens"]: b[f"tokens_{when}"] for b in source["buckets"]}
            total = max(1, sum(tokens.values()))
            shares = [tokens.get(edge, 0) / total for edge in edges]
            axes.bar([i + shift for i in range(len(edges))], shares, width=0.4, label=when)
        share = f"{source['share_before']:.1%} → {source['share_after']:.1%} of all tokens"
        axes.set_title(f"{name}: {share}", loc="left", fontsize="medium")
        axes.yaxis.set_major_formatter("{x:.0%}")
    panels[0].legend(frameon=False)
    panels[-1].set_xticks(range(len(edges)), [f"≥ {edge // 1024}" for edge in edges])
    panels[-1].set_xlabel("thousands of tokens (1,024) of the document")
    figure.supylabel("share of the source's tokens")
    return figure


def scaling(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    bands: Mapping[str, tuple[Any, ...]],
) -> Figure:
    """Draw loss against context with the power law through it, one line per checkpoint.

    Args:
        points: Contexts in tokens and nats per token at each, by name.
        bands: Contexts, the law there, and the ends of its interval, by name.
    """
    figure, axes = _axes()
    for name, (context, losses) in points.items():
        (drawn,) = axes.plot(context, losses, marker="o", linestyle="", label=name)
        dense, law, low, high = bands[name]
        axes.plot(dense, law, color=drawn.get_color(), linewidth=1)
        axes.fill_between(dense, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.legend(frameon=False)
    return figure


def perplexity(windows: Sequence[int], curves: Mapping[str, Sequence[float]]) -> Figure:
    """Draw sliding-window perplexity against the window, one line per checkpoint.

    Args:
        windows: Tokens that are read at a time.
        curves: Perplexity at each, by name.
    """
    figure, axes = _axes()
    for name, values in curves.items():
        axes.plot(windows, values, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(windows), [f"{window:,}" for window in windows])
    axes.set_xlabel("window (tokens)")
    axes.set_ylabel("perplexity (per token)")
    axes.legend(frameon=False)
    return figure


def heat_map(
    lengths: Sequence[int],
    depths: Sequence[float],
    scores: Mapping[str, Sequence[Sequence[float]]],
) -> Figure:
    """Draw scores over length and depth, a panel per checkpoint; green is found, red is not.

    Args:
        lengths: Tokens of the prompts.
        depths: Percent of the context before the needle; a task without depth has one row.
        scores: Mean score of each length (outer) and depth, by checkpoint.
    """
    width = 1.2 + 0.6 * len(lengths)
    figure = Figure(figsize=(max(4.0, width) * len(scores), 3.2), layout="constrained")
    panels = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(panels, scores.items(), strict=True):
        by_depth = list(zip(*values, strict=True))
        image = axes.imshow(by_depth, cmap="RdYlGn", vmin=0.0, vmax=1.0, aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45, ha="right")
        rows = [f"{depth:g} %" for depth in depths] if len(by_depth) > 1 else ["any"]
        axes.set_yticks(range(len(by_depth)), rows)
        axes.set_title(f"{name}: {sum(map(sum, values)) / sum(map(len, values)):.2f}")
        axes.set_xlabel("tokens of the prompt")
        figure.colorbar(image, ax=axes, label="mean score")
    panels[0].set_ylabel("depth of the needle")
    return figure
