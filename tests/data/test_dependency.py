"""The long-dependency score: its formula, the perplexities in it, and documents of known answer."""

import json
import math
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from lit_longctx.checkpoint import export_pretrained
from lit_longctx.data.making import document_scorer as module
from lit_longctx.data.making.dependency import (
    DependencyFilter,
    DependencyScorer,
    dependency_score,
    draw_pairs,
    perplexities,
)
from lit_longctx.data.reading.documents import Document
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE

VOCABULARY, SEGMENT, ALPHABET = 128, 16, 16
SETTINGS: dict[str, Any] = {
    "window": 8 * SEGMENT,
    "segment": SEGMENT,
    "compute_dtype": "float32",
    "device": "cpu",
}


def slow_score(alone, given, full, threshold):
    """The score in plain Python; `given` holds P(i|j) by (i, j)."""
    score = 0.0
    for i in range(len(alone)):
        row = {j: alone[i] - p for (later, j), p in given.items() if later == i}
        if not row:
            continue
        specificity = 1.0
        if len(row) > 1:
            exponentials = [math.exp(gain) for gain in row.values()]
            shares = [e / sum(exponentials) for e in exponentials]
            entropy = -sum(p * math.log(p) for p in shares)
            most = math.log(len(row))
            specificity = min(max((most - entropy) / most, 0.0), 1.0)
        for j, gain in row.items():
            strength = gain / alone[i]
            if strength > threshold:
                distance = min(max((i - j) / (full - 1), 0.0), 1.0)
                score += (strength + distance) * specificity
    return score


def all_pairs(segments):
    return np.argwhere(np.tri(segments, k=-1))


def test_score_of_three_segments_by_hand():
    pairs = np.array([[1, 0], [2, 0], [2, 1]])
    alone = np.array([10.0, 8.0, 4.0])
    # DST 0.25, 0.5 and 0.05: the last is below the threshold but counts in row 2's entropy
    given = np.array([6.0, 2.0, 3.8])
    first = (0.25 + 1 / 4) * 1
    share = 1 / (1 + math.exp(0.2 - 2.0))
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    second = (0.5 + 2 / 4) * (math.log(2) - entropy) / math.log(2)
    found = dependency_score(alone, given, pairs, most_segments=5)
    assert found == pytest.approx(first + second, rel=1e-12)
    assert dependency_score(alone, given, pairs, 5, least_strength=0.3) == pytest.approx(second)


@pytest.mark.parametrize("seed", range(30))
def test_score_is_that_of_a_slow_loop(seed):
    generator = np.random.default_rng(seed)
    segments = int(generator.integers(2, 40))
    full = segments + int(generator.integers(0, 2)) * 20
    pairs = draw_pairs(segments, int(generator.integers(1, 300)), generator)
    alone = generator.uniform(5, 30, segments)
    given = alone[pairs[:, 0]] * generator.uniform(0.3, 1.3, len(pairs))
    table = {(int(i), int(j)): p for (i, j), p in zip(pairs, given, strict=True)}
    threshold = float(generator.choice([0.0, 0.1, 0.4]))
    expected = slow_score(alone, table, full, threshold)
    shuffled = generator.permutation(len(pairs))
    found = dependency_score(alone, given[shuffled], pairs[shuffled], full, threshold)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_extreme_perplexities_give_numbers():
    pairs = all_pairs(4)
    for size in (1.0, 1e3, 1e300):
        alone = np.full(4, size)
        for given in (np.ones(6), np.full(6, size), np.full(6, 1e300)):
            assert 0 <= dependency_score(alone, given, pairs, 4) <= 12
    # one earlier segment tells all, by more than exp can hold
    alone, given = np.full(3, 1e5), np.array([1e5, 1e5, 1.0])
    assert dependency_score(alone, given, all_pairs(3), 3) == pytest.approx(1 - 1e-5 + 1 / 2)


def test_help_from_everywhere_is_not_specific():
    pairs, alone = all_pairs(20), np.full(20, 10.0)
    alike = dependency_score(alone, np.full(190, 4.0), pairs, 20)
    assert alike == pytest.approx(0.6 + 1 / 19)  # row 1 alone: it has nothing to compare with


@pytest.mark.parametrize("segments", [2, 3, 17, 256])
def test_pairs_are_different_ones_below_the_diagonal(segments):
    total = segments * (segments - 1) // 2
    generator = np.random.default_rng(0)
    assert np.array_equal(draw_pairs(segments, 10**9, generator), all_pairs(segments))
    some = draw_pairs(segments, 5, np.random.default_rng(1))
    assert len(np.unique(some, axis=0)) == min(5, total)
    assert (some[:, 1] < some[:, 0]).all()
    assert some.min() >= 0
    assert some.max() < segments
    assert np.array_equal(some, draw_pairs(segments, 5, np.random.default_rng(1)))


@pytest.mark.slow
def test_every_pair_is_as_likely_as_any_other():
    counts = np.zeros((8, 8))
    for seed in range(4000):
        counts[tuple(draw_pairs(8, 7, np.random.default_rng([seed, 0])).T)] += 1
    found = counts[tuple(all_pairs(8).T)]
    assert counts.sum() == found.sum() == 28_000
    assert abs(found - 1000).max() < 5 * math.sqrt(4000 * 0.25 * 0.75)


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory):
    """A random two-layer Llama, and its folder."""
    torch.manual_seed(0)
    config = LlamaConfig(VOCABULARY, 32, 64, 2, 4, num_key_value_heads=2, bos_token_id=1)
    llama = Llama(config, RoPE(theta=100.0))
    for weight in llama.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    folder = tmp_path_factory.mktemp("random") / "model"
    export_pretrained(llama, folder)
    return llama.eval(), str(folder)


def random_ids(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).astype(np.uint16)


def test_score_is_that_of_the_authors_procedure_with_transformers(random_llama):
    transformers = pytest.importorskip("transformers")
    folder = random_llama[1]
    reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def perplexity(tokens):
        ids = torch.tensor([tokens])
        losses = torch.nn.functional.cross_entropy(
            reference(ids).logits[0, :-1].double(), ids[0, 1:], reduction="none"
        )
        return math.exp(losses[-(SEGMENT - 1) :].mean())

    ids = random_ids(6 * SEGMENT + 5)  # shorter than the window, and with a rest
    segments = [ids[i * SEGMENT : (i + 1) * SEGMENT].tolist() for i in range(6)]
    chosen = DependencyScorer(
        DependencyFilter(folder, 0.0, pairs=9, seed=3, least_strength=0.0, **SETTINGS)
    )
    pairs = draw_pairs(6, 9, np.random.default_rng([3, 0])).tolist()
    given = {(i, j): perplexity(segments[j] + segments[i]) for i, j in pairs}
    alone = [perplexity(segment) for segment in segments]
    expected = slow_score(alone, given, full=8, threshold=0.0) / 9
    assert expected > 0.05
    assert chosen.score(ids) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_batched_is_one_by_one(random_llama):
    llama, folder = random_llama
    rows = torch.from_numpy(random_ids(23 * 32).astype(np.int64)).view(23, 32)
    for targets in (15, 31):
        single = perplexities(llama, rows, targets, 1)
        for batch in (2, 7, 23, 100):
            found = perplexities(llama, rows, targets, batch)
            np.testing.assert_allclose(found, single, rtol=2e-5)
    ids = random_ids(8 * SEGMENT)
    scores = [
        DependencyScorer(DependencyFilter(folder, 0.0, batch=n, **SETTINGS)).score(ids)
        for n in (1, 5, 99)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-3)
    assert scores[0] > 0


def test_bfloat16_scores_nearly_as_float32(random_llama):
    ids = random_ids(8 * SEGMENT)
    full = DependencyFilter(random_llama[1], 0.0, **SETTINGS)
    half = DependencyScorer(replace(full, compute_dtype="bfloat16"))
    assert half.llama.head_weight.dtype == torch.bfloat16
    assert half.score(ids) == pytest.approx(DependencyScorer(full).score(ids), rel=0.02)


# ---- a model that expects again what its context holds


@pytest.fixture(scope="module")
def repeating(tmp_path_factory):
    """Folder of a one-layer Llama whose logits are how often each token stood in the context.

    The first half of the width holds the current token; attention with q = k = 0 puts the mean of
    all tokens so far into the second half, the only one that the head reads.
    """
    one = torch.eye(VOCABULARY)
    config = LlamaConfig(VOCABULARY, 2 * VOCABULARY, 8, 1, 1, bos_token_id=1)
    llama = Llama(config, RoPE())
    weights = dict(llama.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            weight.fill_(1.0 if "norm" in name else 0.0)
        attention = "model.layers.0.self_attn."
        weights["model.embed_tokens.weight"][:, :VOCABULARY] = one
        weights[attention + "v_proj.weight"][VOCABULARY:, :VOCABULARY] = one
        weights[attention + "o_proj.weight"][:] = torch.eye(2 * VOCABULARY)
        weights["lm_head.weight"][:, VOCABULARY:] = one / 4  # weak enough to expect new tokens too
    folder = tmp_path_factory.mktemp("repeating") / "model"
    export_pretrained(llama, folder)
    return str(folder)


def segment_of(alphabet, seed):
    """All 16 tokens of an alphabet in random order: no token stands twice."""
    order = np.random.default_rng(seed).permutation(ALPHABET)
    return (ALPHABET * alphabet + order).astype(np.uint16)


def document_of(*alphabets):
    return np.concatenate([segment_of(a, seed) for seed, a in enumerate(alphabets)])


UNRELATED = document_of(0, 1, 2, 3, 4, 5, 6, 7)
RELATED = document_of(0, 1, 2, 3, 4, 5, 6, 0)
NEARER = document_of(1, 2, 3, 4, 5, 0, 6, 0)
TWICE = document_of(0, 1, 2, 3, 4, 5, 0, 1)
BOILERPLATE = document_of(0, 0, 0, 0, 0, 0, 0, 0)


def test_a_segment_that_returns_late_scores_and_an_unrelated_one_does_not(repeating):
    chosen = DependencyScorer(DependencyFilter(repeating, 0.0, **SETTINGS))
    unrelated, related = chosen.score(UNRELATED), chosen.score(RELATED)
    assert unrelated == 0.0
    assert related > 0.01
    assert chosen.score(TWICE) > 1.5 * related
    assert 0.0 < chosen.score(NEARER) < related
    # the same help from everywhere has no specificity but in row 1, which is a single pair
    assert chosen.score(BOILERPLATE) < (1 + 1 / 7) / 28


def test_related_documents_are_kept_and_reported(repeating):
    documents = {"far": RELATED, "none": UNRELATED, "short": RELATED[: 2 * SEGMENT - 1]}
    documents |= {"near": NEARER, "empty": RELATED[:0], "twice": TWICE}
    chosen = DependencyScorer(DependencyFilter(repeating, 0.01, **SETTINGS))
    stream = ((Document("", name), ids) for name, ids in documents.items())
    kept = list(chosen(stream))
    assert [document.id for document, _ in kept] == ["far", "near", "twice"]
    assert all(ids is documents[document.id] for document, ids in kept)

    report = json.loads(json.dumps(chosen.report, allow_nan=False))
    assert (report["kept"], report["dropped"]) == (3, 3)
    assert (report["kept_tokens"], report["dropped_tokens"]) == (3 * 128, 128 + 31)
    assert report["examples"] == {name: chosen.score(ids) for name, ids in documents.items()}
    scores = sorted(report["examples"].values())
    assert report["quantiles"]["0.0"] == 0.0
    assert report["quantiles"]["0.5"] == pytest.approx((scores[2] + scores[3]) / 2)
    assert report["quantiles"]["1.0"] == scores[-1]


def test_all_documents_pass_at_zero_and_an_empty_stream_has_a_report(repeating):
    chosen = DependencyScorer(DependencyFilter(repeating, 0.0, **SETTINGS))
    json.dumps(chosen.report, allow_nan=False)
    stream = [(Document("", str(i)), ids) for i, ids in enumerate((UNRELATED, UNRELATED[:3]))]
    assert list(chosen(iter(stream))) == stream


def test_a_longer_document_is_the_mean_over_the_pairs_of_its_windows(repeating):
    chosen = DependencyScorer(
        DependencyFilter(repeating, 0.0, **SETTINGS)
    )  # 500 pairs: all 28 of a window
    rest = document_of(0, 1, 0)
    expected = 28 * chosen.score(RELATED) + 28 * chosen.score(UNRELATED) + 3 * chosen.score(rest)
    for spare in (0, 9):  # tokens that fill no segment
        ids = np.concatenate([RELATED, UNRELATED, rest, segment_of(0, 9)[:spare]])
        assert chosen.score(ids) == pytest.approx(expected / 59, rel=1e-6)
    # a last window of one segment has no pair
    ids = np.concatenate([RELATED, segment_of(0, 9)])
    assert chosen.score(ids) == pytest.approx(chosen.score(RELATED), rel=1e-6)


def test_a_score_depends_on_tokens_and_seed_alone(random_llama):
    def scores(seed, order):
        chosen = DependencyScorer(
            DependencyFilter(random_llama[1], 0.0, pairs=5, seed=seed, **SETTINGS)
        )
        stream = ((Document("", str(i)), random_ids(150, i)) for i in order)
        for _ in chosen(stream):
            pass
        return chosen.examples

    assert scores(0, range(4)) == scores(0, reversed(range(4)))
    assert scores(0, range(4)) != scores(1, range(4))


def test_the_model_is_loaded_once_and_late(repeating, monkeypatch):
    loaded = []

    def load(folder):
        loaded.append(folder)
        return real(folder)

    real = module.load_pretrained
    monkeypatch.setattr(module, "load_pretrained", load)
    chosen = DependencyScorer(DependencyFilter(repeating, 0.01, **SETTINGS))
    kept = chosen(iter([(Document("", "a"), RELATED), (Document("", "b"), RELATED)]))
    assert loaded == []
    assert len(list(kept)) == 2
    assert loaded == [repeating]


def test_foreign_ids_are_refused_in_one_line(repeating):
    chosen = DependencyScorer(DependencyFilter(repeating, 0.0, **SETTINGS))
    assert chosen.score(np.array([127, 0])) == 0
    expected = rf"^token 128 is beyond {repeating}'s vocabulary of 128; prepare .* tokenizer$"
    with pytest.raises(ValueError, match=expected):
        chosen.score(np.array([1, 128], dtype=np.uint16))


def test_a_broken_model_is_refused_in_one_line(random_llama, tmp_path):
    llama = Llama(random_llama[0].config, RoPE())
    torch.nn.init.constant_(llama.model.norm.weight, 1e38)  # its logits overflow
    export_pretrained(llama, tmp_path / "model")
    chosen = DependencyScorer(DependencyFilter(str(tmp_path / "model"), 0.0, **SETTINGS))
    with pytest.raises(ValueError, match=r"^.* gives a perplexity that is not finite in float32;"):
        chosen.score(random_ids(64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment": 1}, "segment 1 has no token to predict"),
        ({"window": 128}, "window 128 holds no whole number"),
        ({"window": 1000}, "window 1000 holds no whole number"),
        ({"pairs": 0}, "pairs 0 is too few"),
        ({"batch": 0}, "batch 0 is too few"),
        ({"seed": -1}, "seed -1 is negative"),
        ({"least_strength": 1.0}, "least_strength 1.0 is no share"),
        ({"at_least": math.nan}, "at_least nan is no score"),
        ({"at_least": 2.5}, "at_least 2.5 is no score"),
    ],
)
def test_impossible_settings_are_refused_before_the_model_is_loaded(settings, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        DependencyFilter(**{"checkpoint": "nowhere", "at_least": 0.1} | settings)
    assert "\n" not in str(error.value)


def test_settings_are_frozen_and_comparable():
    chosen = DependencyFilter("nowhere", 0.1)
    assert chosen == DependencyFilter("nowhere", 0.1) != DependencyFilter("nowhere", 0.2)
    with pytest.raises(FrozenInstanceError):
        chosen.seed = 3  # pyright: ignore
    assert vars(chosen).keys() == {field.name for field in fields(chosen) if field.init}
