"""Reads how much memory and CPU time the control groups of this process, such as a container's, leave it.

Reads ``/proc/self/cgroup``, ``/proc/self/mountinfo`` and the files they lead to; cgroup v1, v2, and both at once. A
file that cannot be read sets no limit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["MemoryRoom", "cpu_quota", "memory_room"]


@dataclass(frozen=True)
class MemoryRoom:
    """Memory that can be taken without swapping or being killed; ``bound``: what sets the limit."""

    nbytes: int
    bound: str

    def less(self, nbytes: int) -> MemoryRoom:
        """Subtract ``nbytes`` that will be taken."""
        return MemoryRoom(
            max(0, self.nbytes - nbytes), f"{self.bound}, less {nbytes >> 20} MiB for processes and adapters"
        )

    def __str__(self) -> str:
        return f"{self.nbytes >> 20} MiB are available ({self.bound})"


@dataclass(frozen=True)
class _Level:
    """A control group: the process's own, or one above it."""

    folder: Path
    version: int

    def number(self, name: str) -> int | None:
        """Read a number; None for "max" or if it cannot be read."""
        try:
            return int((self.folder / name).read_text())
        except (OSError, ValueError):
            return None

    def table(self, name: str) -> dict[str, int]:
        """Read a file of lines ``key value``."""
        try:
            pairs = [line.split() for line in (self.folder / name).read_text().splitlines()]
            return {key: int(value) for key, value in pairs}
        except (OSError, ValueError):
            return {}


def memory_room(host_available_bytes: int, root: Path = Path("/")) -> MemoryRoom:
    """Return the least of what the host has and what each group allows beyond what it uses and cannot give back.

    ``root``: the root of the file system to read.
    """
    rooms = [MemoryRoom(host_available_bytes, "of the host's memory")]
    for level in _levels(root, "memory"):
        room = _room_v2(level) if level.version == 2 else _room_v1(level)
        if room is not None:
            rooms.append(room)
    return min(rooms, key=lambda room: room.nbytes)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many CPUs' worth of time this process may use; None without a limit."""
    quotas = [_quota_v2(level) if level.version == 2 else _quota_v1(level) for level in _levels(root, "cpu")]
    return min((quota for quota in quotas if quota is not None), default=None)


def _room_v2(level: _Level) -> MemoryRoom | None:
    # Above memory.high the kernel does not kill, but stops the group for longer and longer: as bad as the limit.
    limits = {name: level.number(name) for name in ("memory.max", "memory.high")}
    name, limit = min(((n, b) for n, b in limits.items() if b is not None), key=lambda it: it[1], default=("", None))
    if limit is None:
        return None
    stat = level.table("memory.stat")
    # Anonymous memory, shmem and memfds are on other lists than file pages, which the kernel drops when it must.
    reclaimable = sum(stat.get(key, 0) for key in ("active_file", "inactive_file", "slab_reclaimable"))
    return _room(level, name, limit, (level.number("memory.current") or 0) - reclaimable)


def _room_v1(level: _Level) -> MemoryRoom | None:
    stat = level.table("memory.stat")
    # The second one counts groups above a container, which the process cannot see.
    limits = (level.number("memory.limit_in_bytes"), stat.get("hierarchical_memory_limit"))
    limit = min((each for each in limits if each is not None), default=None)
    if limit is None:
        return None
    reclaimable = sum(stat.get(key, 0) for key in ("total_active_file", "total_inactive_file"))
    return _room(level, "memory.limit_in_bytes", limit, (level.number("memory.usage_in_bytes") or 0) - reclaimable)


def _room(level: _Level, name: str, limit: int, used: int) -> MemoryRoom:
    return MemoryRoom(max(0, limit - max(0, used)), f"{level.folder / name} is {limit >> 20} MiB")


def _quota_v2(level: _Level) -> float | None:
    try:
        quota, period = (level.folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(level: _Level) -> float | None:
    quota, period = level.number("cpu.cfs_quota_us"), level.number("cpu.cfs_period_us")
    return quota / period if quota is not None and period and quota > 0 else None


def _levels(root: Path, controller: str) -> Iterator[_Level]:
    """Yield the groups of this process that may have the controller, from its own upwards as far as visible."""
    paths = dict(_paths(root))
    for mounted, point, version in _mounts(root, controller):
        path = paths.get(controller if version == 1 else "")
        if path is None:
            continue
        top = root / point.lstrip("/")
        folder = top / _below(path, mounted)
        while folder != top:
            yield _Level(folder, version)
            folder = folder.parent
        yield _Level(top, version)


def _below(path: str, mounted: str) -> PurePosixPath:
    """Return where the group ``path`` is in a mount of the group ``mounted``; the mount's top if that is not known.

    ``..`` in either path leads out of this process's cgroup namespace.
    """
    try:
        below = PurePosixPath(path).relative_to(mounted)
    except ValueError:
        return PurePosixPath()
    return PurePosixPath() if ".." in below.parts else below


def _paths(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (controller, path) for each controller of v1, and ("", path) for v2."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, known = line.partition(":")
        controllers, separator, path = known.partition(":")
        if separator:
            yield from ((controller, path) for controller in controllers.split(","))


def _mounts(root: Path, controller: str) -> Iterator[tuple[str, str, int]]:
    """Yield (group at its top, mount point, version) of mounts that show the controller's groups; see proc(5)."""
    for line in _lines(root / "proc/self/mountinfo"):
        place, _, source = line.partition(" - ")
        kind, _, options = source.partition(" ")
        options = options.rpartition(" ")[2]
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            mounted, point = (_unescaped(field) for field in place.split(" ")[3:5])
            yield mounted, point, 2 if kind == "cgroup2" else 1


def _lines(path: Path) -> list[str]:
    try:
        return [os.fsdecode(line) for line in path.read_bytes().splitlines()]
    except OSError:
        return []


def _unescaped(field: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field
