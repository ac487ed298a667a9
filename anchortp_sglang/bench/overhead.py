"""``anchortp bench overhead``: what the package costs while nothing fails.

Both servers are up; one is loaded while the other is idle, in the order stock, ours, ours, stock. Each such quartet
gives one ratio of each figure, so that a disturbance of the machine longer than a round affects both sides.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from anchortp_sglang.bench.load import Load
from anchortp_sglang.bench.sides import Ours, Side, SideName, Stock
from anchortp_sglang.testing.server import ServerFailed
from anchortp_sglang.testing.streams import History, Streams

ORDER: tuple[SideName, ...] = ("stock", "ours", "ours", "stock")


@dataclass(frozen=True)
class Round:
    """One side under load: output tokens per second, median time to the first token and between tokens."""

    side: SideName
    throughput: float
    ttft_s: float
    itl_s: float


@dataclass(frozen=True)
class Ratio:
    """A figure's ratio, ours over stock: median, lowest and highest over the quartets."""

    median: float
    low: float
    high: float


def measure(side: SideName, histories: Sequence[History]) -> Round:
    """Return the round's figures. Raises ServerFailed if a request failed: the round would look faster than it was."""
    for history in histories:
        if history.error is not None:
            raise ServerFailed(f"{side}: a request failed: {history.error}")
    began = min(h.sent_at for h in histories)
    ended = max(h.arrivals[-1][0] for h in histories)
    gaps = [(b - a) / (n - m) for h in histories for (a, m), (b, n) in pairwise(h.arrivals)]
    return Round(
        side,
        throughput=sum(len(h.output_ids) for h in histories) / (ended - began),
        ttft_s=median(h.arrivals[0][0] - h.sent_at for h in histories),
        itl_s=median(gaps),
    )


def compare(rounds: Sequence[Round]) -> dict[str, Ratio]:
    """Return the ratio of each figure by its name. ``rounds``: whole quartets in the order ORDER."""
    quartets = [rounds[start : start + len(ORDER)] for start in range(0, len(rounds), len(ORDER))]
    if not quartets or any(tuple(each.side for each in quartet) != ORDER for quartet in quartets):
        raise ValueError("rounds must be whole quartets in their order")
    return {name: _ratio(quartets, name) for name in ("throughput", "ttft_s", "itl_s")}


def _ratio(quartets: Sequence[Sequence[Round]], name: str) -> Ratio:
    def of(quartet: Sequence[Round], side: SideName) -> float:
        return mean(getattr(each, name) for each in quartet if each.side == side)

    found = [of(quartet, "ours") / of(quartet, "stock") for quartet in quartets]
    return Ratio(median(found), min(found), max(found))


def run(
    model: Path,
    tp_size: int,
    flags: Sequence[str],
    quartets: int,
    clients: int,
    vocab_size: int,
    folder: Path,
    progress: Callable[[str], None],
) -> list[Round]:
    """Start both sides and measure ``quartets`` times four rounds. Raises ServerFailed."""
    requests = Load(1.0, clients, vocab_size).requests()
    requests = [r | {"sampling_params": r["sampling_params"] | {"max_new_tokens": 96}} for r in requests]
    sides: dict[SideName, Side] = {}
    rounds: list[Round] = []
    with ExitStack() as stack:
        for make in (Stock, Ours):
            side = make(model, tp_size, flags, 30.0, folder)
            stack.callback(side.stop)
            progress(f"starting {side.name} with TP={tp_size}")
            progress(f"{side.name} serves after {side.start():.1f} s")
            sides[side.name] = side
            _load(side, requests)  # not counted: warm-up
        for number in range(quartets):
            for name in ORDER:
                rounds.append(_load(sides[name], requests))
            last = {name: mean(r.throughput for r in rounds[-4:] if r.side == name) for name in ("stock", "ours")}
            progress(f"round {number + 1} of {quartets}: stock {last['stock']:.1f}, ours {last['ours']:.1f} tokens/s")
    return rounds


def _load(side: Side, requests: Sequence[dict[str, Any]]) -> Round:
    side.server.flush_cache()
    with Streams(side.server.url, requests) as streams:
        return measure(side.name, streams.wait())
