"""Asks once how the host's cores are laid out: SGLang runs ``lscpu`` each time that it looks for free memory."""

from collections.abc import Callable
from typing import Any

_known: list[Any] = []


def around_parse_lscpu_topology(original: Callable[[], Any]) -> Any:
    """AROUND utils.common.parse_lscpu_topology."""
    if not _known:
        _known.append(original())
    return _known[0]
