"""Lays a recovery out as rows of bars: the server's own stages, and below them each new rank's. Pure.

The page (views/timeline_page.py), the picture (views/timeline_plot.py) and the terminal (views/status.py) draw the same
rows; the metrics and spans of a recovery are made from them, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

RANK_STAGES = ("attached", "groups_ready", "bytes_moved", "weights_bound", "kv_kept", "prefixes_rebuilt", "bound")
"""Stages that ranks report; in the record's own list they stand for the last rank."""

ABOUT = {
    "detected": "the fault was noticed",
    "reaped": "all old ranks are dead",
    "fenced": "what rank 0 had sent has been drained",
    "planned": "verdict made, next ownership planned",
    "forked": "new ranks have their assignments",
    "ready": "all ranks are ready",
    "replayed": "open requests were sent again",
    "first_token": "a client got a new token (TFS)",
    "gave_up": "open requests ended with an error",
    "attached": "the rank has its anchor's memory",
    "groups_ready": "it has its process groups",
    "bytes_moved": "its weights are complete",
    "weights_bound": "its model is built and bound to them",
    "kv_kept": "it has taken over its KV cache",
    "prefixes_rebuilt": "its prefix tree is rebuilt",
    "bound": "its scheduler is complete",
}
"""Events that end each stage, by its name, in the order of legends."""


@dataclass(frozen=True)
class Bar:
    """A stage from the end of the one before it, in seconds since the fault was noticed."""

    stage: str
    start_s: float
    end_s: float

    @property
    def took_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Row:
    """A row of bars. ``label``, ``note``: whose they are, and more about it. ``lost``: a lost device has no bars.

    ``moving``: bytes that arrive while the other bars go on.
    """

    label: str
    note: str = ""
    bars: tuple[Bar, ...] = ()
    moving: Bar | None = None
    lost: bool = False

    @property
    def all_bars(self) -> tuple[Bar, ...]:
        return self.bars if self.moving is None else tuple(sorted((*self.bars, self.moving), key=lambda bar: bar.end_s))


def rows(recovery: Mapping[str, Any]) -> tuple[Row, ...]:
    """Return the server's row, then those of devices in order."""
    ranks = {rank["device"]: _rank_row(recovery, rank) for rank in recovery.get("ranks") or []}
    ranks |= {device: Row(f"device {device}", "lost", lost=True) for device in recovery.get("lost") or []}
    return (Row("server", bars=_server_bars(recovery)), *(ranks[device] for device in sorted(ranks)))


def durations(recovery: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (stage, seconds): each stage of the server, then each stage of ranks, by the slowest one."""
    server, *ranks = rows(recovery)
    for bar in server.bars:
        yield bar.stage, bar.took_s
    for stage in RANK_STAGES:
        took = [bar.took_s for row in ranks for bar in row.all_bars if bar.stage == stage]
        if took:
            yield stage, max(took)


def end_s(recovery: Mapping[str, Any]) -> float:
    """Return the seconds from the fault's detection to its last stage."""
    return max((float(stage["at_s"]) for stage in _all_stages(recovery)), default=0.0)


def ticks(total_s: float, most: int = 6) -> list[float]:
    """Return round moments from 0 to ``total_s``, at most ``most`` of them."""
    if total_s <= 0:
        return [0.0]
    step = next(
        factor * 10.0**power
        for power in range(-4, 6)
        for factor in (1, 2, 5)
        if total_s / (factor * 10.0**power) < most
    )
    return [round(step * n, 6) for n in range(int(total_s / step) + 1)]


def headline(recovery: Mapping[str, Any]) -> str:
    """Describe a recovery in a few words."""
    device, left = recovery.get("device", -1), len(recovery.get("ranks") or [])
    lost = recovery.get("lost") or [device]
    width = f", on with TP={left}" if left else ""
    what = {
        "device": f"device{'s' * (len(lost) > 1)} {', '.join(map(str, lost))} lost",
        "process": f"rank on device {device} died" if device >= 0 else "fault outside of the devices",
        "hang": f"rank on device {device} hung",
        "planned": str(recovery.get("reason")),
    }.get(str(recovery.get("cause")), "fault")
    return f"{what}{width}"


def _all_stages(recovery: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from recovery.get("stages") or []
    for rank in recovery.get("ranks") or []:
        yield from rank["stages"]


def _server_bars(recovery: Mapping[str, Any]) -> tuple[Bar, ...]:
    """Return the server's bars. A second fault begins again with ``detected``, and the bars go on."""
    own = [stage for stage in recovery.get("stages") or [] if stage["name"] not in RANK_STAGES]
    return _bars(0.0, own)


def _rank_row(recovery: Mapping[str, Any], rank: Mapping[str, Any]) -> Row:
    at = {stage["name"]: float(stage["at_s"]) for stage in rank["stages"]}
    # Assigned at some time between the plan and the stage "forked"; a second attempt plans twice.
    planned_s = max((float(s["at_s"]) for s in recovery.get("stages") or [] if s["name"] == "planned"), default=0.0)
    bars = _bars(planned_s, [stage for stage in rank["stages"] if stage["name"] != "bytes_moved"])
    moving = None
    if rank.get("moved_bytes") and "bytes_moved" in at:
        moving = Bar("bytes_moved", at.get("attached", planned_s), at["bytes_moved"])
    return Row(f"device {rank['device']}", f"rank {rank['rank']}", bars, moving)


def _bars(start_s: float, stages: list[Mapping[str, Any]]) -> tuple[Bar, ...]:
    moments = [start_s, *(float(stage["at_s"]) for stage in stages)]
    return tuple(
        Bar(stage["name"], min(before, at), at) for stage, (before, at) in zip(stages, pairwise(moments), strict=True)
    )
