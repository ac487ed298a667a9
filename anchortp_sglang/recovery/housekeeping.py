"""Does a serving generation's background work, which no client waits for.

A fault ends it before its next step. A step under way in its thread goes on: what it makes is then of no use.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from anchortp_sglang.anchor.client import AnchorError
from anchortp_sglang.options import StandbyMode
from anchortp_sglang.recovery.processes.generation import Generation
from anchortp_sglang.recovery.processes.server_processes import ServerProcesses
from anchortp_sglang.threads import in_thread

log = logging.getLogger(__name__)

_FIRST_LOOK_S = 1.0
_LOOK_EVERY_S = 5.0


class Housekeeping:
    """Seals weights and checks the helper processes. ``serving`` returns the generation that serves now, or None.

    ``standby``: what is prepared for the next fault.
    """

    def __init__(
        self, processes: ServerProcesses, standby: StandbyMode, serving: Callable[[], Generation | None]
    ) -> None:
        self._processes = processes
        self._standby = standby
        self._serving = serving
        self._look = asyncio.Event()

    def look_now(self) -> None:
        """Look after the helpers at once instead of in some seconds."""
        self._look.set()

    async def seal_and_free(self, generation: Generation) -> None:
        """Seal the weights of a new generation, and free those of the old one."""
        try:
            await in_thread(self._processes.anchors.seal_and_free, generation)
            await in_thread(self._processes.kv_capacity, generation.ownership)  # before the status asks on this loop
        except AnchorError as error:
            log.info("anchortp: unused memory is not freed yet (generation %d): %s", generation.number, error)

    async def check_helpers(self, generation: Generation) -> None:
        """Fork the next ranks once the first tokens are out, and check from then on that all helpers answer."""
        await asyncio.sleep(_FIRST_LOOK_S)
        while self._serving() is generation:
            try:
                await in_thread(self._processes.prepare_next, generation, self._standby)
            except Exception:  # whatever it is, the checks must go on: without them nothing is ready for a fault
                log.exception(
                    "anchortp: a check of the helper processes failed; the next one is in %g s", _LOOK_EVERY_S
                )
            with suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), _LOOK_EVERY_S)
            self._look.clear()
