"""What a fault cost, from the recorded histories of all clients. Pure; times are seconds on one clock.

TFS: fault to the first new token at any client after the interruption. TTP: from there to the start of the first ten
seconds in which clients get 95% of the tokens that they would get, had there been no fault. Pause: the longest gap
between two tokens of a stream that was open at the fault; of one that broke, the time until any client is served again,
as if its user had asked again at the best moment.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from anchortp_sglang.recovery.report.throughput import WINDOW_S, TokenCurve, time_to_peak

_IN_FLIGHT_S = 1.5
"""So long tokens may still arrive that were on their way when the fault came."""


@dataclass(frozen=True)
class Stream:
    """``arrivals``: (second, tokens so far). ``expected``: the tokens of an unbroken run. ``ended_s``: when the client
    was through with it, well or with an error."""

    sent_s: float
    ended_s: float
    arrivals: tuple[tuple[float, int], ...]
    tokens: tuple[int, ...]
    expected: tuple[int, ...]
    error: str | None

    @property
    def last_s(self) -> float:
        """When the last token came."""
        return self.arrivals[-1][0] if self.arrivals else self.sent_s

    def waits(self, moment: float, fault_s: float) -> bool:
        """Whether its user waits for a token then; after a fault that broke it also when it is over."""
        broke = self.error is not None and self.ended_s >= fault_s
        return self.sent_s <= moment and (broke or moment < self.last_s)


@dataclass(frozen=True)
class Damage:
    """Tokens that are not what an unbroken run gives; of streams that ended with an error, as far as those came."""

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
    """One fault on one side. Rates: tokens per second; ``undelivered``: tokens of failed requests that never came."""

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
    """Medians (before, after the recovery)."""
    goodput: tuple[tuple[float, float], ...] = field(repr=False, default=())
    """(seconds since the fault, tokens per second) of requests that ended well."""


def outcome(streams: Sequence[Stream], began_s: float, fault_s: float, ended_s: float) -> Outcome:
    """``began_s`` to ``ended_s``: when clients arrived."""
    curve = TokenCurve(_samples(streams))
    first_s = first_token(streams, fault_s)
    steady_from_s = ended_s if first_s is None else min(first_s + WINDOW_S, ended_s)
    settled_s = max(began_s, fault_s - WINDOW_S)  # the first clients find an empty server
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
    """TTP. Arrivals are random, so throughput is held against what these very clients ask for.

    ``pace``: seconds to the first token and between tokens, at the end.
    """
    if pace is None:
        return None
    asked = [(s.sent_s + pace[0] + number * pace[1], 1) for s in streams for number in range(len(s.expected))]
    undisturbed = TokenCurve(sorted(asked))
    return time_to_peak(curve, first_s, ended_s, lambda start: undisturbed.between(start, start + WINDOW_S))


def first_token(streams: Sequence[Stream], fault_s: float) -> float | None:
    """The end of the longest silence that the fault began while somebody waited; None if nothing came any more."""
    times = sorted({at for stream in streams for at, _ in stream.arrivals})
    later = [fault_s, *(at for at in times if at > fault_s), math.inf]
    gaps = [(a, b) for a, b in pairwise(later) if a <= fault_s + _IN_FLIGHT_S]
    waited = [(a, b) for a, b in gaps if any(stream.waits(a, fault_s) for stream in streams)]
    _, end_s = max(waited, default=gaps[0], key=lambda gap: gap[1] - gap[0])
    return None if math.isinf(end_s) else end_s


def pause(stream: Stream, fault_s: float, first_s: float | None) -> float:
    """The longest gap after the fault of a stream that was open then; infinite if nobody was served any more."""
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
    """Between what agrees at the beginning and at the end, tokens were changed, and as many lost or doubled as one of
    the two is longer."""
    shorter = min(len(tokens), len(expected))
    head = next((n for n in range(shorter) if tokens[n] != expected[n]), shorter)
    tail = next((n for n in range(shorter - head) if tokens[-1 - n] != expected[-1 - n]), shorter - head)
    got, wanted = len(tokens) - head - tail, len(expected) - head - tail
    return Damage(lost=max(0, wanted - got), doubled=max(0, got - wanted), changed=min(got, wanted))


def goodput(
    streams: Sequence[Stream], began_s: float, fault_s: float, ended_s: float, bin_s: float = 0.5
) -> tuple[tuple[float, float], ...]:
    """Tokens per second in bins of ``bin_s``, aligned to the fault."""
    curve = TokenCurve(_samples(streams))
    first, last = math.ceil((began_s - fault_s) / bin_s), math.floor((ended_s - fault_s) / bin_s)
    starts = [number * bin_s for number in range(first, last)]
    return tuple((at, curve.rate(fault_s + at, fault_s + at + bin_s)) for at in starts)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile; None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))] if ordered else None


def side_summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One side of the report, over all of its faults."""
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
    """tfs, ttp: how many times longer stock takes (medians), None if either never got there in half of its runs;
    throughput_before: ours over stock's."""
    before = ours["throughput_before"], stock["throughput_before"]
    return {
        "tfs": times(stock["tfs_s"], ours["tfs_s"]),
        "ttp": times(stock["ttp_s"], ours["ttp_s"]),
        "throughput_before": _rounded(before[0] / before[1]) if before[0] and before[1] else None,
    }


def times(stock: Sequence[float | None] | None, ours: Sequence[float | None] | None) -> float | None:
    """How many times longer the median is on stock; TTP is told in steps of a tenth."""
    theirs, own = middle(stock or ()), middle(ours or ())
    return None if theirs is None or own is None or math.isinf(own) else _rounded(theirs / max(own, 0.1))


def middle(values: Sequence[float | None]) -> float | None:
    """The median, None of nothing. A value that is None was never reached: infinite."""
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
    """Median seconds between two tokens; a message with several counts as that many."""
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
