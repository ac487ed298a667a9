"""Leaks: what a quiet server holds before and after a storm (descriptors, threads, memory, processes, files)."""

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from anchortp_sglang.testing.memory import total_bytes
from anchortp_sglang.testing.process_tree import Tree, is_zombie

_SETTLE_S = 20.0
_POLL_S = 0.5

# Allowed growth: pools fill with use, and the first recovery imports and opens what it needs.
_OPEN_FILES = "files of main"
_SOCKET = "socket:[#]"
_FEW = {_OPEN_FILES: 4, "sockets of main": 2, "threads of main": 8, "memory of main (MiB)": 64}
_ALLOWED = _FEW | {"memory of all (MiB)": 256}
_IMPORTED_MIB = 750
"""Memory of one more interpreter that has imported SGLang: a zygote that was spawned in place of a dead one."""
_SUMS_OF_THE_DEAD = "_0.db"
"""Suffix of the files in which http/dead_series.py adds up the series of dead ranks, one for each kind."""


@dataclass(frozen=True)
class Holdings:
    """A server's holdings. ``figures``: by name. ``roles``: (number of processes, the number there should be).

    ``open_files``: main's, by name, with numbers as ``#``.
    """

    figures: Mapping[str, int]
    roles: Mapping[str, tuple[int, int]]
    open_files: Counter[str] = field(default_factory=Counter)

    def leaked(self, after: "Holdings") -> list[str]:
        """Describe the figures that grew more than allowed, and roles with a wrong number of processes."""
        found = []
        for name, count in after.figures.items():
            before = self.figures.get(name, 0)
            if count - before > _ALLOWED.get(name, 0):
                found.append(f"{name}: {before} before, {count} after")
                if name == _OPEN_FILES:
                    found[-1] += f" ({dict(after.open_files - self.open_files)})"
        for role, (count, expected) in after.roles.items():
            if count != expected:
                found.append(f"processes ({role}): {count} instead of {expected}")
        return found


def holdings(tree: Tree) -> Holdings:
    """Return what ``tree`` holds now."""
    main = psutil.Process(tree.server.pid)
    processes = tree.all()
    roles = tree.roles()
    open_files = Counter(re.sub(r"\d+", "#", link) for link in _descriptors(main.pid))
    spawned = len({_interpreter(pid) for pid in (main.pid, *roles["zygote"], *roles["reserve"])}) - 1
    figures = {
        _OPEN_FILES: open_files.total() - open_files[_SOCKET],
        "sockets of main": open_files[_SOCKET],
        "threads of main": main.num_threads(),
        "memory of main (MiB)": main.memory_info().rss >> 20,
        "memory of all (MiB)": (total_bytes([process.pid for process in processes]) >> 20) - _IMPORTED_MIB * spawned,
        "zombies": sum(is_zombie(process.pid) for process in processes),
        "files in /dev/shm": len(os.listdir("/dev/shm")),
    }
    figures |= {f"files {kind}": count for kind, count in kinds_of_files(tree.folder).items()}
    width = tree.server.status()["tp_size"]
    expected = {"rank": width, "anchor": width, "spare": width - 1, "standby": width}
    by_role = {role: (len(pids), expected.get(role, 1)) for role, pids in roles.items()}
    return Holdings(figures, by_role, open_files)


def _descriptors(pid: int) -> Iterator[str]:
    """Yield what the descriptors of a process refer to."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed in the meantime
            yield os.readlink(descriptor)


def _interpreter(pid: int) -> str:
    """Return where a process has the kernel's vdso: forks of one interpreter have it at one address."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return next(line.partition(" ")[0] for line in maps if line.endswith("[vdso]"))


def kinds_of_files(folder: Path) -> Mapping[str, int]:
    """Count the files below ``folder`` by name, with numbers (pids, generations) as ``#``.

    Logs and the sums of dead ranks' series do not count.
    """
    names = [path.name for path in folder.rglob("*") if path.suffix != ".log"]
    return Counter(re.sub(r"\d+", "#", name) for name in names if not name.endswith(_SUMS_OF_THE_DEAD))


def settled(tree: Tree, before: Holdings | None = None, timeout_s: float = _SETTLE_S) -> Holdings:
    """Wait until nothing has leaked since ``before`` and all roles are filled, at most ``timeout_s``; return what the
    server then holds."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = holdings(tree)
        if not (before or found).leaked(found) or time.monotonic() > deadline:
            return found
        time.sleep(_POLL_S)
