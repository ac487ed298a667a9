"""Takes a rank's prefixes from the last generation's slot table to its own: one object with named states.

Rank 0 writes the slot table; every rank of the next generation rebuilds its prefix tree from it. The hooks into SGLang
for this are in ``slot_table_hooks.py``.
"""

import array
import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import numpy as np
import torch

from anchortp_sglang.kv.choice_loops import find_free, sum_in_order
from anchortp_sglang.kv.copy import KVSegment
from anchortp_sglang.kv.retained_slots import RetainedSlots
from anchortp_sglang.kv.slot_table import SlotTable, SlotTableMismatch
from anchortp_sglang.platforms.base import Platform
from anchortp_sglang.rank.attachment import HOST_DEVICE, Attachment, slot_table_segment
from anchortp_sglang.rank.kv.following import Following
from anchortp_sglang.rank.kv.mirroring import Mirroring, open_mirroring
from anchortp_sglang.rank.kv.restore import Restoration, RestorationFailed


class State(StrEnum):
    """States of a rank's prefixes, in order; RESTORING only if the last generation left something to restore."""

    OPENED = "opened"  # KV and slot table are mapped
    RESTORING = "restoring"  # a thread puts the retained KV in place
    BUILT = "built"  # SGLang's pool and prefix tree are there, with the retained prefixes
    WRITING = "writing"  # on rank 0: every free and every batch is entered in the slot table


class WrongOrder(RuntimeError):
    """A step was taken in a state that it does not follow."""


class Prefixes:
    """A rank's prefixes.

    ``memory``: the slot table of ``rows`` slots for this generation's ownership, writable only on rank 0, which writes
    it. ``platform``: this rank's. Not thread-safe: all calls come from the scheduler's thread.
    """

    def __init__(
        self,
        rank: int,
        rows: int,
        namespace: bytes,
        memory: mmap.mmap | bytearray,
        platform: Platform,
        mirroring: Mirroring | None = None,
    ) -> None:
        self.state = State.OPENED
        self.platform = platform
        self.table: SlotTable | None = None
        """The table that this rank writes: None until WRITING, and always None on ranks other than 0."""
        self.report: dict[str, Any] = {}
        """Report about what was retained, sent with "ready"; empty if there was nothing to restore. Numbers of slots
        ``kept``, ``dropped`` (by reason) and ``restored`` (lost heads read back), bytes moved, seconds, and the
        ``digest`` that must be equal on all ranks."""
        self._rank, self._rows, self._namespace, self._memory = rank, rows, namespace, memory
        self._mirroring = mirroring
        self._restoration: Restoration | None = None
        self._allocator: Any = None
        # Made at BUILT, written from WRITING on: the other ranks may still read the last generation's table, which can
        # be the same one, while they rebuild their trees.
        self._next: SlotTable | None = None
        self._deferred: list[np.ndarray] | None = None
        self._pending: dict[int, tuple[int, int]] = {}
        self._pending_moves: list[tuple[int, int]] = []

    def restore(self, restoration: Restoration, in_place: SlotTable | None) -> None:
        """Begin to retain the last generation's KV. ``in_place``: its slot table, if this generation uses it too."""
        self._step(State.RESTORING, State.OPENED)
        self._restoration, self._next = restoration, in_place if self._rank == 0 else None
        restoration.start()

    def build(self, result: Any) -> None:
        """Insert the retained prefixes in SGLang's new tree (``result``: of kv_cache_builder.build_kv_cache).

        Blocks until it is known which slots are retained. Raises RestorationFailed, AnchorError.
        """
        self._step(State.BUILT, State.OPENED, State.RESTORING)
        self._allocator = result.token_to_kv_pool_allocator
        began = time.monotonic()
        retained = None if self._restoration is None else self._restoration.retained()
        reusable = not result.disable_radix_cache
        if retained is not None and reusable:
            insert(retained, result)
        if self._rank == 0 and self._next is None:
            self._next = SlotTable.create(self._memory, self._rows, self._namespace)
            if retained is not None:
                self._next.write_entries(retained.entries)
        if retained is not None:
            self._report_retained(retained, reusable, began)

    def finish(self) -> float:
        """Wait until the retained KV is in place; return when it was (monotonic seconds, 0 if there was none)."""
        self._step(State.BUILT, State.BUILT)
        if self._mirroring is not None and self._rank != 0:
            self._mirroring.start()
        if self._restoration is None:
            return 0.0
        restoration = self._restoration
        restoration.wait()
        self.report |= {"restored": restoration.restored_slots, "moved_bytes": restoration.moved}
        if self._rank != 0:
            self._restoration = None  # and the memory of what it found
        return restoration.finished_at

    def start_writing(self) -> None:
        """Forget free slots, and every slot freed from now on. On rank 0, once all ranks have rebuilt their trees."""
        self._step(State.WRITING, State.BUILT)
        table = self._next
        assert table is not None, "rank 0 alone is told that its generation starts"
        if self._restoration is not None:
            # Do this before their parents are forgotten: where two slots had equal chains, one is retained.
            retained = self._restoration.retained()
            if retained.entries.parents is not table.parents:
                parents = retained.entries.parents[retained.numbers]
                moved = table.parents[retained.numbers] != parents
                table.move_below(retained.numbers[moved], parents[moved])
            table.invalidate(self._free_slots())
            self._restoration = None
        self.table, self._next = table, None
        if self._mirroring is not None:
            self._mirroring.start()

    def stop(self) -> None:
        """Write no more, neither to the slot table nor to the mirror: another generation takes them over."""
        self.table = None
        if self._mirroring is not None:
            self._mirroring.stop()

    def forget(self, slots: np.ndarray) -> None:
        """Invalidate freed slots of the table, now or at the end of ``forgetting_later``. Only while WRITING."""
        if self._deferred is not None:
            self._deferred.append(slots)
        elif self.table is not None:
            self.table.invalidate(slots)
            if self._pending:
                for slot in slots.tolist():
                    self._pending.pop(slot, None)
                    self._pending_moves = [move for move in self._pending_moves if slot not in move]

    def commit_later(self, slot: int, token: int, parent: int) -> None:
        """Commit ``token`` in ``slot`` below the slot ``parent`` at ``commit_pending``, unless it is forgotten before.

        For a slot in the tree whose KV the launched step computes.
        """
        self._pending[slot] = (token, parent)

    def move_below(self, slots: np.ndarray, parents: np.ndarray) -> None:
        """Move entries below other slots with equal chains (``SlotTable.move_below``). Only while WRITING.

        Below a slot that is to be committed later they are moved then: until then their chains are not intact, as the
        KV of one token is still being computed.
        """
        assert self.table is not None
        self.table.move_below(slots, parents)
        if self._pending:
            moves = zip(slots.tolist(), parents.tolist(), strict=True)
            self._pending_moves += [(slot, parent) for slot, parent in moves if parent in self._pending]

    def commit_pending(self) -> None:
        """Commit what ``commit_later`` was given: the step that computes it is complete. Only while WRITING."""
        if self._pending and self.table is not None:
            self.table.commit_tokens([(slot, token, parent) for slot, (token, parent) in self._pending.items()])
            self._pending = {}
            if self._pending_moves:
                slots, parents = np.array(self._pending_moves, np.int64).T
                self.table.move_below(slots, parents)
                self._pending_moves = []

    @contextmanager
    def forgetting_later(self) -> Iterator[None]:
        """Defer ``forget`` to the end of the block."""
        self._deferred = []
        try:
            yield
        finally:
            deferred, self._deferred = self._deferred, None
            for slots in deferred:
                self.forget(slots)

    def _step(self, to: State, *allowed: State) -> None:
        if self.state not in allowed:
            raise WrongOrder(f"prefixes are {self.state}: {to} follows {' or '.join(allowed)}")
        self.state = to

    def _report_retained(self, retained: RetainedSlots, reusable: bool, began: float) -> None:
        free = self._free_slots()
        ended = time.monotonic()
        self.report |= {
            "kept": len(retained.slots) if reusable else 0,
            "dropped": retained.dropped | ({} if reusable else {"no_prefix_cache": len(retained.slots)}),
            "seconds": ended - began,
            "at": ended,
            "digest": f"{retained.digest()}-{len(free)}-{sum_in_order(free):016x}",
        }

    def _free_slots(self) -> np.ndarray:
        """Return the allocator's free slots, in the order in which it will give them out."""
        return slots_of_pages(self._allocator.get_all_free_pages(), self._allocator.page_size)


def open_prefixes(attachment: Attachment, following: Following | None = None) -> Prefixes:
    """Map KV and slot table, and begin to retain the last generation's KV. Call it before the pools are built.

    ``following``: of a rank that stood by, what has followed the last generation's slot table.

    Raises RestorationFailed, AnchorError.
    """
    assignment = attachment.assignment
    kv = KVSegment(attachment.kv_memory(), attachment.kv_layout) if assignment.platform.moves_kv else None
    segment = slot_table_segment(assignment.ownership, assignment.kv)
    memory = attachment.map(HOST_DEVICE, segment, writable=assignment.rank == 0)
    mirroring = open_mirroring(attachment, kv, memory) if kv else None
    prefixes = Prefixes(
        assignment.rank, assignment.kv.rows, attachment.namespace, memory, assignment.platform, mirroring
    )
    if not assignment.restore_prefixes:
        return prefixes
    assert assignment.previous is not None
    old = slot_table_segment(assignment.previous.ownership, assignment.previous_kv)
    old_memory = memory if old == segment else attachment.map_briefly(HOST_DEVICE, old)
    try:
        table = SlotTable.attach(old_memory, assignment.previous_kv.rows, attachment.namespace)
    except SlotTableMismatch as error:
        raise RestorationFailed(str(error)) from error
    followed = None if following is None else following.take()
    if old != segment or (following and following.identity != attachment.identity(HOST_DEVICE, segment)):
        followed = None  # it was another table
    prefixes.restore(Restoration(attachment, table, kv, followed), table if old == segment else None)
    return prefixes


def no_prefixes(attachment: Attachment) -> Prefixes:
    """Return what a rank that stands by has until it opens those of the last generation: it writes no table."""
    assignment = attachment.assignment
    return Prefixes(assignment.rank, assignment.kv.rows, attachment.namespace, bytearray(), assignment.platform)


def slots_of_pages(pages: Any, page_size: int) -> np.ndarray:
    """Return the slots of allocator pages, in order."""
    return (pages.cpu().numpy()[:, None] * page_size + np.arange(page_size)).ravel()


def insert(retained: RetainedSlots, result: Any) -> None:
    """Mark the retained slots used and insert their chains, oldest first; equal on all ranks, as ``retained`` is."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    allocator, tree = result.token_to_kv_pool_allocator, result.tree_cache
    device, free = allocator.free_pages.device, allocator.free_pages.cpu().numpy()
    used, left = np.zeros(int(free.max()) + 1, np.bool_), np.empty_like(free)
    left = left[: find_free(free, retained.numbers, allocator.page_size, used, left)]
    allocator.free_pages = torch.from_numpy(left.copy()).to(device)
    for chain in retained.chains():
        extra_key, cache_salt = retained.entries.namespace(chain)
        tokens = array.array("q")
        tokens.frombytes(chain.tokens.data.cast("B"))
        tree.insert(
            InsertParams(
                key=RadixKey(tokens, extra_key, cache_salt=cache_salt),
                value=torch.from_numpy(chain.slots).to(device),
                # Without it the tree frees the slots that it already holds (_insert_overlap_step).
                prev_prefix_len=chain.shared,
            )
        )
