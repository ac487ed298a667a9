"""Watches processes for their death, by pidfd, and ranks for a hang, by their counters."""

import asyncio
import os
import time
from collections.abc import Callable, Mapping

from anchortp_sglang.recovery.processes.generation import Generation
from anchortp_sglang.recovery.processes.pidfd import Usage, process_state, usage

_HANG_POLL_S = 0.5
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class DeathWatch:
    """Watches pidfds, which become readable when the process is dead. On the event loop only."""

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
        """Stop watching; call this before a watched descriptor is closed."""
        for fd in list(self._fds):
            self._forget(fd)

    def _forget(self, fd: int) -> None:
        if fd in self._fds:
            self._fds.discard(fd)
            self._loop.remove_reader(fd)


_ALONE_FACTOR = 10
"""Factor of the timeout of a single rank, which has no all-reduce to show progress within a step."""

_MOST_PATIENCE = 8


class OwnTime:
    """The clock of hangs: counts the seconds that a generation could have used.

    When main itself could not run (a stopped container, a suspended machine), ranks could not either, so a gap between
    two looks counts as ``most_s`` at most. Where ranks compute but get little CPU (a throttled container), the CPU time
    they got counts. A stopped rank, and ranks that wait for it, use no CPU: for them all seconds count.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._now = 0.0
        self._looked_at: float | None = None
        self._used: dict[int, int] = {}

    def advance(self, wall: float, ranks: Mapping[int, Usage]) -> float:
        """Advance to ``wall`` (monotonic seconds) and return the time. ``ranks``: the living ones, by pid."""
        passed = 0.0 if self._looked_at is None else min(wall - self._looked_at, self._most_s)
        got = [r.ticks - self._used[pid] for pid, r in ranks.items() if r.state == "R" and pid in self._used]
        self._now += min(passed, max(got) / _TICKS_PER_S) if got else passed
        self._looked_at, self._used = wall, {pid: r.ticks for pid, r in ranks.items()}
        return self._now


class HangWatch:
    """Decides whether a generation's counters have not moved for too long. Pure: counters and times are arguments.

    A supposed hang may be a long step, which comes again after the recovery. So it waits twice as long each time, until
    counters have moved for that long without a pause above the timeout. A stopped rank is no long step.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.poll_s = min(_HANG_POLL_S, timeout_s / 4)
        self.time = OwnTime(2 * self.poll_s)
        self._seen: tuple[int, tuple[int, ...]] | None = None
        self._since = 0.0
        self._patience = 1
        self._steady_since = 0.0
        self.waited_s = timeout_s
        """Seconds waited before the last hang was reported."""

    def hung(self, generation: int, beats: tuple[int, ...], now: float, stopped: bool = False) -> bool:
        """Return whether no counter of ``generation`` has moved for the timeout: one stuck rank stops its peers.

        ``stopped``: whether a rank is stopped by a signal (state T).
        """
        timeout_s = self.timeout_s * (_ALONE_FACTOR if len(beats) == 1 else 1)
        if self._seen is None or self._seen[0] != generation or now - self._since > timeout_s:
            self._steady_since = now
        if self._seen != (generation, beats):
            if now - self._steady_since > timeout_s * self._patience:
                self._patience = 1
            self._seen, self._since = (generation, beats), now
        patience = 1 if stopped else self._patience
        if now - self._since <= timeout_s * patience:
            return False
        self.waited_s = timeout_s * patience
        if not stopped:
            self._patience = min(2 * patience, _MOST_PATIENCE)
        return True

    def reset(self) -> None:
        self._seen = None


async def watch_for_hang(watch: HangWatch, serving: Callable[[], Generation | None]) -> Generation:
    """Wait for a hang; return the generation that hangs. ``serving`` returns the one that serves, or None."""
    while True:
        await asyncio.sleep(watch.poll_s)
        generation = serving()
        beats = None if generation is None else generation.beats()
        if generation is None or beats is None:
            watch.reset()
            continue
        seen = {child.pid: usage(child.pid) for child in generation.ranks}
        living = {pid: used for pid, used in seen.items() if used is not None}
        now = watch.time.advance(time.monotonic(), living)
        if watch.hung(generation.number, beats, now, any(used.state == "T" for used in living.values())):
            watch.reset()
            return generation


def hung_ranks(generation: Generation) -> set[int]:
    """Return the stopped ranks (state T), or rank 0 for all of them if none is stopped."""
    stopped = {index for index, child in enumerate(generation.ranks) if process_state(child.pid) == "T"}
    return stopped or {0}
