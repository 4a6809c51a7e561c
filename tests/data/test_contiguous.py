"""Contiguous rows: every row walks, every sample is a pure function of its number."""

import pytest

from lit_longctx.data.sampling.contiguous import ContiguousSampler


@pytest.mark.parametrize(("windows", "rows"), [([40], 4), ([43], 4), ([100, 31, 50], 7)])
def test_rows_follow_each_other_until_the_lanes_restart(windows, rows):
    order = ContiguousSampler(windows, None, seed=3, rows=rows)
    jumps = 0
    for step in range(3 * order.span):
        restart = order.restarts(step * rows)
        assert restart == (step % order.span == 0)
        for row in range(rows):
            source, window = order(step * rows + row)
            assert 0 <= window < windows[source]
            if step and not restart:
                assert order((step - 1) * rows + row) == (source, window - 1)
        jumps += restart
    assert jumps == 3


def test_a_step_that_starts_within_a_round_restarts_whenever_one_of_its_rows_jumps():
    order = ContiguousSampler([43], None, seed=1, rows=4)
    for begin in range(2, 2 + 4 * 3 * order.span, 4):
        rows = [order(begin + row) for row in range(4)]
        before = [order(begin + row - 4) for row in range(4)] if begin > 4 else rows
        jumps = [a[1] != b[1] + 1 for a, b in zip(rows, before, strict=True)]
        assert order.restarts(begin) or begin <= 4 or not any(jumps)


def test_an_epoch_reads_no_window_twice():
    order = ContiguousSampler([100, 31, 50], None, seed=0, rows=7)
    seen = [order(sample) for sample in range(order.span * 7)]
    assert len(set(seen)) == len(seen)


def test_epochs_begin_elsewhere_where_there_is_room():
    order = ContiguousSampler([43], None, seed=0, rows=4)
    begins = {order(epoch * order.span * 4) for epoch in range(20)}
    assert begins == {(0, shift) for shift in range(4)}


def test_too_many_lanes_are_refused():
    with pytest.raises(ValueError, match="8 rows are too many for sources of"):
        ContiguousSampler([5], None, seed=0, rows=8)
