"""LongPPL: perplexity of the tokens that need long context (Fang et al. 2024, arXiv:2410.23771)."""

from dataclasses import dataclass
from math import exp
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_longctx.batch import NO_TARGET
from lit_longctx.data.store.windows import Windows
from lit_longctx.decoding import reading
from lit_longctx.evaluation.loss.sliding import long_documents
from lit_longctx.evaluation.measure import Comparison, EvalItem, Measure, Section, signed
from lit_longctx.evaluation.statistics.intervals import Sums
from lit_longctx.model import Llama


def key_tokens(
    full: Float[Tensor, "*tokens"],
    truncated: Float[Tensor, "*tokens"],
    alpha: float = 2.0,
    beta: float = -2.0,
) -> Bool[Tensor, "*tokens"]:
    """Say which tokens are much likelier with the full context than with a truncated one.

    Those are the tokens with ln p(full) − ln p(truncated) > α and ln p(full) > β (Fang et al. 2024,
    §3; α = 2 and β = −2 in their experiments).

    Args:
        full: −ln p of each token after its full context.
        truncated: −ln p of the same tokens after a truncated context.
        alpha: Least gain in nats.
        beta: Least ln p with the full context.
    """
    return (truncated - full > alpha) & (full < -beta)


def truncated_context_nats(
    llama: Llama, ids: Int[Tensor, "batch seq"], truncated_context: int = 4096, stride: int = 1024
) -> Float[Tensor, "batch rest"]:
    """−ln p of every token from `truncated_context` on, after few of the tokens before it.

    `stride` tokens in a row share the beginning of their context, as in the authors' code: the
    first has `truncated_context` tokens before it, the last `stride` − 1 more. Costs
    1 + truncated_context / stride times the tokens of one reading.

    Args:
        llama: The model.
        ids: One document per row, as long as every other, BOS included.
        truncated_context: Least tokens of context.
        stride: Tokens that share a context.

    Returns:
        [batch, seq − truncated_context]: nats of ids[:, truncated_context:].
    """
    seq = ids.shape[1]
    if not (1 <= truncated_context < seq and stride >= 1):
        raise ValueError(
            f"expected a truncated context of 1 to {seq - 1} tokens, below the row's {seq}, and a "
            f"stride of 1 or more; got {truncated_context} and {stride}"
        )
    parts = [
        _nats_from(llama, ids[:, begin : begin + truncated_context + stride], truncated_context)
        for begin in range(0, seq - truncated_context, stride)
    ]
    return torch.cat(parts, dim=1)


def _nats_from(
    llama: Llama, ids: Int[Tensor, "batch seq"], first: int
) -> Float[Tensor, "batch rest"]:
    """−ln p of ids[:, first:], each token after all before it."""
    batch = reading(ids)
    labels = torch.full_like(ids, NO_TARGET)
    labels[:, first - 1 : -1] = ids[:, first:]
    return llama(batch._replace(labels=labels))[:, first - 1 : -1]


@dataclass(frozen=True)
class KeyTokens:
    """Documents of `longppl`, and which of their tokens are key tokens."""

    truncated_context: int = 4096
    """Tokens of the truncated context; the first tokens of a document, as many, are no key ones."""
    stride: int = 1024
    """Tokens that share a truncated context."""
    alpha: float = 2.0
    """Least gain in nats from the truncated context to the full one."""
    beta: float = -2.0
    """Least ln p with the full context."""
    documents: int = 10
    """Held-out documents of each source, spread evenly over those that are long enough."""
    tokens: int | None = None
    """Each document is cut to so many tokens, BOS included; default: 2 × truncated_context."""

    def __post_init__(self) -> None:
        if self.documents < 1 or self.stride < 1 or self.truncated_context < 1:
            raise ValueError(
                f"expected documents, stride and truncated_context of 1 or more; got {self}"
            )
        if self.length <= self.truncated_context:
            raise ValueError(
                f"key_tokens.tokens must be more than truncated_context {self.truncated_context}; "
                f"got {self.tokens}; no token would have a longer context"
            )

    @property
    def length(self) -> int:
        """Tokens of every document."""
        return self.tokens or 2 * self.truncated_context


class LongPPL(Measure):
    """Perplexity of key tokens in held-out documents; one document is one item.

    Key tokens are those of the first checkpoint, the paper's evaluator, for all checkpoints. They
    are chosen when the report is written: other α and β cost no reading. A value holds the nats of
    every token, about 20 bytes each.

    Args:
        sources: Held-out splits by name.
        how: Documents and key tokens.
    """

    def __init__(self, sources: dict[str, Windows], how: KeyTokens) -> None:
        self.sources = sources
        self.how = how

    def eval_items(self) -> list[EvalItem]:
        """Return an item for each document."""
        return [
            {
                "source": name,
                "data": source.manifest.hash,
                "begin": begin,
                "tokens": self.how.length,
                "truncated_context": self.how.truncated_context,
                "stride": self.how.stride,
            }
            for name, source in self.sources.items()
            for begin in long_documents(
                name, source, self.how.length, self.how.documents, "--key_tokens.tokens"
            )
        ]

    @torch.inference_mode()
    def measure(self, llama: Llama, item: EvalItem) -> dict[str, list[float]]:
        """Return nats of all tokens but the first, and of later ones after a truncated context."""
        found = self.sources[item["source"]].read(item["begin"], item["begin"] + item["tokens"])
        ids = torch.from_numpy(found.astype(np.int64))[None].to(llama.head_weight.device)
        full = _nats_from(llama, ids, 1)
        truncated = truncated_context_nats(llama, ids, item["truncated_context"], item["stride"])
        nats = {"full": full, "truncated": truncated}
        return {name: [round(x, 6) for x in each[0].tolist()] for name, each in nats.items()}

    def report(self, values: dict[str, list[Any]], trained: int) -> Section:
        """Return LongPPL and the perplexity of all tokens, by source and checkpoint."""
        evaluator = next(iter(values))
        keys = [self._keys(value) for value in values[evaluator]]
        sums = {name: self._sums(found, keys) for name, found in values.items()}
        compared = Comparison(sums, "document", "--key_tokens.documents")
        lines = [
            f"| source | checkpoint | perplexity | LongPPL (key tokens of {evaluator}) "
            "| Δ nats per key token [95 %] | its own key tokens |",
            "|---" * 6 + "|",
        ]
        results: dict[str, Any] = {}
        for number, source in enumerate(self.sources):
            tokens, key_number = compared.number[2 * number : 2 * number + 2]
            for name, found in values.items():
                every, key = (exp(x) for x in compared.means[name][2 * number : 2 * number + 2])
                own = self._own_keys(source, found)
                told = {"perplexity": every, "longppl": key, "own_key_tokens": own}
                results.setdefault(name, {})[source] = told
                apart = compared.differences.get(name)
                apart = signed(apart[2 * number + 1]) if apart else ""
                shown = f"{key:.4f}" if key == key else "no key token"
                lines.append(f"| {source} | {name} | {every:.4f} | {shown} | {apart} | {own:,} |")
            lines.append(f"| {source} | tokens | {tokens:,.0f} | {key_number:,.0f} | | |")
        table = "\n".join(lines) + compared.missing()
        return Section({"longppl": results}, {"longppl": table}, {})

    def _keys(self, value: dict[str, list[float]]) -> Bool[np.ndarray, " targets"]:
        """Say which targets of a document are key tokens; those without longer context are not."""
        truncated = torch.tensor(value["truncated"])
        full = torch.tensor(value["full"])
        found = key_tokens(full[-len(truncated) :], truncated, self.how.alpha, self.how.beta)
        return np.pad(found.numpy(), (len(full) - len(truncated), 0))

    def _own_keys(self, source: str, values: list[Any]) -> int:
        """Key tokens of a source by a checkpoint's own nats."""
        pairs = zip(self.eval_items(), values, strict=True)
        return sum(int(self._keys(each).sum()) for item, each in pairs if item["source"] == source)

    def _sums(self, values: list[Any], keys: list[Bool[np.ndarray, " targets"]]) -> Sums:
        """Nats and tokens: [document, source × (all tokens, key tokens)]."""
        names, items = list(self.sources), self.eval_items()
        nats, tokens = np.zeros((2, len(items), 2 * len(names)))
        for row, (item, value, key) in enumerate(zip(items, values, keys, strict=True)):
            full, at = np.array(value["full"]), 2 * names.index(item["source"])
            nats[row, at : at + 2] = full.sum(), full[key].sum()
            tokens[row, at : at + 2] = len(full), key.sum()
        return Sums(nats, tokens)
