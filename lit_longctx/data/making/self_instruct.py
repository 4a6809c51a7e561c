"""Questions and answers about long documents, written by a model that is shown a part of each.

Self-instruct as in Llama 2 Long (Xiong et al. 2023, arXiv:2309.16039, §2.2): of a document a random
chunk, of the chunk a question with its answer, long or short, and of the same model a verdict on
the answer. What passes is a row {"document", "question", "answer"} with the whole document, so that
whoever is asked has to find the chunk. The wording of the prompts is ours.
"""

import hashlib
import json
import random
import re
import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, final

from lit_longctx.data.making.report import Unanswered
from lit_longctx.data.reading.documents import Document, unfit
from lit_longctx.result_cache import CacheKey, ResultCache

ASK = """\
Text:
{passage}

Write one question that this text answers, and the answer. Rely on nothing but the text. It is an \
excerpt: whoever is asked has the whole document and does not know which excerpt you saw, so name \
what the question is about, and do not speak of "the text". {style}"""
STYLES = {
    "long": """\
Answer in full sentences and with the details that matter. Write in this form:

Question: How did the stone bridge over the river Taff come to be built?
Answer: William Edwards, a mason, built it in 1756, after floods had carried off two before it.""",
    "short": """\
Answer as briefly as can be: with a name, a number or a few words. Write in this form:

Question: Who built the stone bridge over the river Taff?
Answer: William Edwards""",
}
"""How to answer, by name, with an example; one or the other, equally often."""
CRITIQUE = """\
Text:
{passage}

Question: {question}
Proposed answer: {answer}

Judge by the text alone whether the question can be understood by itself and the proposed answer \
is right and complete. Reply with one line for your reason, and a second one that is

Verdict: yes

or

Verdict: no"""
EXCERPT = re.compile(
    r"\b(?:the|this) (?:(?:given|above|provided) )?(?:passage|text|excerpt)\b", re.IGNORECASE
)
"""What a question may not speak of: whoever is asked does not know it."""
SPENT = ("replies of this run", "replies of earlier runs", "prompt tokens", "new tokens")
"""What replies cost; the tokens are those of both."""
_LABEL = r"[ \t]*\d*[ \t]*\**[:.)][ \t]*\**"
_BEGIN = r"^[ \t>*#\d.)]*"
_QUESTION = rf"{_BEGIN}(?:question|q){_LABEL}"
_ANSWER = rf"(?:{_BEGIN}(?:answer|a)|[ \t]\**answer){_LABEL}"
LABELLED = re.compile(
    rf"{_QUESTION}(.*?){_ANSWER}\s*(.*?)(?=\n[ \t]*\n|{_QUESTION}|\Z)",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
"""Question and answer behind their labels at the begin of a line."""
VERDICT = re.compile(r"verdict\W*(yes|no)\b", re.IGNORECASE)
WORD = re.compile(r"\w+")
AHEAD = 4
"""Questions in work or done per thread, while an earlier one is waited for."""

Item = TypeVar("Item")
Result = TypeVar("Result")
Row = dict[str, Any]


class Reply(NamedTuple):
    """What a model says."""

    text: str
    prompt_tokens: int = 0
    """Tokens it read; 0 if it does not tell."""
    new_tokens: int = 0
    """Tokens it wrote."""
    cut: bool = False
    """Whether it ends where no more tokens were allowed."""


class Generator(ABC):
    """A model that replies to a prompt."""

    concurrency: int = 1
    """Threads that may ask at the same time."""
    requests: int = 0
    """Requests made so far, with those that were made again."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return all that decides a reply but prompt and seed; JSON can say it."""

    @abstractmethod
    def complete(self, prompt: str, seed: int) -> Reply:
        """Return the reply to a prompt; `seed` decides what is random.

        Raises:
            Unanswered: There is none, which says nothing about other prompts.
            ValueError: There will be none for any prompt.
        """


class Passage(NamedTuple):
    """Part of a document that a question is asked about."""

    document: Document
    number: int
    """Which of the document's questions it is for."""
    span: tuple[int, int]
    """First character, and the first behind it."""
    style: str
    """Name of how to answer."""

    @property
    def name(self) -> str:
        """Name of the row."""
        return f"{self.document.id}#{self.number}"

    @property
    def text(self) -> str:
        """The characters."""
        return self.document.text[slice(*self.span)]


def draw(document: Document, number: int, chunk: int, seed: int) -> Passage:
    """Choose a chunk of so many characters and a style: a function of seed, document and number."""
    seeded = random.Random(json.dumps([seed, document.id, number]))
    begin = seeded.randrange(max(1, len(document.text) - chunk + 1))
    span = begin, min(begin + chunk, len(document.text))
    return Passage(document, number, span, seeded.choice(list(STYLES)))


# ---- replies


@final
class ResponseCache:
    """Replies kept as they come: after a kill only what was in flight is asked again."""

    def __init__(self, path: Path) -> None:
        self.cache = ResultCache(path)
        self.lock = threading.Lock()
        self.spent = Counter(dict.fromkeys(SPENT, 0))

    def __enter__(self) -> "ResponseCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.cache.file.close()

    def recall(self, of: CacheKey, ask: Callable[[], Reply]) -> Reply:
        """Return the reply to what `of` describes; asks if there is none yet."""
        known = of in self.cache
        reply = Reply(*self.cache[of]) if known else ask()
        with self.lock:
            if not known and reply.text.strip():  # an empty one is asked again
                self.cache.add(of, reply)
            self.spent.update(dict(zip(SPENT, (not known, known, *reply[1:3]), strict=True)))
        return reply


# ---- questions


@final
class QAGenerator:
    """Asks a model for questions and answers, and whether they are good.

    Args:
        generator: The model.
        replies: What it said before, and where to keep what it says.
        seed: Stands in every request and in the rows; `draw` wants the same.
        grounded: Least share of an answer's words that must stand in its chunk.
    """

    def __init__(
        self, generator: Generator, replies: ResponseCache, seed: int, grounded: float = 0.0
    ) -> None:
        self.generator = generator
        self.identity = generator.identity()
        self.replies = replies
        self.seed = seed
        self.grounded = grounded

    def row(self, passage: Passage) -> Row | None:
        """Return a row about a passage; None if the model thinks better of its answer.

        Raises:
            Unanswered: A request failed, or its reply cannot be read or is not about the chunk.
        """
        asked = ASK.format(style=STYLES[passage.style], passage=passage.text)
        question, answer = question_and_answer(*self._ask(passage, "question", asked))
        check_grounded(question, answer, passage.text, self.grounded)
        critique, _ = self._ask(
            passage,
            "critique",
            CRITIQUE.format(passage=passage.text, question=question, answer=answer),
        )
        if not verdict(critique):
            return None
        return {
            "id": passage.name,
            "document": passage.document.text,
            "question": question,
            "answer": answer,
            "chunk": passage.span,
            "style": passage.style,
            "critique": critique,
            "model": self.identity,
            "seed": self.seed,
            "prompts": {"question": ASK, "style": STYLES[passage.style], "critique": CRITIQUE},
        }

    def _ask(self, passage: Passage, stage: str, prompt: str) -> tuple[str, bool]:
        """Return the reply to a prompt, and whether it was cut short."""
        of = {
            "document": passage.document.id,
            "number": passage.number,
            "chunk": passage.span,
            "stage": stage,
            "style": passage.style,
            "prompt": _digest(prompt),
            "model": self.identity,
            "seed": self.seed,
        }
        seed = int(_digest(json.dumps(of, sort_keys=True))[:8], 16) // 2  # servers take 31 bits
        reply = self.replies.recall(of, lambda: self.generator.complete(prompt, seed))
        if not reply.text.strip():
            raise Unanswered("empty reply")
        return reply.text, reply.cut


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def question_and_answer(reply: str, cut: bool = False) -> tuple[str, str]:
    """Read a reply to `ASK`: the first question with its answer, labelled or in tags.

    A label may be numbered, emphasised or shortened to a letter: `**Question 1:**`, `Q: … A: …`. A
    labelled answer ends at an empty line or a further question.

    Args:
        reply: What the model said.
        cut: Whether it was cut short: an answer that runs to its end is not taken then.

    Raises:
        Unanswered: With one of a few reasons.
    """
    if "<question>" in reply:
        found = re.search(r"<question>(.*?)</question>.*?<answer>(.*?)</answer>", reply, re.DOTALL)
    else:
        found = LABELLED.search(reply)
        if found and cut and found.end() == len(reply):
            raise Unanswered("answer cut short", reply)
    if found is None:
        raise Unanswered("no question and answer in the reply", reply)
    question, answer = (text.strip().strip("*").strip() for text in found.groups())
    if not question or not answer:
        raise Unanswered("empty question or answer", reply)
    if broken := unfit(question) or unfit(answer):
        raise Unanswered(broken.kind, reply)
    return question, answer


def check_grounded(question: str, answer: str, passage: str, share: float) -> None:
    """Refuse a question that speaks of the excerpt, and an answer whose words do not stand in it.

    Args:
        question: Must have words of its own.
        answer: Its words are those of four letters and more, and numbers; if there are none, all.
        passage: What it must come from.
        share: Least share of the answer's words that must stand there, whatever their case.

    Raises:
        Unanswered: With one of two reasons.
    """
    if EXCERPT.search(question):
        raise Unanswered("question speaks of the excerpt", question)
    held = set(WORD.findall(passage.casefold()))
    said = WORD.findall(answer.casefold())
    told = [word for word in said if len(word) > 3 or word.isdigit()] or said
    if sum(word in held for word in told) < share * len(told):
        raise Unanswered("answer's words are not in the excerpt", answer)


def verdict(reply: str) -> bool:
    """Read a reply to `CRITIQUE`: the last labelled verdict, else a yes or no that begins it."""
    found = VERDICT.findall(reply) or re.findall(r"\A\W*(yes|no)\b", reply, re.IGNORECASE)
    if not found:
        raise Unanswered("no verdict in the critique", reply)
    return found[-1].lower() == "yes"


@contextmanager
def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Iterator[tuple[Item, Future[Result]]]]:
    """Do work in threads; yield items with what came of each, in order and a few at a time.

    Who leaves early waits for the work that has begun; none is begun anymore. None is begun either
    once some has failed by anything but `Unanswered`, which says that other work will fail too.
    """
    hopeless = threading.Event()

    def unless_hopeless(item: Item) -> Result:
        if hopeless.is_set():
            raise CancelledError  # nobody sees it: what failed stands before it
        try:
            return work(item)
        except Unanswered:
            raise
        except BaseException:
            hopeless.set()
            raise

    def results() -> Iterator[tuple[Item, Future[Result]]]:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(unless_hopeless, item)))
            if len(waiting) >= AHEAD * threads:
                yield waiting.popleft()
        yield from waiting

    pool = ThreadPoolExecutor(threads)
    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)
