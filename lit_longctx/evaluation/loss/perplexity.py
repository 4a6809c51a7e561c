"""Sliding-window perplexity of whole documents, as the papers' tables have it."""

from math import exp, log
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from lit_longctx.batch import NO_TARGET
from lit_longctx.decoding import reading
from lit_longctx.model import Llama


class SlidingWindowNats(NamedTuple):
    """Losses of one document, window by window."""

    means: list[float]
    """Mean nats of each window's new targets."""
    targets: list[int]
    """New targets of each window; where windows overlap, every token but the first is one once."""

    @property
    def nats(self) -> float:
        """Sum over all targets."""
        return sum(mean * number for mean, number in zip(self.means, self.targets, strict=True))

    def bits_per_byte(self, text: str) -> float:
        """Bits for each UTF-8 byte of the document's text: comparable across tokenizers."""
        return self.nats / log(2) / len(text.encode())


@torch.inference_mode()
def sliding_window_nats(
    llama: Llama,
    ids: Int[np.ndarray, " seq"],
    window: int,
    stride: int = 256,
    bos: int | None = None,
) -> SlidingWindowNats:
    """Read a document in windows that move by `stride`; each scores what the last did not see.

    Peng et al. 2023 (arXiv:2309.00071, §4.3.1), after Press et al. 2022. Costs a forward pass over
    `window` tokens for every `stride` of the document.

    Args:
        llama: The model.
        ids: The document, without BOS if `bos` is given.
        window: Most tokens that are read at a time, BOS included.
        stride: Tokens by which windows move; `window` for windows that do not overlap.
        bos: BOS to put before every window of `window` − 1 tokens, as YaRN's eval/perplexity.py
            does; its first token is a target then too.
    """
    begun = [] if bos is None else [bos]
    if len(ids) + len(begun) < 2:
        raise ValueError(f"a document of {len(ids)} tokens has no target; expected 2 or more")
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride} must be between 1 and the window of {window} tokens")
    tokens = torch.from_numpy(ids.astype(np.int64)).to(llama.head_weight.device)
    prefix = tokens.new_tensor(begun)
    means, targets = [], []
    seen = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window - len(begun), len(ids))
        # without a BOS before it, the first token of a window is no target
        first = max(seen, begin + 1 - len(begun))
        batch = reading(torch.cat([prefix, tokens[begin:end]])[None])
        labels = torch.full_like(batch.labels, NO_TARGET)
        row = slice(first - begin + len(begun) - 1, end - begin + len(begun) - 1)
        labels[0, row] = tokens[first:end]
        if end > first:
            nats = llama(batch._replace(labels=labels))
            means.append(float(nats.double().sum()) / (end - first))
            targets.append(end - first)
        seen = end
        if end == len(ids):
            break
    return SlidingWindowNats(means, targets)


def perplexity(documents: list[SlidingWindowNats], mode: str = "token") -> float:
    """Perplexity over documents.

    Args:
        documents: What `sliding_window_nats` gave for each.
        mode: `token` weights every target alike; `paper` averages the means of windows, as YaRN's
            code does, so that the first window's targets count less than all others.
    """
    if mode not in ("token", "paper"):
        raise ValueError(f"mode {mode!r} unknown; expected 'token' or 'paper'")
    if mode == "paper":
        return exp(float(np.mean([mean for document in documents for mean in document.means])))
    total = sum(sum(document.targets) for document in documents)
    return exp(sum(document.nats for document in documents) / total)
