"""Follows the recovery under way: when it ends, and how long the full throughput takes after it."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from anchortp_sglang.recovery.report.record import Recoveries, Recovery
from anchortp_sglang.recovery.report.throughput import WINDOW_S, Throughput

_POLL_S = 0.05


class RecoveryProgress:
    """Follows recoveries; on the event loop only.

    ``serving`` returns whether a generation serves now; ``awaited``, whether any client waits for a token; ``spawn``
    runs a coroutine as a task. ``recovery``: the one under way, until a token is delivered, no client waits for one, or
    it is given up.
    """

    def __init__(
        self,
        recoveries: Recoveries,
        serving: Callable[[], bool],
        awaited: Callable[[], bool],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self.recovery: Recovery | None = None
        self._recoveries = recoveries
        self._serving = serving
        self._awaited = awaited
        self._spawn = spawn
        self._throughput = Throughput()

    def begin(self) -> None:
        """Begin the record of a recovery; ends the previous one if no token was delivered since."""
        self.finish()
        self.recovery = self._recoveries.begin()

    def on_tokens(self, tokens: int) -> None:
        """Note new tokens for clients: the first ones after a recovery end it."""
        self._throughput.note(tokens, time.monotonic())
        recovery = self.recovery
        if recovery is None or not self._serving():
            return
        recovery.stage("first_token")
        recovery.tfs_s = recovery.stages[-1][1]
        self.finish()
        self._spawn(self._measure_peak(recovery, time.monotonic()))

    def resumed(self) -> None:
        """Note that the next generation serves.

        The recovery ends here if no client waits for a token: a later token would say nothing about it.
        """
        if self.recovery is not None:
            self._spawn(self._finish_unless_awaited(self.recovery))

    def give_up(self, reason: str) -> None:
        """End the recovery under way, if any, as failed."""
        if self.recovery is not None:
            self.recovery.failed = reason
            self.recovery.stage("gave_up")
            self.finish()

    def finish(self) -> None:
        """End the recovery under way, if any."""
        recovery, self.recovery = self.recovery, None
        if recovery is not None:
            self._recoveries.finish(recovery)

    async def _finish_unless_awaited(self, recovery: Recovery) -> None:
        while self.recovery is recovery and self._serving():
            if not self._awaited():
                return self.finish()
            await asyncio.sleep(_POLL_S)

    async def _measure_peak(self, recovery: Recovery, first_token_at: float) -> None:
        """Measure TTP, unless another fault comes first."""
        await asyncio.sleep(2 * WINDOW_S)
        if self._serving() and self._recoveries.last() is recovery:
            recovery.ttp_s = self._throughput.time_to_peak(first_token_at)
