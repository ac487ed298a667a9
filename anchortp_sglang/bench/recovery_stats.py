"""The cost of a fault, from the recorded histories of all clients. Pure; times are seconds on one clock.

TFS: from the fault to the first new token at any client after the interruption. TTP: from there to the start of the
first ten seconds in which clients get 95% of the tokens that they would get without a fault. Pause: the longest gap
between two tokens of a stream that was open at the fault; for a stream that broke, the time until any client is served
again, as if its user had asked again at the best moment.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from anchortp_sglang.recovery.report.throughput import WINDOW_S, TokenCurve, time_to_peak

_IN_FLIGHT_S = 1.5
"""Seconds after the fault during which tokens sent before it may still arrive."""


@dataclass(frozen=True)
class Stream:
    """One client's stream. ``arrivals``: (second, tokens so far). ``expected``: the tokens of an unbroken run.

    ``ended_s``: when it ended, complete or with an error.
    """

    sent_s: float
    ended_s: float
    arrivals: tuple[tuple[float, int], ...]
    tokens: tuple[int, ...]
    expected: tuple[int, ...]
    error: str | None

    @property
    def last_s(self) -> float:
        """Time of the last token."""
        return self.arrivals[-1][0] if self.arrivals else self.sent_s

    def waits(self, moment: float, fault_s: float) -> bool:
        """Return whether its user waits for a token at ``moment``; if the fault broke it, also after its end."""
        broke = self.error is not None and self.ended_s >= fault_s
        return self.sent_s <= moment and (broke or moment < self.last_s)


@dataclass(frozen=True)
class Damage:
    """Numbers of tokens that differ from the unbroken run. Streams that ended with an error count up to their end."""

    lost: int = 0
    doubled: int = 0
    changed: int = 0

    @property
    def wrong(self) -> int:
        return self.lost + self.doubled + self.changed

    def __add__(self, other: "Damage") -> "Damage":
        return Damage(self.lost + other.lost, self.doubled + other.doubled, self.changed + other.changed)


@dataclass(frozen=True)
class Outcome:
    """One fault on one side. Rates are tokens per second. ``undelivered``: missing tokens of failed requests."""

    tfs_s: float | None
    ttp_s: float | None
    pauses_s: tuple[float, ...]
    requests: int
    failed: int
    damage: Damage
    undelivered: int
    throughput_before: float
    throughput_after: float
    ttft_s: tuple[float | None, float | None]
    itl_s: tuple[float | None, float | None]
    """Median seconds between tokens (before the fault, after the recovery)."""
    goodput: tuple[tuple[float, float], ...] = field(repr=False, default=())
    """(seconds since the fault, tokens per second) of successful requests."""


def outcome(streams: Sequence[Stream], began_s: float, fault_s: float, ended_s: float) -> Outcome:
    """Compute a fault's outcome. Clients arrived from ``began_s`` to ``ended_s``."""
    curve = TokenCurve(_samples(streams))
    first_s = first_token(streams, fault_s)
    steady_from_s = ended_s if first_s is None else min(first_s + WINDOW_S, ended_s)
    settled_s = max(began_s, fault_s - WINDOW_S)  # the server is not yet loaded when the first clients come
    after = curve.rate(steady_from_s, ended_s)
    ttft = _ttft(streams, settled_s, fault_s), _ttft(streams, steady_from_s, ended_s)
    itl = _itl(streams, settled_s, fault_s), _itl(streams, steady_from_s, ended_s)
    wait = ttft[0] if ttft[1] is None else ttft[1]
    pace = None if wait is None or itl[1] is None else (wait, itl[1])
    failed = [stream for stream in streams if stream.error is not None]
    return Outcome(
        tfs_s=None if first_s is None else first_s - fault_s,
        ttp_s=None if first_s is None else _time_to_peak(streams, curve, first_s, ended_s, pace),
        pauses_s=tuple(pause(stream, fault_s, first_s) for stream in streams if _open_at(stream, fault_s)),
        requests=len(streams),
        failed=len(failed),
        damage=sum((_damage_of(stream) for stream in streams), Damage()),
        undelivered=sum(max(0, len(stream.expected) - len(stream.tokens)) for stream in failed),
        throughput_before=curve.rate(settled_s, fault_s),
        throughput_after=after,
        ttft_s=ttft,
        itl_s=itl,
        goodput=goodput([s for s in streams if s.error is None], began_s, fault_s, ended_s),
    )


def _time_to_peak(
    streams: Sequence[Stream], curve: TokenCurve, first_s: float, ended_s: float, pace: tuple[float, float] | None
) -> float | None:
    """Return TTP. As arrivals are random, throughput is compared with what these same clients ask for.

    ``pace``: seconds to the first token and between tokens, at the end of the run.
    """
    if pace is None:
        return None
    due = [(s.sent_s + pace[0] + number * pace[1], 1) for s in streams for number in range(len(s.expected))]
    undisturbed = TokenCurve(sorted(due))
    return time_to_peak(curve, first_s, ended_s, lambda start: undisturbed.between(start, start + WINDOW_S))


def first_token(streams: Sequence[Stream], fault_s: float) -> float | None:
    """Return when the longest silence ends that began at the fault while a client waited; None if no token came."""
    times = sorted({at for stream in streams for at, _ in stream.arrivals})
    later = [fault_s, *(at for at in times if at > fault_s), math.inf]
    gaps = [(a, b) for a, b in pairwise(later) if a <= fault_s + _IN_FLIGHT_S]
    waited = [(a, b) for a, b in gaps if any(stream.waits(a, fault_s) for stream in streams)]
    _, end_s = max(waited, default=gaps[0], key=lambda gap: gap[1] - gap[0])
    return None if math.isinf(end_s) else end_s


def pause(stream: Stream, fault_s: float, first_s: float | None) -> float:
    """Return the longest gap after the fault of a stream that was open then; infinite if no client was served again."""
    times = [at for at, _ in stream.arrivals]
    last_s = max((at for at in times if at <= fault_s), default=stream.sent_s)
    gaps = [b - a for a, b in pairwise([last_s, *(at for at in times if at > fault_s)])]
    if stream.error is not None:
        gaps.append(math.inf if first_s is None else first_s - max(stream.last_s, last_s))
    return max(gaps, default=0.0)


def _damage_of(stream: Stream) -> Damage:
    expected = stream.expected if stream.error is None else stream.expected[: len(stream.tokens)]
    return damage(stream.tokens, expected)


def damage(tokens: Sequence[int], expected: Sequence[int]) -> Damage:
    """Count wrong tokens between the common beginning and the common end: the difference in length as lost or doubled,
    the rest as changed."""
    shorter = min(len(tokens), len(expected))
    head = next((n for n in range(shorter) if tokens[n] != expected[n]), shorter)
    tail = next((n for n in range(shorter - head) if tokens[-1 - n] != expected[-1 - n]), shorter - head)
    got, due = len(tokens) - head - tail, len(expected) - head - tail
    return Damage(lost=max(0, due - got), doubled=max(0, got - due), changed=min(got, due))


def goodput(
    streams: Sequence[Stream], began_s: float, fault_s: float, ended_s: float, bin_s: float = 0.5
) -> tuple[tuple[float, float], ...]:
    """Return (seconds since the fault, tokens per second) in bins of ``bin_s``, aligned to the fault."""
    curve = TokenCurve(_samples(streams))
    first, last = math.ceil((began_s - fault_s) / bin_s), math.floor((ended_s - fault_s) / bin_s)
    starts = [number * bin_s for number in range(first, last)]
    return tuple((at, curve.rate(fault_s + at, fault_s + at + bin_s)) for at in starts)


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the nearest-rank percentile; None without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))] if ordered else None


def side_summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return one side's part of the report, over all its faults."""
    pauses = [pause_s for each in outcomes for pause_s in each.pauses_s]
    return {
        "tfs_s": [_rounded(each.tfs_s) for each in outcomes],
        "ttp_s": [_rounded(each.ttp_s) for each in outcomes],
        "pause_s": {
            "p50": _rounded(percentile(pauses, 0.5)),
            "p99": _rounded(percentile(pauses, 0.99)),
            "max": _rounded(max(pauses, default=None)),
        },
        "failed_requests": sum(each.failed for each in outcomes),
        "wrong_tokens": sum(each.damage.wrong for each in outcomes),
        "throughput_before": _rounded(_mean([each.throughput_before for each in outcomes])),
        "throughput_after": _rounded(_mean([each.throughput_after for each in outcomes])),
    }


def ratios(ours: dict[str, Any], stock: dict[str, Any]) -> dict[str, float | None]:
    """Return the ratios of the report. tfs, ttp: stock's median over ours, None if a side did not get there in half of
    its runs; throughput_before: ours over stock's."""
    before = ours["throughput_before"], stock["throughput_before"]
    return {
        "tfs": times(stock["tfs_s"], ours["tfs_s"]),
        "ttp": times(stock["ttp_s"], ours["ttp_s"]),
        "throughput_before": _rounded(before[0] / before[1]) if before[0] and before[1] else None,
    }


def times(stock: Sequence[float | None] | None, ours: Sequence[float | None] | None) -> float | None:
    """Return stock's median over ours; TTP is known in steps of a tenth of a second."""
    stock_s, our_s = middle(stock or ()), middle(ours or ())
    return None if stock_s is None or our_s is None or math.isinf(our_s) else _rounded(stock_s / max(our_s, 0.1))


def middle(values: Sequence[float | None]) -> float | None:
    """Return the median; None without values. A value of None was never reached and counts as infinite."""
    return median(math.inf if value is None else value for value in values) if values else None


def _samples(streams: Sequence[Stream]) -> list[tuple[float, int]]:
    samples = [
        (at, tokens - before)
        for stream in streams
        for (_, before), (at, tokens) in pairwise([(stream.sent_s, 0), *stream.arrivals])
    ]
    return sorted(samples)


def _open_at(stream: Stream, moment: float) -> bool:
    return stream.sent_s <= moment < (stream.last_s if stream.error is None else stream.ended_s)


def _ttft(streams: Sequence[Stream], start_s: float, end_s: float) -> float | None:
    waits = [s.arrivals[0][0] - s.sent_s for s in streams if s.arrivals and start_s <= s.sent_s < end_s]
    return median(waits) if waits else None


def _itl(streams: Sequence[Stream], start_s: float, end_s: float) -> float | None:
    """Return the median seconds between two tokens; a message with n tokens counts n times."""
    gaps = [
        (b - a) / (after - before)
        for stream in streams
        for (a, before), (b, after) in pairwise(stream.arrivals)
        if start_s <= a and b < end_s
    ]
    return median(gaps) if gaps else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 3)
