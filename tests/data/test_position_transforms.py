from collections import Counter, defaultdict
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from schemes import every_scheme

from lit_longctx.batch import NO_TARGET, pack
from lit_longctx.data.sampling.position_transforms import E2LLM, FIRST_TOKENS, PoSE, SkipAlign
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import DynamicNTK, LongRoPE, PositionInterpolation, RoPE, XPos

B, SEQ, TARGET, TRAINED, FACTOR = 1, 40, 100, 40, 6
TRANSFORMS = [
    PoSE(TARGET),
    SkipAlign(TARGET),
    SkipAlign(TARGET, "inner"),
    SkipAlign(TARGET, "outer"),
    E2LLM(TRAINED, FACTOR),
]


def windows(samples):
    """Three documents of sizes that the sample decides, the last of them padding; answers too."""
    found = torch.full((len(samples), SEQ + 1), NO_TARGET)
    answers = torch.zeros(len(samples), SEQ, dtype=torch.bool)
    for row, sample in enumerate(samples):
        generator = torch.Generator().manual_seed(sample)
        sizes = torch.randint(1, 20, (2,), generator=generator).tolist()
        for begin, size in [(0, sizes[0]), (sizes[0], sizes[1])]:
            found[row, begin] = B
            found[row, begin + 1 : begin + size] = 5
        answers[row] = torch.rand(SEQ, generator=generator) < 0.5
    return found, answers


def build(samples):
    """Rows of those sample numbers, whatever else is in the batch."""
    found, answers = windows(samples)
    return pack(found, bos=B, samples=torch.tensor(samples)), answers


def documents(batch, answers):
    """(row, place of its first token, places, answers) of each document that has targets."""
    for row, ids in enumerate(batch.documents.ids.tolist()):
        for document in range(max(ids) + 1):
            tokens = [t for t in range(len(ids)) if ids[t] == document]
            if any(batch.labels[row, t] != NO_TARGET for t in tokens):
                places = [batch.position_ids[row, t].item() for t in tokens]
                yield row, places, [bool(answers[row, t]) for t in tokens]


def whole(samples, length):
    """Rows that are one document each."""
    return pack(torch.full((samples, length + 1), 5), bos=B, samples=torch.arange(samples))


def chi_square(counts, values):
    """Distance of what was counted from a uniform distribution, in degrees of freedom."""
    assert set(counts) <= set(values)
    expected = counts.total() / len(values)
    return sum((counts[v] - expected) ** 2 for v in values) / expected / (len(values) - 1)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_a_sample_has_the_same_places_in_any_order_and_split(transform):
    samples = [7, 0, 3, 12, 5, 1_000_000_007, 9, 2]
    together = transform(*build(samples)).position_ids
    assert not torch.equal(together, build(samples)[0].position_ids.to(together.dtype))
    for order, size in [(samples[::-1], 8), (samples, 1), (sorted(samples), 3)]:
        for begin in range(0, 8, size):
            part = order[begin : begin + size]
            for sample, places in zip(part, transform(*build(part)).position_ids, strict=True):
                assert torch.equal(places, together[samples.index(sample)])


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_only_position_ids_change_and_padding_keeps_its_own(transform):
    batch, answers = build(list(range(20)))
    placed = transform(batch, answers)
    assert all(
        getattr(placed, name) is getattr(batch, name)
        for name in batch._fields
        if name != "position_ids"
    )
    padding = batch.documents.ids == 2
    assert padding.any()
    kept = batch.position_ids[padding].to(transform.dtype)
    assert torch.equal(placed.position_ids[padding], kept)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_places_go_upwards_from_0_and_stay_in_the_context(transform):
    batch, answers = build(list(range(300)))
    longest = 0.0
    for _, places, _ in documents(transform(batch, answers), answers):
        assert places[0] == 0
        assert all(a < b for a, b in pairwise(places))
        longest = max(longest, places[-1])
    limit = TRAINED - 1 / FACTOR if isinstance(transform, E2LLM) else TARGET - 1
    assert 0.7 * limit < longest <= limit


def test_pose_makes_one_gap_in_the_first_half():
    batch, answers = build(list(range(300)))
    for _, places, _ in documents(PoSE(TARGET)(batch, answers), answers):
        gaps = [i for i in range(1, len(places)) if places[i] - places[i - 1] != 1]
        assert len(gaps) <= 1
        assert all(i <= (len(places) + 1) // 2 for i in gaps)


def test_pose_draws_every_split_and_every_shift_equally_often():
    batch = PoSE(60)(whole(4000, 21))
    splits, shifts = Counter(), Counter()
    for places in batch.position_ids.tolist():
        shifts[places[-1] - 20] += 1
        splits[next((i for i in range(1, 21) if places[i] != i), 0)] += 1
    del splits[0]  # shift 0: the split cannot be seen
    assert shifts.keys() == set(range(40))
    assert splits.keys() == set(range(1, 12))
    assert chi_square(shifts, range(40)) < 1.8  # exceeded with p = 0.002
    assert chi_square(splits, range(1, 12)) < 2.8
    mean = sum(shift * n for shift, n in shifts.items()) / 4000
    assert abs(mean - 19.5) < 4 * 11.54 / 4000**0.5


@pytest.mark.parametrize("mode", ["all", "inner", "outer"])
def test_skip_align_skips_only_where_its_mode_allows(mode):
    batch, answers = build(list(range(300)))
    skipped = 0
    for _, places, marks in documents(SkipAlign(TARGET, mode)(batch, answers), answers):
        for i in range(1, len(places)):
            allowed = {
                "all": True,
                "inner": marks[i] and not marks[i - 1],
                "outer": marks[i - 1] and not marks[i],
            }[mode]
            assert places[i] - places[i - 1] == 1 or allowed
            skipped += places[i] - places[i - 1] > 1
    assert skipped > 300


@pytest.mark.slow
def test_skip_align_draws_shifts_evenly_and_sorts_them():
    answers = torch.zeros(4000, 10, dtype=torch.bool)
    answers[:, [3, 4, 7]] = True  # two answers: boundaries before tokens 3 and 7
    batch = SkipAlign(30, "inner")(whole(4000, 10), answers)
    shifts = batch.position_ids - torch.arange(10)
    assert (shifts[:, :3] == 0).all()
    assert (shifts[:, 3:7] == shifts[:, 3:4]).all()
    assert (shifts[:, 7:] == shifts[:, 7:8]).all()
    assert (shifts[:, 7] >= shifts[:, 3]).all()
    both = Counter(shifts[:, [3, 7]].flatten().tolist())
    assert both.keys() == set(range(21))
    assert chi_square(both, range(21)) < 2.2
    # the expected smaller and larger of two draws from U{0 … 20} are 20/3 and 40/3, ± 1/60
    assert abs(shifts[:, 3].float().mean() - 20 / 3) < 0.4
    assert abs(shifts[:, 7].float().mean() - 40 / 3) < 0.4


def test_skip_align_skips_before_any_token():
    places = SkipAlign(60)(whole(500, 10)).position_ids
    assert ((places.diff() > 1).sum(dim=0) > 300).all()


def test_e2_llm_has_a_spacing_of_exactly_one_over_g_but_for_one_gap():
    batch, answers = build(list(range(300)))
    placed = E2LLM(TRAINED, FACTOR)(batch, answers)
    assert placed.position_ids.dtype == torch.float32
    for _, places, _ in documents(placed, answers):
        factors = [g for g in range(1, FACTOR + 1) if abs(places[1] * g - 1) < 1e-6]
        assert len(factors) == 1
        tokens = [Fraction(place).limit_denominator(FACTOR) * factors[0] for place in places]
        moved = tokens[FIRST_TOKENS] - FIRST_TOKENS if len(tokens) > FIRST_TOKENS else 0
        assert 0 <= moved <= (factors[0] - 1) * TRAINED
        offsets = [0 if n < FIRST_TOKENS else moved for n in range(len(places))]
        assert tokens == [n + offset for n, offset in enumerate(offsets)]
        nearest = [torch.tensor(float(token / factors[0])).item() for token in tokens]
        assert places == nearest


def test_e2_llm_draws_every_factor_and_offset_equally_often():
    places = E2LLM(8, 3)(whole(4000, 8)).position_ids.double()
    factors = (1 / places[:, 1]).round().long()
    offsets = (places[:, 4] * factors).round().long() - 4
    assert chi_square(Counter(factors.tolist()), [1, 2, 3]) < 6.2  # exceeded with p = 0.002
    by_factor = defaultdict(Counter)
    for factor, offset in zip(factors.tolist(), offsets.tolist(), strict=True):
        by_factor[factor][offset] += 1
    assert by_factor[1].keys() == {0}
    for factor in (2, 3):
        values = range(8 * factor - 8 + 1)
        assert by_factor[factor].keys() == set(values)
        assert chi_square(by_factor[factor], values) < 3.1


def tiny(position):
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(16, 32, 48, 2, 2), position)
    for parameter in llama.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    return llama


@pytest.mark.parametrize(
    "transform", [PoSE(20), SkipAlign(20), SkipAlign(20, "inner"), E2LLM(20, 1)], ids=str
)
def test_without_room_places_and_loss_are_those_of_the_plain_batch(transform):
    batch = whole(4, 20)
    batch = batch._replace(input_ids=torch.randint(3, 16, (4, 20)))
    placed = transform(batch, torch.rand(4, 20) < 0.5)
    assert torch.equal(placed.position_ids, batch.position_ids.to(transform.dtype))
    llama = tiny(RoPE(100.0))
    assert torch.equal(llama.loss(placed)[0], llama.loss(batch)[0])


def test_e2_llm_trains_what_position_interpolation_reads():
    batch = whole(12, 20)._replace(input_ids=torch.randint(3, 16, (12, 20)))
    placed = E2LLM(20, 3)(batch)
    factors = (1 / placed.position_ids[:, 1]).round().long()
    assert set(factors.tolist()) == {1, 2, 3}
    for factor in (1, 2, 3):
        scaled = tiny(PositionInterpolation(100.0, factor=factor))
        whole_places = batch.with_position_ids((placed.position_ids * factor).round().long())
        rows = factors == factor
        found = tiny(RoPE(100.0)).loss(placed)[1][rows]
        expected = scaled.loss(whole_places)[1][rows]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("position", every_scheme(16), ids=lambda scheme: type(scheme).__name__)
@pytest.mark.parametrize("transform", [PoSE(TARGET), E2LLM(TRAINED, FACTOR)], ids=str)
def test_every_position_scheme_takes_the_places(position, transform):
    batch, answers = build(list(range(4)))
    placed = transform(batch, answers)
    nats = tiny(position).loss(placed)[1]
    assert nats.isfinite().all()
    code = position.encode(placed.position_ids, 16, placed.documents)
    for t in range(SEQ):  # a token's code depends on its place and its document's length alone
        alone = placed.position_ids[:, t : t + 1]
        lengths = placed.documents.lengths()[:, t : t + 1]
        for row in range(4):
            if isinstance(position, (DynamicNTK, LongRoPE)):
                whole_row = torch.zeros(1, int(lengths[row]), dtype=alone.dtype)
                whole_row[:, 0] = alone[row]
                expected = position.encode(whole_row, 16, whole(1, int(lengths[row])).documents)
            else:
                expected = position.encode(alone[row : row + 1], 16)
            torch.testing.assert_close(code[row, t], expected[0, 0])


def test_xpos_refuses_places_that_its_scales_cannot_hold():
    placed = PoSE(200_000)(whole(8, 20))
    with pytest.raises(
        ValueError, match=r"xPos scales leave float32 at position .* set scale_base"
    ):
        tiny(XPos()).loss(placed)


@pytest.mark.parametrize(
    ("transform", "name"),
    [(PoSE(19), "target"), (SkipAlign(19), "target"), (E2LLM(19, 4), "trained")],
    ids=str,
)
def test_a_document_longer_than_the_context_is_refused(transform, name):
    message = f"expected documents of at most {name}_context 19 tokens; got one of 20; raise"
    with pytest.raises(ValueError, match=message):
        transform(whole(1, 20))
    padding = pack(torch.full((1, 21), NO_TARGET), bos=B, samples=torch.tensor([-1]))
    assert transform(padding).position_ids.tolist() == [list(range(20))]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_shortest_documents_keep_their_first_place(transform, length):
    batch = whole(30, length)
    answers = torch.arange(length).expand(30, length) % 2 == 1
    places = transform(batch, answers).position_ids
    assert (places[:, 0] == 0).all()
    assert (places.diff() > 0).all()


@pytest.mark.parametrize("mode", ["inner", "outer"])
def test_skip_align_between_turns_needs_answers(mode):
    with pytest.raises(ValueError, match=f"expected answers for SkipAlign mode {mode}; got None"):
        SkipAlign(TARGET, mode)(whole(1, 20))


def test_a_factor_below_1_is_refused():
    with pytest.raises(ValueError, match="expected a max_factor of 1 or more; got 0"):
        E2LLM(TRAINED, 0)
