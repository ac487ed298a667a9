"""Terminal view of a server's status (``GET /anchortp/status``). Pure: a dict in, renderables out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from anchortp_sglang.recovery.report.stages import end_s, rows

RECOVERIES_SHOWN = 5
_COLOURS = {
    "serving": "green",
    "starting": "cyan",
    "degraded": "yellow",
    "recovering": "yellow",
    "idle": "yellow",
    "drained": "yellow",
    "leaving": "cyan",
    "joining": "cyan",
    "down": "bold red",
    "lost": "red",
}


def status_view(status: Mapping[str, Any]) -> RenderableType:
    """Show a headline, the devices, and the last recoveries with their stages."""
    recoveries = status.get("recoveries") or []
    parts: list[RenderableType] = [
        _headline(status),
        *_kv_capacity(status),
        _devices(status.get("devices") or []),
        _kv(status.get("kv")),
    ]
    if not recoveries:
        return Group(*parts, Text("no recoveries so far", style="dim"))
    shown = recoveries[-RECOVERIES_SHOWN:]
    return Group(*parts, _recoveries(shown), *map(_stages, shown))


def timeline_view(recovery: Mapping[str, Any], width: int = 80) -> RenderableType:
    """Draw a recovery as a Gantt chart of ``width`` columns: each stage of the server and of each device."""
    drawn = rows(recovery)
    what = f"device {_cell(recovery.get('device'))}, {_cell(recovery.get('cause'))} fault"
    if recovery.get("cause") == "planned":
        what = "change of devices"
    title = f"generation {_cell(recovery.get('generation'))}, {what}: {_cell(recovery.get('reason'))}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("stage", ""):
        table.add_column(heading, no_wrap=True)
    for heading in ("took", "at"):
        table.add_column(heading, justify="right", no_wrap=True)
    numbers = 2 * len("  999.999 s")
    names = max((len(f"  {each.stage}") for row in drawn for each in row.all_bars), default=0)
    bar_width = max(10, width - numbers - names - 2)
    total_s = end_s(recovery)
    for row in drawn:
        table.add_row(Text(row.label, style="bold red" if row.lost else "bold"), Text(row.note, style="dim"))
        for each in row.all_bars:
            colour = "magenta" if each is row.moving else "cyan"
            line = bar(each.start_s, each.end_s, total_s, bar_width, colour)
            table.add_row(f"  {each.stage}", line, f"{each.took_s:.3f} s", f"{each.end_s:.3f} s")
    return Group(table, Text(_outcome(recovery)))


def bar(start_s: float, end_s: float, total_s: float, width: int, colour: str = "cyan") -> Text:
    """Draw a bar from ``start_s`` to ``end_s`` in a line whose ``width`` columns stand for ``total_s``."""
    scale = width / total_s if total_s > 0 else 0.0
    first = min(int(start_s * scale), width - 1)
    length = max(1, round(end_s * scale) - first)
    return Text(" " * first + "█" * length, style=colour)


def _outcome(recovery: Mapping[str, Any]) -> str:
    """Describe what moved and what was replayed."""
    reused, redone = _cell(recovery.get("tokens_reused")), _cell(recovery.get("tokens_recomputed"))
    return (
        f"weights: {_moved(recovery)}; KV slots: {_kv_slots(recovery.get('kv') or {})}; "
        f"{_cell(recovery.get('requests_replayed'))} requests replayed, {reused} tokens reused, {redone} computed again"
    )


def _headline(status: Mapping[str, Any]) -> Text:
    state = str(status.get("state", "?"))
    line = Text.assemble((state, _COLOURS.get(state, "")))
    line.append(f"  generation {status.get('generation', '?')}  tp {status.get('tp_size', '?')}")
    if status.get("paused"):
        line.append("  paused", style="yellow")
    return line


def _kv_capacity(status: Mapping[str, Any]) -> list[Text]:
    """Describe the KV capacity, and what it would be with heads placed the other way (rotating or not)."""
    kv = status.get("kv_capacity")
    if not kv:
        return []
    rotating = kv["rotating"]
    other = f"{kv['slots_alike']} if they did not" if rotating else f"{kv['slots_rotating']} if they did"
    return [
        Text(
            f"KV {kv['slots']} slots, heads {'rotate' if rotating else 'do not rotate'} over the layers; "
            f"in the {byte_size(kv['device_bytes'])} of the fullest device {other}"
        )
    ]


def _devices(devices: list[Mapping[str, Any]]) -> Table:
    table = Table(title="devices", title_justify="left")
    for heading in ("device", "state", "rank", "rank pid", "anchor pid", "weights", "KV"):
        table.add_column(heading, justify="left" if heading == "state" else "right")
    reasons = any(device.get("reason") for device in devices)
    if reasons:
        table.add_column("why")
    for device in devices:
        state = str(device.get("state", "?"))
        table.add_row(
            *(_cell(device.get("id")), Text(state, style=_COLOURS.get(state, ""))),
            *(_cell(device.get(key)) for key in ("rank", "rank_pid", "anchor_pid")),
            *(byte_size(device.get(key)) for key in ("weight_bytes", "kv_bytes")),
            *([str(device.get("reason", ""))] if reasons else []),
        )
    return table


def _kv(kv: Mapping[str, Any] | None) -> Text:
    """Describe the slots in use and the mirror, whose slots survive the loss of a device."""
    if kv is None:
        return Text("KV: nothing known yet", style="dim")
    line = f"KV: {kv['used']} of {kv['slots']} slots used; mirror: "
    mirror = kv.get("mirror")
    if mirror is None:
        return Text(line + "none")
    share = f"{mirror['mirrored']} slots ({float(mirror['coverage']):.1%} of what is used)"
    return Text(f"{line}{share}, {mirror['lag_slots']} behind, {byte_size(mirror['bytes'])}")


def _recoveries(recoveries: list[Mapping[str, Any]]) -> Table:
    table = Table(title="last recoveries", title_justify="left")
    for heading in ("gen", "cause", "device", "TFS", "moved", "KV slots", "replayed", "kept/redone"):
        table.add_column(heading, justify="left" if heading in ("cause", "moved", "KV slots") else "right")
    for recovery in recoveries:
        tfs_s = recovery.get("tfs_s")
        kept, redone = recovery.get("tokens_reused"), recovery.get("tokens_recomputed")
        table.add_row(
            *(_cell(recovery.get(key)) for key in ("generation", "cause", "device")),
            "-" if tfs_s is None else f"{float(tfs_s):.2f} s",
            _moved(recovery),
            _kv_slots(recovery.get("kv") or {}),
            _cell(recovery.get("requests_replayed")),
            f"{_cell(kept)}/{_cell(redone)}",
        )
    return table


def _stages(recovery: Mapping[str, Any]) -> Text:
    """Describe the reason, and the seconds from the fault to the end of each stage."""
    parts = [f"generation {_cell(recovery.get('generation'))}: {_cell(recovery.get('reason'))}"]
    parts += [f"{stage['name']} {float(stage['at_s']):.2f}" for stage in recovery.get("stages") or []]
    return Text(" · ".join(parts))


def _moved(recovery: Mapping[str, Any]) -> str:
    named = {"reload_bytes": "read", "p2p_bytes": "P2P", "copied_bytes": "copied"}
    parts = [f"{byte_size(recovery[key])} {name}" for key, name in named.items() if recovery.get(key)]
    return ", ".join(parts) or "nothing"


def _kv_slots(kv: Mapping[str, Any]) -> str:
    named = {"slots_kept": "kept", "slots_restored": "restored", "slots_dropped": "dropped"}
    return ", ".join(f"{kv[key]} {name}" for key, name in named.items() if kv.get(key)) or "none"


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)


def byte_size(value: Any) -> str:
    """Format bytes with a binary unit: 0 B, 1.5 MiB."""
    if value is None:
        return "-"
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, {"B": "KiB", "KiB": "MiB", "MiB": "GiB", "GiB": "TiB"}[unit]
    return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
