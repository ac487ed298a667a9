"""Tokens per second, and the time to the full throughput."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchortp_sglang.recovery.report.throughput import PEAK_SHARE, WINDOW_S, Throughput, TokenCurve, time_to_peak


def steady(rate, start, end):
    return [(start + n / rate, 1) for n in range(round((end - start) * rate))]


def at_rate(rate):
    return lambda start: rate * WINDOW_S


def test_full_throughput_at_once_is_a_time_to_peak_of_zero():
    assert time_to_peak(TokenCurve(steady(50, 0, 40)), 5.0, 40.0, at_rate(50)) == 0.0


def test_half_the_throughput_for_eight_seconds_delays_the_peak_by_about_as_much():
    curve = TokenCurve([*steady(25, 0, 8), *steady(50, 8, 40)])
    # A window that begins at 7.0 has lost half of one second: 95% of ten are there.
    assert time_to_peak(curve, 0.0, 40.0, at_rate(50)) == pytest.approx(7.0, abs=0.11)


@pytest.mark.parametrize("until", [9.0, 30.0])
def test_a_peak_that_is_not_seen_is_none(until):
    assert time_to_peak(TokenCurve(steady(40, 0, 30)), 0.0, until, at_rate(50)) is None


def test_without_any_throughput_there_is_no_peak():
    assert time_to_peak(TokenCurve([]), 0.0, 30.0, at_rate(0)) is None


@given(st.lists(st.tuples(st.floats(0, 60), st.integers(1, 9)), max_size=80), st.floats(0, 30), st.floats(0.1, 20))
def test_the_window_at_the_peak_has_the_tokens_and_none_before_it_has(samples, since, rate):
    samples.sort()
    curve = TokenCurve(samples)
    found = time_to_peak(curve, since, 60.0, at_rate(rate))
    wanted = PEAK_SHARE * rate * WINDOW_S
    starts = [since + 0.1 * n for n in range(int((60.0 - WINDOW_S - since) / 0.1 + 1e-6) + 1)]
    full = [sum(t for at, t in samples if start <= at < start + WINDOW_S) >= wanted for start in starts]
    assert found == (0.1 * full.index(True) if True in full else None)


@given(st.lists(st.tuples(st.floats(0, 60), st.integers(1, 9)), max_size=80), st.floats(0, 60), st.floats(0, 60))
def test_tokens_between_two_moments_are_those_of_the_samples_there(samples, a, b):
    samples.sort()
    start, end = sorted((a, b))
    assert TokenCurve(samples).between(start, end) == sum(t for at, t in samples if start <= at < end)


def test_a_server_that_is_slow_for_five_seconds_says_so_itself():
    throughput = Throughput()
    for at, tokens in [*steady(20, 100, 105), *steady(100, 105, 121)]:
        throughput.note(tokens, at)
    assert throughput.time_to_peak(100.0) == pytest.approx(4.4, abs=0.15)


def test_only_the_last_minute_is_kept():
    throughput = Throughput()
    for second in range(1000):
        for tenth in range(10):
            throughput.note(1, second + tenth / 10)
    assert len(throughput._counts) <= 600
