"""When ranks capture decode graphs: not at their start, which clients wait for, but once nobody does."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from anchortp_sglang.recovery.processes.generation import Generation

log = logging.getLogger(__name__)

_POLL_S = 0.25
_PATIENCE_S = 30.0
"""A server that is never idle captures after so long under load: a pause of seconds for faster steps from then on."""


class GraphCapture:
    """On the event loop. ``batch_sizes``: none where ranks stay eager; ``serving``: the generation that serves;
    ``captured``: whether the current generation has its graphs."""

    def __init__(
        self, batch_sizes: Sequence[int], serving: Callable[[], Generation | None], captured: Callable[[], bool]
    ) -> None:
        self._batch_sizes = list(batch_sizes)
        self._serving = serving
        self._captured = captured
        self._asked = False

    async def capture(self, generation: Generation, idle: Callable[[], bool], ask: Callable[[list[int]], None]) -> None:
        """Ask this generation's ranks once its first requests are done, or at last. ``idle``: no request is open."""
        if not self._batch_sizes:
            return
        patience_ends = time.monotonic() + _PATIENCE_S
        await asyncio.sleep(_POLL_S)
        while not idle() and time.monotonic() < patience_ends:
            await asyncio.sleep(_POLL_S)
        if self._serving() is generation and self._batch_sizes:
            self._asked = True
            ask(self._batch_sizes)

    def on_fault(self) -> None:
        """Ranks that died while they may have been capturing are not asked again: it could go on for ever."""
        asked, self._asked = self._asked, False
        if asked and not self._captured():
            log.error("anchortp: ranks died while they captured decode graphs; they stay eager from now on")
            self._batch_sizes = []
