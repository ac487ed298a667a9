"""Detects which processes of the serving generation die or hang, notes it there, and reports the fault."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from anchortp_sglang.anchor.client import AnchorError
from anchortp_sglang.rank.attachment import HOST_DEVICE
from anchortp_sglang.recovery.processes.anchor_respawn import restore_anchor
from anchortp_sglang.recovery.processes.generation import Generation
from anchortp_sglang.recovery.processes.server_processes import ServerProcesses
from anchortp_sglang.recovery.watch import DeathWatch, HangWatch, hung_ranks, watch_for_hang
from anchortp_sglang.threads import in_thread

log = logging.getLogger(__name__)

_ANCHOR_GRACE_S = 0.2


class Detection:
    """Watches the serving generation. ``on_fault`` is called on the event loop, once or more per fault.

    ``serving`` returns the generation that serves now, or None. ``spawn`` runs a coroutine as a task.
    """

    def __init__(
        self,
        processes: ServerProcesses,
        hang_timeout_s: float,
        serving: Callable[[], Generation | None],
        on_fault: Callable[[str], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._processes = processes
        self._hang = HangWatch(hang_timeout_s)
        self._serving = serving
        self._on_fault = on_fault
        self._spawn = spawn
        self._deaths: DeathWatch | None = None

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Watch for hangs from now on; ``watch`` starts with each generation."""
        self._deaths = DeathWatch(loop)
        self._spawn(self._watch_for_hangs())

    def watch(self, generation: Generation) -> None:
        """Watch its ranks, the detokenizer and the anchors; processes that are already dead are reported at once."""
        deaths, detokenizer = self._deaths, self._processes.detokenizer
        assert deaths is not None and detokenizer is not None
        for index, child in enumerate(generation.ranks):
            deaths.watch(child.pidfd, lambda index=index: self._rank_died(generation, index))  # type: ignore[misc]
        deaths.watch(detokenizer.pidfd, lambda: self._on_fault("the detokenizer died"))
        for device in (HOST_DEVICE, *generation.ownership.devices):
            self._watch_anchor(generation, device)

    def stop_watching(self) -> None:
        """Stop watching processes; call this before a child is closed."""
        if self._deaths is not None:
            self._deaths.stop()

    def _rank_died(self, generation: Generation, index: int) -> None:
        generation.died.add(index)
        generation.note_deaths()
        self._on_fault(f"the process of rank {index} died")

    def _watch_anchor(self, generation: Generation, device: int) -> None:
        assert self._deaths is not None
        pidfd = self._processes.anchors.processes[device].pidfd
        self._deaths.watch(pidfd, lambda: self._spawn(self._anchor_died(generation, device)))

    async def _anchor_died(self, generation: Generation, device: int) -> None:
        """Replace an anchor that died alone: its rank still has the memory. If both died, the device is lost."""
        await asyncio.sleep(_ANCHOR_GRACE_S)
        if self._serving() is not generation:
            return
        anchors = self._processes.anchors
        try:
            segments = await in_thread(restore_anchor, anchors, generation, device)
        except Exception as error:
            log.error("anchortp: the anchor of device %s died and could not be restored: %s", device, error)
            if self._serving() is generation:  # otherwise this is known already
                self._on_fault(f"the anchor of device {device} died")
            return
        log.warning("anchortp: the anchor of device %s died; a new one holds %s again", device, ", ".join(segments))
        if self._serving() is not generation:
            return
        self._watch_anchor(generation, device)
        try:
            await in_thread(anchors.seal_and_free, generation)  # it may have died before that was done
        except AnchorError as error:
            log.info("anchortp: unused memory is not freed yet (generation %d): %s", generation.number, error)

    async def _watch_for_hangs(self) -> None:
        while True:
            generation = await watch_for_hang(self._hang, self._serving)
            generation.note_hang(hung_ranks(generation), since=time.monotonic() - self._hang.waited_s)
            self._on_fault(f"no rank made progress for {self._hang.waited_s:g} s")
