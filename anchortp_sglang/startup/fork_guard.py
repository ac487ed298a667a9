"""Whether this process may become a zygote, or be forked into one: what a fork would break in its children."""

from __future__ import annotations

import os

from anchortp_sglang.platforms.cuda.fork_guard import driver_in_use

__all__ = ["unfit_to_fork"]


def unfit_to_fork() -> str | None:
    """Why this process must not become a zygote, whatever its server's platform; None if it may."""
    threads = len(os.listdir("/proc/self/task"))
    return f"it has {threads} threads" if threads != 1 else driver_in_use()
