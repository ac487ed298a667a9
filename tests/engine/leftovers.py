"""What a server may not leave behind."""

import os
import time
from pathlib import Path


def processes(job_pid: int, run_base: Path) -> dict[int, str]:
    """Live processes of a job's session, and anchors in its run directories: pid -> command line."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            session, state = _session_and_state(entry)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX" and (session == job_pid or f"--run-dir={run_base}" in command):
            found[int(entry.name)] = command
    return found


def _session_and_state(entry: Path) -> tuple[int, str]:
    fields = (entry / "stat").read_text().rpartition(")")[2].split()
    return int(fields[3]), fields[0]


def wait_gone(job_pid: int, run_base: Path, timeout_s: float = 5) -> dict[int, str]:
    """The processes that are left after a moment."""
    deadline = time.monotonic() + timeout_s
    while (left := processes(job_pid, run_base)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def files(run_base: Path) -> list[str]:
    """Files and sockets below, and run directories; not the empty caches that libraries make."""
    left = [path for path in run_base.rglob("*") if not path.is_dir()] + list(run_base.glob("anchortp/*"))
    return sorted(os.path.relpath(path, run_base) for path in left)
