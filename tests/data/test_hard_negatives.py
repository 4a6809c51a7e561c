"""Hard negatives: the nearest chunks by hand and by BM25's formula, and no token of a text lost."""

import json
import math
import sys
from collections import Counter

import numpy as np
import pytest

from lit_longctx import cli, manifest
from lit_longctx.data.making.hard_negatives import HardNegatives, bm25
from lit_longctx.data.reading.documents import Document
from lit_longctx.data.tokens.tokenizer import ByteTokenizer

A, B, C = [1, 1, 2, 2], [2, 2, 9, 9], [1, 8, 7, 7]


def extended(how: HardNegatives, *rows: list[int]) -> list[tuple[str, list[int]]]:
    """Documents A, B, C … with these ids, extended."""
    stream = (
        (Document(f"text of {name}", name), np.array(ids, dtype=np.uint16))
        for name, ids in zip("ABCDEF", rows, strict=False)
    )
    return [(document.id, ids.tolist()) for document, ids in how.extended(stream, ByteTokenizer())]


@pytest.mark.parametrize(
    ("negatives", "rows", "expected"),
    [
        # a1 = 1 1 shares a term with c1 = 1 8 alone, a2 = 2 2 with b1 = 2 2
        (1, (A, B, C), [1, 1, 1, 8, 2, 2, 2, 2]),
        (1, (A,), A),
        (1, ([], A, B), []),
        # what stands in the document is not taken twice; the pool ends before the fourth
        (3, ([1, 1, 1, 1], [1, 1], [5, 5]), [1, 1, 1, 1, 5, 5, 1, 1]),
    ],
)
def test_negatives_of_the_first_document(negatives, rows, expected):
    assert extended(HardNegatives(2, negatives), *rows)[0] == ("A", expected)


def test_pools_follow_the_stream():
    found = extended(HardNegatives(2, 1, pool=2), [1, 1], [1, 2], [1, 1], [1, 3], [4])
    assert [ids for _, ids in found] == [
        [1, 1, 1, 2],
        [1, 2, 1, 1],
        [1, 1, 1, 3],
        [1, 3, 1, 1],
        [4],
    ]


def test_scores_are_bm25s_in_lucenes_form():
    """Σ idf(t)·f/(f + k1(1 − b + b·len/mean)) over the query's terms, idf ln(1 + (N−n+½)/(n+½))."""
    generator = np.random.default_rng(0)
    texts = [
        [str(t) for t in generator.zipf(1.5, size=generator.integers(5, 40)) if t < 50]
        for _ in range(30)
    ]
    mean = np.mean([len(text) for text in texts])
    score = bm25(texts)
    for own in range(0, 30, 7):
        expected = []
        for text in texts:
            counts, total = Counter(text), 0.0
            for term in set(texts[own]):
                holding = sum(term in other for other in texts)
                idf = math.log(1 + (30 - holding + 0.5) / (holding + 0.5))
                f = counts[term]
                total += idf * f / (f + 1.5 * (0.25 + 0.75 * len(text) / mean))
            expected.append(total)
        np.testing.assert_allclose(score(own), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("embed", [None, lambda texts: [[len(t), t.count("a")] for t in texts]])
def test_no_token_is_lost_or_moved_and_negatives_are_others(embed):
    generator = np.random.default_rng(1)
    rows = [
        (generator.integers(0, 200, size=n) + 0).astype(np.uint16)
        for n in generator.integers(0, 90, size=12)
    ]
    rows = [np.concatenate([[300 + i], row]).astype(np.uint16) for i, row in enumerate(rows)]
    how = HardNegatives(chunk_tokens=20, negatives=3, pool=5, embed=embed)
    stream = ((Document("", str(i)), ids) for i, ids in enumerate(rows))
    tokenizer = ByteTokenizer()
    for i, (document, ids) in enumerate(how.extended(stream, tokenizer)):
        assert document.id == str(i)
        assert ids.dtype == np.uint16
        rest, own = ids.tolist(), rows[i].tolist()
        chunks = [own[at : at + 20] for at in range(0, len(own), 20)]
        pool = [rows[j].tolist() for j in range(i // 5 * 5, min(12, i // 5 * 5 + 5)) if j != i]
        others = [row[at : at + 20] for row in pool for at in range(0, len(row), 20)]
        for chunk in chunks:
            assert rest[: len(chunk)] == chunk
            rest = rest[len(chunk) :]
            for _ in range(min(3, len(others))):
                negative = next(other for other in others if rest[: len(other)] == other)
                others.remove(negative)
                rest = rest[len(negative) :]
        assert rest == []


def test_a_plug_in_decides_by_cosine():
    def embed(texts):
        return [[1.0, text.count("x")] for text in texts]

    rows = [list(b"xx"), list(b"ab"), list(b"xxxxxx"), list(b"xa")]
    found = extended(HardNegatives(9, 1, embed=embed), *rows)
    assert [bytes(ids) for _, ids in found] == [b"xxxxxxxx", b"abxa", b"xxxxxxxx", b"xaxx"]
    with pytest.raises(ValueError, match=r"returned \(1, 2\) for 4 texts"):
        extended(HardNegatives(9, 1, embed=lambda texts: [[0, 1]]), *rows)


def test_prepare_extends_training_documents_and_says_how(tmp_path):
    rows = [{"id": str(i), "text": chr(97 + i % 3) * 40 + str(i)} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["prepare", "--input", f"[{tmp_path}/a.jsonl]", "--output", str(tmp_path / "data")]
    options += ["--hard_negatives.chunk_tokens", "64", "--hard_negatives.negatives", "1"]
    assert cli.main(options) == 0
    found = manifest.read(tmp_path / "data")
    how = {"chunk_tokens": 64, "negatives": 1, "pool": 1000, "embed": None}
    assert found["settings"]["hard_negatives"] == how
    plain = sum(len(row["text"]) + 2 for row in rows)
    assert found["splits"]["train"]["tokens"] > 1.8 * plain * 0.9


@pytest.mark.parametrize("options", [{"chunk_tokens": 0}, {"negatives": 0}, {"pool": 1}])
def test_settings_without_meaning_are_refused(options):
    with pytest.raises(ValueError, match=r"hard_negatives\."):
        HardNegatives(**options)


def test_without_the_library_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"pip install 'lit_longctx\[bm25\]'"):
        extended(HardNegatives(2, 1), A, B)
