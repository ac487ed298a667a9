"""The chain hash: a run in closed form is the same as token by token."""

from __future__ import annotations

import numpy as np
import pytest

from anchortp_sglang.kv.chain_hash import RunHasher, child_hash, child_hashes, root_hash
from anchortp_sglang.kv.slot_table import SlotTable

ROOT_HASH = root_hash(b"model-a")


def one_by_one(parent_hash: int, tokens: np.ndarray) -> list[int]:
    hashes = [parent_hash]
    for token in tokens:
        hashes.append(int(child_hashes(np.array(hashes[-1:], np.uint64), np.array([token]))[0]))
    return hashes[1:]


@pytest.mark.parametrize("token", [0, 1, -1, 151_935, (1 << 62) + 1, -(1 << 63)])
@pytest.mark.parametrize("parent_hash", [1, ROOT_HASH, (1 << 64) - 1])
def test_plain_integers_hash_as_arrays_do(parent_hash: int, token: int) -> None:
    (expected,) = child_hashes(np.array([parent_hash], np.uint64), np.array([token], np.int64)).tolist()
    assert child_hash(parent_hash, token) == expected


def test_plain_integers_never_hash_to_unknown() -> None:
    assert child_hash(ROOT_HASH, token_that_hashes_to_zero(ROOT_HASH)) == 1


def token_that_hashes_to_zero(parent_hash: int) -> int:
    """mix and A are invertible, so a token can be chosen that makes the hash come out as 0."""
    wrap = (1 << 64) - 1
    x = -parent_hash * 6364136223846793005 & wrap
    x ^= x >> 31 ^ x >> 62
    x = x * pow(0x94D049BB133111EB, -1, 1 << 64) & wrap
    x ^= x >> 27 ^ x >> 54
    x = x * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & wrap
    x ^= x >> 30 ^ x >> 60
    x ^= 0x9E3779B97F4A7C15
    return int(np.array(x, np.uint64).view(np.int64))


@pytest.mark.parametrize("n", [0, 1, 2, 1023, 1025, 3000])
def test_a_run_hashes_as_its_tokens_one_by_one(n: int) -> None:
    tokens = np.random.default_rng(n).integers(-(1 << 62), 1 << 62, n)
    seed = ROOT_HASH
    assert RunHasher().run_hashes(seed, tokens).tolist() == one_by_one(seed, tokens)


@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_hash_of_zero_is_stored_as_one_and_its_descendants_verify(at: int) -> None:
    tokens = np.arange(8)
    above = one_by_one(ROOT_HASH, tokens[:at])
    tokens[at] = token_that_hashes_to_zero(above[-1] if above else ROOT_HASH)
    hashes = RunHasher().run_hashes(ROOT_HASH, tokens)
    assert hashes[at] == 1
    assert hashes.tolist() == one_by_one(ROOT_HASH, tokens)
    table = SlotTable.create(bytearray(SlotTable.nbytes(10)), 10, b"model-a")
    assert table.commit_run(np.arange(1, 9), tokens, 0)
    table.commit_step([9], [5], [8])
    assert table.retained_slots().tolist() == list(range(1, 10))
