"""Sliding-window perplexity of held-out documents for `evaluate`: by source and window."""

from dataclasses import dataclass, field
from itertools import product
from math import log
from typing import Any, Literal

import numpy as np

from lit_longctx import plots
from lit_longctx.data.store.windows import Windows
from lit_longctx.data.tokens.opening import open_tokenizer
from lit_longctx.evaluation.loss.perplexity import (
    SlidingWindowNats,
    perplexity,
    sliding_window_nats,
)
from lit_longctx.evaluation.measure import Comparison, EvalItem, Measure, Section, signed, spread
from lit_longctx.evaluation.statistics.intervals import Sums
from lit_longctx.model import Llama


@dataclass(frozen=True)
class SlidingWindow:
    """How documents are read for sliding-window perplexity."""

    windows: list[int] = field(default_factory=lambda: [1024, 2048, 4096])
    """Tokens that are read at a time; one pass over every document for each."""
    stride: int = 256
    """Tokens by which a window moves."""
    documents: int = 10
    """Held-out documents of each source, spread evenly over those that are long enough."""
    tokens: int | None = None
    """Each document is cut to so many tokens, BOS included; default: the largest window."""
    bos: Literal["window", "document"] = "window"
    """Where BOS stands, if the data's tokenizer adds one: before every window, as in YaRN's
    published script, or before the document alone."""
    truncate: bool = False
    """Cut documents to each window, which then reads them at once: the curves of YaRN's script with
    --truncate, all in one run. `stride` counts for nothing."""

    def __post_init__(self) -> None:
        if not self.windows or self.documents < 1 or not 1 <= self.stride <= min(self.windows):
            raise ValueError(
                f"expected windows, documents and a stride of 1 to the smallest window; got {self}"
            )
        if sorted(set(self.windows)) != self.windows:
            raise ValueError(f"windows must rise; got {self.windows}")
        if self.length < 2:
            raise ValueError(f"{self.length} token has no target; set tokens to 2 or more")

    @property
    def length(self) -> int:
        """Tokens of every document."""
        return self.tokens or max(self.windows)


def long_documents(name: str, source: Windows, tokens: int, number: int, option: str) -> list[int]:
    """Return first tokens of so many documents of `tokens` or more, spread evenly over them.

    Raises:
        ValueError: There is none; `option` is the one to lower.
    """
    lengths = source.document_lengths().astype(np.int64)
    long = (lengths.cumsum() - lengths)[lengths >= tokens].tolist()
    if not long:
        raise ValueError(
            f"no held-out document of {name} has {tokens} tokens; the longest has "
            f"{lengths.max(initial=0)}; set {option} to that or less"
        )
    return spread(long, number)


class SlidingWindowPerplexity(Measure):
    """Perplexity of the same held-out documents for every window; one document is one item.

    Args:
        sources: Held-out splits by name.
        how: Windows, stride and documents.
    """

    def __init__(self, sources: dict[str, Windows], how: SlidingWindow) -> None:
        self.sources = sources
        self.how = how

    def eval_items(self) -> list[EvalItem]:
        """Return a item for each source, document and window."""
        return [
            {
                "source": name,
                "data": source.manifest.hash,
                "begin": begin,
                "tokens": window if self.how.truncate else self.how.length,
                "window": window,
                "stride": window if self.how.truncate else self.how.stride,
                "bos": self.how.bos,
            }
            for name, source in self.sources.items()
            for begin, window in product(self._places(name), self.how.windows)
        ]

    def _places(self, name: str) -> list[int]:
        """First tokens of the chosen documents of a source."""
        length, number = self.how.length, self.how.documents
        return long_documents(name, self.sources[name], length, number, "--sliding.tokens")

    def measure(self, llama: Llama, item: EvalItem) -> dict[str, Any]:
        """Return nats by window, and the bytes of the text (of its last character, too)."""
        source = self.sources[item["source"]]
        ids = source.read(item["begin"], item["begin"] + item["tokens"])
        text = open_tokenizer(str(source.tokenizer_folder)).decode(ids[1:].tolist())
        window, stride = item["window"], item["stride"]
        if item["bos"] == "window" and source.tokenizer.add_bos:
            stride = min(stride, window - 1)
            found = sliding_window_nats(llama, ids[1:], window, stride, bos=int(ids[0]))
        else:
            found = sliding_window_nats(llama, ids, window, stride)
        return {**found._asdict(), "bytes": len(text.encode())}

    def report(self, values: dict[str, list[Any]], trained: int) -> Section:
        """Return perplexities by source and window, per token and as papers have it."""
        rows = list(product(self.sources, self.how.windows))
        sums = {name: self._sums(found) for name, found in values.items()}
        compared = Comparison(sums, "document", "--sliding.documents")
        results: dict[str, Any] = {}
        lines = [
            "| source | window | checkpoint | perplexity | mean of windows (paper) | bits per byte "
            "| Δ nats per token [95 %] |",
            "|---" * 7 + "|",
        ]
        for number, (source, window) in enumerate(rows):
            for name, found in values.items():
                told = self._numbers(
                    [
                        v
                        for u, v in zip(self.eval_items(), found, strict=True)
                        if (u["source"], u["window"]) == (source, window)
                    ]
                )
                results.setdefault(name, {}).setdefault(source, {})[str(window)] = told
                difference = compared.differences.get(name)
                numbers = " | ".join(f"{value:.4f}" for value in told.values())
                apart = signed(difference[number]) if difference else ""
                lines.append(f"| {source} | {window:,} | {name} | {numbers} | {apart} |")
        curves = {
            f"{name}, {source}": [each["token"] for each in by_window.values()]
            for name, by_source in results.items()
            for source, by_window in by_source.items()
        }
        figure = plots.perplexity(self.how.windows, curves)
        return Section(
            {"perplexity": results},
            {"perplexity": "\n".join(lines) + compared.missing()},
            {"perplexity": figure},
        )

    def _numbers(self, documents: list[dict[str, Any]]) -> dict[str, float]:
        found = [SlidingWindowNats(each["means"], each["targets"]) for each in documents]
        size = sum(each["bytes"] for each in documents)
        return {
            "token": perplexity(found, "token"),
            "paper": perplexity(found, "paper"),
            "bits_per_byte": sum(each.nats for each in found) / log(2) / size,
        }

    def _sums(self, values: list[dict[str, Any]]) -> Sums:
        """Nats and targets: [document, source × window]."""
        rows = list(product(self.sources, self.how.windows))
        items = self.eval_items()
        documents = sorted({(u["source"], u["begin"]) for u in items})
        nats, targets = np.zeros((2, len(documents), len(rows)))
        for item, value in zip(items, values, strict=True):
            source = item["source"]
            at = documents.index((source, item["begin"])), rows.index((source, item["window"]))
            nats[at] = SlidingWindowNats(value["means"], value["targets"]).nats
            targets[at] = sum(value["targets"])
        return Sums(nats, targets)
