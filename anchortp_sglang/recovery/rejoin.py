"""Takes lost devices back by itself (``--anchor-rejoin auto``), one after the other, and never in a hurry.

A device is tried again ``FIRST_PAUSE_S`` after its loss. Each further loss, and each attempt that fails, doubles the
pause up to ``LONGEST_PAUSE_S``; after ``FORGIVEN_S`` in service it is as good as new.
"""

import asyncio
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass

from anchortp_sglang.recovery.change_plans import ChangeRefused, Wish
from anchortp_sglang.recovery.reconfiguration import Reconfiguration

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 10.0
LONGEST_PAUSE_S = 3600.0
FORGIVEN_S = 600.0

_POLL_S = 1.0


@dataclass
class _Record:
    """A device's past. ``pause_s``: the next pause; ``due_at``: monotonic seconds, None while it serves."""

    pause_s: float = FIRST_PAUSE_S
    due_at: float | None = None
    serving_since: float | None = None


class HoldOffs:
    """Decides when devices are tried again. Pure: times are arguments."""

    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}

    def look(self, serving: Collection[int], lost: Collection[int], now: float) -> list[int]:
        """Note which devices serve and which are lost; return the lost ones that are due, longest due first."""
        for device in serving:
            record = self._records.get(device)
            if record is None:
                continue
            if record.due_at is not None:
                record.due_at, record.serving_since = None, now
            elif record.serving_since is not None and now - record.serving_since > FORGIVEN_S:
                del self._records[device]
        for device in lost:
            record = self._records.setdefault(device, _Record())
            if record.due_at is None:
                self._wait(record, now)
        due = [(record.due_at, device) for device, record in self._records.items() if device in lost and record.due_at]
        return [device for at, device in sorted(due) if at <= now]

    def failed(self, device: int, now: float) -> None:
        """Note that an attempt to take a device back has failed."""
        self._wait(self._records.setdefault(device, _Record()), now)

    def not_now(self, device: int, now: float) -> None:
        """Note that an attempt was not possible, for a reason that has passed by the next one."""
        self._records.setdefault(device, _Record()).due_at = now + FIRST_PAUSE_S

    def _wait(self, record: _Record, now: float) -> None:
        record.due_at = now + record.pause_s
        record.pause_s = min(2 * record.pause_s, LONGEST_PAUSE_S)


async def take_back_lost(reconfiguration: Reconfiguration) -> None:
    """Take lost devices back as long as the server runs; on the event loop. Drained devices stay away."""
    hold_offs = HoldOffs()
    while True:
        await asyncio.sleep(_POLL_S)
        serving, lost = reconfiguration.devices()
        if not serving:
            continue
        due = hold_offs.look(serving, lost, time.monotonic())
        if not due:
            continue
        device = due[0]
        log.info("anchortp: device %d was lost; it is tried again", device)
        try:
            await reconfiguration.change(Wish(rejoin=frozenset({device})))
        except ChangeRefused as refusal:
            log.warning("anchortp: device %d was not taken back: %s", device, refusal)
            note = hold_offs.not_now if refusal.code == 409 else hold_offs.failed
            note(device, time.monotonic())
        except Exception:  # the others that are lost are still to be taken back
            log.exception("anchortp: device %d was not taken back", device)
            hold_offs.failed(device, time.monotonic())
