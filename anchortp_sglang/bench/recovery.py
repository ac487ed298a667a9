"""``anchortp bench recovery``: the same load and the same faults for our server and for stock with a supervisor.

The sides run one after the other, as they share the machine. The expected answers are those of stock before its first
fault (without stock: those of our server).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from anchortp_sglang.bench.load import Load, requested_tokens
from anchortp_sglang.bench.open_loop import OpenLoop
from anchortp_sglang.bench.recovery_stats import Outcome, Stream, outcome, ratios, side_summary
from anchortp_sglang.bench.sides import Ours, Side, SideName, Stock, memory_bytes
from anchortp_sglang.recovery.state_machine import Cause
from anchortp_sglang.testing.server import ServerFailed
from anchortp_sglang.testing.streams import History, Streams

Progress = Callable[[str], None]
_REFERENCE_CLIENTS = 8
_POLL_S = 0.1
_PROGRESS_INTERVAL_S = 5.0
_DEVICES = (1, 2, 0, 3)
"""The devices that fail, in turn."""


@dataclass(frozen=True)
class Plan:
    """The measurement to make. ``seeds``: repetitions of each fault, with different arrivals and moments.

    The fault comes ``before_s`` after the first arrival, give or take a fifth, as soon as a client is being served;
    arrivals go on for ``after_s`` after the first token that follows it.
    """

    model: Path
    tp_size: int
    faults: tuple[Cause, ...]
    seeds: int
    load: Load
    flags: tuple[str, ...]
    sides: tuple[SideName, ...] = ("stock", "ours")
    before_s: float = 20.0
    after_s: float = 22.0
    hang_timeout_s: float = 4.0
    outage_limit_s: float = 900.0

    def runs(self) -> list[tuple[Cause, int]]:
        """Return (fault, seed) of each run, in their order."""
        return [(fault, seed) for seed in range(self.seeds) for fault in self.faults]


@dataclass
class SideResult:
    """One side's results. ``outcomes``: in the order of the plan's runs. ``memory_bytes``: before any fault."""

    name: SideName
    start_s: float = 0.0
    memory_bytes: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    answers: dict[int, tuple[int, ...]] = field(default_factory=dict)
    recorded: list["Recorded"] = field(default_factory=list)


@dataclass(frozen=True)
class Recorded:
    """The clients' histories of one run."""

    began_s: float
    fault_s: float
    ended_s: float
    histories: tuple[tuple[int, History], ...]


def run(plan: Plan, folder: Path, progress: Progress) -> dict[SideName, SideResult]:
    """Carry out the plan. Raises ServerFailed if a side does not start, or never serves again."""
    results = {name: _run_side(plan, name, folder, progress) for name in plan.sides}
    expected = results[plan.sides[0]].answers
    for result in results.values():
        result.outcomes = [_judge(recorded, expected) for recorded in result.recorded]
    return results


def summary(results: dict[SideName, SideResult]) -> dict[str, Any]:
    """Return the report: a part for each side, and the ratios if there are two sides."""
    sides = [name for name in ("ours", "stock") if name in results]
    report: dict[str, Any] = {name: side_summary(results[name].outcomes) for name in sides}
    if len(report) == 2:
        report["ratios"] = ratios(report["ours"], report["stock"])
    return report


def details(plan: Plan, results: dict[SideName, SideResult]) -> dict[str, Any]:
    """Return what the report leaves out, for ``--record`` and the picture."""
    return {
        name: {
            "start_s": round(result.start_s, 2),
            "memory_bytes": result.memory_bytes,
            "degraded_itl": degraded_itl(plan, result),
            "runs": [
                {"fault": fault, "seed": seed} | _outcome_json(each)
                for (fault, seed), each in zip(plan.runs(), result.outcomes, strict=True)
            ],
        }
        for name, result in results.items()
    }


def degraded_itl(plan: Plan, result: SideResult) -> tuple[float, float] | None:
    """Return (slowdown of the median time between tokens after a device loss, the ideal one).

    None for stock, which goes on at full width, and if nothing was measured.
    """
    if result.name == "stock":
        return None
    pairs = [each.itl_s for (fault, _), each in zip(plan.runs(), result.outcomes, strict=True) if fault == "device"]
    slower = [after / before for before, after in pairs if before and after]
    return (median(slower), plan.tp_size / (plan.tp_size - 1)) if slower and plan.tp_size > 1 else None


def _outcome_json(each: Outcome) -> dict[str, Any]:
    return {
        "tfs_s": each.tfs_s,
        "ttp_s": each.ttp_s,
        "pauses_s": [None if math.isinf(pause_s) else round(pause_s, 4) for pause_s in each.pauses_s],
        "requests": each.requests,
        "failed": each.failed,
        "lost": each.damage.lost,
        "doubled": each.damage.doubled,
        "changed": each.damage.changed,
        "undelivered": each.undelivered,
        "throughput_before": each.throughput_before,
        "throughput_after": each.throughput_after,
        "ttft_s": each.ttft_s,
        "itl_s": each.itl_s,
        "goodput": [[at, round(rate, 2)] for at, rate in each.goodput],
    }


def _run_side(plan: Plan, name: SideName, folder: Path, progress: Progress) -> SideResult:
    make = Ours if name == "ours" else Stock
    side: Side = make(plan.model, plan.tp_size, plan.flags, plan.hang_timeout_s, folder)
    result = SideResult(name)
    try:
        progress(f"{name}: starting with TP={plan.tp_size}")
        result.start_s = side.start()
        progress(f"{name}: serves after {result.start_s:.1f} s; recording the answers of an unbroken run")
        result.answers = _unbroken(side, plan.load.requests())
        result.memory_bytes = memory_bytes(side)
        for number, (fault, seed) in enumerate(plan.runs()):
            side.ready_for(fault)
            about = f"{name}: fault {number + 1} of {len(plan.runs())} ({fault})"
            result.recorded.append(
                _one_fault(plan, side, fault, seed, number, partial(_progress_about, progress, about))
            )
    finally:
        progress(f"{name}: stopping")
        side.stop()
    return result


def _progress_about(progress: Progress, about: str, text: str) -> None:
    progress(f"{about}: {text}")


def _one_fault(plan: Plan, side: Side, fault: Cause, seed: int, number: int, progress: Progress) -> Recorded:
    side.server.flush_cache()
    before_s = plan.before_s * (0.8 + 0.4 * (seed * 0.382 % 1))
    requests, arrivals = plan.load.requests(), plan.load.arrivals(1000 * seed + plan.faults.index(fault))
    with OpenLoop(side.server.url, requests, arrivals) as clients:
        progress(f"clients arrive for {before_s:.0f} s")
        time.sleep(before_s)
        comebacks, limit = side.comebacks(), time.monotonic() + plan.outage_limit_s
        fault_now = side.aim(fault, _DEVICES[number % len(_DEVICES)] % plan.tp_size)
        while not clients.being_served():
            if time.monotonic() > limit:
                raise ServerFailed(f"{side.name}: no client was served for {plan.outage_limit_s:g} s")
            time.sleep(0.005)
        fault_s = time.monotonic()
        fault_now()
        for out_s in _waiting(plan, side, clients, comebacks, fault_s):
            progress(f"not recovered after {out_s:.0f} s")
        progress(f"tokens again after {time.monotonic() - fault_s:.1f} s; clients arrive for {plan.after_s:.0f} s more")
        time.sleep(plan.after_s)
        clients.stop()
        ended_s = time.monotonic()
    return Recorded(clients.began, fault_s, ended_s, tuple(clients.histories))


def _waiting(plan: Plan, side: Side, clients: OpenLoop, comebacks: int, fault_s: float) -> Iterator[float]:
    """Wait until a client gets a token after the side came back; yield the seconds so far every few seconds."""
    reported_s, back_at = 0.0, math.inf
    while clients.first_token_after(back_at) is None:
        if back_at == math.inf and side.comebacks() > comebacks:
            back_at = time.monotonic()
        out_s = time.monotonic() - fault_s
        if out_s > plan.outage_limit_s:
            raise ServerFailed(f"{side.name}: no token within {plan.outage_limit_s:g} s of the fault")
        if out_s - reported_s > _PROGRESS_INTERVAL_S:
            reported_s = out_s
            yield out_s
        time.sleep(_POLL_S)


def _unbroken(side: Side, requests: Sequence[dict[str, Any]]) -> dict[int, tuple[int, ...]]:
    answers: dict[int, tuple[int, ...]] = {}
    for start in range(0, len(requests), _REFERENCE_CLIENTS):
        with Streams(side.server.url, requests[start : start + _REFERENCE_CLIENTS]) as streams:
            histories = streams.wait()
        for number, history in enumerate(histories, start):
            if history.error is not None or len(history.output_ids) != requested_tokens(history.request):
                raise ServerFailed(f"{side.name}: an unbroken request failed: {history.error}")
            answers[number] = tuple(history.output_ids)
    return answers


def _judge(recorded: Recorded, expected: dict[int, tuple[int, ...]]) -> Outcome:
    streams = [
        Stream(h.sent_at, h.ended_at, tuple(h.arrivals), tuple(h.output_ids), expected[number], h.error)
        for number, h in recorded.histories
    ]
    return outcome(streams, recorded.began_s, recorded.fault_s, recorded.ended_s)
