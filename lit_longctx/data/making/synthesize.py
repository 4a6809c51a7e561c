"""`lit_longctx synthesize`: long fine-tuning data, from a model or from nothing, as rows of jsonl.

Rows are {"id", "document", "question", "answer"} and how they came to be; `prepare --chat true`
reads them.
"""

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from tqdm import tqdm

from lit_longctx import manifest
from lit_longctx.data.making import generators  # noqa: F401  the command line finds its classes
from lit_longctx.data.making.report import Report, Unanswered
from lit_longctx.data.making.self_instruct import (
    Generator,
    Passage,
    QAGenerator,
    ResponseCache,
    Row,
    draw,
    in_order,
)
from lit_longctx.data.making.synthetic import Synthetic
from lit_longctx.data.reading.documents import DocumentReader, Faults
from lit_longctx.data.tokens.opening import open_tokenizer


class SynthesisTask(ABC):
    """A kind of fine-tuning data."""

    @abstractmethod
    def rows(self, output: Path, seed: int, report: Report) -> Iterator[Row]:
        """Yield rows, in an order that does not hang on time; count what became of all else.

        Args:
            output: File that the rows are for; what must outlive a kill stands beside it.
            seed: Decides what is random.
            report: The report, for the task to fill.
        """


def synthesize(task: SynthesisTask, output: str, seed: int = 0) -> dict[str, Any]:
    """Make long fine-tuning data; OUTPUT appears whole or not at all.

    Args:
        task: What to make: `SelfInstruct`, questions that a model writes about long documents, or
            `TemplatedTask`, key-value lists, tables and lists of words with questions about them.
        output: File to make, .jsonl; must not exist.
        seed: Decides chunks, prompts and whatever else is random.

    Returns:
        What became of documents and questions.
    """
    target = Path(output)
    if target.suffix != ".jsonl":
        raise ValueError(f"expected an output that ends in .jsonl; got {output}; rename it")
    report = Report()
    with manifest.whole_file(target) as temporary, temporary.open("w") as file:
        for row in tqdm(task.rows(target, seed, report), desc="rows", unit="", disable=None):
            file.write(json.dumps(row) + "\n")
        file.flush()
        manifest.flush(temporary)
    print(report.summary())
    print(f"wrote {output}")
    return vars(report)


@final
@dataclass(frozen=True)
class TemplatedTask(SynthesisTask):
    """Documents whose questions are right by construction; no model is asked."""

    kind: Synthetic
    """What the documents are: `KeyValues`, `Table` or `FrequentWords`."""
    documents: int = 1000
    """Documents to make."""
    tokens: int = 32_768
    """Most tokens of a document with its questions and answers, without what a chat template
    adds; it comes close to them."""
    tokenizer: str = "bytes"
    """Whose tokens: `bytes`, a tokenizer.json, a tokenizer.model or a folder with one of them."""

    def rows(self, output: Path, seed: int, report: Report) -> Iterator[Row]:
        """Yield the questions about one document after the other; fewer documents are a prefix."""
        tokenizer, seeded = open_tokenizer(self.tokenizer), random.Random(seed)
        kind = {"kind": type(self.kind).__name__, **vars(self.kind)}
        for number in range(self.documents):
            drawn = seeded.getrandbits(63)
            examples = self.kind.within(self.tokens, lambda t: len(tokenizer.encode([t])[0]), drawn)
            report.documents += 1
            for question, example in enumerate(examples):
                report.kept += 1
                name = f"{kind['kind']}-{seed}-{number}#{question}"
                yield {"id": name, **example, "made": kind, "seed": seed}


@final
@dataclass(frozen=True)
class SelfInstruct(SynthesisTask):
    """Llama 2 Long's questions and answers about chunks of long documents (arXiv:2309.16039, §2.2).

    Every reply is kept in OUTPUT.asked as soon as it is there: the same command again, after a stop
    or a kill, asks only what was not answered.
    """

    input: list[str] | str
    """Documents, as `prepare` reads them."""
    generator: Generator
    """The model: `Endpoint` or `Checkpoint`."""
    reader: DocumentReader = field(default_factory=DocumentReader)
    """Which fields of rows hold text and name, and the largest document."""
    questions: int = 1
    """Questions per document, each about a chunk of its own."""
    chunk: int = 4096
    """Characters that a question is asked about."""
    shortest: int = 32_768
    """Characters; shorter documents are passed over."""
    grounded: float = 0.5
    """Least share of an answer's words (numbers, and words of four letters and more) that must
    stand in the chunk; 0 for languages that put no spaces between words."""
    tolerated: float = 0.1
    """Largest share of questions that may fail, and of documents that may be broken; above it the
    run stops, and replies are kept."""

    def __post_init__(self) -> None:
        if min(self.questions, self.chunk) < 1:
            raise ValueError(
                f"expected questions and chunk of 1 or more; got {self.questions} and "
                f"{self.chunk}; raise them"
            )
        if not 0 <= self.grounded <= 1:
            raise ValueError(f"expected grounded between 0 and 1; got {self.grounded}; change it")

    def rows(self, output: Path, seed: int, report: Report) -> Iterator[Row]:
        """Yield the rows that pass, in the order of the documents."""
        report.tolerated = self.tolerated
        with ResponseCache(output.with_name(output.name + ".asked")) as replies:
            ask = QAGenerator(self.generator, replies, seed, self.grounded).row
            passages = self._passages(seed, report)
            with in_order(ask, passages, self.generator.concurrency) as results:
                for passage, result in results:
                    yield from counted(passage, result, report)
            report.costs = {**replies.spent, "requests": self.generator.requests}
        report.check()

    def _passages(self, seed: int, report: Report) -> Iterator[Passage]:
        faults, seen = Faults(self.tolerated), set()
        inputs = [self.input] if isinstance(self.input, str) else self.input
        for document in self.reader.documents(inputs, faults):
            report.documents += 1
            if len(document.text) < self.shortest:
                report.passed_over[f"shorter than {self.shortest:,} characters"] += 1
            elif (text := hash(document.text)) in seen:
                report.passed_over["the same text as an earlier one"] += 1
            else:
                seen.add(text)
                for number in range(self.questions):
                    yield draw(document, number, self.chunk, seed)
        faults.check()
        report.documents += faults.kinds.total()
        report.passed_over.update(faults.kinds)


def counted(passage: Passage, result: Future[Row | None], report: Report) -> Iterator[Row]:
    """Count what became of a question; yield its row, if that is one."""
    try:
        row = result.result()
    except Unanswered as reason:
        report.fail(passage.name, reason)
    else:
        report.kept += row is not None
        report.filtered += row is None
        if row:
            yield row
