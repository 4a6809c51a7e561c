"""Long-dependency score: how much a document's segments help to predict later ones, far away.

Chen et al. 2024, "Long Context is Not Long at All" (arXiv:2405.17915), whose pipeline is also
called ProLong. Documents that score low are long, but give nothing to learn of long context.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_longctx.batch import NO_TARGET, pack
from lit_longctx.data.making.document_scorer import DocumentScorer, ScoreSettings
from lit_longctx.data.tokens.tokenizer import Ids
from lit_longctx.model import Llama


def dependency_score(
    alone: Float[np.ndarray, " segments"],
    given: Float[np.ndarray, " pairs"],
    pairs: Int[np.ndarray, "pairs 2"],
    most_segments: int,
    least_strength: float = 0.1,
) -> float:
    """LDS of one window: Σ (DST + DDI) · DSP over its pairs with DST above `least_strength`.

    For segment i and an earlier segment j, with perplexities P:

        DST = (P(i) − P(i|j)) / P(i)                strength
        DDI = (i − j) / (most_segments − 1)         distance, at most 1
        DSP = 1 − H(softmax_j(P(i) − P(i|j))) / ln n    specificity of row i, n the pairs in it

    Pairs that were not drawn have no term. A single pair in a row has nothing to be compared with;
    its DSP is 1, as in the authors' code, which also sets the paper's weights of DST and DDI to 1.

    Args:
        alone: Perplexity of each segment by itself.
        given: Perplexity of each pair's later segment after the earlier one.
        pairs: (i, j) with j < i, each pair once.
        most_segments: Segments of a full window, so that distances mean the same in every window.
        least_strength: The authors' threshold on DST.
    """
    later, earlier = pairs.T
    gains = alone[later] - given
    strengths = gains / alone[later]
    distances = np.minimum((later - earlier) / (most_segments - 1), 1.0)
    terms = np.where(strengths > least_strength, strengths + distances, 0.0)
    rows = (later == row for row in np.unique(later))
    return float(sum(terms[row].sum() * _specificity(gains[row]) for row in rows))


def _specificity(gains: Float[np.ndarray, " earlier"]) -> float:
    """1 if one earlier segment alone lowers the perplexity, 0 if all do alike."""
    if len(gains) == 1:
        return 1.0
    shares = np.exp(gains - gains.max())
    shares /= shares.sum()
    # 0 · ln 0 is 0; the clip also keeps rounding from leaving [0, 1]
    entropy = -(shares * np.log(np.maximum(shares, 1e-300))).sum()
    return float(np.clip(1 - entropy / math.log(len(gains)), 0, 1))


def draw_pairs(
    segments: int, number: int, generator: np.random.Generator
) -> Int[np.ndarray, "pairs 2"]:
    """Draw so many different (later, earlier) pairs of segments, or all there are; sorted."""
    total = segments * (segments - 1) // 2
    chosen = np.sort(generator.choice(total, min(number, total), replace=False))
    # pairs are counted row by row: row i holds i of them, after i(i − 1)/2 others
    later = ((1 + np.sqrt(8 * chosen + 1)) // 2).astype(np.int64)
    return np.stack([later, chosen - later * (later - 1) // 2], axis=1)


@torch.inference_mode()
def perplexities(
    llama: Llama, rows: Int[Tensor, "rows tokens"], targets: int, batch: int
) -> Float[np.ndarray, " rows"]:
    """exp(mean nats) of the last `targets` tokens of each row, which is read as one document."""
    found = []
    for windows in rows.split(batch):
        windows = windows.to(llama.head_weight.device)
        read = pack(windows, NO_TARGET, starts=torch.zeros_like(windows, dtype=torch.bool))
        labels = read.labels.clone()
        labels[:, :-targets] = NO_TARGET  # spares the head what is not asked for
        nats = llama(read._replace(labels=labels))[:, -targets:]
        found.append(nats.double().mean(1).exp().cpu())
    return torch.cat(found).numpy()


@dataclass(frozen=True)
class DependencyFilter(ScoreSettings):
    """Keeps the documents whose long-dependency score is at least `at_least`.

    A document is cut into windows, each into segments without BOS; what does not fill a segment is
    not read. Its score is the sum of its windows' LDS (see `dependency_score`) divided by the pairs
    drawn in all of them: the mean contribution of a pair, at most 2. So one threshold fits windows
    of any number of segments and pairs, and a short last window weighs as little as it holds. The
    authors' score of a full window is this one times `pairs`. A document of fewer than two segments
    scores 0. A score depends on tokens, settings and checkpoint alone, not on the stream's order.

    The scoring model decides what a score means: specificity is a softmax over raw perplexities, so
    thresholds do not carry over from one checkpoint or tokenizer to another; look at the report.

    Costs a forward pass over window + 2·pairs·segment tokens per window: 161k of them by default.

    The paper scored with OPT-350m.
    """

    window: int = 32768
    """Tokens within which dependencies are looked for, a multiple of `segment`; documents are read
    window after window. The authors' code draws 256 segments from the whole document instead."""
    segment: int = 128
    """Tokens per segment."""
    pairs: int = 500
    """Pairs of segments drawn per window (the paper: 5,000; its code: 500). Of a full window's 500,
    2.6 share a row of the matrix, which makes specificity rough, and 11 % are alone in theirs; of
    5,000, 20 and 0.1 %."""
    least_strength: float = 0.1
    """Least share by which an earlier segment must lower the perplexity to count."""
    batch: int = 32
    """Pairs per forward pass."""
    seed: int = 0
    """Decides which pairs are drawn."""

    def __post_init__(self) -> None:
        if self.segment < 2:
            raise ValueError(f"segment {self.segment} has no token to predict; expected 2 or more")
        if self.window % self.segment or self.window < 2 * self.segment:
            raise ValueError(
                f"window {self.window} holds no whole number of segments of {self.segment} tokens; "
                "expected a multiple, 2 segments or more"
            )
        for name in ("pairs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is too few; expected 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} is negative; expected 0 or more")
        if not 0 <= self.least_strength < 1:
            raise ValueError(
                f"least_strength {self.least_strength} is no share; expected 0 ≤ … < 1"
            )
        if not 0 <= self.at_least <= 2:
            raise ValueError(f"at_least {self.at_least} is no score; expected 0 ≤ at_least ≤ 2")


class DependencyScorer(DocumentScorer):
    """Scores documents by their long dependencies (see `DependencyFilter`)."""

    settings: DependencyFilter

    def score(self, ids: Ids) -> float:
        """Mean contribution of a pair of segments to the long-dependency score of a document."""
        self._check(ids)
        how = self.settings
        total = drawn = 0
        for number, begin in enumerate(range(0, len(ids), how.window)):
            window = ids[begin : begin + how.window].astype(np.int64)
            segments = len(window) // how.segment
            if segments < 2:
                continue
            pairs = draw_pairs(segments, how.pairs, np.random.default_rng([how.seed, number]))
            rows = torch.from_numpy(window[: segments * how.segment]).view(segments, -1)
            total += self._window_score(rows, pairs)
            drawn += len(pairs)
        return total / drawn if drawn else 0.0

    def _window_score(
        self, segments: Int[Tensor, "segments tokens"], pairs: Int[np.ndarray, "pairs 2"]
    ) -> float:
        how = self.settings
        later, earlier = torch.from_numpy(pairs).T
        joined = torch.cat([segments[earlier], segments[later]], dim=1)
        targets = how.segment - 1  # the first token of a segment has nothing before it when alone
        alone, given = (
            perplexities(self.llama, rows, targets, how.batch) for rows in (segments, joined)
        )
        if not (np.isfinite(alone).all() and np.isfinite(given).all()):
            raise ValueError(
                f"{how.checkpoint} gives a perplexity that is not finite in {how.compute_dtype}; "
                "choose another compute_dtype or checkpoint"
            )
        full = how.window // how.segment
        return dependency_score(alone, given, pairs, full, how.least_strength)
