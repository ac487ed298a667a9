"""Memory of a whole server: what its processes hold, shared pages counted once, and memfds nobody maps."""

import re
from pathlib import Path

import psutil

_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ (\d+) +(.*)$")


def total_bytes(pids: list[int]) -> int:
    """PSS of all processes, plus allocated pages of their memfds that no mapping accounts for."""
    pss, mapped, allocated = 0, {}, {}
    for pid in pids:
        pss += _read_smaps(pid, mapped)
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if str(fd.readlink()).startswith("/memfd:"):
                    facts = fd.stat()
                    allocated[facts.st_ino] = facts.st_blocks * 512
            except FileNotFoundError:
                continue
    return pss + sum(max(0, size - mapped.get(inode, 0)) for inode, size in allocated.items())


def _read_smaps(pid: int, mapped: dict[int, int]) -> int:
    """PSS of a process; adds that of its memfd mappings to ``mapped``, by inode."""
    total, inode = 0, None
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if match := _MAPPING.match(line):
            inode = int(match[1]) if match[2].startswith("/memfd:") else None
        elif line.startswith("Pss:"):
            kilobytes = int(line.split()[1])
            total += kilobytes << 10
            if inode is not None:
                mapped[inode] = mapped.get(inode, 0) + (kilobytes << 10)
    return total


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
