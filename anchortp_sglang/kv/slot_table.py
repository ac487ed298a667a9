"""The slot table: the content of each KV slot, in shared memory, readable after all ranks were killed at any instant.

It has four arrays over the slots (chain hash, token, parent slot, step of last use) behind a small header. Only rank 0
writes; the next generation reads once all old ranks are dead or have left. There is no journal: an entry is valid if
its hash follows from its token and its parent's hash, and so on up to a root; others are dropped. Three rules make this
safe:

- a slot is invalidated when it is freed, hence before any rank can write other KV to it;
- a slot is committed once its KV is complete, while its request still owns it; within a commit any older hash is
  cleared first, and the new hash is stored last;
- if two slots hold equal chains and one is freed, its children are first moved below the other.

Slot 0 is SGLang's padding slot: it never holds an entry; as a parent it means "first token of a sequence". Sequences
with an extra key or cache salt have their own roots (``namespaces.py``), as negative parents.
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
    """The buffer holds no slot table of this size and namespace; create a new one."""


class SlotTable:
    """A slot table over ``slots`` KV slots (ids 0 to slots-1) in a buffer of ``nbytes(slots)`` bytes or more.

    Use ``create`` or ``attach``. The arrays are views of the buffer: an mmap cannot be closed while the table exists.
    Readers may have a read-only buffer. Slot arrays hold int64 ids; for one outside [0, slots) ValueError is raised and
    nothing is written.
    """

    def __init__(self, buffer: Buffer, slots: int, seed: int) -> None:
        self._header = np.frombuffer(buffer, np.uint64, _HEADER_WORDS)
        arrays = np.frombuffer(buffer, np.int64, 4 * slots, _HEADER_WORDS * _WORD).reshape(4, slots)
        # Slot 0, which has no entry, holds the root's hash, so that commits need no special case.
        self._hash: Hashes = arrays[0].view(np.uint64)
        self._token, self._parent, self._last_use = arrays[1], arrays[2], arrays[3]
        self._plain = tuple(memoryview(column) for column in (self._header, self._hash, *arrays[1:]))
        self._slots = slots
        self._seed = seed
        self._namespaces = Namespaces(buffer, _WORD * (_HEADER_WORDS + 4 * slots), seed)
        self._hasher = RunHasher()

    @staticmethod
    def nbytes(slots: int) -> int:
        """Return the bytes of shared memory for ``slots`` >= 1 slots, the padding slot included."""
        if slots < 1:
            raise ValueError(f"a slot table needs at least the padding slot, not {slots} slots")
        return _WORD * (_HEADER_WORDS + 4 * slots) + NAMESPACES_BYTES

    @classmethod
    def create(cls, buffer: Buffer, slots: int, namespace: bytes) -> SlotTable:
        """Make an empty table, whatever the buffer holds. Raises ValueError if it is too small."""
        have, need = memoryview(buffer).nbytes, cls.nbytes(slots)
        if have < need:
            raise ValueError(f"a slot table of {slots} slots needs {need} bytes, the buffer has {have}")
        table = cls(buffer, slots, root_hash(namespace))
        _apply(table._create_stores())
        return table

    @classmethod
    def attach(cls, buffer: Buffer, slots: int, namespace: bytes) -> SlotTable:
        """Return the table that another process left. Raises SlotTableMismatch if it does not fit the arguments."""
        have, need = memoryview(buffer).nbytes, cls.nbytes(slots)
        if have < need:
            raise SlotTableMismatch(f"a slot table of {slots} slots has {need} bytes, this buffer only {have}")
        table = cls(buffer, slots, root_hash(namespace))
        table._check_header()
        return table

    @property
    def slots(self) -> int:
        """Number of slots, the padding slot included."""
        return self._slots

    @property
    def step(self) -> int:
        """The table's clock, which grows with each commit."""
        return int(self._header[_STEP])

    @property
    def hashes(self) -> Hashes:
        """uint64[slots], the live array: each slot's chain hash, ``UNKNOWN`` if it has no entry; do not write."""
        return self._hash

    def used(self) -> int:
        """Return the number of slots with an entry."""
        return int(np.count_nonzero(self._hash)) - 1  # the root has one too

    @property
    def seed(self) -> int:
        """The hash of the plain root."""
        return self._seed

    @property
    def tokens(self) -> Ids:
        """int64[slots], the live array: the token of each slot with an entry; do not write."""
        return self._token

    @property
    def parents(self) -> Ids:
        """int64[slots], the live array: the slot of the token before, or a root; do not write."""
        return self._parent

    @property
    def last_use(self) -> Ids:
        """int64[slots], the live array: the step at which a slot was committed; do not write."""
        return self._last_use

    def entries(self) -> Entries:
        """Return all entries: the table's own arrays, no copies. They change as long as a rank writes to the table."""
        columns = self._hash, self._token, self._parent, self._last_use
        return Entries(self._seed, self.step, *columns, self._namespaces.all())

    def write_entries(self, entries: Entries) -> None:
        """Fill a new, empty table. ``entries`` must have the same number of slots."""
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
        """Return the ``parent_slot`` of a namespace's first tokens; enter the namespace if it is new.

        None if there is no place for it or its key is too long: its tokens then cannot be entered.
        """
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
        """Remove the entries of slots (int64[n]) just freed, before they are allocated again; padding is ignored."""
        ids = self._checked(slots)
        _apply([(self._hash, ids[ids != ROOT], UNKNOWN)])

    def move_below(self, slots: ArrayLike, parents: ArrayLike) -> None:
        """Give ``slots`` new ``parents`` (int64[n] each) that hold the same chains as their old ones.

        A kill between two of them is harmless, as either parent is intact. A slot keeps its parent if its hash does not
        follow from the new one.
        """
        ids, above = self._checked(slots), self._checked(parents)
        follows = child_hashes(self._hash[above], self._token[ids]) == self._hash[ids]
        follows &= self._hash[above] != UNKNOWN
        _apply([(self._parent, ids[follows], above[follows])])

    def commit_run(self, slots: ArrayLike, tokens: ArrayLike, parent_slot: int) -> bool:
        """Record an extend of one request: ``slots`` hold the complete KV of ``tokens`` (int64[n] each).

        ``parent_slot`` holds the token before the first; for the first token of a sequence it is 0 or ``root_of`` its
        namespace. Returns False, with nothing written, if that slot has no entry. Raises ValueError for slot 0 in
        ``slots``.
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
        """Record a decode step with complete KV: one token for each request (int64[batch] each).

        ``parents`` are the slots of the tokens before; none is in ``slots``. Tokens whose parent has no entry, and
        padding (slot 0), are skipped.
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
        """Record a decode step as ``commit_step`` does, in plain integers: (slot, token, parent) of each request.

        For a small batch this is several times faster: numpy's calls are slow after a forward pass has displaced them
        from the processor's caches.
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
        """Return int64[n], ascending: the slots of all intact chains."""
        return self.entries().forest().ascending

    def _create_stores(self) -> list[Store]:
        # The magic is cleared first and set last, so that attach refuses a table that a kill left unfinished.
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
        """Return the stores of a commit in crash-safe order: a kill between any two leaves the table valid."""
        step = int(self._header[_STEP]) + 1
        stores: list[Store] = [(self._header, _STEP, step)]
        held = self._hash[slots]
        if np.count_nonzero(held):
            # An unchanged entry keeps its hash throughout, as its descendants depend on it.
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
        # As unsigned numbers, negative ids are too large too.
        if ids.size and ids.view(np.uint64).max() >= self._slots:
            raise ValueError(f"slot ids {ids.min()}..{ids.max()} are not all within [0, {self._slots})")
        return ids


def _check_lengths(slots: Ids, tokens: Ids, parents: Ids) -> None:
    if slots.ndim != 1 or not slots.shape == tokens.shape == parents.shape:
        raise ValueError(
            f"each slot needs one token and one parent, got {slots.shape}, {tokens.shape}, {parents.shape}"
        )


def _enter(columns: Sequence[memoryview], step: int, entries: Sequence[tuple[int, int, int, int]]) -> None:
    """Commit a few tokens (slot, token, parent, hash) in the order of ``_commit_stores``."""
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
    """Carry out stores in order. Only this and ``_enter`` write to the shared memory."""
    for array, where, value in stores:
        array[where] = value
