"""Throughput in tokens per second, and the time until it is back at the full rate (TTP). Pure.

TTP counts from the first token after a fault to the start of the first ``WINDOW_S`` seconds in which the throughput is
at least ``PEAK_SHARE`` of the steady one.
"""

import itertools
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence

WINDOW_S = 10.0
PEAK_SHARE = 0.95
_STEP_S = 0.1

Samples = Sequence[tuple[float, int]]
"""(seconds, new tokens at that moment), in the order of time."""


class TokenCurve:
    """The sum of tokens at any moment."""

    def __init__(self, samples: Samples) -> None:
        self._times = [at for at, _ in samples]
        self._sums = [0, *itertools.accumulate(tokens for _, tokens in samples)]

    def between(self, start: float, end: float) -> int:
        """Count the tokens in [start, end)."""
        return self._sums[bisect_left(self._times, end)] - self._sums[bisect_left(self._times, start)]

    def rate(self, start: float, end: float) -> float:
        """Return the tokens per second in [start, end)."""
        return self.between(start, end) / (end - start) if end > start else 0.0


def time_to_peak(curve: TokenCurve, since: float, until: float, steady: Callable[[float], float]) -> float | None:
    """Return the seconds from ``since`` to the peak; None if it is not reached before ``until``.

    ``steady(start)``: tokens of a window from ``start`` on at full throughput.
    """
    for step in range(int((until - WINDOW_S - since) / _STEP_S + 1e-6) + 1):
        start = since + step * _STEP_S
        wanted = PEAK_SHARE * steady(start)
        if wanted > 0 and curve.between(start, start + WINDOW_S) >= wanted:
            return step * _STEP_S
    return None


class Throughput:
    """Tokens given to clients in the last minute, in tenths of a second."""

    def __init__(self, history_s: float = 60.0) -> None:
        self._counts: deque[tuple[float, int]] = deque(maxlen=int(history_s / _STEP_S))

    def note(self, tokens: int, now: float) -> None:
        if self._counts and now - self._counts[-1][0] < _STEP_S:
            at, before = self._counts[-1]
            self._counts[-1] = at, before + tokens
        else:
            self._counts.append((now, tokens))

    def time_to_peak(self, first_token_at: float) -> float | None:
        """Return TTP; call it two windows after the first token, as the second one gives the steady throughput."""
        curve = TokenCurve(tuple(self._counts))
        second = first_token_at + WINDOW_S
        steady = curve.between(second, second + WINDOW_S)
        return time_to_peak(curve, first_token_at, second + WINDOW_S, lambda _: steady)
