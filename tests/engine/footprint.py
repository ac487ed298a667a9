"""Which processes are a server's."""

from pathlib import Path

import psutil


def server_pids(main_pid: int, run_dir: Path | None = None) -> list[int]:
    """A server's process, its descendants, and its anchors, which are no descendants."""
    main = psutil.Process(main_pid)
    pids = [main_pid, *(child.pid for child in main.children(recursive=True))]
    if run_dir is not None:
        wanted = f"--run-dir={run_dir}"
        pids += [process.pid for process in psutil.process_iter() if _mentions(process, wanted)]
    return pids


def _mentions(process: psutil.Process, text: str) -> bool:
    try:
        return any(argument.startswith(text) for argument in process.cmdline())
    except psutil.Error:
        return False
