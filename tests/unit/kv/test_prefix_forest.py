"""Chains come back whole out of the slot table's arrays; arrays that nobody committed verify as nothing."""

from __future__ import annotations

import numpy as np
import pytest

from anchortp_sglang.kv.chain_hash import MULTIPLIER, child_hashes, mix
from anchortp_sglang.kv.slot_table import SlotTable

NAMESPACE = b"model-a"


def new_table(slots: int) -> SlotTable:
    return SlotTable.create(bytearray(SlotTable.nbytes(slots)), slots, NAMESPACE)


def test_a_big_forest_is_rebuilt_as_it_was_committed() -> None:
    slots, requests, length = 50_001, 40, 1_000
    table = new_table(slots)
    rng = np.random.default_rng(0)
    places = rng.permutation(slots - 1) + 1
    prefix, rest = places[:10_000], places[10_000:]
    table.commit_run(prefix, prefix % 97, 0)
    for own in rest.reshape(requests, length):
        table.commit_run(own, own % 101, int(prefix[-1]))
    chains = table.entries().intact_chains()
    assert [chain.shared for chain in chains] == [0] + [len(prefix)] * (requests - 1)
    for chain, own in zip(chains, rest.reshape(requests, length), strict=True):
        assert np.array_equal(chain.slots, np.concatenate((prefix, own)))
        assert np.array_equal(chain.tokens, np.concatenate((prefix % 97, own % 101)))


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_verify_as_nothing(seed: int) -> None:
    slots = 20_000
    table = new_table(slots)
    rng = np.random.default_rng(seed)
    for array in (table._hash, table._token, table._last_use):
        array.view(np.uint8)[:] = rng.integers(0, 256, array.nbytes, np.uint8)
    table._parent[:] = rng.integers(-3, slots + 3, slots)
    assert not table.retained_slots().size
    assert table.entries().intact_chains() == []


@pytest.mark.parametrize("field", ["_hash", "_token", "_parent"])
@pytest.mark.parametrize("wrong", [-1, -(1 << 40), 10, 1 << 40, 9])
def test_a_spoiled_field_drops_the_slot_and_its_descendants_only(field: str, wrong: int) -> None:
    table = new_table(10)
    table.commit_run([1, 2, 3, 4], [1, 2, 3, 4], 0)
    table.commit_run([9], [8], 0)
    array = getattr(table, field)
    array[3] = np.array(wrong).astype(array.dtype)
    assert table.retained_slots().tolist() == [1, 2, 9]


def test_a_cycle_whose_hashes_agree_is_dropped() -> None:
    table = new_table(10)
    # h1 = h2 * A + m1 and h2 = h1 * A + m2 can be solved if A * m2 + m1 has the powers of 2 in 1 - A * A.
    even, odd = 8, (1 - MULTIPLIER**2) // 8
    assert odd % 2 == 1
    mixed = mix(np.arange(100)).tolist()
    token_1 = next(t for t in range(100) if (MULTIPLIER * mixed[0] + mixed[t]) % even == 0)
    sum_1 = (MULTIPLIER * mixed[0] + mixed[token_1]) % (1 << 64)
    hash_1 = sum_1 // even * pow(odd, -1, 1 << 64) % (1 << 64)
    hash_2 = (hash_1 * MULTIPLIER + mixed[0]) % (1 << 64)
    table._hash[1:3], table._token[1:3], table._parent[1:3] = (hash_1, hash_2), (token_1, 0), (2, 1)
    assert child_hashes(table._hash[[2, 1]], table._token[[1, 2]]).tolist() == [hash_1, hash_2]
    table.commit_step([3], [7], [2])
    table.commit_run([4], [4], 0)
    assert [chain.slots.tolist() for chain in table.entries().intact_chains()] == [[4]]
