"""The rate of moves beside a serving generation."""

import time

from anchortp_sglang.rank.weights.pace import Pace


def test_bytes_take_the_time_that_their_rate_gives_them():
    pace, began = Pace(1000.0), time.monotonic()
    for _ in range(10):
        pace.moved(20)
    assert 0.2 <= time.monotonic() - began < 0.5


def test_what_came_late_is_not_held_up():
    pace = Pace(1000.0)
    time.sleep(0.1)
    began = time.monotonic()
    pace.moved(50)
    assert time.monotonic() - began < 0.04


def test_without_a_bound_nothing_sleeps():
    began, pace = time.monotonic(), Pace(0.0)
    pace.moved(1 << 40)
    assert time.monotonic() - began < 0.1
