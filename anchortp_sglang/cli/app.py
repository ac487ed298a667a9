"""The command ``anchortp``: inspect a running server, change its devices, inject faults, plan, measure, check.

Exit codes: 0 success, 1 a check, comparison or fault failed, 2 no server answers or the command line is wrong.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from anchortp_sglang.cli import bench as bench_command
from anchortp_sglang.cli import client as server_client
from anchortp_sglang.cli import devices as devices_commands
from anchortp_sglang.cli import parity
from anchortp_sglang.cli import pause as pause_commands
from anchortp_sglang.cli import plan as plan_command
from anchortp_sglang.cli.arguments import DEFAULT_URL, FLEET_URL, JsonOption, KeyOption, UrlOption

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Inspect, test and check an anchortp-sglang server.",
)


class FaultKind(StrEnum):
    """Faults of ``inject``: kill the rank, kill the rank and its memory, or stop the rank."""

    PROCESS = "process"
    DEVICE = "device"
    HANG = "hang"


@app.command()
def status(
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
    fleet: Annotated[
        bool, typer.Option("--fleet", help=f"Ask a fleet's ingress instead, by default {FLEET_URL}.")
    ] = False,
) -> None:
    """Show the server's devices and its last recoveries, or a fleet's servers."""
    found = _status(FLEET_URL if fleet and url == DEFAULT_URL else url, api_key)
    if fleet and not found.get("fleet"):
        typer.echo(f"anchortp: {url} is one server, no fleet: leave --fleet out", err=True)
        raise typer.Exit(1)
    if as_json:
        return _print_json(found)
    from anchortp_sglang.views.fleet import fleet_view
    from anchortp_sglang.views.status import status_view

    Console().print(fleet_view(found) if found.get("fleet") else status_view(found))


@app.command()
def timeline(
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    last: Annotated[
        int | None, typer.Option("--last", metavar="N", min=1, help="Show the last N recoveries instead of one.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Also draw them by device to a .png or .svg.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw the stages of the last recovery. The server has the same as a page: /anchortp/timeline."""
    recoveries = (_status(url, api_key).get("recoveries") or [])[-(last or 1) :]
    if plot is not None and recoveries:
        _plot_timeline(recoveries, plot)
    if as_json:
        return _print_json(recoveries if last else recoveries[-1] if recoveries else None)
    if not recoveries:
        return typer.echo("no recoveries so far")
    from anchortp_sglang.views.status import timeline_view

    console = Console()
    for recovery in recoveries:
        console.print(timeline_view(recovery, console.width))


def _plot_timeline(recoveries: list[dict[str, Any]], path: Path) -> None:
    from anchortp_sglang.views.picture import PictureError, save
    from anchortp_sglang.views.timeline_plot import picture

    try:
        save(picture(recoveries), path)
    except (PictureError, OSError) as error:
        typer.echo(f"anchortp: {error}", err=True)
        raise typer.Exit(2) from None


@app.command()
def inject(
    device: Annotated[int, typer.Option("--device", min=0, help="Id of the device, as shown by status.")],
    kind: Annotated[FaultKind, typer.Option("--kind", help="Fault to inject.")],
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Inject a fault into a server started with --anchor-allow-injection, and verify its effect."""
    try:
        answer = server_client.inject(url, device, kind.value, api_key)
    except server_client.RefusedError as error:
        answer = {"ok": False, "verified": False, "detail": str(error)}
    except server_client.UnreachableError as error:
        _unreachable(error)
    took_effect = bool(answer.get("ok")) and bool(answer.get("verified"))
    if as_json:
        _print_json(answer)
    else:
        verdict = f"{kind.value} fault at device {device} took effect" if took_effect else "no fault took effect"
        typer.echo(f"{verdict}: {answer.get('detail', '')}", err=not took_effect)
    raise typer.Exit(0 if took_effect else 1)


@app.command()
def doctor(
    run_dir: Annotated[str | None, typer.Option("--run-dir", help="The --anchor-run-dir you intend to use.")] = None,
    sglang: Annotated[
        Path | None,
        typer.Option("--sglang", metavar="PATH", help="Judge the source tree of a fork of SGLang instead."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check whether this machine can run the server. Exit code 1 if a check fails."""
    from anchortp_sglang.cli.doctor import judge_tree, run_checks

    try:
        checks = list(run_checks(run_dir) if sglang is None else judge_tree(sglang))
    except ValueError as error:
        typer.echo(f"anchortp: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        _print_json([asdict(check) for check in checks])
    else:
        colours = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}
        table = Table("", Column("", overflow="fold"), Column("", overflow="fold"), box=None, pad_edge=False)
        table.show_header = False
        for check in checks:
            detail = f"{check.detail}\n-> {check.way_out}" if check.way_out else check.detail
            table.add_row(Text(check.level, style=colours[check.level]), check.name, Text(detail))
        Console().print(table)
    raise typer.Exit(1 if any(check.level == "FAIL" for check in checks) else 0)


app.command()(pause_commands.pause)
app.command("continue")(pause_commands.continue_)
app.command()(devices_commands.drain)
app.command()(devices_commands.rejoin)
app.command()(devices_commands.resize)
app.command()(devices_commands.rebalance)
app.command()(plan_command.plan)
app.command()(parity.parity)
app.add_typer(bench_command.app, name="bench")


def _status(url: str, api_key: str | None) -> dict[str, Any]:
    try:
        return server_client.get_status(url, api_key)
    except server_client.UnreachableError as error:
        _unreachable(error)
    except server_client.RefusedError as error:
        typer.echo(f"anchortp: {error}", err=True)
        raise typer.Exit(1) from None


def _unreachable(error: Exception) -> NoReturn:
    typer.echo(f"anchortp: {error}", err=True)
    raise typer.Exit(2)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def main() -> None:
    """Run the console script ``anchortp``."""
    app(prog_name="anchortp")
