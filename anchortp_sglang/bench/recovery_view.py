"""The display of ``anchortp bench recovery``: a table, and throughput over time as a picture."""

from collections.abc import Iterator, Mapping, Sequence
from math import isinf
from statistics import mean, median
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from anchortp_sglang.bench.recovery_stats import middle, times
from anchortp_sglang.recovery.report.stages import ticks
from anchortp_sglang.views.picture import Box, Label, Picture

Json = Mapping[str, Any]
_WIDTH, _PANEL, _LEFT, _RIGHT, _TOP = 960, 150, 60, 20, 50
_COLOURS = {"ours": "#1a7f37", "stock": "#b54708"}
_FAULT, _FAINT, _LINE = "#cf222e", "#626b76", "#dde1e6"


def report_view(report: Json, details: Json, title: str) -> RenderableType:
    """Make the report's table. ``report``: bench.recovery.summary; ``details``: bench.recovery.details."""
    sides = [name for name in ("ours", "stock") if name in report]
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in sides:
        table.add_column(name, justify="right")
    if "ratios" in report:
        table.add_column("", justify="right")
    for label, values, ratio in _lines(report, details, sides):
        table.add_row(label, *values, *([ratio] if "ratios" in report else []))
    return Group(table, _verdict(report))


def _lines(report: Json, details: Json, sides: Sequence[str]) -> Iterator[tuple[str, list[str], str]]:
    def line(label: str, key: str, ratio: str = "") -> tuple[str, list[str], str]:
        return label, [_list(report[name][key]) for name in sides], ratio

    ratios = report.get("ratios") or {}
    yield line("TFS: fault to first new token, median (all)", "tfs_s", _times(ratios.get("tfs")))
    yield from _tfs_by_fault(details, sides)
    yield line("TTP: from there to full throughput, median (all)", "ttp_s", _times(ratios.get("ttp")))
    for key, name in (("p50", "median"), ("p99", "p99"), ("max", "longest")):
        yield f"pause of an open stream, {name}", [_seconds(report[side]["pause_s"][key]) for side in sides], ""
    failed = [f"{report[side]['failed_requests']} of {_sum(details, side, 'requests')}" for side in sides]
    yield "requests that failed", failed, ""
    kinds = ("lost", "doubled", "changed")
    wrong = [", ".join(str(_sum(details, side, kind)) for kind in kinds) for side in sides]
    yield "wrong tokens: lost, doubled, changed", wrong, ""
    yield "tokens of failed requests never delivered", [str(_sum(details, side, "undelivered")) for side in sides], ""
    before = ratios.get("throughput_before")
    yield (
        "tokens/s before the fault",
        [_number(report[side]["throughput_before"]) for side in sides],
        "" if before is None else f"{before:.2f}×",
    )
    yield "tokens/s after the recovery", [_number(report[side]["throughput_after"]) for side in sides], ""
    for key, name in (("ttft_s", "time to first token"), ("itl_s", "time between tokens")):
        halves = [_before_after(details[side]["runs"], key) for side in sides]
        yield f"{name}, before → after", [_milliseconds(*each) for each in halves], _before_ratio(halves)
    yield "start to serving", [_seconds(details[side]["start_s"]) for side in sides], ""
    yield "memory while serving", [decimal(details[side]["memory_bytes"]) for side in sides], ""
    if any(details[side]["degraded_itl"] for side in sides):
        slower = [_slower(details[side]["degraded_itl"]) for side in sides]
        yield "time between tokens, a device less over all of them", slower, ""


def _tfs_by_fault(details: Json, sides: Sequence[str]) -> Iterator[tuple[str, list[str], str]]:
    """Yield a line for each kind of fault, if there are several."""
    runs = {side: details[side]["runs"] for side in sides}
    faults = list(dict.fromkeys(run["fault"] for run in runs[sides[0]]))
    for fault in faults if len(faults) > 1 else ():
        tfs = {side: [run["tfs_s"] for run in runs[side] if run["fault"] == fault] for side in sides}
        yield f"  after {fault}", [_list(tfs[side]) for side in sides], _times(times(tfs.get("stock"), tfs.get("ours")))


def _verdict(report: Json) -> Text:
    if "ours" not in report:
        return Text("")
    ours = report["ours"]
    if ours["failed_requests"] == 0 and ours["wrong_tokens"] == 0:
        return Text("ours: no request failed, every token is that of an unbroken run", "bold green")
    return Text(f"ours: {ours['failed_requests']} requests failed, {ours['wrong_tokens']} tokens are wrong", "bold red")


def picture(details: Json, title: str) -> Picture:
    """Draw goodput around the fault: a panel for each side on one scale, the mean over its runs."""
    curves = {name: _mean_curve(details[name]["runs"]) for name in ("ours", "stock") if name in details}
    start = min(at for curve in curves.values() for at in curve)
    end = max(at for curve in curves.values() for at in curve) + 0.5
    highest = max((rate for curve in curves.values() for rate in curve.values()), default=0.0) or 1.0
    scale = (_WIDTH - _LEFT - _RIGHT) / (end - start)
    boxes: list[Box] = []
    labels = [Label(20, 20, title, bold=True)]
    for row, (name, curve) in enumerate(curves.items()):
        base = _TOP + row * (_PANEL + 50) + _PANEL
        labels.append(Label(_LEFT, base - _PANEL - 8, _caption(name, details[name]["runs"]), colour=_FAINT))
        for rate in ticks(highest, 5):
            y = base - _PANEL * rate / highest
            boxes.append(Box(_LEFT, y, _WIDTH - _LEFT - _RIGHT, 1, _LINE))
            labels.append(Label(_LEFT - 6, y, f"{rate:g}", "end", _FAINT))
        for at, rate in curve.items():
            height = _PANEL * rate / highest
            tip = f"{rate:.0f} tokens/s {at:g} s after the fault"
            x, width = _LEFT + (at - start) * scale, max(1.0, 0.5 * scale - 0.5)
            boxes.append(Box(x, base - height, width, height, _COLOURS[name], tip))
        measured = max(curve, default=end) + 0.5
        if measured < end - 5.0:  # a side with a longer outage was measured for longer
            labels.append(Label(_LEFT + (measured - start) * scale + 6, base - 12, "watched until here", colour=_FAINT))
        boxes.append(Box(_LEFT - start * scale - 1, base - _PANEL, 2, _PANEL, _FAULT))
        for at in ticks(end, 12):
            labels.append(Label(_LEFT + (at - start) * scale, base + 12, f"{at:g} s", "middle", _FAINT))
    return Picture(_WIDTH, _TOP + len(curves) * (_PANEL + 50) - 10, title, tuple(boxes), tuple(labels))


def _caption(name: str, runs: Sequence[Json]) -> str:
    tfs = [run["tfs_s"] for run in runs if run["tfs_s"] is not None]
    first_token = f"first token {median(tfs):.1f} s after the fault (red)" if tfs else "no token after the fault (red)"
    return f"{name}: {first_token}; tokens per second of requests that ended well, mean of {len(runs)} faults"


def _mean_curve(runs: Sequence[Json]) -> dict[float, float]:
    found: dict[float, list[float]] = {}
    for run in runs:
        for at, rate in run["goodput"]:
            found.setdefault(at, []).append(rate)
    # Only moments that most runs have: a mean of one run is noise.
    return {at: mean(rates) for at, rates in sorted(found.items()) if 2 * len(rates) > len(runs)}


def _list(values: Sequence[float | None]) -> str:
    between = middle(values)
    if between is None:
        return "-"
    every = f" ({', '.join('-' if v is None else f'{v:.2f}' for v in values)})" if len(values) > 1 else ""
    return f"{'not in time' if isinf(between) else f'{between:.2f} s'}{every}"


def _before_after(runs: Sequence[Json], key: str) -> tuple[float | None, float | None]:
    before, after = ([run[key][half] for run in runs if run[key][half] is not None] for half in (0, 1))
    return middle(before), middle(after)


def _milliseconds(before: float | None, after: float | None) -> str:
    return " → ".join("-" if value is None else f"{1000 * value:.0f} ms" for value in (before, after))


def _before_ratio(halves: Sequence[tuple[float | None, float | None]]) -> str:
    """Format ours over stock's, before the fault."""
    before = [each[0] for each in halves]
    return f"{before[0] / before[1]:.2f}×" if len(before) == 2 and before[0] and before[1] else ""


def _slower(degraded: Sequence[float] | None) -> str:
    return "" if degraded is None else f"{degraded[0]:.2f}× (ideal {degraded[1]:.2f}×)"


def _sum(details: Json, side: str, key: str) -> int:
    return sum(run[key] for run in details[side]["runs"])


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}× faster" if value >= 10 else f"{value:.1f}× faster"
