"""Held-out conversations: does a checkpoint give their answers, to the letter."""

from typing import Any

import numpy as np

from lit_longctx.data.sampling.conversations import Conversations
from lit_longctx.data.tokens.opening import open_tokenizer
from lit_longctx.evaluation.measure import Comparison, EvalItem, Measure, Section, spread
from lit_longctx.evaluation.retrieval.prompts import TaskExample
from lit_longctx.evaluation.retrieval.scoring import generated_answers, teacher_forced
from lit_longctx.evaluation.statistics.intervals import Sums
from lit_longctx.model import Llama


class Answers(Measure):
    """Exact match and loss of the last answer of held-out conversations; each is one item.

    Args:
        sources: Held-out conversations by name.
        number: Conversations of each, spread evenly.
        generate: Let the model write the answer; default: read the right one (`teacher_forced`).
    """

    def __init__(self, sources: dict[str, Conversations], number: int, generate: bool) -> None:
        self.sources = sources
        self.number = number
        self.generate = generate

    def eval_items(self) -> list[EvalItem]:
        """Return a item for each conversation."""
        return [
            {
                "source": name,
                "data": source.windows.manifest.hash,
                "window": source.window,
                "at": at,
                "generate": self.generate,
            }
            for name, source in self.sources.items()
            for at in spread(range(len(source)), self.number)
        ]

    def measure(self, llama: Llama, item: EvalItem) -> dict[str, float]:
        """Return whether the answer is exact, and the nats of a token of it."""
        source = self.sources[item["source"]]
        sample = last_answer(*source[item["at"]])
        read = teacher_forced(llama, [sample])[0]
        exact = read.exact
        if self.generate:
            tokenizer = open_tokenizer(str(source.windows.tokenizer_folder))
            max_new_tokens = len(sample.answer_ids) + 16
            end = int(sample.answer_ids[-1])  # of the turn; it need not be EOS
            said = generated_answers(llama, tokenizer, [sample], max_new_tokens, end)[0]
            exact = said.strip() == tokenizer.decode(sample.answer_ids.tolist()).strip()
        return {"exact": float(exact), "nats": float(read.nats.mean())}

    def report(self, values: dict[str, list[Any]], trained: int) -> Section:
        """Return shares of exact answers, and their loss, by source."""
        results: dict[str, Any] = {}
        tables = []
        for kind, digits in (("exact", 3), ("nats", 4)):
            sums = {name: self._sums(v, kind) for name, v in values.items()}
            compared = Comparison(sums, "conversation", "--windows")
            results[kind] = {
                name: dict(zip(self.sources, means, strict=True))
                for name, means in compared.means.items()
            }
            results[f"{kind}_difference"] = compared.differences
            head = {"exact": "exact answers", "nats": "nats per token of the answer"}[kind]
            tables.append(compared.table(head, "conversations", list(self.sources), digits))
        return Section({"answers": results}, {"answers": "\n\n".join(tables)}, {})

    def _sums(self, values: list[dict[str, float]], kind: str) -> Sums:
        """Lay out the values: [conversation, source]."""
        of = [item["source"] for item in self.eval_items()]
        which = np.array([[source == name for name in self.sources] for source in of], dtype=float)
        return Sums(np.array([value[kind] for value in values])[:, None] * which, which)


def last_answer(ids: np.ndarray, answers: np.ndarray) -> TaskExample:
    """Return what comes before the last answer, and the answer with the end of its turn."""
    stop = int(np.flatnonzero(answers)[-1]) + 1
    begin = int(np.flatnonzero(~answers[:stop])[-1]) + 1
    return TaskExample(ids[:begin], ids[begin:stop], "", (), ())
