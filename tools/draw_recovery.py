#!/usr/bin/env python3
"""Draw docs/img/recovery.svg from a recorded run of the demo. Needs the standard library alone.

python -m anchortp_sglang.bench.demo --record run.json
python tools/draw_recovery.py run.json docs/img/recovery.svg
"""

import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

WIDTH, MARGIN, LABELS = 900, 20, 70
STREAM_TOP, STREAM_ROW, TICK = 64, 18, 11
GANTT_ROW, GANTT_BAR, GANTT_NAMES, GANTT_GAP = 19, 11, 92, 40
LEAST_PAUSE_S = 0.25

# Own background: readable whatever page it lies on, and in either colour scheme.
STYLE = """
  text { font: 12px system-ui, sans-serif } .head { font-weight: 600; font-size: 14px }
  .end { text-anchor: end } .mid { text-anchor: middle }
  .back { fill: #ffffff } text { fill: #1f2328 } .faint { fill: #656d76 } .fault { fill: #cf222e }
  .tick { stroke: #1a7f37; fill: none } .axis { stroke: #d0d7de } .mark { stroke: #cf222e; stroke-width: 1.5 }
  .pause { fill: #fff1c2 } .stage { fill: #0969da }
  @media (prefers-color-scheme: dark) {
    .back { fill: #0d1117 } text { fill: #e6edf3 } .faint { fill: #8d96a0 } .fault { fill: #f85149 }
    .tick { stroke: #3fb950 } .axis { stroke: #30363d } .mark { stroke: #f85149 }
    .pause { fill: #3a2d05 } .stage { fill: #4493f8 } }
"""

Run = dict[str, Any]


def draw(run: Run) -> str:
    """The whole picture: eight streams over time, and below them the stages of each recovery."""
    axis_y = STREAM_TOP + STREAM_ROW * len(run["streams"]) + 6
    gantt_top = axis_y + 64
    rows = max(len(fault["recovery"]["stages"]) for fault in run["faults"])
    height = gantt_top + rows * GANTT_ROW + 44
    body = [*_streams(run, axis_y), *_gantts(run, gantt_top)]
    title = "Tokens of eight streams, two faults with their pauses, and the stages of both recoveries"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">',
            f"<title>{title}</title><style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{height}" rx="8" class="back"/>',
            *body,
            "</svg>\n",
        ]
    )


def _streams(run: Run, axis_y: float) -> Iterator[str]:
    left, right = MARGIN + LABELS, WIDTH - MARGIN
    end_s = max(at for stream in run["streams"] for at, _ in stream)
    scale = (right - left) / end_s
    yield _text(MARGIN, 28, "what eight clients receive: one line for each message with a new token", "head")
    for fault in run["faults"]:
        start, stop = (left + scale * at for at in _pause(run, fault["at_s"]))
        yield _rect(start, STREAM_TOP - 4, stop - start, axis_y - STREAM_TOP + 4, "pause")
        x = left + scale * fault["at_s"]
        yield f'<path class="mark" d="M{x:.1f} {STREAM_TOP - 8}V{axis_y}"/>'
        yield _text(x, STREAM_TOP - 14, fault["title"], "fault")
    for row, stream in enumerate(run["streams"]):
        y = STREAM_TOP + row * STREAM_ROW
        yield _text(left - 10, y + TICK - 1, f"stream {row + 1}", "end faint")
        ticks = "".join(f"M{left + scale * at:.1f} {y}v{TICK}" for at, _ in stream)
        yield f'<path class="tick" d="{ticks}"/>'
    yield from _axis(left, right, axis_y, scale, end_s, 1.0)


def _pause(run: Run, at_s: float) -> tuple[float, float]:
    """When the last token before a fault's pause came, and the first after it."""
    gaps = [
        (a, b)
        for stream in run["streams"]
        for (a, _), (b, _) in pairwise(stream)
        if b > at_s and a < at_s + LEAST_PAUSE_S and b - a > LEAST_PAUSE_S
    ]
    return max(a for a, _ in gaps), min(b for _, b in gaps)


def _gantts(run: Run, top: float) -> Iterator[str]:
    panel = (WIDTH - 2 * MARGIN - GANTT_GAP) / len(run["faults"])
    end_s = max(stage["at_s"] for fault in run["faults"] for stage in fault["recovery"]["stages"])
    for column, fault in enumerate(run["faults"]):
        yield from _gantt(fault, MARGIN + column * (panel + GANTT_GAP), panel, top, end_s)


def _gantt(fault: Run, left: float, panel: float, top: float, end_s: float) -> Iterator[str]:
    bars, right = left + GANTT_NAMES, left + panel
    scale = (right - bars - 50) / end_s
    devices = f"{fault['devices_before']} → {fault['devices_after']} devices"
    yield _text(left, top - 12, f"{fault['title']}: {devices}", "head")
    before_s, y = 0.0, top
    for stage in fault["recovery"]["stages"]:
        at_s = stage["at_s"]
        width = max(1.5, scale * (at_s - before_s))
        yield _text(bars - 8, y + GANTT_BAR, stage["name"].replace("_", " "), "end")
        yield _rect(bars + scale * before_s, y + 1, width, GANTT_BAR, "stage")
        yield _text(bars + scale * before_s + width + 6, y + GANTT_BAR, f"{at_s:.3f}", "faint")
        before_s, y = at_s, y + GANTT_ROW
    yield from _axis(bars, right - 50, y + 2, scale, end_s, 0.2)


def _axis(left: float, right: float, y: float, scale: float, end_s: float, step_s: float) -> Iterator[str]:
    yield f'<path class="axis" d="M{left:.1f} {y}H{right:.1f}"/>'
    for n in range(int(end_s / step_s) + 1):
        yield _text(left + scale * n * step_s, y + 16, f"{n * step_s:g} s", "mid faint")


def _rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{text}</text>'


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    Path(sys.argv[2]).write_text(draw(json.loads(Path(sys.argv[1]).read_text())), encoding="utf-8")
