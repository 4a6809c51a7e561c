"""`lit_longctx mix`: prepared sources → the same with other lengths and shares (Fu et al. 2024).

Continued pretraining needs long documents, but taking more books changes the domains too.
Per-source upsampling keeps every source's share of the tokens and, within each, drops most short
documents (arXiv:2402.10171, §3). Nothing is tokenised again; held-out splits are copied as they
are.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from lit_longctx import manifest, plots
from lit_longctx.data.store.chunks import BLOCK, BUCKETS, SplitWriter
from lit_longctx.data.store.windows import Windows

Mode = Literal["none", "global", "per_source", "upsample"]


@dataclass(frozen=True)
class Upsampling:
    """Which documents of which source are kept."""

    mode: Mode = "per_source"
    """none: all lengths and shares as they are; global: fewer short documents, whatever becomes of
    the shares; per_source: fewer short documents, shares as they are; upsample: fewer short
    documents, other shares (`upsample_code_arxiv_book` of the published code)."""
    threshold: int = 4096
    """Tokens from which a document counts as long (the paper: 4,096)."""
    keep: float = 0.1
    """Share of shorter documents that is kept (the paper: 0.1)."""
    shares: dict[str, float] | None = None
    """For `upsample`: shares of named sources, before all are made to sum to 1 (the paper: 0.6)."""
    tokens: int | None = None
    """Tokens of the mix (the paper: 5e9); more than there are repeats documents. Default: as many
    as every source gives without repeating one."""
    seed: int = 0
    """Decides which documents are kept."""

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep {self.keep} is no share; expected 0 ≤ keep ≤ 1")
        if (self.mode == "upsample") != bool(self.shares):
            raise ValueError("shares go with mode upsample, and only with it")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens {self.tokens} must be 1 or more")

    def choose(self, lengths: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
        """Return the numbers of the documents to take from each source, pass by pass.

        A source's budget is met to one document, since documents are not cut.

        Args:
            lengths: Tokens of each document, by source.
        """
        if unknown := set(self.shares or {}) - set(lengths):
            raise ValueError(f"shares name {', '.join(unknown)}; sources are {', '.join(lengths)}")
        if self.mode == "global" or (self.mode == "none" and self.tokens is None):
            chosen = self._by_length_alone(lengths)
            _refuse_empty({name: sum(map(len, passes)) for name, passes in chosen.items()})
            return chosen
        kept = {name: self._pass(i, 0, each) for i, (name, each) in enumerate(lengths.items())}
        given = {name: int(lengths[name][documents].sum()) for name, documents in kept.items()}
        _refuse_empty(given)
        shares = self._shares(lengths)
        total = self.tokens or min(int(given[name] / shares[name]) for name in lengths)
        return {
            name: self._fill(i, each, round(shares[name] * total))
            for i, (name, each) in enumerate(lengths.items())
        }

    def _shares(self, lengths: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Share of the tokens that each source is to have."""
        tokens = {name: int(each.sum(dtype=np.int64)) for name, each in lengths.items()}
        before = {name: number / sum(tokens.values()) for name, number in tokens.items()}
        asked = before | (self.shares or {})
        return {name: share / sum(asked.values()) for name, share in asked.items()}

    def _pass(self, source: int, number: int, lengths: np.ndarray) -> np.ndarray:
        """Documents that one pass over a source keeps, in random order."""
        generator = np.random.default_rng([self.seed, source, number])
        chance = generator.random(len(lengths))
        every = self.mode == "none"
        kept = chance < 1 if every else (lengths >= self.threshold) | (chance < self.keep)
        return generator.permutation(np.flatnonzero(kept))

    def _fill(self, source: int, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
        """Take documents, in as many passes as it needs, until the budget is met."""
        passes = []
        while budget > 0:
            documents = self._pass(source, len(passes), lengths)
            before = lengths[documents].cumsum(dtype=np.int64) - lengths[documents]
            taken = documents[before < budget]
            passes.append(np.sort(taken))
            budget -= int(lengths[taken].sum())
            if not len(taken):
                break
        return passes

    def _by_length_alone(self, lengths: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
        """No budgets of their own: one pass, or passes over everything until the total is met."""
        sizes = np.concatenate(list(lengths.values()))
        ends = np.cumsum([len(each) for each in lengths.values()])
        total = self.tokens or int(sizes[self._pass(0, 0, sizes)].sum())
        passes = self._fill(0, sizes, total)
        chosen = [np.split(taken, np.searchsorted(taken, ends[:-1])) for taken in passes]
        return {
            name: [parts[i] - (ends[i] - len(each)) for parts in chosen]
            for i, (name, each) in enumerate(lengths.items())
        }


def _refuse_empty(left: Mapping[str, int]) -> None:
    """ValueError if nothing is left of a source."""
    if empty := [name for name, number in left.items() if not number]:
        raise ValueError(f"source {empty[0]} has no document left; raise keep")


def mix(
    sources: dict[str, str],
    output: str,
    upsampling: Upsampling = Upsampling(),
    weights: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Copy prepared sources with other document lengths and shares, and report on it.

    Writes OUTPUT/NAME for every source, OUTPUT/data.yaml, which `fit` takes as a second --config,
    and OUTPUT/report.txt, .json and .png. The folder appears whole or not at all.

    Args:
        sources: Folders that `lit_longctx prepare` made, by name.
        output: Folder to make; must not exist.
        upsampling: Which documents are kept.
        weights: Share of the training samples that each source gets; default: its share of the
            tokens in the mix.

    Returns:
        The report.
    """
    if weights is not None and set(weights) != set(sources):
        raise ValueError(f"weights must name the sources {', '.join(sources)}; got {weights}")
    opened = {name: Windows(folder, "train", BLOCK) for name, folder in sources.items()}
    lengths = {name: windows.document_lengths() for name, windows in opened.items()}
    chosen = upsampling.choose(lengths)
    report = describe(upsampling, lengths, chosen)
    with manifest.whole_folder(Path(output)) as folder:
        for name, windows in opened.items():
            copy(windows, lengths[name], chosen[name], folder / name, report)
        after = {name: source["share_after"] for name, source in report["sources"].items()}
        parts = {
            name: {"folder": str(Path(output) / name), "weight": round(share, 6)}
            for name, share in (weights or after).items()
        }
        data = {"data": {"class_path": "PretrainData", "init_args": {"sources": parts}}}
        manifest.write_text(folder / "data.yaml", yaml.safe_dump(data, sort_keys=False))
        manifest.write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
        manifest.write_text(folder / "report.txt", table(report) + "\n")
        plots.document_lengths(report).savefig(folder / "report.png", dpi=120)
    print(table(report))
    print(f"wrote {output}; train on it with: fit --config RUN.yaml --config {output}/data.yaml")
    return report


def copy(
    windows: Windows,
    lengths: np.ndarray,
    chosen: list[np.ndarray],
    folder: Path,
    report: dict[str, Any],
) -> None:
    """Write the chosen documents of one source, pass by pass in their stored order."""
    before = windows.manifest
    begins = lengths.cumsum(dtype=np.int64) - lengths
    writer = SplitWriter(folder / "train", before.tokenizer, before.chunk_tokens)
    for document in np.concatenate(chosen).tolist():
        begin = int(begins[document])
        first, end = begin + len(writer.prefix), begin + int(lengths[document]) - 1
        writer.add(windows.read(first, end))
    writer.finish()
    for file in before.files:
        if file.startswith(("held_out/", "tokenizer/")):
            (folder / file).parent.mkdir(exist_ok=True)
            with windows.files.open(file) as stored, open(folder / file, "wb") as copied:
                shutil.copyfileobj(stored, copied)
    splits = {**before.splits, "train": writer.info()}
    mixed = {"settings": report["settings"], **report["sources"][folder.name]}
    after = replace(before, splits=splits, mixed=mixed)
    manifest.seal(folder, manifest.hash_files(folder), **after.as_json())


def describe(
    upsampling: Upsampling, lengths: Mapping[str, np.ndarray], chosen: dict[str, list[np.ndarray]]
) -> dict[str, Any]:
    """Return documents and tokens of every source and length, before and after."""
    taken = {name: np.concatenate([*chosen[name], []]).astype(np.int64) for name in lengths}
    before = {name: int(each.sum(dtype=np.int64)) for name, each in lengths.items()}
    after = {name: int(lengths[name][taken[name]].sum(dtype=np.int64)) for name in lengths}
    found = {}
    for name, each in lengths.items():
        each = each.astype(np.int64)
        copies = np.bincount(taken[name], minlength=len(each))
        found[name] = {
            "share_before": before[name] / sum(before.values()),
            "share_after": after[name] / sum(after.values()),
            "long_before": int(each[each >= upsampling.threshold].sum()) / before[name],
            "long_after": int((each * copies)[each >= upsampling.threshold].sum()) / after[name],
            "passes": len(chosen[name]),
            "buckets": [
                _bucket(edge, end, each, copies)
                for edge, end in zip(BUCKETS, [*BUCKETS[1:], 2**62], strict=True)
                if ((each >= edge) & (each < end)).any()
            ],
        }
    return {"settings": vars(upsampling), "sources": found}


def _bucket(edge: int, end: int, lengths: np.ndarray, copies: np.ndarray) -> dict[str, int]:
    """Count the documents of at least `edge` and fewer than `end` tokens."""
    here = (lengths >= edge) & (lengths < end)
    kept = int((copies[here] > 0).sum())
    return {
        "from_tokens": edge,
        "documents_before": int(here.sum()),
        "tokens_before": int(lengths[here].sum()),
        "documents_after": int(copies[here].sum()),
        "tokens_after": int((lengths * copies)[here].sum()),
        "kept": kept,
        "dropped": int(here.sum()) - kept,
    }


def table(report: dict[str, Any]) -> str:
    """Source × length as text; shares are of a source's own tokens."""
    settings = report["settings"]
    edge = settings["threshold"]
    lines = [f"mix: mode {settings['mode']}, threshold {edge:,} tokens, keep {settings['keep']}"]
    for name, source in report["sources"].items():
        lines += [
            f"{name}: {source['share_before']:.2%} → {source['share_after']:.2%} of all tokens, "
            f"{source['long_before']:.1%} → {source['long_after']:.1%} of its own in long ones, "
            f"{source['passes']} pass{'es' * (source['passes'] > 1)}",
            f"  {'length':>11} {'documents':>19} {'tokens':>29} {'share':>15} kept / dropped",
        ]
        totals = [sum(b[f"tokens_{w}"] for b in source["buckets"]) for w in ("before", "after")]
        for b in source["buckets"]:
            shares = b["tokens_before"] / totals[0], b["tokens_after"] / max(1, totals[1])
            lines.append(
                f"  ≥ {b['from_tokens']:>9,}"
                f" {b['documents_before']:>8,} → {b['documents_after']:<8,}"
                f" {b['tokens_before']:>13,} → {b['tokens_after']:<13,}"
                f" {shares[0]:>6.1%} → {shares[1]:<6.1%} {b['kept']:,} / {b['dropped']:,}"
            )
    return "\n".join(lines)
