"""Held-out loss by position, source and document length, and how it falls with context."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from lit_longctx import plots
from lit_longctx.batch import pack
from lit_longctx.data.store.windows import Windows
from lit_longctx.evaluation.loss.metrics import LossByPosition
from lit_longctx.evaluation.measure import Comparison, EvalItem, Measure, Section, signed, spread
from lit_longctx.evaluation.statistics.intervals import Interval, Sums, paired_differences
from lit_longctx.evaluation.statistics.scaling import Extrapolation, extrapolate
from lit_longctx.model import Llama

SOURCE, LENGTH, POSITION = 1, 2, 3
"""Axes of the sums, after that of the windows."""


@dataclass(frozen=True)
class LossRows:
    """What the rows of the loss are, and the buckets of position."""

    long_documents: bool = False
    """Rows are the beginnings of held-out documents longer than the window, spread evenly over
    them; default: windows of the whole split, in which documents end and begin."""
    edges: list[int] = field(default_factory=list)
    """Tokens at which buckets of position end, rising up to the window; default: 128, 256, 512, and
    so on."""

    def check(self, window: int) -> None:
        """Raise ValueError if the edges do not rise up to the window."""
        rising = all(low < high for low, high in pairwise([0, *self.edges]))
        if self.edges and not (rising and self.edges[-1] == window):
            raise ValueError(
                f"expected edges that rise from above 0 to the window of {window}; got {self.edges}"
            )


class HeldOutLoss(Measure):
    """Nats per token in evenly spread held-out rows; one row is one item.

    Args:
        sources: Held-out splits by name, of one window length.
        windows: Rows of each.
        rows: What the rows are, and the buckets of position.
    """

    def __init__(
        self, sources: dict[str, Windows], windows: int, rows: LossRows = LossRows()
    ) -> None:
        self.sources = sources
        self.windows = windows
        self.rows = rows
        window = next(iter(sources.values())).length
        rows.check(window)
        self.metric = LossByPosition(
            list(sources), window, [0, *rows.edges] if rows.edges else None
        )

    def eval_items(self) -> list[EvalItem]:
        """Return an item for each row."""
        edges = {"edges": self.rows.edges} if self.rows.edges else {}
        return [
            {
                "source": name,
                "data": source.manifest.hash,
                "window": source.length,
                **place,
                **edges,
            }
            for name, source in self.sources.items()
            for place in self._places(name, source)
        ]

    def _places(self, name: str, source: Windows) -> list[dict[str, int]]:
        """Where the rows of a source are: numbers of windows, or documents' first tokens."""
        if not self.rows.long_documents:
            return [{"at": at} for at in spread(range(len(source)), self.windows)]
        lengths = source.document_lengths().astype(np.int64)
        long = (lengths.cumsum() - lengths)[lengths > source.length].tolist()
        if not long:
            raise ValueError(
                f"no held-out document of {name} has more than {source.length} tokens; the longest "
                f"has {lengths.max(initial=0)}; set --window to less"
            )
        return [{"begin": begin} for begin in spread(long, self.windows)]

    @torch.inference_mode()
    def measure(self, llama: Llama, item: EvalItem) -> list[list[float]]:
        """Return [length bucket, position bucket, Σ nats, targets] wherever there are targets."""
        source = self.sources[item["source"]]
        tokens, starts = (
            torch.from_numpy(each)[None].to(llama.head_weight.device)
            for each in self._row(source, item)
        )
        batch = pack(tokens, source.tokenizer.bos, starts)
        self.metric.to(tokens.device).reset()
        self.metric.update(llama(batch), batch)
        nats, targets = (found[0] for found in self.metric.compute())
        return [
            [i, j, float(nats[i, j]), int(targets[i, j])] for i, j in targets.nonzero().tolist()
        ]

    @staticmethod
    def _row(source: Windows, item: EvalItem) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of a row, and True where a document starts."""
        if "at" in item:
            return source.with_starts(item["at"])
        end = item["begin"] + source.length + 1
        return source.read(item["begin"], end), source.starts(item["begin"], end)

    def report(self, values: dict[str, list[Any]], trained: int) -> Section:
        """Return losses by position, source and length, gains, and the law L(c)."""
        edges, sources = self.metric.edges, list(self.sources)
        sums = {name: self._sums(windows) for name, windows in values.items()}
        position, length, source = (
            Comparison({n: each.over(*axes) for n, each in sums.items()}, "window", "--windows")
            for axes in ((SOURCE, LENGTH), (SOURCE, POSITION), (LENGTH, POSITION))
        )
        gain = gains(
            {name: each.over(SOURCE, LENGTH) for name, each in sums.items()}, edges, trained
        )
        by_source = {name: each.over(LENGTH).means().tolist() for name, each in sums.items()}
        laws = {name: found for name, each in sums.items() if (found := law(each, edges))}
        results = {
            "window": edges[-1],
            "edges": edges,
            "targets": position.number,
            "loss": position.means,
            "difference": position.differences,
            "overall": {n: float(s.over(1, 2, 3).means()) for n, s in sums.items()},
            "gain": gain,
            "loss_by_source": {n: dict(zip(sources, s, strict=True)) for n, s in by_source.items()},
            "loss_by_length": {n: s.over(SOURCE).means().tolist() for n, s in sums.items()},
            "scaling": {name: found.results() for name, found in laws.items()},
        }
        names = [f"{low:,}–{high:,}" for low, high in pairwise(edges)]
        lengths = [*names, f"{edges[-1]:,}"]
        tables = {
            "loss_by_position": position.table("tokens before", "targets", names)
            + told(gain, trained),
            "loss_by_length": length.table("document's tokens in the window", "targets", lengths),
        }
        if len(sources) > 1:
            tables["loss_by_source"] = source.table("source", "targets", sources)
        figures = {"loss_by_position": plots.loss_by_position(edges, position.means, trained)}
        if laws:
            tables["scaling"] = law_table(laws)
            figures["scaling"] = plots.scaling(
                {name: (found.context, found.losses) for name, found in laws.items()},
                {name: found.band() for name, found in laws.items()},
            )
        return Section(results, tables, figures)

    def _sums(self, windows: Sequence[list[list[float]]]) -> Sums:
        """Lay out the values of all windows: [window, source, length, position]."""
        shape = (len(windows), *self.metric.nats.shape)
        nats, targets = np.zeros(shape), np.zeros(shape)
        names = list(self.sources)
        for number, (item, cells) in enumerate(zip(self.eval_items(), windows, strict=True)):
            for i, j, total, count in cells:
                at = (number, names.index(item["source"]), int(i), int(j))
                nats[at], targets[at] = total, count
        return Sums(nats, targets)


def gains(
    by_position: dict[str, Sums], edges: Sequence[int], trained: int
) -> dict[str, dict[str, Interval]]:
    """Mean nats that later checkpoints save inside and beyond `trained` tokens, with intervals."""
    inside = np.array([high <= trained for high in edges[1:]])
    which = np.stack([inside, ~inside], axis=1).astype(np.float64)
    sums = {n: Sums(each.total @ which, each.number @ which) for n, each in by_position.items()}
    (_, first), *others = sums.items()
    found = {}
    for name, other in others:
        pairs = zip(("inside", "beyond"), paired_differences(other, first), strict=True)
        found[name] = {part: saved for part, saved in pairs if saved.mean == saved.mean}
    return found


def told(gain: dict[str, dict[str, Interval]], trained: int) -> str:
    """Return the gains as lines below a table."""
    lines = []
    for name, parts in gain.items():
        each = (f"{part} {signed(saved)} nats" for part, saved in parts.items())
        lines.append(f"\n\ngain of {name} over {trained:,} trained tokens: {', '.join(each)}")
    return "".join(lines)


def law(sums: Sums, edges: Sequence[int]) -> Extrapolation | None:
    """Fit L(c) to documents that fill a window, the same ones at every c; None if there are few.

    c is the geometric middle of a bucket. The first bucket is left out: its tokens have from none
    to 127 before them.
    """
    contexts = [(low * high) ** 0.5 for low, high in pairwise(edges[1:])]
    whole = sums.over(SOURCE)
    nats, targets = (found[:, -1, 1:] for found in whole)
    filled = targets.all(1)
    if len(contexts) < 4 or filled.sum() < 2:
        return None
    return extrapolate(contexts, nats[filled] / targets[filled])


def law_table(laws: dict[str, Extrapolation]) -> str:
    """Return the laws' parameters with 95 % intervals, and what they say of the longest context."""
    lines = [
        "| L(c) = (α/c)^β + γ | α | β | γ | longest c, left out of the fit: law | measured |",
        "|---" * 6 + "|",
    ]
    told = {name: found for name, found in laws.items() if found.fitted.identified}
    for name, found in told.items():
        parameters = zip(*found.fitted[:3], strict=True)
        cells = [f"{value:.3g} [{low:.3g}, {high:.3g}]" for value, low, high in parameters]
        predicted = "{:.4f} [{:.4f}, {:.4f}]".format(*found.predicted)
        lines.append(f"| {name} | {' | '.join(cells)} | {predicted} | {found.losses[-1]:.4f} |")
    if unsure := [name for name in laws if name not in told]:
        sentence = f"no power law can be told from these losses: {', '.join(unsure)}"
        lines = [*lines, "", sentence] if told else [sentence]
    return "\n".join(lines)
