"""Folders that SGLang and torch need to write to while they are imported. Imports neither."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from anchortp_sglang.anchor.run_base import make_private

__all__ = ["home_defaults"]


def home_defaults(environ: Mapping[str, str]) -> dict[str, str]:
    """Set HOME to a folder of this user in ``$TMPDIR`` if it is unset, does not exist, or takes no caches.

    SGLang keeps torch's caches in ``~/.cache/sglang`` (environ.SGLANG_CACHE_DIR), and torch makes them when it is
    imported. Raises ValueError if there is no folder for temporary files, where SGLang has its sockets.
    """
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError:
        raise ValueError("no folder for temporary files can be written: mount one at /tmp, or set TMPDIR") from None
    home = environ.get("HOME") or os.path.expanduser("~")
    if os.path.isabs(home) and _takes_caches(home):
        return {}
    instead = Path(temporary, f"anchortp-home-{os.geteuid()}")
    make_private(instead)
    return {"HOME": str(instead)}


def _takes_caches(home: str) -> bool:
    cache = os.path.join(home, ".cache")
    try:
        os.makedirs(cache, exist_ok=True)
    except OSError:
        return False
    return os.access(cache, os.W_OK | os.X_OK)
