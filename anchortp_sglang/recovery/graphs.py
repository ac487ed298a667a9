"""Has ranks capture decode graphs when no request is open, as a capture at their start would delay clients."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from anchortp_sglang.rank.messages import CaptureGraphs
from anchortp_sglang.recovery.processes.generation import Generation

log = logging.getLogger(__name__)

_POLL_S = 0.25
_PATIENCE_S = 30.0
"""Time after which a server that is never idle captures under load: a pause of seconds, then faster steps."""


class GraphCapture:
    """Decides when graphs are captured; on the event loop.

    ``batch_sizes``: none where ranks stay eager; ``serving`` returns the generation that serves; ``idle``, whether no
    request is open; ``send`` sends a message to the ranks.
    """

    def __init__(
        self,
        batch_sizes: Sequence[int],
        serving: Callable[[], Generation | None],
        idle: Callable[[], bool],
        send: Callable[[Any], None],
    ) -> None:
        self._batch_sizes = list(batch_sizes)
        self._serving, self._idle, self._send = serving, idle, send
        self._requested = False

    async def capture(self, generation: Generation) -> None:
        """Tell this generation's ranks to capture once its first requests are done, or after ``_PATIENCE_S``."""
        if not self._batch_sizes:
            return
        patience_ends = time.monotonic() + _PATIENCE_S
        await asyncio.sleep(_POLL_S)
        while not self._idle() and time.monotonic() < patience_ends:
            await asyncio.sleep(_POLL_S)
        if self._serving() is generation and self._batch_sizes:
            self._requested = True
            self._send(CaptureGraphs(batch_sizes=self._batch_sizes))

    def on_fault(self, generation: Generation) -> None:
        """Capture no more graphs if ranks may have died of a capture: the next generation could die of it as well."""
        requested, self._requested = self._requested, False
        if requested and not generation.graphs_captured():
            log.error("anchortp: ranks died while they captured decode graphs; they stay eager from now on")
            self._batch_sizes = []
