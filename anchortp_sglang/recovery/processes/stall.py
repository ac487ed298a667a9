"""Judges from outside whether starting ranks make progress, by their states and the CPU time that they take."""

from collections.abc import Sequence

from anchortp_sglang.recovery.processes.pidfd import Usage

STOPPED = ("T", "t")
_ASLEEP = ("S", *STOPPED)
_POLLS = 10
"""Fewest looks that must agree: time in which main itself did not run does not count."""


class StallWatch:
    """Judges the ranks of one start. Pure: states and times (seconds) are arguments.

    Ranks that are runnable but get no CPU time (a throttled container), or wait for a disk, are not stalled.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._ticks = -1
        self._asleep = _Lasting(limit_s)
        self._stopped = _Lasting(limit_s)

    def stalled(self, ranks: Sequence[Usage | None], now: float) -> bool:
        """Return whether for the limit all ranks have slept without any CPU time, or one has been stopped.

        The others may take CPU time while they wait for a stopped one: they look for it again and again.
        """
        living = [rank for rank in ranks if rank is not None]
        ticks = sum(rank.ticks for rank in living)
        asleep = ticks == self._ticks and all(rank.state in _ASLEEP for rank in living)
        self._ticks = ticks
        stopped = any(rank.state in STOPPED for rank in living)
        return any([self._asleep.holds(asleep, now), self._stopped.holds(stopped, now)])


class _Lasting:
    """A condition that counts once it has held for a while, at many looks."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since = 0.0
        self._polls = 0

    def holds(self, now_true: bool, now: float) -> bool:
        if not now_true or self._polls == 0:
            self._since, self._polls = now, 0
        self._polls += 1
        return self._polls > _POLLS and now - self._since > self._limit_s
