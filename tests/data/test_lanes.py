"""Lanes: every row walks, every sample is a pure function of its number."""

import pytest

from lit_longctx.data.sampling.lanes import Lanes


@pytest.mark.parametrize(("windows", "lanes"), [([40], 4), ([43], 4), ([100, 31, 50], 7)])
def test_rows_follow_each_other_until_the_lanes_restart(windows, lanes):
    order = Lanes(windows, None, seed=3, lanes=lanes)
    jumps = 0
    for step in range(3 * order.span):
        restart = order.restarts(step * lanes)
        assert restart == (step % order.span == 0)
        for lane in range(lanes):
            source, window = order(step * lanes + lane)
            assert 0 <= window < windows[source]
            if step and not restart:
                assert order((step - 1) * lanes + lane) == (source, window - 1)
        jumps += restart
    assert jumps == 3


def test_a_step_that_starts_within_a_round_restarts_whenever_one_of_its_rows_jumps():
    order = Lanes([43], None, seed=1, lanes=4)
    for begin in range(2, 2 + 4 * 3 * order.span, 4):
        rows = [order(begin + row) for row in range(4)]
        before = [order(begin + row - 4) for row in range(4)] if begin > 4 else rows
        jumps = [a[1] != b[1] + 1 for a, b in zip(rows, before, strict=True)]
        assert order.restarts(begin) or begin <= 4 or not any(jumps)


def test_an_epoch_reads_no_window_twice():
    order = Lanes([100, 31, 50], None, seed=0, lanes=7)
    seen = [order(sample) for sample in range(order.span * 7)]
    assert len(set(seen)) == len(seen)


def test_epochs_begin_elsewhere_where_there_is_room():
    order = Lanes([43], None, seed=0, lanes=4)
    begins = {order(epoch * order.span * 4) for epoch in range(20)}
    assert begins == {(0, shift) for shift in range(4)}


def test_too_many_lanes_are_refused():
    with pytest.raises(ValueError, match="8 lanes are too many for sources of"):
        Lanes([5], None, seed=0, lanes=8)
