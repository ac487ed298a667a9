"""Hang detection as a function of what was seen and when."""

from anchortp_sglang.recovery.watch import HangWatch


def test_counters_that_move_are_never_hung():
    watch = HangWatch(timeout_s=2.0)
    assert not any(watch.hung(1, (tick, 0), now=float(tick)) for tick in range(100))


def test_counters_that_stand_still_for_longer_than_the_timeout_are_hung():
    watch = HangWatch(timeout_s=2.0)
    assert [watch.hung(1, (5, 5), now) for now in (0.0, 1.0, 2.0, 2.1)] == [False, False, False, True]


def test_a_new_generation_starts_its_own_time():
    watch = HangWatch(timeout_s=2.0)
    watch.hung(1, (5, 5), 0.0)
    assert not watch.hung(2, (5, 5), 3.0)
    assert watch.hung(2, (5, 5), 5.1)


def test_after_a_reset_the_time_counts_anew():
    watch = HangWatch(timeout_s=2.0)
    watch.hung(1, (5, 5), 0.0)
    watch.reset()
    assert not watch.hung(1, (5, 5), 10.0)


def test_a_single_rank_has_more_time_for_a_step():
    watch = HangWatch(timeout_s=2.0)
    assert [watch.hung(1, (5,), now) for now in (0.0, 3.0, 20.0, 20.1)] == [False, False, False, True]
