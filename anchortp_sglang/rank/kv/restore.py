"""Takes KV over to a new generation, while the main thread builds the rest of the rank.

Each rank decides alone, from the same shared memory, which slots are retained (``kv/retained_slots.py``). A device
whose heads and slots stay the same has its KV in place. Otherwise retained heads are copied from the old segments of
this device and its peers, lost ones from the mirror; both lie in anchors, and are no longer written to.
"""

import logging
import threading
import time
from concurrent.futures import Future

import numpy as np

from anchortp_sglang.anchor.client import AnchorError
from anchortp_sglang.kv.chain_hash import root_hash
from anchortp_sglang.kv.copy import KVSegment
from anchortp_sglang.kv.followed_table import WORTHWHILE, FollowedTable
from anchortp_sglang.kv.mirror import KVMirror, MirrorMismatch, MirrorShape
from anchortp_sglang.kv.moving import move_retained, restorable_slots
from anchortp_sglang.kv.retained_slots import Entries, RetainedSlots, retain
from anchortp_sglang.kv.slot_table import SlotTable
from anchortp_sglang.planning.layout.kv_layout import KVLayout, kv_layout, kv_moves, lost_heads, whole_layout
from anchortp_sglang.rank.attachment import HOST_DEVICE, Attachment, kv_segment, mirror_segment

log = logging.getLogger(__name__)


def mirror_shape(attachment: Attachment) -> MirrorShape:
    """Return the shape of the mirror that this server was planned with."""
    assignment = attachment.assignment
    assert assignment.mirror is not None
    layout = whole_layout(assignment.model, assignment.kv, assignment.mirror.rows)
    return MirrorShape(layout, root_hash(attachment.namespace))


class RestorationFailed(RuntimeError):
    """The retained KV, or its description, cannot be used."""


class Restoration(threading.Thread):
    """Retains what can be retained of the last generation's KV.

    ``table``: its slot table, no longer written to. ``into``: where KV is copied to; None where it can only stay in
    place. ``followed``: what is known of the table, if this generation goes on with it.
    """

    def __init__(
        self, attachment: Attachment, table: SlotTable, into: KVSegment | None, followed: FollowedTable | None = None
    ) -> None:
        super().__init__(name="anchortp-kv", daemon=True)
        self._followed = followed
        self._attachment, self._table, self._into = attachment, table, into
        self._retained: Future[RetainedSlots] = Future()
        self._done: Future[None] = Future()
        self.moved: dict[str, int] = {"kept": 0, "restored": 0}
        """Bytes of KV copied from devices, and from the mirror."""
        self.restored_slots = 0
        """Slots of which some heads came from the mirror, on this rank."""
        self.finished_at = 0.0

    def run(self) -> None:
        try:
            self._restore()
            self.finished_at = time.monotonic()
            self._done.set_result(None)
        except BaseException as error:
            # An anchor that does not answer has died: another fault, after which the KV may still be usable.
            seen = error if isinstance(error, AnchorError) else RestorationFailed(repr(error))
            for future in (self._retained, self._done):
                if not future.done():
                    future.set_exception(seen)

    def _restore(self) -> None:
        assignment = self._attachment.assignment
        assert assignment.previous is not None
        entries, mirror, usable = self._table.entries(), None, None
        held = assignment.previous.ownership
        if held != assignment.ownership and lost_heads(
            assignment.model, assignment.ownership, held, assignment.leaving
        ):
            mirror = self._mirror()
            usable = restorable_slots(entries, mirror)
        retained = self._retained_as_followed(entries) if usable is None else None
        if retained is None:
            running = np.frombuffer(assignment.running, np.uint64)
            retained = retain(entries, usable, assignment.kv.rows, assignment.kv.page_size, running)
        self._retained.set_result(retained)
        self._move(retained, mirror)

    def _retained_as_followed(self, entries: Entries) -> RetainedSlots | None:
        followed, self._followed = self._followed, None
        if followed is None:
            return None
        try:
            retained = followed.retained(entries, WORTHWHILE)
            log.info("anchortp: %d slots have changed since the slot table was looked at", followed.last_changed)
            return retained
        except Exception:  # of whatever kind, the table can still be read as a whole
            log.exception("anchortp: what was followed of the slot table is of no use; it is read as a whole")
            return None

    def retained(self) -> RetainedSlots:
        """Wait until it is known what is retained, even if it is not in place yet. Raises the error of this thread."""
        return self._retained.result()

    def wait(self) -> None:
        """Wait until every byte is in place. Raises the error of this thread."""
        self._done.result()

    def _mirror(self) -> KVMirror | None:
        assignment = self._attachment.assignment
        if assignment.mirror is None:
            return None
        memory = self._attachment.map_briefly(HOST_DEVICE, mirror_segment(assignment.mirror))
        try:
            return KVMirror.attach(memory, mirror_shape(self._attachment))
        except MirrorMismatch:
            return None  # nothing was ever written to it

    def _move(self, retained: RetainedSlots, mirror: KVMirror | None) -> None:
        assignment = self._attachment.assignment
        assert assignment.previous is not None
        held = assignment.previous.ownership
        stays = assignment.device in held.devices and self._old_layout(assignment.device) == self._attachment.kv_layout
        if not len(retained.slots) or stays:
            return
        if self._into is None:
            raise RestorationFailed("this platform cannot move KV between devices")
        moves = kv_moves(assignment.model, assignment.ownership, assignment.rank, held, assignment.leaving)
        self.moved = move_retained(retained, self._into, moves, self._old_segment, mirror)
        if self.moved["restored"]:
            self.restored_slots = len(retained.slots)

    def _old_layout(self, device: int) -> KVLayout:
        assignment = self._attachment.assignment
        assert assignment.previous is not None
        held = assignment.previous.ownership
        return kv_layout(assignment.model, assignment.previous_kv, held, held.devices.index(device))

    def _old_segment(self, device: int) -> KVSegment:
        layout = self._old_layout(device)
        return KVSegment(self._attachment.map_briefly(device, kv_segment(layout)), layout)
