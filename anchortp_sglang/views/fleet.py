"""Terminal view of a fleet's status (``GET /anchortp/status`` of an ingress). Pure: a dict in, renderables out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_COLOURS = {"serving": "green", "degraded": "yellow", "recovering": "yellow", "starting": "cyan"}


def fleet_view(status: Mapping[str, Any]) -> RenderableType:
    """Show what Serve says of the deployments, the servers, and what the asked ingress has served."""
    serve, ingress = status.get("serve") or {}, status.get("ingress") or {}
    parts: list[RenderableType] = [Text(f"fleet: {serve.get('status', 'unknown')}", style="bold")]
    if "error" in serve:
        parts.append(Text(f"Serve does not say more: {serve['error']}", style="yellow"))
    for name, one in (serve.get("deployments") or {}).items():
        states = ", ".join(f"{count} {state.lower()}" for state, count in (one.get("replicas") or {}).items())
        message = f": {one['message']}" if one.get("message") else ""
        parts.append(Text(f"{name}: {str(one.get('status', '')).lower()}, {states or 'no replicas'}{message}"))
    parts.append(_servers(status.get("servers") or []))
    if ingress:
        parts.append(
            Text(
                f"this ingress: {ingress.get('open', 0)} open, {ingress.get('served', 0)} served,"
                f" {ingress.get('failed', 0)} failed, {ingress.get('moved', 0)} moves"
                f" (longest pause {ingress.get('longest_pause_s', 0.0):.2f} s)"
            )
        )
    return Group(*parts)


def _servers(servers: list[Mapping[str, Any]]) -> RenderableType:
    if not servers:
        return Text("no servers: Serve is starting them, or has no node with room for one", style="bold red")
    table = Table(box=None, pad_edge=False)
    for heading in ("server", "state", "node", "url"):
        table.add_column(heading, overflow="fold")
    for heading in ("devices", "open", "generation", "recoveries"):
        table.add_column(heading, justify="right")
    for one in sorted(servers, key=lambda server: str(server.get("name"))):
        said = one.get("status") or {}
        state = said.get("state", "unreachable") if one.get("up") else "lost"
        devices = f"{said['tp_size']}/{len(said['devices'])}" if said else "-"
        numbers = [devices, *(str(said.get(name, "-")) for name in ("open_requests", "generation"))]
        table.add_row(
            str(one.get("name")),
            Text(state if said else f"{state}: {one.get('error', '')}", style=_COLOURS.get(state, "bold red")),
            str(one.get("node", ""))[:12],
            str(one.get("url")),
            *numbers,
            str(len(said.get("recoveries") or [])) if said else "-",
        )
    return table
