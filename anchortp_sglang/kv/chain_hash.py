"""The 64-bit chain hash of a KV slot: it depends on the slot's token and all tokens before it.

``h(child) = h(parent) * A + mix(token)  (mod 2**64)``, from a root that stands for the model. As it is affine in the
parent, it has a closed form over a run: a prompt of any length is hashed without a Python loop. ``UNKNOWN`` (0) means
that a slot's content is not known; a hash of 0 is stored as 1.

It guards against stale entries, not against forgery: a client can build two prompts of equal hash, but can only mix up
these two.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Hashes = NDArray[np.uint64]

UNKNOWN = 0

MULTIPLIER = 6364136223846793005  # odd, hence invertible mod 2**64; = 5 mod 8, hence of full order (Knuth, MMIX)
_INVERSE = pow(MULTIPLIER, -1, 1 << 64)


SALT = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def _constant(value: int) -> Hashes:
    # A 0-d array costs a ufunc half of what a numpy scalar does, and a decode step is all overhead.
    return np.array(value, dtype=np.uint64)


_A = _constant(MULTIPLIER)
_ONE = _constant(1)
_SALT, _MIX_1, _MIX_2 = _constant(SALT), _constant(MIX_1), _constant(MIX_2)
_27, _30, _31 = _constant(27), _constant(30), _constant(31)


def root_hash(namespace: bytes) -> int:
    """Return the hash of the empty chain: a nonzero 64-bit digest of ``namespace``, which identifies the model."""
    return int.from_bytes(hashlib.blake2b(namespace, digest_size=8).digest(), "little") or 1


def mix(tokens: Ids) -> Hashes:
    """Apply splitmix64's finaliser to each token: int64[n] -> uint64[n]. A bijection, so tokens never collide."""
    x = tokens.view(np.uint64) ^ _SALT
    x ^= x >> _30
    x *= _MIX_1
    x ^= x >> _27
    x *= _MIX_2
    x ^= x >> _31
    return x


def child_hashes(parent_hashes: Hashes, tokens: Ids) -> Hashes:
    """Hash each token below its own parent: uint64[n], int64[n] -> uint64[n], never ``UNKNOWN``."""
    hashes = parent_hashes * _A
    hashes += mix(tokens)
    np.maximum(hashes, _ONE, out=hashes)
    return hashes


def child_hash(parent_hash: int, token: int) -> int:
    """Hash one token below its parent, in plain integers."""
    return (parent_hash * MULTIPLIER + _mix_one(token)) & _MASK or 1


@lru_cache(maxsize=1 << 15)
def _mix_one(token: int) -> int:
    x = token & _MASK ^ SALT
    x = (x ^ x >> 30) * MIX_1 & _MASK
    x = (x ^ x >> 27) * MIX_2 & _MASK
    return x ^ x >> 31


class RunHasher:
    """Hashes runs of consecutive tokens in O(n), and keeps the powers of A between calls.

    Over a run, ``h_i = A**(i+1) * (h_parent + sum_{j<=i} mix(t_j) * A**-(j+1))``.
    """

    def __init__(self) -> None:
        self._powers: Hashes = np.empty(0, np.uint64)
        self._inverses: Hashes = np.empty(0, np.uint64)

    def run_hashes(self, parent_hash: int, tokens: Ids) -> Hashes:
        """Hash each token (int64[n]) below the one before it, the first below ``parent_hash``: uint64[n]."""
        n = len(tokens)
        self._reserve(n)
        sums = mix(tokens)
        sums *= self._inverses[:n]
        np.cumsum(sums, out=sums)
        sums += _constant(parent_hash)
        sums *= self._powers[:n]
        if np.count_nonzero(sums) < n:
            # A hash of 0 is stored as 1, and the rest of the run is hashed from that.
            zero = int(np.argmin(sums))
            sums[zero] = 1
            sums[zero + 1 :] = self.run_hashes(1, tokens[zero + 1 :])
        return sums

    def _reserve(self, n: int) -> None:
        if n > len(self._powers):
            size = max(n, 2 * len(self._powers), 1024)
            self._powers = np.cumprod(np.full(size, MULTIPLIER, np.uint64), dtype=np.uint64)
            self._inverses = np.cumprod(np.full(size, _INVERSE, np.uint64), dtype=np.uint64)
