"""Picture of recoveries for ``anchortp timeline --plot``: draws the rows of recovery/report/stages.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anchortp_sglang.recovery.report import stages
from anchortp_sglang.recovery.report.stages import ABOUT, Bar
from anchortp_sglang.views.picture import INK, Box, Label, Picture
from anchortp_sglang.views.status import byte_size

_WIDTH, _MARGIN, _NAMES, _ROW, _BAR = 960, 20, 130, 26, 18
_FAINT, _TRACK = "#626b76", "#eef0f3"
_COLOURS = {
    "detected": "#b42318",
    "reaped": "#b42318",
    "fenced": "#b54708",
    "planned": "#7a5af8",
    "forked": "#475467",
    "ready": "#98a2b3",
    "replayed": "#c4640a",
    "first_token": "#1a7f37",
    "gave_up": "#cf222e",
    "attached": "#475467",
    "groups_ready": "#1f6feb",
    "bytes_moved": "#c11574",
    "weights_bound": "#0e7490",
    "kv_kept": "#5b8c1f",
    "prefixes_rebuilt": "#4d7c0f",
    "bound": "#3f6fb5",
}


def picture(recoveries: Sequence[Mapping[str, Any]]) -> Picture:
    """Draw the recoveries one below the other on one scale, with a legend of their stages."""
    total_s = max(map(stages.end_s, recoveries), default=0.0) or 1.0
    boxes: list[Box] = []
    labels: list[Label] = []
    y = float(_MARGIN)
    seen: list[str] = []
    for recovery in recoveries:
        labels.append(Label(_MARGIN, y + 6, _title(recovery), bold=True))
        y += 24
        for row in stages.rows(recovery):
            ink = _FAINT if row.lost else INK
            labels.append(Label(_MARGIN, y + _BAR / 2, f"{row.label} {row.note}", colour=ink))
            boxes.append(Box(_MARGIN + _NAMES, y, _scale(total_s) * total_s, _BAR, _TRACK))
            boxes += [_box(bar, total_s, y, _BAR - (5 if row.moving else 0)) for bar in row.bars]
            boxes += [_box(row.moving, total_s, y + _BAR - 4, 4)] if row.moving else []
            seen += [bar.stage for bar in (*row.bars, *([row.moving] if row.moving else []))]
            y += _ROW
        for at in stages.ticks(total_s, 10):
            labels.append(Label(_x(at, total_s), y + 4, f"{at:g} s", "middle", _FAINT))
        y += 36
    for box, label in _legend([name for name in (*ABOUT, *seen) if name in seen], y):
        boxes.append(box)
        labels.append(label)
        y = max(y, label.y)
    return Picture(_WIDTH, int(y + 24), "Stages of recoveries, by device", tuple(boxes), tuple(labels))


def _title(recovery: Mapping[str, Any]) -> str:
    tfs_s = recovery.get("tfs_s")
    moved = sum(recovery.get(key) or 0 for key in ("reload_bytes", "p2p_bytes", "copied_bytes"))
    parts = [stages.headline(recovery), "no token yet" if tfs_s is None else f"first token after {tfs_s:.2f} s"]
    parts += [f"{byte_size(moved)} moved", f"{recovery.get('requests_replayed', 0)} requests replayed"]
    return " · ".join(parts)


def _legend(names: Sequence[str], y: float) -> Iterator[tuple[Box, Label]]:
    columns = 5
    for index, name in enumerate(dict.fromkeys(names)):
        x = _MARGIN + index % columns * (_WIDTH - 2 * _MARGIN) / columns
        line = y + index // columns * 20
        yield Box(x, line - 5, 10, 10, _colour(name)), Label(x + 16, line, name.replace("_", " "), colour=_FAINT)


def _box(bar: Bar, total_s: float, y: float, height: float) -> Box:
    width = max(1.5, bar.took_s * _scale(total_s))
    return Box(_x(bar.start_s, total_s), y, width, height, _colour(bar.stage), f"{bar.stage}: {bar.took_s:.3f} s")


def _colour(stage: str) -> str:
    return _COLOURS.get(stage, "#475467")


def _x(at_s: float, total_s: float) -> float:
    return _MARGIN + _NAMES + at_s * _scale(total_s)


def _scale(total_s: float) -> float:
    return (_WIDTH - 2 * _MARGIN - _NAMES) / total_s
