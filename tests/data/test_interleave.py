"""Interleaving: the right answer by hand, and nothing lost, repeated or out of order."""

import itertools

import numpy as np
import pytest

from lit_longctx.data.making.interleave import Interleave
from lit_longctx.data.reading.documents import Document


def pairs(*rows):
    """Documents A, B, C … with these ids."""
    for name, ids in zip("ABCDEFGHIJ", rows, strict=False):
        yield Document(f"text of {name}", name), np.array(ids, dtype=np.uint16)


def found(interleave, *rows):
    return [(document.id, ids.tolist()) for document, ids in interleave(pairs(*rows))]


A, B, C = [10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]


@pytest.mark.parametrize(
    ("chunk_tokens", "rows", "expected"),
    [
        (2, (A, B, C), [10, 11, 20, 21, 30, 31, 12, 13, 22, 23, 32, 33]),
        (1, (A, B, C), [10, 20, 30, 11, 21, 31, 12, 22, 32, 13, 23, 33]),
        (3, (A, B, C), [10, 11, 12, 20, 21, 22, 30, 31, 32, 13, 23, 33]),
        (4, (A, B, C), A + B + C),
        (9, (A, B, C), A + B + C),
        (2, ([10], [20, 21, 22, 23, 24], [30, 31]), [10, 20, 21, 30, 31, 22, 23, 24]),
        (2, ([], [20, 21, 22], [30]), [20, 21, 30, 22]),
        (2, ([], [], []), []),
    ],
)
def test_chunks_stand_in_turn(chunk_tokens, rows, expected):
    assert found(Interleave(chunk_tokens, together=3), *rows) == [("A + B + C", expected)]


def test_groups_follow_the_stream_and_the_last_may_be_short():
    rows = [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]
    expected = [("A + B", [1, 3, 2, 4]), ("C + D", [5, 7, 6, 8]), ("E", [9, 10])]
    assert found(Interleave(1, together=2), *rows) == expected
    expected = [("A + B + C", [1, 3, 5, 2, 4, 6]), ("D + E", [7, 9, 8, 10])]
    assert found(Interleave(1, together=3), *rows) == expected
    assert found(Interleave(1, together=2)) == []


def test_texts_are_kept_and_ids_keep_their_type():
    document, ids = next(Interleave(1, together=2)(pairs(A, B)))
    assert document.text == "text of A\ntext of B"
    assert ids.dtype == np.uint16


def test_no_token_is_lost_repeated_or_moved_within_its_document():
    for seed in range(50):
        check_that_tokens_are_kept(np.random.default_rng(seed))


def check_that_tokens_are_kept(generator):
    chunk_tokens, together = generator.integers(1, 40), generator.integers(2, 9)
    lengths = generator.integers(0, 300, size=generator.integers(1, 40))
    ends = lengths.cumsum()  # every token of the stream is another number
    rows = [np.arange(end - length, end) for length, end in zip(lengths, ends, strict=True)]
    stream = ((Document("", str(i)), ids) for i, ids in enumerate(rows))
    joined = list(Interleave(int(chunk_tokens), int(together))(stream))

    parts = [document.id.split(" + ") for document, _ in joined]
    assert list(itertools.chain(*parts)) == [str(i) for i in range(len(rows))]
    assert all(len(part) == together for part in parts[:-1])
    for part, (_, ids) in zip(parts, joined, strict=True):
        members = [rows[int(name)] for name in part]
        assert sorted(ids.tolist()) == np.concatenate(members).tolist()
        for member in members:
            assert np.array_equal(ids[np.isin(ids, member)], member)


def test_chunks_of_equal_documents_are_as_far_apart_as_the_others_are_long():
    rows = [range(100 * i, 100 * i + 64) for i in range(5)]
    ((_, ids),) = Interleave(16, together=5)(pairs(*rows))
    place = {int(token): at for at, token in enumerate(ids)}
    for i in range(5):
        gaps = [place[100 * i + t + 1] - place[100 * i + t] for t in range(63)]
        assert gaps == [65 if t % 16 == 15 else 1 for t in range(63)]


def test_it_holds_one_group_only():
    taken = []

    def stream():
        for i in range(100):
            taken.append(i)
            yield Document("", str(i)), np.array([i])

    joined = Interleave(2, together=4)(stream())
    assert taken == []
    next(joined)
    assert len(taken) == 4
    next(joined)
    assert len(taken) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_tokens": 0}, "^chunk_tokens 0 is too few; expected 1 or more$"),
        ({"together": 1}, "^together 1 joins nothing; expected 2 or more$"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        Interleave(**settings)
