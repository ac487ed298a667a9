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
from typing import Any, Protocol

import numpy as np

from anchortp_sglang.bench.load import Load
from anchortp_sglang.bench.sides import DEVICES, Ours, Side, SideName, Stock
from anchortp_sglang.testing.server import Server, ServerFailed
from anchortp_sglang.testing.streams import History, Streams

ORDER: tuple[SideName, ...] = ("stock", "ours", "ours", "stock")
NAMES = ("throughput", "ttft_s", "itl_s", "itl_p99_s")


@dataclass(frozen=True)
class Figures:
    """Output tokens per second, median time to the first token, median and 99th percentile between tokens."""

    throughput: float
    ttft_s: float
    itl_s: float
    itl_p99_s: float


@dataclass(frozen=True)
class Round:
    """One side under one load."""

    side: SideName
    load: str
    figures: Figures


@dataclass(frozen=True)
class Ratio:
    """A figure's ratio, ours over stock: median, lowest and highest over the quartets."""

    median: float
    low: float
    high: float


class ServerLoad(Protocol):
    """A load whose text (``str``) is its name."""

    def measure(self, server: Server, model: Path) -> Figures:
        """Load a server once. Raises ServerFailed if a request failed: the round would look faster than it was."""
        ...


class StreamsLoad:
    """Streams that all begin at once, of 96 tokens each."""

    def __init__(self, clients: int, vocab_size: int) -> None:
        requests = Load(1.0, clients, vocab_size).requests()
        self._requests: list[dict[str, Any]] = [
            request | {"sampling_params": request["sampling_params"] | {"max_new_tokens": 96}} for request in requests
        ]

    def __str__(self) -> str:
        return f"{len(self._requests)} streams"

    def measure(self, server: Server, model: Path) -> Figures:
        with Streams(server.url, self._requests) as streams:
            return figures(streams.wait())


def figures(histories: Sequence[History]) -> Figures:
    """Return the figures of a round of streams. Raises ServerFailed if one failed."""
    for history in histories:
        if history.error is not None:
            raise ServerFailed(f"a request failed: {history.error}")
    began = min(h.sent_at for h in histories)
    ended = max(h.arrivals[-1][0] for h in histories)
    gaps = [(b - a) / (n - m) for h in histories for (a, m), (b, n) in pairwise(h.arrivals)]
    return Figures(
        throughput=sum(len(h.output_ids) for h in histories) / (ended - began),
        ttft_s=median(h.arrivals[0][0] - h.sent_at for h in histories),
        itl_s=median(gaps),
        itl_p99_s=float(np.percentile(gaps, 99)),
    )


def compare(rounds: Sequence[Round]) -> dict[str, Ratio]:
    """Return the ratio of each figure by its name. ``rounds``: whole quartets of one load in the order ORDER."""
    quartets = [rounds[start : start + len(ORDER)] for start in range(0, len(rounds), len(ORDER))]
    if not quartets or any(tuple(each.side for each in quartet) != ORDER for quartet in quartets):
        raise ValueError("rounds must be whole quartets in their order")
    return {name: _ratio(quartets, name) for name in NAMES}


def by_load(rounds: Sequence[Round]) -> dict[str, list[Round]]:
    """Return the rounds of each load, in their order."""
    return {load: [r for r in rounds if r.load == load] for load in dict.fromkeys(r.load for r in rounds)}


def _ratio(quartets: Sequence[Sequence[Round]], name: str) -> Ratio:
    def of(quartet: Sequence[Round], side: SideName) -> float:
        return mean(getattr(each.figures, name) for each in quartet if each.side == side)

    found = [of(quartet, "ours") / of(quartet, "stock") for quartet in quartets]
    return Ratio(median(found), min(found), max(found))


def run(
    model: Path,
    sides: Sequence[Side],
    loads: Sequence[ServerLoad],
    quartets: int,
    progress: Callable[[str], None],
) -> list[Round]:
    """Start both sides and measure each load ``quartets`` times four rounds. Raises ServerFailed."""
    rounds: list[Round] = []
    by_name = {side.name: side for side in sides}
    with ExitStack() as stack:
        for side in sides:
            stack.callback(side.stop)
            progress(f"starting {side.name}")
            progress(f"{side.name} serves after {side.start():.1f} s")
            for load in loads:
                _round(side, load, model)  # not counted: warm-up
        for number in range(quartets):
            for load in loads:
                found = [_round(by_name[name], load, model) for name in ORDER]
                rounds += found
                pace = {name: mean(r.figures.throughput for r in found if r.side == name) for name in by_name}
                text = ", ".join(f"{name} {pace[name]:.1f}" for name in by_name)
                progress(f"round {number + 1} of {quartets}, {load}: {text} tokens/s")
    return rounds


def _round(side: Side, load: ServerLoad, model: Path) -> Round:
    side.server.flush_cache()
    try:
        return Round(side.name, str(load), load.measure(side.server, model))
    except ServerFailed as error:
        raise ServerFailed(f"{side.name}: {error}") from None


def both_sides(model: Path, tp_size: int, device: str, slots: int, folder: Path, overlap: bool) -> tuple[Side, Side]:
    """Return stock, and ours with the same settings. ``overlap``: both with the overlap schedule, as on GPUs anyway."""
    of_device, our_defaults = DEVICES[device]
    flags = (*of_device, "--max-total-tokens", str(slots))
    ours = (*flags, "--anchor-overlap", "on") if overlap else flags
    return (
        Stock(model, tp_size, flags, 30.0, folder, overlap, our_defaults),
        Ours(model, tp_size, ours, 30.0, folder),
    )
