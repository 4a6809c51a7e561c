import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from lit_longctx.data.sampling.sample_index import PERIOD, SampleIndex, quota_schedule, whole_shares


def draws(order, number, start=0):
    return [order(n) for n in range(start, start + number)]


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize("sources", range(2, 11))
def test_every_prefix_gives_each_source_its_share_to_within_one_window(sources):
    generator = random.Random(sources)
    for _ in range(4):
        weights = [generator.randint(1, 60) for _ in range(sources)]
        order = SampleIndex([50] * sources, weights)
        total = sum(weights)
        number = 3 * total + 7
        drawn = np.array([source for source, _ in draws(order, number)])
        taken = np.cumsum(drawn[:, None] == np.arange(sources), axis=0)
        due = np.outer(np.arange(1, number + 1), weights)
        assert np.abs(taken * total - due).max() < total
        assert taken[-8].tolist() == [3 * weight for weight in weights]


@pytest.mark.parametrize("seed", range(4))
def test_real_weights_are_kept_to_the_stated_precision(seed):
    generator = random.Random(seed)
    weights = [generator.random() ** 3 + 0.01 for _ in range(generator.randint(2, 10))]
    shares = whole_shares(weights)
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share / sum(shares) - weight / sum(weights)) < 1 / PERIOD
    order = SampleIndex([100] * len(weights), weights)
    number = 2 * PERIOD
    drawn = np.array([source for source, _ in draws(order, number)])
    taken = np.cumsum(drawn[:, None] == np.arange(len(weights)), axis=0)
    places = np.arange(1, number + 1)[:, None]
    due = places * np.array(weights) / sum(weights)
    assert (np.abs(taken - due) < 1 + places / PERIOD).all()


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([1], [1]),
        ([5, 5], [1, 1]),
        ([0.1, 0.2, 0.7], [1, 2, 7]),
        ([0.5, 0.25, 0.25], [2, 1, 1]),
        ([1e-9, 1], [1, PERIOD - 1]),
        ([3e-5, 1.5e-5], [6667, 3333]),
        ([1000, 999], [5003, 4997]),
    ],
)
def test_whole_shares_by_hand(weights, shares):
    assert whole_shares(weights) == shares


@pytest.mark.parametrize("weights", [[0, 1], [1, -1], [float("nan"), 1], [float("inf"), 1]])
def test_weights_must_be_above_0(weights):
    with pytest.raises(ValueError, match="every weight must be above 0"):
        SampleIndex([5, 5], weights)


def test_a_source_without_windows_is_refused():
    with pytest.raises(ValueError, match=r"every source needs a window at least; got \[5, 0\]"):
        SampleIndex([5, 0])


def test_without_weights_all_sources_end_together():
    windows = [30, 12, 6]
    drawn = draws(SampleIndex(windows), 48)
    assert sorted(drawn) == [(s, w) for s, number in enumerate(windows) for w in range(number)]


@pytest.mark.parametrize("group", [None, [7, 4, 1], [1000, 3, 2]])
def test_every_epoch_is_a_permutation_and_no_two_alike(group):
    windows = [101, 17, 6]
    order = SampleIndex(windows, [3, 2, 1], seed=5, group=group)
    drawn = draws(order, 6 * 250)
    for source, size in enumerate(windows):
        mine = [window for s, window in drawn if s == source]
        epochs = [mine[i : i + size] for i in range(0, len(mine) - size + 1, size)]
        assert len(epochs) >= 7
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs[:5]}) == 5


def test_seeds_and_sources_are_shuffled_apart():
    orders = {}
    for seed in range(5):
        drawn = draws(SampleIndex([40, 40], [1, 1], seed=seed), 80)
        for source in range(2):
            orders[seed, source] = tuple(window for s, window in drawn if s == source)
    assert len(set(orders.values())) == 10


def test_every_window_is_first_equally_often():
    first = Counter(SampleIndex([4], seed=seed)(0)[1] for seed in range(2000))
    assert all(abs(first[window] - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for window in range(4))


def test_a_sample_is_a_pure_function_of_its_number():
    settings = ([101, 17, 6], [0.31, 0.42, 0.27], 3, [7, 4, 6])
    forward = draws(SampleIndex(*settings), 2000)
    order = SampleIndex(*settings)
    numbers = list(range(2000))
    random.Random(0).shuffle(numbers)
    assert {n: order(n) for n in numbers} == dict(enumerate(forward))
    assert draws(SampleIndex(*settings), 100, start=1900) == forward[1900:]
    far = 10**12 + 7
    assert SampleIndex(*settings)(far) == order(far)


def test_the_order_of_a_seed_never_changes():
    drawn = draws(SampleIndex([5, 3], [2, 1], seed=0, group=[2, 3]), 12)
    assert drawn[:6] == [(0, 4), (1, 1), (0, 0), (0, 1), (1, 2), (0, 3)]
    assert drawn[6:] == [(0, 2), (1, 0), (0, 3), (0, 2), (1, 0), (0, 4)]


@pytest.mark.parametrize(("windows", "group"), [(23, 5), (20, 5), (6, 5), (5, 5), (3, 5), (9, 1)])
def test_a_group_is_read_through_before_the_next_begins(windows, group):
    order = SampleIndex([windows], seed=1, group=[group])
    groups = [list(range(i, min(i + group, windows))) for i in range(0, windows, group)]
    first_groups = set()
    for epoch in range(40):
        drawn = [window for _, window in draws(order, windows, epoch * windows)]
        seen = []
        while drawn:
            mine = groups[drawn[0] // group]
            assert sorted(drawn[: len(mine)]) == mine
            seen.append(drawn[0] // group)
            drawn = drawn[len(mine) :]
        assert sorted(seen) == list(range(len(groups)))
        first_groups.add(seen[0])
    assert first_groups == set(range(len(groups)))


def test_windows_are_shuffled_within_their_group():
    order = SampleIndex([23], seed=1, group=[5])
    places = Counter()
    for epoch in range(300):
        drawn = [window for _, window in draws(order, 23, epoch * 23)]
        places[drawn.index(21) - min(drawn.index(w) for w in (20, 21, 22))] += 1
    assert all(abs(places[i] - 100) < 5 * (300 * 2 / 9) ** 0.5 for i in range(3))


@pytest.mark.parametrize("shares", [[1, 1], [9999, 1], [1, 2, 3], [3333, 3333, 3334], [1] * 10])
def test_a_schedule_holds_each_source_share_times(shares):
    assert Counter(quota_schedule(shares)) == dict(enumerate(shares))


def test_the_schedule_stays_within_tijdemans_bound():
    shares = [1, 4, 10, 17, 20]
    schedule = quota_schedule(shares)
    bound = 1 - Fraction(1, 2 * len(shares) - 2)
    for source, share in enumerate(shares):
        for n in range(1, len(schedule) + 1):
            deviation = abs(schedule[:n].count(source) - Fraction(n * share, sum(shares)))
            assert deviation <= bound


def test_a_source_is_shuffled_by_its_key_wherever_it_stands():
    both = SampleIndex([40, 60], [1, 1], seed=3, group=[8, 7])
    second = [window for source, window in draws(both, 200) if source == 1]
    alone = SampleIndex([60], seed=3, group=[7], keys=[1])
    assert [window for _, window in draws(alone, 100)] == second


def test_windows_that_count_as_drawn_come_later():
    order = SampleIndex([40, 60], [1, 2], seed=3, group=[8, 7])
    drawn = order.drawn(50)
    assert sum(drawn) == 50
    found = draws(SampleIndex([40, 60], [1, 2], seed=3, group=[8, 7], begun=drawn), 60)
    expected = draws(order, 60, start=50)
    for source in (0, 1):
        mine = [window for s, window in found if s == source]
        theirs = [window for s, window in expected if s == source]
        assert mine[: len(theirs)] == theirs[: len(mine)]
