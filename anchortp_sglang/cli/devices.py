"""The commands ``anchortp drain``, ``rejoin``, ``resize`` and ``rebalance``: change the devices of a running server.

Interrupted (Ctrl-C) before the new generation takes over, they change nothing.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from anchortp_sglang.cli import client
from anchortp_sglang.cli.arguments import DEFAULT_URL, JsonOption, KeyOption, UrlOption
from anchortp_sglang.cli.exits import told

DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only show what would be moved.")]
GenerationOption = Annotated[
    int | None, typer.Option("--generation", metavar="N", help="Do it only if this generation serves.")
]
DeviceOption = Annotated[
    list[int], typer.Option("--device", min=0, help="Id of the device, as shown by status; may be repeated.")
]


def drain(
    device: DeviceOption,
    dry_run: DryRunOption = False,
    generation: GenerationOption = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take devices out of a running server, without losing a request. Returns once they are out."""
    _change({"drain": device}, dry_run, generation, url, api_key, as_json)


def rejoin(
    device: DeviceOption,
    dry_run: DryRunOption = False,
    generation: GenerationOption = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take devices back that were drained, or lost and repaired. Returns once they serve."""
    _change({"rejoin": device}, dry_run, generation, url, api_key, as_json)


def resize(
    devices: Annotated[
        str | None, typer.Option("--devices", metavar="ID,ID,…", help="The devices that are to serve, if they change.")
    ] = None,
    widths: Annotated[
        str | None, typer.Option("--widths", metavar="N,N,…", help="KV heads of each device; columns follow them.")
    ] = None,
    dry_run: DryRunOption = False,
    generation: GenerationOption = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a running server go on with these devices, of those it was started with, or with other shares."""
    given = {"devices": devices, "widths": widths}
    wanted = {name: _numbers(name, text) for name, text in given.items() if text is not None}
    if not wanted:
        raise typer.BadParameter("give --devices, --widths or both")
    _change(wanted, dry_run, generation, url, api_key, as_json)


class Aim(StrEnum):
    """Name what shares of devices can follow."""

    SPEED = "speed"
    MEMORY = "memory"


def rebalance(
    by: Annotated[Aim, typer.Option("--by", help="What shares are to follow, as it is measured now.")],
    dry_run: DryRunOption = False,
    generation: GenerationOption = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give devices of a running server shares by their speed or their memory, if they differ by more than noise."""
    _change({"rebalance": by.value}, dry_run, generation, url, api_key, as_json)


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"give whole numbers, such as 0,1,3; not {text!r}", param_hint=f"--{name}") from None


def _change(
    wanted: dict[str, Any], dry_run: bool, generation: int | None, url: str, api_key: str | None, as_json: bool
) -> None:
    with told():
        answer = client.reconfigure(url, {**wanted, "dry_run": dry_run, "generation": generation}, api_key)
    if as_json:
        return typer.echo(json.dumps(answer, indent=2))
    typer.echo(_describe(answer, dry_run))


def _describe(answer: dict[str, Any], dry_run: bool) -> str:
    serving = f"devices {', '.join(map(str, answer['devices']))} serve, as generation {answer['generation']}"
    plan, measured = answer.get("plan"), [_measured(each) for each in answer.get("measured", ())]
    if plan is None:
        return "\n".join([f"nothing to do: {serving}", *measured])
    done = f"nothing was changed: {serving}; it would be:" if dry_run else f"{serving}, after {answer['seconds']:g} s"
    lines = [done, *measured]
    for each in plan["devices"]:
        lines.append(
            f"  device {each['id']}: {_mib(each['weight_bytes'])} of weights; {_mib(each['stay_bytes'])} stay in place,"
            f" {_mib(each['local_bytes'])} copied within it, {_mib(each['p2p_bytes'])} from others,"
            f" {_mib(each['reload_bytes'])} from the checkpoint"
        )
    before, after = plan["kv_slots"]
    lines.append(f"  moved: {_mib(plan['moved_bytes'])}; shares of this size need {_mib(plan['least_bytes'])} at least")
    if plan["least_s"]:
        lines.append(f"  that takes {plan['least_s']:g} s at least, by --anchor-change-gbps, while requests run")
    lines.append(f"  KV slots: {before} before, {after} after")
    return "\n".join(lines)


def _measured(device: dict[str, Any]) -> str:
    if "bytes_per_s" in device:
        return f"  device {device['id']}: reads {device['bytes_per_s'] / 1e9:.2f} GB/s of weights"
    if device["memory_bytes"] is None:
        return f"  device {device['id']}: shares the host's memory"
    return f"  device {device['id']}: {_mib(device['memory_bytes'])} for weights and KV"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
