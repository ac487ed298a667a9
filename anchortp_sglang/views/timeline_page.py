"""The page of ``GET /anchortp/timeline``: the last recoveries as Gantt charts. Pure: status in, HTML out.

The page contains its style and script and loads nothing else. The script polls ``?part=main`` of the same address for
the part that changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from anchortp_sglang.recovery.report import stages
from anchortp_sglang.recovery.report.stages import ABOUT, Bar, Row
from anchortp_sglang.views.status import byte_size

SHOWN = 12
_PERCENT_PER_LETTER = 1.6
"""Width of a letter, in percent of a track on a phone: wide enough bars show their stage's name."""

_STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #ffffff; --ink: #1c2128; --faint: #626b76; --line: #dde1e6;
  --track: #eef0f3; --good: #1a7f37; --warn: #9a6700; --bad: #cf222e; --on: #ffffff;
  --detected: #b42318; --reaped: #b42318; --fenced: #b54708; --planned: #7a5af8; --forked: #475467; --ready: #98a2b3;
  --replayed: #c4640a; --first_token: #1a7f37; --gave_up: #cf222e; --attached: #475467; --groups_ready: #1f6feb;
  --bytes_moved: #c11574; --weights_bound: #0e7490; --kv_kept: #5b8c1f; --prefixes_rebuilt: #4d7c0f; --bound: #3f6fb5; }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --card: #161b22; --ink: #e6edf3; --faint: #8d96a0;
  --line: #2b323b; --track: #1f262f; --good: #3fb950; --warn: #d29922; --bad: #f85149; --ready: #57606c;
  --forked: #6e7781; --attached: #6e7781; --planned: #8b6df5; --first_token: #238636; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.45 system-ui, sans-serif }
main, header { max-width: 1100px; margin: 0 auto; padding: 0 16px }
header { display: flex; align-items: baseline; gap: 12px; padding-top: 18px }
h1 { font-size: 20px; margin: 0 } h2 { font-size: 16px; margin: 0 }
#live { color: var(--faint); font-size: 13px; margin-left: auto } #live.gone { color: var(--bad) }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px;
  margin: 14px 0 }
.badge { border-radius: 99px; padding: 1px 10px; font-size: 13px; color: var(--on); background: var(--warn) }
.badge.serving { background: var(--good) } .badge.down, .badge.lost { background: var(--bad) }
.title { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: baseline }
.faint { color: var(--faint); font-size: 13px } .bad { color: var(--bad) }
.devices { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 10px }
.device { border: 1px solid var(--line); border-radius: 8px; padding: 5px 10px; font-size: 13px }
.device.lost { color: var(--faint); text-decoration: line-through }
dl { display: flex; flex-wrap: wrap; gap: 8px 26px; margin: 10px 0 12px }
dl div { display: flex; flex-direction: column } dt { color: var(--faint); font-size: 12px }
dd { margin: 0; font-size: 17px; font-variant-numeric: tabular-nums }
.row { display: grid; grid-template-columns: 130px 1fr; gap: 10px; align-items: center; margin: 5px 0 }
.row .who { font-size: 13px; white-space: nowrap }
.track { position: relative; height: 24px; background: var(--track); border-radius: 4px }
.track.lost { background: repeating-linear-gradient(135deg, var(--track) 0 6px, transparent 6px 12px) }
.bar { position: absolute; top: 0; height: 100%; min-width: 2px; border-radius: 3px; color: var(--on); font-size: 11px;
  line-height: 24px; padding: 0 0; overflow: hidden; text-align: center; white-space: nowrap }
.row.moves .track .bar { height: 17px; line-height: 17px } .row.moves .track .bar.moving { top: 19px; height: 5px }
.tick { position: absolute; top: 0; font-size: 11px; color: var(--faint); white-space: nowrap;
  transform: translateX(-50%) }
.tick.first { transform: none } .tick.last { transform: translateX(-100%) }
.axis .track { background: none; height: 15px }
summary { cursor: pointer; color: var(--faint); font-size: 13px; margin-top: 8px }
table { border-collapse: collapse; font-size: 13px; margin-top: 6px } .scroll { overflow-x: auto }
td, th { padding: 2px 12px 2px 0; text-align: left; font-weight: 400 }
th { color: var(--faint) } td.n { text-align: right; font-variant-numeric: tabular-nums }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px }
@media (max-width: 640px) { main, header { padding: 0 10px } section { padding: 12px }
  .row { grid-template-columns: 1fr; gap: 1px; margin: 7px 0 } dl { gap: 8px 20px } .bar { font-size: 10px } }
"""

_SCRIPT = """
const live = document.getElementById('live'), main = document.querySelector('main');
let shown = null, heard = Date.now();
async function look() {
  if (document.hidden) return;
  try {
    const how = { cache: 'no-store', signal: AbortSignal.timeout(3000) };
    const answer = await fetch(location.pathname + '?part=main', how);
    if (!answer.ok) throw new Error(answer.status);
    const text = await answer.text();
    heard = Date.now();
    if (text !== shown) {
      const open = new Set([...main.querySelectorAll('details[open]')].map(d => d.id));
      main.innerHTML = shown = text;
      for (const d of main.querySelectorAll('details')) d.open = open.has(d.id);
    }
    live.textContent = 'live'; live.className = '';
  } catch (error) {
    live.textContent = 'no answer for ' + Math.round((Date.now() - heard) / 1000) + ' s'; live.className = 'gone';
  }
}
if (location.protocol.startsWith('http')) setInterval(look, 1000); else live.textContent = 'saved page';
"""


def page(status: Mapping[str, Any]) -> str:
    """Return the whole HTML document."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>anchortp: recoveries</title><style>{_STYLE}</style></head>\n"
        '<body><header><h1>Recoveries</h1><span id="live"></span></header>\n'
        f"<main>{main_part(status)}</main>\n<script>{_SCRIPT}</script></body></html>\n"
    )


def main_part(status: Mapping[str, Any]) -> str:
    """Return the HTML of the server's state and its last recoveries, newest first."""
    recoveries = list(status.get("recoveries") or [])[-SHOWN:]
    parts = [_server(status), *map(_recovery, reversed(recoveries))]
    if not recoveries:
        parts.append('<section class="faint">No recoveries so far.</section>')
    return "\n".join(parts)


def _server(status: Mapping[str, Any]) -> str:
    state = str(status.get("state", "?"))
    devices = "".join(map(_device, status.get("devices") or []))
    return (
        f'<section><div class="title"><span class="badge {_text(state)}">{_text(state)}</span>'
        f"<span>TP={_text(status.get('tp_size', '?'))}</span>"
        f'<span class="faint">generation {_text(status.get("generation", "?"))}</span></div>'
        f'<div class="devices">{devices}</div></section>'
    )


def _device(device: Mapping[str, Any]) -> str:
    state = str(device.get("state", "?"))
    held = f"rank {device['rank']} · {byte_size(device['weight_bytes'])}" if device.get("rank") is not None else state
    return f'<span class="device {_text(state)}">device {_text(device.get("id"))} · {_text(held)}</span>'


def _recovery(recovery: Mapping[str, Any]) -> str:
    number, total_s = recovery.get("generation", 0), stages.end_s(recovery)
    failed = recovery.get("failed")
    return (
        f'<section class="recovery"><div class="title"><h2>{_text(stages.headline(recovery))}</h2>'
        f'<span class="faint">generation {_text(number)} · {_text(recovery.get("reason", ""))}</span></div>'
        + (f'<p class="bad">gave up: {_text(failed)}</p>' if failed else "")
        + f"<dl>{''.join(_figures(recovery))}</dl>"
        + "".join(_row(row, total_s) for row in stages.rows(recovery))
        + _axis(total_s)
        + f'<details id="stages-{_text(number)}"><summary>all stages in seconds</summary>{_table(recovery)}</details>'
        + "</section>"
    )


def _figures(recovery: Mapping[str, Any]) -> Iterator[str]:
    def figure(name: str, value: str) -> str:
        return f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>"

    yield figure("first token", _seconds(recovery.get("tfs_s")))
    if recovery.get("ttp_s") is not None:
        yield figure("full throughput after", f"{float(recovery['ttp_s']):.1f} s")
    named = {"reload_bytes": "read from disk", "p2p_bytes": "device to device", "copied_bytes": "copied in place"}
    moved = [(name, recovery[key]) for key, name in named.items() if recovery.get(key)]
    for name, nbytes in moved or [("bytes moved", 0)]:
        yield figure(name, byte_size(nbytes))
    yield figure("requests replayed", str(recovery.get("requests_replayed", 0)))
    kept, redone = recovery.get("tokens_reused", 0), recovery.get("tokens_recomputed", 0)
    yield figure("tokens kept / redone", f"{kept} / {redone}")


def _row(row: Row, total_s: float) -> str:
    bars = "".join(_bar(bar, total_s) for bar in row.bars)
    if row.moving is not None:
        bars += _bar(row.moving, total_s, moving=True)
    who = f'{_text(row.label)} <span class="faint">{_text(row.note)}</span>'
    kind, lost = ("row moves" if row.moving else "row"), (" lost" if row.lost else "")
    return f'<div class="{kind}"><div class="who">{who}</div><div class="track{lost}">{bars}</div></div>'


def _bar(bar: Bar, total_s: float, moving: bool = False) -> str:
    left, width = _percent(bar.start_s, total_s), _percent(bar.took_s, total_s)
    name = bar.stage.replace("_", " ")
    tip = f"{name}: {bar.took_s:.3f} s, until {bar.end_s:.3f} s ({ABOUT.get(bar.stage, '')})"
    label = _text(name) if width >= _PERCENT_PER_LETTER * len(name) and not moving else ""
    place = f"left:{left:.2f}%;width:{width:.2f}%;background:var(--{_text(bar.stage)}, var(--forked))"
    return f'<div class="bar{" moving" if moving else ""}" style="{place}" title="{_text(tip)}">{label}</div>'


def _axis(total_s: float) -> str:
    marks = ""
    for at_s in stages.ticks(total_s):
        left = _percent(at_s, total_s)
        end = " first" if left < 3 else " last" if left > 97 else ""
        marks += f'<span class="tick{end}" style="left:{left:.2f}%">{at_s:g} s</span>'
    return f'<div class="row axis"><div class="who"></div><div class="track">{marks}</div></div>'


def _table(recovery: Mapping[str, Any]) -> str:
    lines = []
    for row in stages.rows(recovery):
        for bar in (*row.bars, *([row.moving] if row.moving else [])):
            key = f'<span class="key" style="background:var(--{_text(bar.stage)}, var(--forked))"></span>'
            lines.append(
                f"<tr><td>{_text(row.label)}</td><td>{key}{_text(bar.stage.replace('_', ' '))}</td>"
                f'<td class="n">{bar.took_s:.3f}</td><td class="n">{bar.end_s:.3f}</td>'
                f'<td class="faint">{_text(ABOUT.get(bar.stage, ""))}</td></tr>'
            )
    head = "<tr><th></th><th>stage</th><th>took</th><th>at</th><th>at its end</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(lines)}</table></div>'


def _percent(part_s: float, total_s: float) -> float:
    return 100.0 * part_s / total_s if total_s > 0 else 0.0


def _seconds(value: Any) -> str:
    return "–" if value is None else f"{float(value):.2f} s"


def _text(value: Any) -> str:
    return escape(str(value))
