"""Gantt picture of a predicted recovery: its stages, those of a restart, and every transfer below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from anchortp_sglang.planning.prediction.schedule import Entry, Timeline
from anchortp_sglang.planning.prediction.simulation import Prediction
from anchortp_sglang.views.picture import Box, Label, Picture

WIDTH, MARGIN, NAMES = 1100, 20, 130
ROW, BAR, GAP = 20, 14, 46
MOST_FLOWS = 96
FAINT = "#656d76"
KIND_COLOURS = {"reload": ("#bc4c00", "#e8894f"), "p2p": ("#0969da", "#6cb0f7"), "copy": ("#1a7f37", "#6fce8a")}
"""Colours of each kind of transfer for even and odd layers."""

STAGE_COLOURS = {
    "detected": "#8250df",
    "fenced": "#cf222e",
    "stopped": "#cf222e",
    "planned": "#6e7781",
    "forked": "#0969da",
    "processes started": "#0969da",
    "groups ready": "#1b7c83",
    "bytes moved": "#bc4c00",
    "weights loaded": "#bc4c00",
    "bound": "#9a6700",
    "first token": "#1a7f37",
    "graphs": "#bf3989",
}


def gantt(title: str, timeline: Timeline, recovery: Prediction, restart: Prediction) -> Picture:
    """Draw stages on one scale and transfers on another (seconds since the first transfer)."""
    boxes: list[Box] = []
    labels = [Label(MARGIN, MARGIN, title, bold=True)]
    y = MARGIN + 34.0
    end_s = max(recovery.full_speed_s, restart.full_speed_s)
    for drawn, name in ((recovery, "recovery"), (restart, "restart and reload")):
        y = _stages(drawn, name, y, end_s, boxes, labels)
    y = _axis(y, end_s, boxes, labels) + GAP
    flows = sorted({_flow(entry) for entry in timeline.entries})
    labels.append(Label(MARGIN, y - 24, _heading(timeline, flows), bold=True))
    top = y
    shown = {flow: top + ROW * n for n, flow in enumerate(flows[:MOST_FLOWS])}
    for flow, row in shown.items():
        labels.append(Label(MARGIN + NAMES - 8, row + BAR / 2, _flow_name(flow), "end"))
    scale = _scale(timeline.makespan_s)
    for entry in timeline.entries:
        row = shown.get(_flow(entry), -1.0)
        if row >= 0:
            boxes.append(_transfer_box(entry, row, scale))
    y = _axis(top + ROW * len(shown), timeline.makespan_s, boxes, labels)
    return Picture(WIDTH, int(y + MARGIN), title, tuple(boxes), tuple(labels))


def _stages(drawn: Prediction, name: str, y: float, end_s: float, boxes: list[Box], labels: list[Label]) -> float:
    labels.append(Label(MARGIN, y, f"{name}: first token after {drawn.tfs_s:.2f} s", bold=True))
    y += 14
    scale = _scale(end_s)
    for stage in drawn.stages:
        x = MARGIN + NAMES + stage.start_s * scale
        width = max(1.0, (stage.end_s - stage.start_s) * scale)
        tip = f"{stage.name}: {stage.start_s:.3f} to {stage.end_s:.3f} s"
        boxes.append(Box(x, y, width, BAR, STAGE_COLOURS[stage.name], tip))
        labels.append(Label(MARGIN + NAMES - 8, y + BAR / 2, stage.name, "end"))
        time, middle = f"{stage.end_s:.2f} s", y + BAR / 2
        fits = x + width + 60 < WIDTH - MARGIN
        labels.append(
            Label(x + width + 6, middle, time, "start", FAINT) if fits else Label(x - 6, middle, time, "end", FAINT)
        )
        y += ROW
    return y + 22


def _transfer_box(entry: Entry, row: float, scale: float) -> Box:
    colour = KIND_COLOURS[entry.kind][(entry.layer or 0) % 2]
    where = "outside of the layers" if entry.layer is None else f"layer {entry.layer}"
    tip = f"{where}: {entry.nbytes} bytes, {entry.start_s * 1e3:.2f} to {entry.end_s * 1e3:.2f} ms"
    width = max(0.5, (entry.end_s - entry.start_s) * scale)
    return Box(MARGIN + NAMES + entry.start_s * scale, row, width, BAR, colour, tip)


def _axis(y: float, end_s: float, boxes: list[Box], labels: list[Label]) -> float:
    scale = _scale(end_s)
    step = _tick_step(end_s)
    boxes.append(Box(MARGIN + NAMES, y, WIDTH - 2 * MARGIN - NAMES, 1, FAINT))
    for tick in range(int(end_s / step + 1e-9) + 1) if end_s > 0 else ():
        x = MARGIN + NAMES + tick * step * scale
        boxes.append(Box(x, y, 1, 4, FAINT))
        labels.append(Label(x, y + 12, f"{tick * step:g} s", "middle", FAINT))
    return y + 20


def _scale(end_s: float) -> float:
    return (WIDTH - 2 * MARGIN - NAMES) / end_s if end_s > 0 else 0.0


def _tick_step(end_s: float) -> float:
    """Return the smallest of 1, 2 or 5 times a power of ten that gives at most ten ticks."""
    steps: Iterator[float] = (digit * 10.0**power for power in range(-6, 9) for digit in (1, 2, 5))
    return next(step for step in steps if end_s / step <= 10)


def _heading(timeline: Timeline, flows: Sequence[tuple[int, str, int]]) -> str:
    if not flows:
        return "no bytes move"
    more = f"; {len(flows) - MOST_FLOWS} of {len(flows)} flows are not shown" if len(flows) > MOST_FLOWS else ""
    lasts = f"{timeline.makespan_s:.3f} s, the busiest link {timeline.link_lower_bound_s:.3f} s"
    return f"transfers, layer by layer, from the fork on: {lasts}{more}"


def _flow(entry: Entry) -> tuple[int, str, int]:
    return entry.device, entry.kind, -1 if entry.source is None else entry.source


def _flow_name(flow: tuple[int, str, int]) -> str:
    device, kind, source = flow
    return f"device {device}: {kind}" + (f" from {source}" if kind == "p2p" else "")
