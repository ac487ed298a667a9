"""The values that ``--anchor-*`` options take: from text or Python to what AnchorOptions holds, or OptionsError."""

import math
import os
from typing import Any, Literal

FLAG_PREFIX = "--anchor-"

AVAILABLE: Literal["available"] = "available"
"""A server starts with those devices that can be started."""
StartDevices = tuple[int, ...] | Literal["available"] | None
"""Devices that a server starts with, by id; AVAILABLE; or None for all."""

# A Unix socket's path has at most 107 bytes (sun_path); the rest is for a run id and the socket's name.
MAX_RUN_DIR_BYTES = 80


class OptionsError(ValueError):
    """An ``--anchor-*`` option is unknown, malformed or out of range. The text says which."""


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def as_widths(value: Any) -> tuple[int, ...]:
    try:
        widths = integers(value) if isinstance(value, str) else tuple(value)
    except (TypeError, ValueError):
        widths = ()
    if not widths or not all(isinstance(width, int) and width >= 1 for width in widths):
        raise OptionsError(f"--anchor-widths takes whole numbers above 0, for instance 2,1,1; got {value!r}")
    return widths


def as_devices(value: Any) -> StartDevices:
    if value == AVAILABLE:
        return AVAILABLE
    try:
        devices = tuple(sorted(integers(value) if isinstance(value, str) else value))
    except (TypeError, ValueError):
        devices = ()
    valid = all(isinstance(device, int) and not isinstance(device, bool) and device >= 0 for device in devices)
    if not devices or not valid or len(set(devices)) < len(devices):
        raise OptionsError(
            f"--anchor-start-devices takes different device ids, for instance 0,1,3, or available; got {value!r}"
        )
    return devices


def as_symbols(value: Any) -> tuple[str, ...]:
    try:
        symbols = names(value) if isinstance(value, str) else tuple(value)
    except TypeError:
        symbols = ()
    if not symbols or not all(isinstance(symbol, str) and symbol for symbol in symbols):
        raise OptionsError(f"--anchor-allow-drift takes symbols of SGLang with commas between them; got {value!r}")
    return symbols


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionsError(f"{FLAG_PREFIX}{name} takes a whole number of at least 1; got {value!r}")


def check_seconds(name: str, value: Any, zero_allowed: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (value == 0 and not zero_allowed):
        least = "of at least 0" if zero_allowed else "above 0"
        raise OptionsError(f"{FLAG_PREFIX}{name} takes a number of seconds {least}; got {value!r}")


def check_amount(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise OptionsError(f"{FLAG_PREFIX}{name} takes a number above 0; got {value!r}")


def check_run_dir(path: str | None) -> None:
    if path is not None and len(os.fsencode(path)) > MAX_RUN_DIR_BYTES:
        raise OptionsError(
            f"--anchor-run-dir {path} is longer than {MAX_RUN_DIR_BYTES} bytes, too long for the Unix sockets"
            " inside it: choose a shorter path, for instance under /run or /tmp"
        )
