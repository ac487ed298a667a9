"""Checks whether this process may become a zygote or be forked into one: a fork can break things in its children."""

from __future__ import annotations

from pathlib import Path

from anchortp_sglang.platforms.cuda.fork_guard import HARMLESS_THREADS, driver_in_use

__all__ = ["unfit_to_fork"]


def unfit_to_fork() -> str | None:
    """Return why this process must not become a zygote, on any platform; None if it may."""
    names = [name for name in _threads() if not name.startswith(HARMLESS_THREADS)]
    if len(names) > 1:
        return f"it has {len(names)} threads"
    return "CUDA is initialised" if driver_in_use() else None


def _threads() -> list[str]:
    """Return the names of this process's threads; those that end meanwhile are left out."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found.append((task / "comm").read_text().strip())
        except FileNotFoundError:
            pass
    return found
