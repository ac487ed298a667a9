"""What each KV slot holds, in shared memory, readable after all ranks were killed at any instant.

Four arrays over the slots (chain hash, token, parent slot, step of last use) behind a small header. Rank 0
alone writes; the next generation reads, once all old ranks are dead. There is no journal: an entry counts if
its hash follows from its own token and its parent's hash, up to the root, and is dropped otherwise. Three rules
make that safe:

- a slot is invalidated when it is freed, hence before any rank can write other KV to it;
- a slot is committed once its KV is written completely, while its request still owns it; within a commit the
  hash is stored last, and any older hash is cleared first;
- where two slots hold equal chains and one is freed, what follows it is moved below the other one first.

Slot 0 is SGLang's padding slot: it never holds an entry; as a parent it means "first token of a sequence". Sequences
with an extra key or cache salt have roots of their own (``namespaces.py``), as negative parents.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from anchortp_sglang.kv.chain_hash import (
    UNKNOWN,
    Hashes,
    Ids,
    RunHasher,
    child_hash,
    child_hashes,
    root_hash,
)
from anchortp_sglang.kv.namespaces import (
    MOST_NAMESPACES,
    NAMESPACES_BYTES,
    PLAIN,
    Key,
    Namespaces,
    first_parent,
    namespaces_used,
)
from anchortp_sglang.kv.prefix_forest import ROOT, Chain
from anchortp_sglang.kv.retained_slots import Entries

__all__ = ["Chain", "SlotTable", "SlotTableMismatch"]

Buffer = bytes | bytearray | memoryview | mmap.mmap
Store = tuple[np.ndarray[Any, Any], Any, Any]  # (array, where, value)

_WORD = 8
_HEADER_WORDS = 8
_MAGIC, _VERSION, _SLOTS, _SEED, _STEP = range(5)
_IDENTITY = ("magic", "version", "slots", "namespace seed")
_MAGIC_VALUE = int.from_bytes(b"anchorTP", "little")
_VERSION_VALUE = 2
_STEP_LIMIT = 1 << 62


class SlotTableMismatch(Exception):
    """The buffer holds no slot table of this size and namespace: its content is useless, create a new one."""


class SlotTable:
    """A slot table over ``slots`` KV slots (ids 0 to slots-1) in a buffer of ``nbytes(slots)`` bytes or more.

    Use ``create`` or ``attach``. The arrays are views of the buffer, so an mmap cannot be closed before the
    table is gone. A read-only buffer will do for reading. Slot arrays hold int64 ids; one outside [0, slots)
    is a ValueError, and nothing is written.
    """

    def __init__(self, buffer: Buffer, slots: int, seed: int) -> None:
        self._header = np.frombuffer(buffer, np.uint64, _HEADER_WORDS)
        arrays = np.frombuffer(buffer, np.int64, 4 * slots, _HEADER_WORDS * _WORD).reshape(4, slots)
        # The root's hash is kept in the otherwise unused entry of slot 0: commits need no case for it.
        self._hash: Hashes = arrays[0].view(np.uint64)
        self._token, self._parent, self._last_use = arrays[1], arrays[2], arrays[3]
        self._plain = tuple(memoryview(column) for column in (self._header, self._hash, *arrays[1:]))
        self._slots = slots
        self._seed = seed
        self._namespaces = Namespaces(buffer, _WORD * (_HEADER_WORDS + 4 * slots), seed)
        self._hasher = RunHasher()

    @staticmethod
    def nbytes(slots: int) -> int:
        """Bytes of shared memory for a table over ``slots`` slots, the padding slot included; slots >= 1."""
        if slots < 1:
            raise ValueError(f"a slot table needs at least the padding slot, not {slots} slots")
        return _WORD * (_HEADER_WORDS + 4 * slots) + NAMESPACES_BYTES

    @classmethod
    def create(cls, buffer: Buffer, slots: int, namespace: bytes) -> SlotTable:
        """Make an empty table of whatever is in the buffer. ValueError if the buffer is too small."""
        have, need = memoryview(buffer).nbytes, cls.nbytes(slots)
        if have < need:
            raise ValueError(f"a slot table of {slots} slots needs {need} bytes, the buffer has {have}")
        table = cls(buffer, slots, root_hash(namespace))
        _apply(table._create_stores())
        return table

    @classmethod
    def attach(cls, buffer: Buffer, slots: int, namespace: bytes) -> SlotTable:
        """Use the table that another process left; SlotTableMismatch if it does not fit the arguments."""
        have, need = memoryview(buffer).nbytes, cls.nbytes(slots)
        if have < need:
            raise SlotTableMismatch(f"a slot table of {slots} slots has {need} bytes, this buffer only {have}")
        table = cls(buffer, slots, root_hash(namespace))
        table._check_header()
        return table

    @property
    def slots(self) -> int:
        """How many slots there are, the padding slot included."""
        return self._slots

    @property
    def step(self) -> int:
        """Grows with each commit."""
        return int(self._header[_STEP])

    @property
    def hashes(self) -> Hashes:
        """uint64[slots], the live array: each slot's chain hash, ``UNKNOWN`` if it has no entry; do not write."""
        return self._hash

    def used(self) -> int:
        """How many slots have an entry now."""
        return int(np.count_nonzero(self._hash)) - 1  # the root has one too

    @property
    def parents(self) -> Ids:
        """int64[slots], the live array: the slot of the token before, or a root; do not write."""
        return self._parent

    @property
    def last_use(self) -> Ids:
        """int64[slots], the live array: the step at which a slot was committed; do not write."""
        return self._last_use

    def entries(self) -> Entries:
        """A copy of all entries, as they are now."""
        tokens, parents, last_use = (column.copy() for column in (self._token, self._parent, self._last_use))
        namespaces = self._namespaces.all()
        return Entries(self._seed, self.step, self._hash.copy(), tokens, parents, last_use, namespaces)

    def write_entries(self, entries: Entries) -> None:
        """Fill a new, empty table; ``entries`` must have as many slots."""
        known = np.flatnonzero(entries.hashes)
        known = known[known != ROOT]
        for place, key in entries.namespaces.items():
            _apply(self._namespaces.stores(place, key))
        _apply(
            [
                (self._header, _STEP, entries.step),
                (self._token, known, entries.tokens[known]),
                (self._parent, known, entries.parents[known]),
                (self._last_use, known, entries.last_use[known]),
                (self._hash, known, entries.hashes[known]),
            ]
        )

    def root_of(self, key: Key) -> int | None:
        """The ``parent_slot`` of a sequence's first token in a namespace; None if there is no place for it, or its key
        is too long: its tokens then cannot be entered."""
        if key == PLAIN:
            return ROOT
        place = self._namespaces.find(key)
        if place is None:
            free = np.flatnonzero(~namespaces_used(self._parent, self._hash))
            if not free.size:
                return None
            place = int(free[0])
            try:
                _apply(self._namespaces.stores(place, key))
            except ValueError:
                return None
        return first_parent(place)

    def invalidate(self, slots: ArrayLike) -> None:
        """Forget slots (int64[n]) just freed, before anybody can have them anew; padding is ignored."""
        ids = self._checked(slots)
        _apply([(self._hash, ids[ids != ROOT], UNKNOWN)])

    def move_below(self, slots: ArrayLike, parents: ArrayLike) -> None:
        """Hang entries on other slots (int64[n] each) that hold the same chain as their parents do.

        A kill between two of them is harmless, as a slot has one intact parent or the other. An entry stays where it is
        if its hash does not follow from the new parent.
        """
        ids, above = self._checked(slots), self._checked(parents)
        follows = child_hashes(self._hash[above], self._token[ids]) == self._hash[ids]
        follows &= self._hash[above] != UNKNOWN
        _apply([(self._parent, ids[follows], above[follows])])

    def commit_run(self, slots: ArrayLike, tokens: ArrayLike, parent_slot: int) -> bool:
        """Record an extend of one request: the KV of ``tokens`` is completely in ``slots``; int64[n] each.

        ``parent_slot`` holds the token before the first; if there is none it is 0, or what ``root_of`` says. False,
        with nothing written, if that slot's content is unknown. Slot 0 in ``slots`` is a ValueError.
        """
        ids = self._checked(slots)
        is_root = -MOST_NAMESPACES <= parent_slot < ROOT
        above = np.array([parent_slot]) if is_root else self._checked([parent_slot])
        its_tokens = np.asarray(tokens, np.int64)
        parents = np.concatenate((above, ids[:-1]))[: len(ids)]
        _check_lengths(ids, its_tokens, parents)
        if not ids.all():
            raise ValueError("slot 0 is the padding slot: no token of a run can be in it")
        parent_hash = int(self._namespaces.seeds[-1 - parent_slot] if is_root else self._hash[above[0]])
        if parent_hash == UNKNOWN:
            return False
        if ids.size:
            hashes = self._hasher.run_hashes(parent_hash, its_tokens)
            _apply(self._commit_stores(ids, its_tokens, parents, hashes))
        return True

    def commit_step(self, slots: ArrayLike, tokens: ArrayLike, parents: ArrayLike) -> None:
        """Record a decode step: one token per request, its KV complete; int64[batch] each.

        ``parents`` are the slots of the tokens before, none of them in ``slots``. Entries whose parent is
        unknown, and padding (slot 0), are skipped.
        """
        ids, its_tokens, above = self._checked(slots), np.asarray(tokens, np.int64), self._checked(parents)
        _check_lengths(ids, its_tokens, above)
        above_hashes = self._hash[above]
        hashes = child_hashes(above_hashes, its_tokens)
        usable = (above_hashes != UNKNOWN) & (ids != ROOT)
        n_usable = np.count_nonzero(usable)
        if n_usable < len(ids):
            ids, its_tokens, above, hashes = ids[usable], its_tokens[usable], above[usable], hashes[usable]
        if n_usable:
            _apply(self._commit_stores(ids, its_tokens, above, hashes))

    def commit_tokens(self, entries: Iterable[tuple[int, int, int]]) -> None:
        """``commit_step`` in plain integers: (slot, token, parent) of each request.

        For a small batch this is several times as fast: numpy's calls cost most when a forward pass has just
        displaced them from the processor's caches.
        """
        header, hashes, _, _, _ = self._plain
        limit, found = self._slots, []
        for slot, token, parent in entries:
            if not (0 <= slot < limit and 0 <= parent < limit):
                raise ValueError(f"slot ids {slot} and {parent} are not both within [0, {limit})")
            above = hashes[parent]
            if above != UNKNOWN and slot != ROOT:
                found.append((slot, token, parent, child_hash(above, token)))
        if found:
            _enter(self._plain, header[_STEP] + 1, found)

    def retained_slots(self) -> Ids:
        """int64[n], ascending: the slots of all intact chains."""
        return np.flatnonzero(self.entries().verified())

    def _create_stores(self) -> list[Store]:
        # The magic goes first and comes back last: a table torn by a kill here is refused by attach.
        return [
            (self._header, slice(None), 0),
            (self._hash, slice(None), UNKNOWN),
            (self._namespaces.seeds, slice(None), UNKNOWN),
            (self._token, slice(None), 0),
            (self._parent, slice(None), ROOT),
            (self._last_use, slice(None), 0),
            (self._hash, ROOT, self._seed),
            (self._header, slice(_VERSION, _SEED + 1), (_VERSION_VALUE, self._slots, self._seed)),
            (self._header, _MAGIC, _MAGIC_VALUE),
        ]

    def _commit_stores(self, slots: Ids, tokens: Ids, parents: Ids, hashes: Hashes) -> list[Store]:
        """The stores of a commit, in an order in which it may be cut off anywhere."""
        step = int(self._header[_STEP]) + 1
        stores: list[Store] = [(self._header, _STEP, step)]
        held = self._hash[slots]
        if np.count_nonzero(held):
            # An entry that stays as it is keeps its hash throughout: its descendants hang on it.
            same = (held == hashes) & (self._token[slots] == tokens) & (self._parent[slots] == parents)
            stores.append((self._last_use, slots[same], step))
            slots, tokens, parents, hashes = slots[~same], tokens[~same], parents[~same], hashes[~same]
            stores.append((self._hash, slots, UNKNOWN))
        stores.append((self._token, slots, tokens))
        stores.append((self._parent, slots, parents))
        stores.append((self._last_use, slots, step))
        stores.append((self._hash, slots, hashes))
        return stores

    def _check_header(self) -> None:
        expected = (_MAGIC_VALUE, _VERSION_VALUE, self._slots, self._seed)
        found = self._header.tolist()
        for name, want, have in zip(_IDENTITY, expected, found, strict=False):
            if have != want:
                raise SlotTableMismatch(f"slot table: {name} is {have:#x}, expected {want:#x}; create a new one")
        if found[_STEP] >= _STEP_LIMIT or int(self._hash[ROOT]) != self._seed:
            raise SlotTableMismatch("slot table: the header was overwritten; create a new one")

    def _checked(self, slots: ArrayLike) -> Ids:
        ids = np.asarray(slots, np.int64)
        # As unsigned, a negative id is too large as well.
        if ids.size and ids.view(np.uint64).max() >= self._slots:
            raise ValueError(f"slot ids {ids.min()}..{ids.max()} are not all within [0, {self._slots})")
        return ids


def _check_lengths(slots: Ids, tokens: Ids, parents: Ids) -> None:
    if slots.ndim != 1 or not slots.shape == tokens.shape == parents.shape:
        raise ValueError(f"want one token and parent per slot, got {slots.shape}, {tokens.shape}, {parents.shape}")


def _enter(columns: Sequence[memoryview], step: int, entries: Sequence[tuple[int, int, int, int]]) -> None:
    """``_commit_stores`` of a few tokens (slot, token, parent, hash), carried out at once."""
    header, hashes, tokens, parents, last_use = columns
    header[_STEP] = step
    for slot, token, parent, own in entries:
        held = hashes[slot]
        if held != own or tokens[slot] != token or parents[slot] != parent:
            if held:
                hashes[slot] = UNKNOWN
            tokens[slot] = token
            parents[slot] = parent
        last_use[slot] = step
        hashes[slot] = own


def _apply(stores: Sequence[Store]) -> None:
    """Carry out stores in order. Nothing but this and ``_enter`` writes to the shared memory."""
    for array, where, value in stores:
        array[where] = value
