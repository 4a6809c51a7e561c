"""Figures that notebooks, the command line, reports and the logger share; each returns a Figure."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import pi
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_longctx.batch import NO_TARGET, Batch


def _axes(width: float = 7.0, height: float = 4.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, _plain(figure.add_subplot())


def _plain(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return axes


def _tokens(axes: Axes, ticks: Sequence[int], zero: float | None = None) -> None:
    """Make x a logarithmic axis of tokens with ticks that do not overprint; the last one stays.

    Args:
        axes: Where to.
        ticks: Tokens, growing; one that stands less than an eighth of the width before a later one
            that has a tick has none.
        zero: Where 0 tokens stand, which a logarithm knows not.
    """
    left = ticks[0] if zero is None else zero
    apart = (ticks[-1] / left) ** (1 / 8)
    kept = [ticks[-1]]
    for tick in reversed(ticks[:-1]):
        if tick * apart <= kept[-1]:
            kept.append(tick)
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    begin = [] if zero is None else [zero]
    axes.set_xticks([*begin, *kept], ["0" for _ in begin] + [f"{tick:,}" for tick in kept])
    axes.set_xlim(left=zero)


def loss_by_position(
    edges: Sequence[int], curves: Mapping[str, Sequence[float]], trained: int | None = None
) -> Figure:
    """Draw mean nats against the tokens that came before, one line per checkpoint.

    Each value stands in the geometric middle of its bucket; the first, which begins at 0, is as
    wide as if it were the half below its end.

    Args:
        edges: Bucket edges in tokens, one more than values.
        curves: Nats per token of each bucket, by name.
        trained: Context of the first checkpoint, drawn as a vertical line.
    """
    figure, axes = _axes()
    zero = edges[1] / 2
    middles = [(max(low, zero) * high) ** 0.5 for low, high in pairwise(edges)]
    for name, values in curves.items():
        axes.plot(middles, values, marker="o", label=name)
    if trained:
        axes.axvline(
            trained, color="grey", linestyle="--", linewidth=1, label=f"{trained:,} tokens"
        )
    _tokens(axes, edges[1:], zero)
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
    panels[-1].set_xticks(
        range(len(edges)), [f"≥ {edge // 1024}" for edge in edges], fontsize="small"
    )
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
        axes.plot(
            *zip(*sorted(zip(windows, values, strict=True)), strict=True), marker="o", label=name
        )
    _tokens(axes, sorted(windows))
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
        depths: Percent of the context before the needle; none for a task without depth.
        scores: Mean score of each length (outer) and depth, by checkpoint.
    """
    width = 1.2 + 0.6 * len(lengths)
    figure = Figure(figsize=(max(4.0, width) * len(scores), 3.2), layout="constrained")
    panels = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(panels, scores.items(), strict=True):
        by_depth = list(zip(*values, strict=True))
        image = axes.imshow(by_depth, cmap="RdYlGn", vmin=0.0, vmax=1.0, aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45, ha="right")
        rows = [f"{depth:g} %" for depth in depths] or ["any"]
        axes.set_yticks(range(len(by_depth)), rows)
        axes.set_title(f"{name}: {sum(map(sum, values)) / sum(map(len, values)):.2f}")
        axes.set_xlabel("tokens of the prompt")
        figure.colorbar(image, ax=axes, label="mean score")
    panels[0].set_ylabel("depth of the needle")
    return figure


def batch(packed: Batch, row: int = 0) -> Figure:
    """Draw the rows of a batch in the colours of their documents, and one row's places and mask.

    A document without any target, such as padding, is white. Costs rows × seq + 512².

    Args:
        packed: The batch.
        row: Row whose places and attention are drawn.
    """
    ids, labels, places = (
        found.cpu().numpy() for found in (packed.documents.ids, packed.labels, packed.position_ids)
    )
    rows, seq = ids.shape
    figure = Figure(figsize=(7.0, 4.0 + 0.4 * rows), layout="constrained")
    panels = figure.subplot_mosaic([["rows", "rows"], ["places", "mask"]], height_ratios=[rows, 7])
    _documents(panels["rows"], ids, labels == NO_TARGET)
    _plain(panels["places"]).plot(places[row], color="black", linewidth=1)
    panels["places"].set(title=f"places in row {row}", xlabel="token of the row", ylabel="place")
    shown = ids[row, :: -(-seq // 512)]
    sees = np.tril(shown[:, None] == shown)
    extent = (0, seq, seq, 0)
    colours = np.ma.array(np.broadcast_to(shown[:, None] % 10, sees.shape), mask=~sees)
    panels["mask"].imshow(colours, cmap="tab10", vmin=0, vmax=9, extent=extent)
    panels["mask"].set(title=f"who sees whom in row {row}", xlabel="key", ylabel="query")
    for axes in panels.values():
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:,.0f}")
    return figure


def _documents(axes: Axes, ids: np.ndarray, empty: np.ndarray) -> None:
    """Draw a bar per row in the colours of its documents, with a tick where one has no target."""
    rows, seq = ids.shape
    blank = np.stack([~np.isin(i, i[~e]) for i, e in zip(ids, empty, strict=True)])
    colours = np.ma.array(ids % 10, mask=blank)
    shape = {"extent": (0, seq, rows - 0.5, -0.5), "aspect": "auto", "interpolation": "nearest"}
    axes.imshow(colours, cmap="tab10", vmin=0, vmax=9, **shape)
    axes.hlines(np.arange(rows - 1) + 0.5, 0, seq, color="white", linewidth=4)
    row, token = (empty & ~blank).nonzero()
    axes.scatter(token + 0.5, row - 0.34, marker="v", s=16, color="black", linewidths=0, zorder=3)
    axes.set_yticks(range(rows))
    axes.set(ylabel="row", title="documents (▾ no target; white: padding)")
    axes.spines[["top", "right"]].set_visible(False)


def loss_by_step(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> Figure:
    """Draw loss against optimizer steps, one line per run; a few values have a dot each.

    Args:
        curves: Steps and nats per token at each, by name.
    """
    figure, axes = _axes()
    for name, (steps, losses) in curves.items():
        axes.plot(steps, losses, marker="o" if len(steps) < 10 else "", label=name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    return figure


def differences(intervals: Mapping[str, tuple[float, float, float]], label: str) -> Figure:
    """Draw differences with their intervals beside a line at 0, one below the other.

    Args:
        intervals: Mean and both ends of each, by name; ends that are nan are not drawn.
        label: What differs, with its unit.
    """
    figure, axes = _axes(height=1.0 + 0.35 * len(intervals))
    for row, (mean, low, high) in enumerate(intervals.values()):
        axes.plot([low, high], [row, row], color="tab:blue", linewidth=2)
        axes.plot([mean], [row], color="tab:blue", marker="o")
    axes.axvline(0, color="grey", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(intervals)), list(intervals))
    axes.set_ylim(len(intervals) - 0.5, -0.5)
    axes.set_xlabel(label)
    return figure


def needles(prompts: Mapping[str, tuple[int, Sequence[tuple[int, int]], int]]) -> Figure:
    """Draw where needles stand in prompts, and where the answer follows; a bar per prompt.

    Args:
        prompts: Tokens of the prompt, first token and end of each needle, tokens of the answer;
            by name.
    """
    figure, axes = _axes(width=9.0, height=0.8 + 0.35 * len(prompts))
    axes.set_axisbelow(True)
    parts = ("context and question", "needle", "answer")
    for row, (length, places, answer) in enumerate(prompts.values()):
        spans = [(start, stop - start) for start, stop in places]
        for number, each in enumerate(([(0, length)], spans, [(length, answer)])):
            colour = ("lightgrey", "tab:orange", "tab:green")[number]
            label = None if row else parts[number]
            axes.broken_barh(each, (row - 0.35, 0.7), color=colour, label=label)
    axes.set_yticks(range(len(prompts)), list(prompts))
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("token")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
