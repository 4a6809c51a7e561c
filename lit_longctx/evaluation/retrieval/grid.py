"""Probes over lengths and depths: which cells of the heat map a checkpoint answers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from lit_longctx import plots
from lit_longctx.evaluation.measure import Comparison, EvalItem, Measure, Section
from lit_longctx.evaluation.retrieval.prompts import Haystack, TaskExample
from lit_longctx.evaluation.retrieval.registry import task_named
from lit_longctx.evaluation.retrieval.scoring import generated, teacher_forced
from lit_longctx.evaluation.statistics.intervals import Sums, wilson
from lit_longctx.manifest import short_hash
from lit_longctx.model import Llama


@dataclass(frozen=True)
class Grid:
    """Where a needle is hidden, and how often."""

    lengths: list[int] = field(default_factory=lambda: [1024, 2048, 4096])
    """Tokens of the prompts, with BOS; exact."""
    depths: list[float] = field(default_factory=lambda: [0.0, 25.0, 50.0, 75.0, 100.0])
    """Percent of the context before the needle."""
    samples: int = 4
    """Prompts per length and depth, the same for every checkpoint."""
    answers: Literal["teacher_forced", "generated"] = "teacher_forced"
    """`teacher_forced` reads the right answer in one forward pass and scores 1 where every token of
    it is the likeliest; `generated` lets the model write, and scores as the task does."""
    seed: int = 0
    """Decides the prompts."""

    def __post_init__(self) -> None:
        if not (self.lengths and self.depths and self.samples > 0 and min(self.lengths) > 0):
            raise ValueError("a grid needs lengths, depths and samples of 1 or more")
        if not all(0 <= depth <= 100 for depth in self.depths):
            raise ValueError(f"depths must be from 0 to 100 percent; got {self.depths}")


class Probe(Measure):
    """A task in every cell of a grid; one prompt is one item: memory is that of one prompt.

    Args:
        name: Of the task.
        grid: Lengths, depths and samples.
        hay: Text that needles are hidden in, with the tokenizer.
    """

    def __init__(self, name: str, grid: Grid, hay: Haystack) -> None:
        self.name = name
        self.task = task_named(name)
        self.version = self.task.version
        self.grid = grid
        self.hay = hay
        self.depths = grid.depths if self.task.uses_depth else [50.0]
        self.seeds = range(grid.seed, grid.seed + grid.samples)

    def eval_items(self) -> list[EvalItem]:
        """Return a item for each length, depth and sample, in this order."""
        for seed in self.seeds:  # has the shortest room for all secrets?
            self.task.sample(self.hay, min(self.grid.lengths), self.depths[0], seed)
        settings = {**vars(self.task), "answers": self.grid.answers}
        hay = short_hash([self.hay.text, self.hay.tokenizer.fingerprint])
        return [
            {"length": length, "depth": float(depth), "seed": seed, "hay": hay, **settings}
            for length in self.grid.lengths
            for depth in self.depths
            for seed in self.seeds
        ]

    def sample(self, item: EvalItem) -> TaskExample:
        """Return the prompt of a item, with its answer."""
        return self.task.sample(self.hay, item["length"], item["depth"], item["seed"])

    def measure(self, llama: Llama, item: EvalItem) -> float:
        """Return the score of one prompt."""
        sample = self.sample(item)
        if self.grid.answers == "teacher_forced":
            return float(teacher_forced(llama, [sample])[0].exact)
        answer = generated(llama, self.hay.tokenizer, self.task, [sample])[0]
        return self.task.score(sample, answer)

    def cells(self, scores: Sequence[float]) -> Float[np.ndarray, "lengths depths"]:
        """Mean scores, given those of `eval_items`."""
        shape = (len(self.grid.lengths), len(self.depths), len(self.seeds))
        return np.asarray(scores).reshape(shape).mean(-1)

    def report(self, values: dict[str, list[Any]], trained: int) -> Section:
        """Return the heat map, and mean scores by length."""
        cells = {name: self.cells(scores).tolist() for name, scores in values.items()}
        intervals = {
            name: [[wilson(mean, len(self.seeds)) for mean in row] for row in found]
            for name, found in cells.items()
        }
        sums = {name: self._by_length(scores) for name, scores in values.items()}
        compared = Comparison(sums, "prompt", "--grid.samples")
        lengths = [f"{length:,}" for length in self.grid.lengths]
        results = {
            "grid": asdict(self.grid),
            "probes": {self.name: cells},
            "probe_intervals": {self.name: intervals},
            "probe_difference": {self.name: compared.differences},
        }
        table = compared.table(f"{self.name}: tokens", "prompts", lengths, digits=3)
        table += self._cell_tables(cells, intervals)
        return Section(results, {self.name: table}, {self.name: self.draw(cells)})

    def _cell_tables(self, cells: dict[str, Any], intervals: dict[str, Any]) -> str:
        """Return a table of each checkpoint's cells, with intervals, and what was asked in each."""
        each = f"{len(self.seeds)} prompts, each with secrets and context of its own"
        each = each if len(self.seeds) > 1 else "1 prompt"
        lines = ["", "", f"in every cell: {each}; 95 % intervals (Wilson)"]
        columns = [f"{depth:g} %" for depth in self.depths] if self.task.uses_depth else ["any"]
        for name, found in cells.items():
            lines += ["", f"| {name}: tokens, depth | " + " | ".join(columns) + " |"]
            lines.append("|---" * (len(columns) + 1) + "|")
            for length, row, ends in zip(self.grid.lengths, found, intervals[name], strict=True):
                pairs = zip(row, ends, strict=True)
                texts = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, (low, high) in pairs]
                lines.append(f"| {length:,} | " + " | ".join(texts) + " |")
        return "\n".join(lines)

    def draw(self, cells: dict[str, Any]) -> Figure:
        """Return the heat map of `cells` by name."""
        depths = self.depths if self.task.uses_depth else []
        return plots.heat_map(self.grid.lengths, depths, cells)

    def _by_length(self, scores: Sequence[float]) -> Sums:
        """Lay out the scores: [prompt, length]."""
        lengths = len(self.grid.lengths)
        which = np.repeat(np.eye(lengths), len(scores) // lengths, axis=0)
        return Sums(np.asarray(scores)[:, None] * which, which)
