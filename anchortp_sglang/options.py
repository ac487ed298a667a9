"""The operator's options for anchors and recovery, in one frozen record.

The command line (``--anchor-widths 2,1,1``), its help and the keyword arguments of ``anchortp_sglang.Engine``
(``anchor_widths=(2, 1, 1)``) are derived from the fields of :class:`AnchorOptions`. SGLang's own flags pass through.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from anchortp_sglang.option_values import (
    AVAILABLE,
    FLAG_PREFIX,
    OptionsError,
    as_devices,
    as_symbols,
    as_widths,
    check_amount,
    check_count,
    check_run_dir,
    check_seconds,
    integers,
    names,
)

KWARG_PREFIX = "anchor_"

StandbyMode = Literal["off", "cold", "warm"]
"""Mode of preparation for the next fault: nothing waits for it, spare ranks do, or a whole generation."""
RejoinMode = Literal["manual", "auto"]


def _option(default: Any, usage: str, help_text: str, parse: Callable | None = None) -> Any:
    """Make a dataclass field with its flag. Without ``parse`` the flag is a switch that inverts the default.

    A value in brackets (``usage`` "flag [VALUE]") may be left out, and is True then.
    """
    flag, _, metavar = usage.partition(" ")
    metadata = {"flag": FLAG_PREFIX + flag, "help": help_text, "parse": parse, "metavar": metavar}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class AnchorOptions:
    """The ``--anchor-*`` options. Durations are seconds; invalid values raise ``OptionsError``."""

    widths: tuple[int, ...] | None = _option(
        None,
        "widths N,N,...",
        "number of KV heads of each device, for instance 2,1,1 with --tp 3 and 4 KV heads;"
        " the other axes follow in proportion (default: as even as the model allows)",
        integers,
    )
    rotate_heads: bool = _option(
        False,
        "rotate-heads",
        "give KV heads (with their query heads) and whole experts that do not divide evenly to different devices in"
        " different layers, so that all devices fill up alike; not with --anchor-widths",
    )
    min_devices: int | None = _option(
        None,
        "min-devices N",
        "with fewer devices the server stops serving: open requests end with an error, /health says 503 (default: 1;"
        " on GPUs the fewest that leave room for a third of the KV slots that all devices have room for)",
        int,
    )
    linger_s: float = _option(
        0.0,
        "linger SECONDS",
        "time for which anchors keep weights and KV after the server has died, for a restarted server to take over",
        float,
    )
    run_dir: str | None = _option(
        None,
        "run-dir PATH",
        "directory of the sockets, mode 0700, owned by the server's user (default: chosen by port)",
        str,
    )
    hang_timeout_s: float = _option(
        30.0,
        "hang-timeout SECONDS",
        "ranks without progress (a layer, or a turn of their loop) for this long count as hung and are replaced",
        float,
    )
    recovery_deadline_s: float = _option(
        120.0,
        "recovery-deadline SECONDS",
        "a recovery that takes longer is given up: every open request ends with an error",
        float,
    )
    max_body_mib: float = _option(
        64.0,
        "max-body-mib MIB",
        "longest HTTP body; longer ones get a 413, and a prompt of a million tokens takes about 10 MiB",
        float,
    )
    allow_injection: bool = _option(
        False, "allow-injection", "let 'anchortp inject' kill ranks and devices of this server"
    )
    allow_journals: bool = _option(
        False,
        "allow-journals",
        "serve POST /anchortp/journaled: requests that another server can go on with, and the rest of those of others",
    )
    allow_drift: bool | tuple[str, ...] = _option(
        False,
        "allow-drift [SYMBOL,...]",
        "start although the installed SGLang differs, in these symbols, or in any, from the one the hooks are for",
        names,
    )
    device_gib: float | None = _option(
        None,
        "device-gib GIB",
        "memory of each device for weights and KV; after a loss the KV cache shrinks to what the others have"
        " (default: no limit, the number of slots stays the same)",
        float,
    )
    kv_mirror: Literal["off", "host"] | None = _option(
        None,
        "kv-mirror off|host",
        "keep a copy of the KV cache in host memory, from which a lost device's part is restored"
        " (default: host if there is memory for all of it)",
        str,
    )
    kv_mirror_gib: float | None = _option(
        None,
        "kv-mirror-gib GIB",
        "memory for the mirror; if it is less than the KV cache, the mirror holds what was used last"
        " (default: as much as the KV cache)",
        float,
    )
    kv_mirror_gbps: float = _option(
        4.0, "kv-mirror-gbps GB/S", "bandwidth of copies to the mirror, over all devices, in 10**9 bytes/s", float
    )
    standby: Literal["off", "cold", "warm"] | None = _option(
        None,
        "standby off|cold|warm",
        "what waits for the next fault: nothing; processes that can become ranks; or a whole next generation, which"
        " goes on where killed ranks stopped (default: warm if there is memory for it, else cold)",
        str,
    )
    start_devices: tuple[int, ...] | Literal["available"] | None = _option(
        None,
        "start-devices ID,ID,...|available",
        "start with these devices only, of those that --tp-size numbers from 0, or with those that can be started;"
        " 'anchortp rejoin' adds others (default: all, or the server does not start)",
        str,
    )
    rejoin: Literal["manual", "auto"] = _option(
        "manual",
        "rejoin manual|auto",
        "how a lost device comes back: by 'anchortp rejoin', or by itself, after a pause that doubles each time that it"
        " is lost again",
        str,
    )
    change_gbps: float = _option(
        4.0,
        "change-gbps GB/S",
        "bandwidth of moving weights for a planned change of devices while requests run, over all devices,"
        " in 10**9 bytes/s",
        float,
    )
    overlap: Literal["auto", "on", "off"] = _option(
        "auto",
        "overlap auto|on|off",
        "SGLang's overlap schedule: prepare a step while the one before runs; auto is on for GPUs and off for CPUs,"
        " where it only delays results",
        str,
    )
    share_gpus: bool = _option(
        False,
        "share-gpus",
        "put several devices on one GPU if there are more devices than GPUs (for tests: collectives use gloo)",
    )

    def __post_init__(self) -> None:
        if self.run_dir is not None:
            # Absolute, as anchors change their working directory.
            object.__setattr__(self, "run_dir", os.path.abspath(os.path.expanduser(self.run_dir)))
        if self.widths is not None:
            object.__setattr__(self, "widths", as_widths(self.widths))
        if self.start_devices is not None:
            object.__setattr__(self, "start_devices", as_devices(self.start_devices))
        if not isinstance(self.allow_drift, bool):
            object.__setattr__(self, "allow_drift", as_symbols(self.allow_drift))
        if self.min_devices is not None:
            check_count("min-devices", self.min_devices)
        check_seconds("linger", self.linger_s, zero_allowed=True)
        check_seconds("hang-timeout", self.hang_timeout_s)
        check_seconds("recovery-deadline", self.recovery_deadline_s)
        if self.kv_mirror not in (None, "off", "host"):
            raise OptionsError(f"--anchor-kv-mirror takes off or host; got {self.kv_mirror!r}")
        if self.standby not in (None, "off", "cold", "warm"):
            raise OptionsError(f"--anchor-standby takes off, cold or warm; got {self.standby!r}")
        if self.rejoin not in ("manual", "auto"):
            raise OptionsError(f"--anchor-rejoin takes manual or auto; got {self.rejoin!r}")
        if self.overlap not in ("auto", "on", "off"):
            raise OptionsError(f"--anchor-overlap takes auto, on or off; got {self.overlap!r}")
        for name, gib in (("device-gib", self.device_gib), ("kv-mirror-gib", self.kv_mirror_gib)):
            if gib is not None:
                check_amount(name, gib)
        check_amount("kv-mirror-gbps", self.kv_mirror_gbps)
        check_amount("change-gbps", self.change_gbps)
        check_amount("max-body-mib", self.max_body_mib)
        check_run_dir(self.run_dir)
        if self.start_devices is not None and self.widths is not None:
            raise OptionsError(
                "--anchor-start-devices and --anchor-widths exclude each other: widths are for all devices; start with"
                " all, or give widths later: 'anchortp resize --widths'"
            )
        if self.rotate_heads and self.widths is not None:
            raise OptionsError(
                "--anchor-rotate-heads and --anchor-widths exclude each other: widths are the KV heads of a device in"
                " every layer; leave one of them out"
            )

    @property
    def device_bytes(self) -> int | None:
        """Return ``device_gib`` in bytes."""
        return None if self.device_gib is None else int(self.device_gib * 2**30)

    def check_tp_size(self, tp_size: int) -> None:
        """Raise OptionsError if an option contradicts SGLang's ``--tp-size``."""
        if self.widths is not None and len(self.widths) != tp_size:
            raise OptionsError(
                f"--anchor-widths gives widths to {len(self.widths)} devices, but --tp-size is {tp_size}:"
                f" give one width per device, or --tp-size {len(self.widths)}"
            )
        start = self.start_devices
        named: Sequence[int] = range(tp_size) if start is None or start == AVAILABLE else start
        if max(named) >= tp_size:
            raise OptionsError(
                f"--anchor-start-devices names device {max(named)}; --tp-size {tp_size} numbers devices"
                f" from 0 to {tp_size - 1}"
            )
        if self.min_devices is None:
            return
        if len(named) < self.min_devices <= tp_size:
            raise OptionsError(
                f"--anchor-start-devices names {len(named)} devices, --anchor-min-devices is {self.min_devices}:"
                " name more"
            )
        if self.min_devices > tp_size:
            raise OptionsError(
                f"--anchor-min-devices {self.min_devices} is more than the {tp_size} devices of --tp-size:"
                f" choose 1 to {tp_size}"
            )


_FIELD_OF_FLAG = {f.metadata["flag"]: f for f in fields(AnchorOptions)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the ``--anchor-*`` flags to ``parser`` in their own group."""
    group = parser.add_argument_group("anchortp", "surviving the loss of ranks and devices")
    for flag, option in _FIELD_OF_FLAG.items():
        about: dict[str, Any] = {"dest": KWARG_PREFIX + option.name, "help": _help(option)}
        if option.metadata["parse"] is None:
            group.add_argument(flag, action="store_false" if option.default else "store_true", **about)
        else:
            about |= {"type": option.metadata["parse"], "default": option.default}
            if _takes_no_value_too(option):
                about |= {"nargs": "?", "const": True}
            group.add_argument(flag, metavar=option.metadata["metavar"].strip("[]"), **about)


def _takes_no_value_too(option: Any) -> bool:
    return option.metadata["metavar"].startswith("[")


def _help(option: Any) -> str:
    is_complete = option.metadata["parse"] is None or option.default in (None, False)
    is_complete = is_complete or "default" in option.metadata["help"]
    return option.metadata["help"] if is_complete else f"{option.metadata['help']} (default: {option.default})"


def split_argv(argv: Sequence[str]) -> tuple[AnchorOptions, list[str]]:
    """Split ``argv`` into the ``--anchor-*`` options and SGLang's arguments, in their order."""
    values: dict[str, Any] = {}
    rest: list[str] = []
    tokens = deque(argv)
    while tokens:
        token = tokens.popleft()
        if not token.startswith(FLAG_PREFIX) and token != FLAG_PREFIX.rstrip("-"):
            rest.append(token)
            continue
        flag, has_value, text = token.partition("=")
        option = _FIELD_OF_FLAG.get(flag)
        if option is None:
            raise OptionsError(_unknown(flag, _FIELD_OF_FLAG))
        if option.metadata["parse"] is None:
            if has_value:
                raise OptionsError(f"{flag} is a switch and takes no value; got {text!r}")
            values[option.name] = not option.default
        elif _takes_no_value_too(option) and not has_value and (not tokens or tokens[0].startswith("-")):
            values[option.name] = True
        else:
            values[option.name] = _parse(option, text if has_value else tokens.popleft() if tokens else None)
    return AnchorOptions(**values), rest


def _parse(option: Any, text: str | None) -> Any:
    flag, metavar = option.metadata["flag"], option.metadata["metavar"]
    if text is None or text == "" or text.startswith("--"):
        raise OptionsError(f"{flag} needs a value: {flag} {metavar}")
    try:
        return option.metadata["parse"](text)
    except ValueError:
        raise OptionsError(f"{flag} takes {metavar}; got {text!r}") from None


def _unknown(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
    return f"unknown option {name}; {hint}"


def from_kwargs(kwargs: dict[str, Any]) -> tuple[AnchorOptions, dict[str, Any]]:
    """Split an Engine's keyword arguments into the ``anchor_*`` options and SGLang's.

    A name is the field's (``anchor_linger_s``) or the flag's (``anchor_linger``).
    """
    known = {KWARG_PREFIX + f.name: f.name for f in fields(AnchorOptions)}
    known |= {key.removesuffix("_s"): name for key, name in known.items() if key.endswith("_s")}
    values: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in kwargs.items():
        if not name.startswith(KWARG_PREFIX):
            rest[name] = value
        elif name not in known:
            raise OptionsError(_unknown(name, known))
        elif known[name] in values:
            raise OptionsError(f"{name} is given twice, as {name} and under its other name")
        else:
            values[known[name]] = value
    return AnchorOptions(**values), rest


def print_help(prog: str = "python -m anchortp_sglang.launch_server") -> None:
    """Print the help of SGLang's flags and ours. Only this function imports SGLang."""
    from sglang.srt.server_args import ServerArgs  # prepare_server_args builds its parser the same way

    parser = argparse.ArgumentParser(prog=prog)
    ServerArgs.add_cli_args(parser)
    add_arguments(parser)
    parser.print_help()
