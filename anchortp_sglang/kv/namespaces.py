"""Namespaces: the roots of the prefix forest for each extra key and cache salt in use, besides the plain root.

Equal tokens in two namespaces are two chains, as their hashes start from different seeds. Each namespace has a numbered
place in shared memory with its key, from which the prefix tree is rebuilt. A place is valid if its seed is that of its
key. In the slot table, parent -1 - n means "first token of a sequence of namespace n".
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from anchortp_sglang.kv.chain_hash import UNKNOWN, Hashes, Ids

__all__ = [
    "MOST_NAMESPACES",
    "NAMESPACES_BYTES",
    "PLAIN",
    "Key",
    "Namespaces",
    "first_parent",
    "namespace_seed",
    "namespaces_used",
]

Key = tuple[str | None, str | None]
"""A request's extra key and cache salt."""

PLAIN: Key = (None, None)

MOST_NAMESPACES = 256
_PLACE_BYTES = 512
_KEY_BYTES = _PLACE_BYTES - 16
NAMESPACES_BYTES = MOST_NAMESPACES * _PLACE_BYTES

_PLACE = np.dtype([("seed", np.uint64), ("length", np.uint64), ("key", f"V{_KEY_BYTES}")])


def namespace_seed(root: int, key: Key) -> int:
    """Return the nonzero hash of a namespace's empty chain. ``root``: the slot table's seed, that of (None, None)."""
    if key == PLAIN:
        return root
    digest = hashlib.blake2b(msgspec.json.encode(key), digest_size=8, key=root.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") or 1


def first_parent(namespace: int) -> int:
    """Return the parent that a slot table stores for the first token of a sequence of ``namespace``."""
    return -1 - namespace


class Namespaces:
    """The namespaces in NAMESPACES_BYTES of shared memory at ``offset``; none if zeroed. Only rank 0 writes."""

    def __init__(self, buffer: Any, offset: int, root: int) -> None:
        places = np.frombuffer(buffer, _PLACE, MOST_NAMESPACES, offset)
        self.seeds: Hashes = places["seed"]
        """uint64[MOST_NAMESPACES], the live array, not verified; ``UNKNOWN`` for an empty place."""
        self._lengths, self._keys = places["length"], places["key"]
        self._root = root
        self._found: dict[Key, int] = {}

    def all(self) -> dict[int, Key]:
        """Return the keys of all valid places, by place."""
        return {place: key for place in np.flatnonzero(self.seeds).tolist() if (key := self._key(place)) is not None}

    def find(self, key: Key) -> int | None:
        """Return the place of a namespace, or None."""
        place = self._found.get(key)
        if place is None or self._key(place) != key:
            self._found = {found: place for place, found in self.all().items()}
        return self._found.get(key)

    def stores(self, place: int, key: Key) -> list[tuple[Any, Any, Any]]:
        """Return the stores, in order, that put a namespace in an unused place. Raises ValueError if it is too long."""
        encoded = msgspec.json.encode(key)
        if len(encoded) > _KEY_BYTES:
            raise ValueError(f"an extra key and cache salt of {len(encoded)} bytes, more than {_KEY_BYTES}")
        return [
            (self.seeds, place, UNKNOWN),
            (self._keys, place, np.void(encoded.ljust(_KEY_BYTES, b"\0"))),
            (self._lengths, place, len(encoded)),
            (self.seeds, place, namespace_seed(self._root, key)),
        ]

    def _key(self, place: int) -> Key | None:
        encoded = bytes(self._keys[place].tobytes())[: int(self._lengths[place])]
        try:
            extra_key, cache_salt = msgspec.json.decode(encoded, type=Key)
        except msgspec.DecodeError:
            return None
        verified = namespace_seed(self._root, (extra_key, cache_salt)) == int(self.seeds[place])
        return (extra_key, cache_salt) if verified else None


def namespaces_used(parents: Ids, hashes: Hashes) -> NDArray[np.bool_]:
    """Return bool[MOST_NAMESPACES]: the namespaces in which a sequence begins."""
    used = np.zeros(MOST_NAMESPACES, np.bool_)
    firsts = parents[(hashes != UNKNOWN) & (parents < 0) & (parents >= -MOST_NAMESPACES)]
    used[-1 - firsts] = True
    return used
