"""A copy of committed KV in host memory, readable after all processes were killed at any instant.

Row r of the mirror holds the KV of one slot over all layers and heads. Rank 0 assigns a row to a slot (``assign``): it
stores the slot, then the chain hash of the slot's content. Every rank copies its heads and then writes that hash as its
own tag of the row. A row is complete if the tags of all writers equal its hash; it then holds the KV of that chain of
tokens, whichever slot that was in. Three rules make this safe:

- a writer clears its tag before the first byte and sets it after the last, and only if the slot's entry in the slot
  table did not change meanwhile;
- a row's hash is cleared before the row is assigned to another slot;
- ``begin``, with which a generation takes over, first drops the incomplete rows; the complete ones no longer depend on
  who wrote them, so their tags are reset for the new set of writers.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anchortp_sglang.kv.chain_hash import UNKNOWN, Hashes, Ids
from anchortp_sglang.kv.copy import KVSegment
from anchortp_sglang.kv.equal_hashes import places_of
from anchortp_sglang.planning.layout.kv_layout import KVLayout

__all__ = ["KVMirror", "MirrorMismatch", "MirrorShape"]

_WORD = 8
_HEADER_WORDS = 8
_MAGIC, _ROWS, _ROW_BYTES, _SEED, _WRITERS, _GENERATION, _ASSIGNED = range(7)
_MAGIC_VALUE = int.from_bytes(b"atpMIR01", "little")
_PAGE_BYTES = 4096
MAX_WRITERS = 64


class MirrorMismatch(Exception):
    """The buffer holds no mirror of this shape; nothing can be read from it."""


@dataclass(frozen=True)
class MirrorShape:
    """Shape of a mirror. ``layout``: all heads of all layers. ``seed``: the slot table's, it stands for the model."""

    layout: KVLayout
    seed: int

    @property
    def rows(self) -> int:
        return self.layout.rows

    @property
    def row_bytes(self) -> int:
        """Bytes of the KV of one slot."""
        return self.layout.total_bytes // self.rows

    @property
    def payload_offset(self) -> int:
        """Offset in bytes of the rows' KV; page-aligned."""
        words = _HEADER_WORDS + (2 + MAX_WRITERS) * self.rows
        return -(-words * _WORD // _PAGE_BYTES) * _PAGE_BYTES

    @property
    def nbytes(self) -> int:
        return self.payload_offset + self.layout.total_bytes


class KVMirror:
    """The mirror in ``buffer`` (``MirrorShape.nbytes`` bytes, zeroed when new; may be read-only for readers)."""

    def __init__(self, buffer: bytes | bytearray | memoryview | mmap.mmap, shape: MirrorShape) -> None:
        self.shape = shape
        self._header = np.frombuffer(buffer, np.uint64, _HEADER_WORDS)
        start = _HEADER_WORDS * _WORD
        self.hashes: Hashes = np.frombuffer(buffer, np.uint64, shape.rows, start)
        """uint64[rows]: the chain hash of the content a row is assigned to; ``UNKNOWN`` if it is free."""
        start += _WORD * shape.rows
        self.slots: Ids = np.frombuffer(buffer, np.int64, shape.rows, start)
        """int64[rows]: the slot to copy a row from; meaningless for rows of an earlier generation."""
        start += _WORD * shape.rows
        self._tags = np.frombuffer(buffer, np.uint64, MAX_WRITERS * shape.rows, start)
        self._tags = self._tags.reshape(MAX_WRITERS, shape.rows)
        self.kv = KVSegment(buffer, shape.layout, shape.payload_offset)

    @classmethod
    def attach(cls, buffer: bytes | bytearray | memoryview | mmap.mmap, shape: MirrorShape) -> KVMirror:
        """Return the mirror in ``buffer``. Raises MirrorMismatch."""
        have = memoryview(buffer).nbytes
        if have < shape.nbytes:
            raise MirrorMismatch(f"a mirror of {shape.rows} rows needs {shape.nbytes} bytes, the buffer has {have}")
        mirror = cls(buffer, shape)
        if mirror._header[: _SEED + 1].tolist() != mirror._identity():
            raise MirrorMismatch("the buffer holds no mirror, or one of another shape or model")
        return mirror

    @classmethod
    def attach_or_create(cls, buffer: bytearray | memoryview | mmap.mmap, shape: MirrorShape) -> KVMirror:
        """Return the mirror in ``buffer``, or make an empty one. For rank 0."""
        try:
            return cls.attach(buffer, shape)
        except MirrorMismatch:
            mirror = cls(buffer, shape)
            mirror._header[:] = 0
            mirror.hashes[:] = UNKNOWN
            mirror._header[: _SEED + 1] = mirror._identity()
            return mirror

    def complete(self) -> NDArray[np.bool_]:
        """Return bool[rows]: the rows that every writer has finished."""
        writers = int(self._header[_WRITERS])
        done = self.hashes != UNKNOWN
        if not 0 < writers <= MAX_WRITERS:
            return np.zeros_like(done)
        for writer in range(writers):
            done &= self._tags[writer] == self.hashes
        return done

    def rows_of(self, hashes: Hashes) -> Ids:
        """Return int64[n]: a complete row for each chain hash (uint64[n]), or -1."""
        rows = np.append(np.flatnonzero(self.complete()), -1)
        return rows[places_of(self.hashes[rows[:-1]], hashes)]

    # ---- rank 0

    def begin(self, generation: int, writers: int) -> None:
        """Take over for a generation, once no rank restores from here. Can be repeated after a kill at any instant."""
        if not 0 < writers <= MAX_WRITERS:
            raise ValueError(f"a mirror has 1 to {MAX_WRITERS} writers, not {writers}")
        self._header[_GENERATION] = 0
        self.hashes[~self.complete()] = UNKNOWN
        # A rank's old tag of a dropped row may stand for other heads than the rank of that number has now.
        self._tags[: max(writers, int(self._header[_WRITERS]))] = self.hashes
        self._header[_WRITERS] = writers
        self._header[_GENERATION] = generation + 1

    def assign(self, rows: Ids, slots: Ids, hashes: Hashes) -> None:
        """Assign ``rows``, which must be free, to ``slots`` with these chain hashes."""
        self.slots[rows] = slots
        self.hashes[rows] = hashes
        self._header[_ASSIGNED] += np.uint64(1)

    def free(self, rows: Ids) -> None:
        """Free these rows; their content is lost."""
        self.hashes[rows] = UNKNOWN

    # ---- every writer

    def begun(self, generation: int) -> bool:
        """Return whether writers of this generation may write."""
        return int(self._header[_GENERATION]) == generation + 1

    @property
    def assignments(self) -> int:
        """Number of calls of ``assign`` so far."""
        return int(self._header[_ASSIGNED])

    def pending(self, writer: int) -> Ids:
        """Return int64[n]: the assigned rows that ``writer`` has not finished."""
        hashes = self.hashes
        return np.flatnonzero((self._tags[writer] != hashes) & (hashes != UNKNOWN))

    def set_tags(self, writer: int, rows: Ids, hashes: Hashes | int) -> None:
        """Set a writer's tags of these rows to the hashes of what it copied; ``UNKNOWN`` while it writes."""
        self._tags[writer, rows] = hashes

    def _identity(self) -> list[int]:
        return [_MAGIC_VALUE, self.shape.rows, self.shape.row_bytes, self.shape.seed]
