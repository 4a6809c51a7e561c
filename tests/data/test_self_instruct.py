"""Chunks, replies that are kept, and what is read out of them; no model is asked."""

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from lit_longctx.data.making import self_instruct
from lit_longctx.data.making.report import Report, Unanswered
from lit_longctx.data.making.self_instruct import (
    STYLES,
    Generator,
    Passage,
    QAGenerator,
    Reply,
    ResponseCache,
    check_grounded,
    draw,
    in_order,
    question_and_answer,
    verdict,
)
from lit_longctx.data.reading.documents import Document

TEXT = "".join(random.Random(0).choices("abcdefgh ", k=5000))


# ---- chunks


def test_a_chunk_is_decided_by_seed_document_and_number_alone():
    passage = draw(Document(TEXT, "a"), 0, 100, seed=3)
    assert draw(Document(TEXT, "a"), 0, 100, seed=3) == passage
    others = [
        draw(Document(TEXT, "b"), 0, 100, seed=3),
        draw(Document(TEXT, "a"), 1, 100, seed=3),
        draw(Document(TEXT, "a"), 0, 100, seed=4),
    ]
    assert all(other.span != passage.span for other in others)
    # pinned: another chunk for the same seed would ask paid replies anew
    assert (passage.span, passage.style) == ((3698, 3798), "long")


def test_chunks_lie_anywhere_and_both_styles_are_as_frequent():
    passages = [draw(Document(TEXT, str(i)), 0, 1000, seed=0) for i in range(2000)]
    assert all(len(p.text) == 1000 and p.text == TEXT[p.span[0] :][:1000] for p in passages)
    begins = [p.span[0] for p in passages]
    assert min(begins) < 20
    assert 3980 < max(begins) <= 4000
    quarters = Counter(begin // 1001 for begin in begins)
    assert all(430 < quarters[i] < 570 for i in range(4))
    styles = Counter(p.style for p in passages)
    assert set(styles) == set(STYLES)
    assert all(900 < count < 1100 for count in styles.values())


def test_of_a_document_shorter_than_a_chunk_all_is_taken():
    assert draw(Document("short", "a"), 0, 4096, seed=0).text == "short"


# ---- what is read out of replies


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("<question>Who?</question>\n<answer>Ada.</answer>", ("Who?", "Ada.")),
        (
            "Sure!\n<question>\n Who\nis? </question> and <answer>A {b}</answer>.",
            ("Who\nis?", "A {b}"),
        ),
        ("<question>Who?</question><answer>cut off", "no question and answer in the reply"),
        ("Who? Ada.", "no question and answer in the reply"),
        ("Question: Who?\nAnswer: Ada.", ("Who?", "Ada.")),
        ("Who wrote it?\n\nAnswer: Ada.", "no question and answer in the reply"),
        ("Question: Who wrote it?\n", "no question and answer in the reply"),
        (
            "Sure! Here it is:\n\nQuestion: Who\nis it?\n\nAnswer:\nAda B.",
            ("Who\nis it?", "Ada B."),
        ),
        ("**Question:** Who?\n**Answer:** *Ada*", ("Who?", "Ada")),
        ("1. Question 1: Who?\nAnswer 1: Ada.\n2. Question 2: No?\nAnswer 2: b", ("Who?", "Ada.")),
        ("Q: Who?\nA: Ada.\nQ: Why?\nA: So.", ("Who?", "Ada.")),
        ("Question: Who? Answer: Ada.\n\nThis is right, since", ("Who?", "Ada.")),
        ("QUESTION: A: B or C?\nANSWER: B: the first", ("A: B or C?", "B: the first")),
        ("Question:\nAnswer: Ada", "empty question or answer"),
        ("Question: Who?\nAnswer:", "empty question or answer"),
        ("Question: \ud800\nAnswer: Ada", "lone surrogate"),
        ("<question>Who?</question><answer> </answer>", "empty question or answer"),
        ("<question></question><answer>Ada</answer>", "empty question or answer"),
        ("<question>\ud800</question><answer>Ada</answer>", "lone surrogate"),
    ],
)
def test_question_and_answer_are_read_or_refused(reply, found):
    if isinstance(found, tuple):
        assert question_and_answer(reply) == found
    else:
        with pytest.raises(Unanswered, match=f"^{found}"):
            question_and_answer(reply)


def test_of_a_reply_that_was_cut_short_the_last_answer_is_not_taken():
    with pytest.raises(Unanswered, match=r"^answer cut short$"):
        question_and_answer("Question: Who?\nAnswer: Ada, who was", cut=True)
    whole = "Question: Who?\nAnswer: Ada.\n\nQuestion: Why?\nAns"
    assert question_and_answer(whole, cut=True) == ("Who?", "Ada.")


PASSAGE = "In 1756 William Edwards, a mason, built the bridge; floods had carried off two."


@pytest.mark.parametrize(
    ("question", "answer", "share", "reason"),
    [
        ("Who built the bridge?", "William EDWARDS.", 1.0, None),
        ("When was it built?", "1756", 1.0, None),
        ("When was it built?", "1757", 1.0, "answer's words are not in the excerpt"),
        ("How many were lost?", "two", 1.0, None),
        ("How many were lost?", "ten", 1.0, "answer's words are not in the excerpt"),
        # of mason, named, William, Wright (a is too short) two stand there
        ("Who built it?", "A mason named William Wright", 0.5, None),
        ("Who built it?", "A mason named William Wright", 0.6, "answer's words are not in the"),
        ("Who built it?", "Christopher Wren", 0.0, None),
        ("What does the passage say?", "floods", 0.5, "question speaks of the excerpt"),
        ("Who is named in this text?", "floods", 0.5, "question speaks of the excerpt"),
        ("Which passages were flooded?", "floods", 0.5, None),
    ],
)
def test_answers_must_come_from_the_chunk(question, answer, share, reason):
    if reason is None:
        check_grounded(question, answer, PASSAGE, share)
    else:
        with pytest.raises(Unanswered, match=f"^{reason}"):
            check_grounded(question, answer, PASSAGE, share)


@pytest.mark.parametrize(
    ("reply", "good"),
    [
        ("Right. <verdict>yes</verdict>", True),
        ("<verdict>yes</verdict>, or rather <verdict> NO </verdict>", False),
        ("It says so.\n\nVerdict: yes", True),
        ("The year is wrong.\n**Verdict:** No.", False),
        ("Yes, the answer is right: nothing says no.", True),
        ("No. The mason built it, yes.", False),
        ("It says yes", None),
        ("Verdict: maybe", None),
        ("Notes on the text", None),
    ],
)
def test_a_labelled_verdict_counts_or_the_first_word(reply, good):
    if good is None:
        with pytest.raises(Unanswered, match="no verdict"):
            verdict(reply)
    else:
        assert verdict(reply) is good


# ---- replies


def test_a_reply_is_asked_for_once(tmp_path):
    path, asked = tmp_path / "new" / "x.asked", []

    def ask():
        asked.append(1)
        return Reply("text \ud800 ü\n", 3, 4)

    for run in range(2):
        with ResponseCache(path) as replies:
            for _ in range(2):
                assert replies.recall({"b": 1, "a": "ü"}, ask) == ("text \ud800 ü\n", 3, 4, False)
            assert list(replies.spent.values()) == [1 - run, 1 + run, 6, 8]
    assert len(asked) == len(path.read_bytes().splitlines()) == 1


# ---- the interview


class Parrot(Generator):
    """Replies what it is told to, and remembers what it was asked."""

    def __init__(self, *replies, **identity):
        self.replies, self.asked, self.known = list(replies), [], identity

    def identity(self):
        return self.known

    def complete(self, prompt, seed):
        self.asked.append((prompt, seed))
        return Reply(self.replies.pop(0))


GOOD = "<question>Who {x}?</question><answer>Ada {y}</answer>", "Fine. <verdict>yes</verdict>"


def test_a_row_says_what_it_is_made_of(tmp_path):
    passage = draw(Document(TEXT + "{brace}", "book"), 1, 300, seed=5)
    parrot = Parrot(*GOOD, model="m")
    with ResponseCache(tmp_path / "x.asked") as replies:
        row = QAGenerator(parrot, replies, 5).row(passage)
    assert row
    assert (row["id"], row["document"]) == ("book#1", TEXT + "{brace}")
    assert (row["question"], row["answer"]) == ("Who {x}?", "Ada {y}")
    assert (row["critique"], row["model"], row["seed"]) == (GOOD[1], {"model": "m"}, 5)
    (first, _), (second, _) = parrot.asked
    begin, end = row["chunk"]
    assert first.startswith(f"Text:\n{row['document'][begin:end]}\n\n")
    prompts = row["prompts"]
    shown = row["document"][begin:end]
    assert first == prompts["question"].format(style=prompts["style"], passage=shown)
    assert second == prompts["critique"].format(
        passage=shown, question="Who {x}?", answer="Ada {y}"
    )
    assert prompts["style"] == STYLES[row["style"]]


def test_whatever_decides_a_request_makes_it_a_new_one(tmp_path):
    passage, identity = Passage(Document(TEXT, "book"), 0, (10, 310), "long"), {"model": "m"}
    settings = [
        (passage, 0, identity),
        (passage, 1, identity),
        (passage, 0, {"model": "n"}),
        (passage._replace(document=Document(TEXT, "other")), 0, identity),
        (passage._replace(document=Document(TEXT[::-1], "book")), 0, identity),
        (passage._replace(number=1), 0, identity),
        (passage._replace(span=(10, 311)), 0, identity),
        (passage._replace(style="short"), 0, identity),
    ]
    seeds = []
    with ResponseCache(tmp_path / "x.asked") as replies:
        for expected in (2, 0):
            for passage, seed, identity in settings:
                parrot = Parrot(*GOOD, **identity)
                assert QAGenerator(parrot, replies, seed).row(passage)
                assert len(parrot.asked) == expected
                seeds += [seed for _, seed in parrot.asked]
    assert len(set(seeds)) == len(seeds) == 2 * len(settings)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_an_answer_that_is_taken_back_makes_no_row(tmp_path):
    with ResponseCache(tmp_path / "x.asked") as replies:
        parrot = Parrot(GOOD[0], "Wrong: <verdict>no</verdict>")
        assert QAGenerator(parrot, replies, 0).row(draw(Document(TEXT, "a"), 0, 9, 0)) is None
        with pytest.raises(Unanswered, match=r"^empty reply$"):
            QAGenerator(Parrot(GOOD[0], " "), replies, 0).row(draw(Document(TEXT, "b"), 0, 9, 0))


# ---- threads

PATIENCE = 60
"""Seconds after which a thread is taken to hang; none of them decides what a test finds."""


def test_results_come_in_order_from_no_more_threads_than_allowed():
    threads, all_three = set(), threading.Barrier(3)
    done = [threading.Event() for _ in range(20)]

    def work(i):
        threads.add(threading.get_ident())
        if i < 3:
            all_three.wait(PATIENCE)
        if i % 5 == 0:
            assert done[i + 1].wait(PATIENCE)  # results come in order even if work ends in another
        done[i].set()
        return i * i

    with in_order(work, iter(range(20)), 3) as results:
        assert [(i, future.result()) for i, future in results] == [(i, i * i) for i in range(20)]
    assert len(threads) == 3


def test_items_are_taken_a_few_at_a_time_and_nothing_begins_after_leaving(monkeypatch):
    taken, begun, done, left = [], [], [], threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            left.set()
            super().shutdown(wait=wait)

    monkeypatch.setattr(self_instruct, "ThreadPoolExecutor", Pool)

    def items():
        for i in range(1000):
            taken.append(i)
            yield i

    def work(i):
        threads.add(threading.current_thread())
        begun.append(i)
        assert i == 0 or left.wait(PATIENCE)  # two are in work while the block is left
        done.append(i)

    threads = set()
    with in_order(work, items(), 2) as results:
        next(results)[1].result()
    assert len(taken) == 2 * self_instruct.AHEAD
    assert 0 in begun
    assert set(begun) <= {0, 1, 2}
    assert sorted(done) == sorted(begun)  # what had begun was waited for
    assert not any(thread.is_alive() for thread in threads)


def test_nothing_begins_once_something_has_failed_for_good():
    begun = []

    def work(i):
        begun.append(i)
        raise Unanswered("empty reply") if i < 2 else ValueError("refused")

    with in_order(work, iter(range(100)), 1) as results:
        for expected in (Unanswered, Unanswered, ValueError):
            with pytest.raises(expected):
                next(results)[1].result()
    assert begun == [0, 1, 2]


# ---- the report


def test_too_many_failures_stop_the_run_but_not_the_first_few():
    report = Report(tolerated=0.25, kept=15)
    for i in range(5):
        report.fail(f"book#{i}", Unanswered("HTTP 500", "over\nloaded"))
    report.check()
    message = (
        r"^6 of 21 questions failed \(tolerated: 25\.0%\), most often by HTTP 500 \(6, first "
        r"book#0: over\\nloaded\); replies are kept: mend it and start again, or raise "
    )
    with pytest.raises(ValueError, match=message):
        report.fail("book#9", Unanswered("HTTP 500"))
    few = Report(tolerated=0.0)
    few.fail("book#0", Unanswered("timeout"))
    with pytest.raises(ValueError, match=r"^1 of 1 questions failed .* first book#0\)"):
        few.check()


def test_the_report_adds_up():
    report = Report(1.0, 7, Counter({"shorter than 9 characters": 2}), 3, 1)
    report.fail("a#0", Unanswered("timeout"))
    report.costs = {"requests": 1234}
    assert report.summary().splitlines() == [
        "7 documents: 3 rows kept, 1 filtered by critique, 1 failed",
        "  passed over 2: shorter than 9 characters",
        "  failed 1: timeout, first a#0",
        "  1,234 requests",
    ]
