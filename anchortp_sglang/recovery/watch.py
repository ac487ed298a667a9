"""Detection: dead processes by pidfd, hung ranks by their counters."""

from __future__ import annotations

import asyncio
import mmap
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from anchortp_sglang.recovery import heartbeat
from anchortp_sglang.recovery.processes import process_state

if TYPE_CHECKING:
    from anchortp_sglang.recovery.generation import Generation

_HANG_POLL_S = 0.5


class DeathWatch:
    """Readers on pidfds, which become readable when the process is dead. On the event loop only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._fds: set[int] = set()

    def watch(self, pidfd: int, on_death: Callable[[], None]) -> None:
        """Call ``on_death`` once, as soon as the process is dead (now, if it is already)."""

        def readable() -> None:
            self._forget(pidfd)
            on_death()

        self._fds.add(pidfd)
        self._loop.add_reader(pidfd, readable)

    def stop(self) -> None:
        """Watch nothing any more; must come before a watched descriptor is closed."""
        for fd in list(self._fds):
            self._forget(fd)

    def _forget(self, fd: int) -> None:
        if fd in self._fds:
            self._fds.discard(fd)
            self._loop.remove_reader(fd)


_ALONE_FACTOR = 10
"""A single rank has no all-reduce to show progress within a step: it gets that much more time."""


class HangWatch:
    """Whether a generation's counters stand still for too long. Fed with what it sees and when: no clock of its own."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.poll_s = min(_HANG_POLL_S, timeout_s / 4)
        self._seen: tuple[int, tuple[int, ...]] | None = None
        self._since = 0.0

    def hung(self, generation: int, beats: tuple[int, ...], now: float) -> bool:
        """True if no counter of ``generation`` has moved for the timeout: one stuck rank stops its peers too."""
        if self._seen != (generation, beats):
            self._seen, self._since = (generation, beats), now
        return now - self._since > self.timeout_s * (_ALONE_FACTOR if len(beats) == 1 else 1)

    def reset(self) -> None:
        self._seen = None


async def watch_for_hang(
    watch: HangWatch, current: Callable[[], Generation | None], lanes: Mapping[int, mmap.mmap]
) -> Generation:
    """Return the generation that hangs. ``current``: the one that serves, or None; ``lanes``: by generation."""
    while True:
        await asyncio.sleep(watch.poll_s)
        generation = current()
        if generation is None or generation.number not in lanes:
            watch.reset()
            continue
        beats = heartbeat.read_beats(lanes[generation.number], generation.ownership.tp_size)
        if watch.hung(generation.number, beats, time.monotonic()):
            watch.reset()
            return generation


def hung_ranks(generation: Generation) -> set[int]:
    """The stopped ranks (state T); rank 0 stands for all if none is."""
    stopped = {index for index, child in enumerate(generation.ranks) if process_state(child.pid) == "T"}
    return stopped or {0}
