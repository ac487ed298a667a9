"""Memory of a whole server, and of the machine that a server is measured on."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ (\d+) +(.*)$")


def total_bytes(pids: Sequence[int]) -> int:
    """Return the memory of a server's processes, in bytes: their PSS, and pages of their memfds that none has mapped.

    Processes that end meanwhile do not count.
    """
    pss = 0
    mapped: dict[int, int] = {}
    allocated: dict[int, int] = {}
    for pid in pids:
        try:
            pss += _read_smaps(pid, mapped)
            fds = list(Path(f"/proc/{pid}/fd").iterdir())
        except (FileNotFoundError, ProcessLookupError):
            continue
        for fd in fds:
            try:
                if str(fd.readlink()).startswith("/memfd:"):
                    facts = fd.stat()
                    allocated[facts.st_ino] = facts.st_blocks * 512
            except FileNotFoundError:
                continue
    return pss + sum(max(0, size - mapped.get(inode, 0)) for inode, size in allocated.items())


def touch(gib: float) -> None:
    """Take ``gib`` GiB of free memory, and give them back.

    A virtual machine may have given memory that is free back to its host (free page reporting of the balloon device).
    Then the next process waits for each page, which is nothing of the program that is measured.
    """
    zeros, fd = bytes(1 << 20), os.memfd_create("anchortp-touch")
    try:
        for _ in range(int(gib * 1024)):
            os.write(fd, zeros)
    finally:
        os.close(fd)


def _read_smaps(pid: int, mapped: dict[int, int]) -> int:
    """Return the PSS of a process in bytes; add that of its memfd mappings to ``mapped``, by inode."""
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
