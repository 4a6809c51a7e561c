"""Answers looked up in the document's text by a reader of its lines, not by its writer."""

import random
import re
from collections import Counter
from string import ascii_letters

import pytest

from lit_longctx.data.making.synthetic import (
    COLUMNS,
    HEAD,
    FrequentWords,
    KeyValues,
    Table,
    keys,
    text,
)

KINDS = [
    KeyValues(questions=7),
    KeyValues(questions=3, hops=2),
    KeyValues(questions=20, hops=4),
    Table(questions=9),
    Table(columns=10, questions=1),
    FrequentWords(),
]
ROWS = [4, 5, 33, 400]


def looked_up(example):
    """What a reader of the document would answer."""
    lines = example["document"].split("\n")
    question = example["question"]
    if key := re.fullmatch(r"([A-Za-z]+):", question):
        assert lines[0] == HEAD
        held = dict(line.split(": ") for line in lines[1:])
        assert len(held) == len(lines) - 1, "a key stands twice"
        value, hops = held[key[1]], 1
        while value in held:
            value, hops = held[value], hops + 1
        return value, hops
    if question == "Which word is the most frequent?":
        (value, most), *others = Counter(lines[1:]).most_common()
        assert all(number < most for _, number in others)
        return value, 1
    columns = lines[0].split(" | ")
    cells = [dict(zip(columns, line.split(" | "), strict=True)) for line in lines[1:]]
    assert len({row["name"] for row in cells}) == len(cells)
    if asked := re.fullmatch(r"What is the (\w+) of (\w+)\?", question):
        (value,) = [row[asked[1]] for row in cells if row["name"] == asked[2]]
    else:
        asked = re.fullmatch(r"Which name has (\d+) as its (\w+)\?", question)
        (value,) = [row["name"] for row in cells if row[asked[2]] == asked[1]]
    return value, 1


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_answer_is_what_the_document_says(kind, rows):
    for seed in range(5):
        examples = kind.draw(rows, seed)
        assert len(examples) == getattr(kind, "questions", 1)
        assert len({example["document"] for example in examples}) == 1
        assert examples[0]["document"].count("\n") == rows
        for example in examples:
            assert set(example) == {"document", "question", "answer"}
            assert looked_up(example) == (example["answer"], getattr(kind, "hops", 1))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nothing_is_asked_again_before_all_has_been(kind):
    for rows in ROWS:
        asked = [str(sorted(example.items())) for example in kind.draw(rows, 1)]
        cells = rows // getattr(kind, "hops", 1) * getattr(kind, "columns", 1)
        # a cell may be asked for and about, so that it counts as two questions
        assert len(set(asked)) >= min(len(asked), cells)


def test_both_kinds_of_questions_about_tables_and_chains_in_both_directions():
    asked = [example["question"][:5] for example in Table(questions=100).draw(50)]
    assert 30 < asked.count("What ") < 70
    assert asked.count("What ") + asked.count("Which") == 100
    backward = 0
    for example in KeyValues(questions=50, hops=2).draw(100):
        names = re.findall(r"\n(\w+):", example["document"])
        (after,) = re.findall(rf"\n{example['question'][:-1]}: (\w+)", example["document"])
        backward += names.index(after) < names.index(example["question"][:-1])
    assert 10 < backward < 40


def test_frequencies_of_words_fall_by_zipfs_law():
    drawn = [FrequentWords().draw(400, seed)[0] for seed in range(300)]
    ranked = [[n for _, n in Counter(d["document"].split("\n")[1:]).most_common()] for d in drawn]
    chance = 1 / sum(rank**-2 for rank in range(1, 11))
    for rank in (1, 2, 3):
        share = sum(counts[rank - 1] for counts in ranked) / 400 / 300
        assert share == pytest.approx(chance / rank**2, rel=0.05)
    assert min(Counter(each["answer"] for each in drawn).values()) > 300 / 10 / 3


def test_the_seed_decides():
    for kind in KINDS:
        assert kind.draw(30, 1) == kind.draw(30, 1)
        assert kind.draw(30, 1)[0]["document"] != kind.draw(30, 2)[0]["document"]


def test_text_is_the_document_with_its_questions_and_answers():
    examples = KeyValues(questions=2).draw(2, seed=3)
    found = text(examples)
    lines = found.split("\n")
    assert lines[:1] == [HEAD]
    assert sorted(line.replace("?", ":") for line in lines[3:]) == sorted(lines[1:3])
    assert all(re.fullmatch(r"[A-Za-z]{2}: \d{2}", line) for line in lines[1:3])
    assert all(re.fullmatch(r"[A-Za-z]{2}: \d{2}", line) for line in lines[3:])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("budget", [700, 4096, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_budget_is_filled_to_within_a_row(kind, budget):
    def words(found):
        return len(re.findall(r"\w+|\W", found))

    for measure in (len, words) if budget < 20_000 else (len,):
        found = text(kind.within(budget, measure, seed=5))
        row = max(measure("\n" + line) for line in found.split("\n"))
        # the asked names may be a letter longer in a document of another length
        assert budget - row - 2 * getattr(kind, "questions", 1) <= measure(found) <= budget


def test_keys_are_all_words_of_two_letters_then_of_three():
    stream = keys(random.Random(0))
    short = [next(stream) for _ in range(52**2)]
    longer = [next(stream) for _ in range(5000)]
    assert sorted(short) == sorted(a + b for a in ascii_letters for b in ascii_letters) != short
    assert {len(key) for key in longer} == {3}
    assert len(set(longer)) == len(longer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KeyValues(questions=0), "questions and hops of 1 or more; got 0 and 1"),
        (lambda: KeyValues(hops=0), "questions and hops of 1 or more; got 1 and 0"),
        (lambda: KeyValues(hops=3).draw(2), "expected rows of 3 or more; got 2; raise"),
        (lambda: Table(columns=11), f"columns from 1 to {len(COLUMNS)}; got 11; choose"),
        (lambda: Table(columns=0), "columns from 1 to 10; got 0; choose"),
        (lambda: Table(questions=-1), "expected questions of 1 or more; got -1; raise"),
        (lambda: FrequentWords().draw(0), "expected rows of 1 or more; got 0; raise"),
        (lambda: Table().draw(0), "expected rows of 1 or more; got 0; raise"),
        (lambda: KeyValues().within(29), "expected a budget of 30 or more; got 29; raise"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as found:
        make()
    assert "\n" not in str(found.value)


def test_the_least_budget_is_one_row():
    (example,) = KeyValues().within(30)
    assert len(text([example])) == 30
    assert example["document"].count("\n") == 1
