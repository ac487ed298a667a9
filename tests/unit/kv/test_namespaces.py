"""Extra keys and cache salts: equal tokens of two of them never mix, and both are found again with their key."""

import numpy as np
import pytest
from counted_stores import Killed, killed_after

from anchortp_sglang.kv.namespaces import MOST_NAMESPACES, PLAIN
from anchortp_sglang.kv.retained_slots import retain
from anchortp_sglang.kv.slot_table import SlotTable

SLOTS = 40
TENANT, SALTED = ("tenant-1", None), ("tenant-1", "salt")


def new_table(slots=SLOTS):
    buffer = bytearray(SlotTable.nbytes(slots))
    return SlotTable.create(buffer, slots, b"model"), buffer


def found(table, rows=SLOTS):
    retained = retain(table.entries(), None, rows, 1)
    return {retained.entries.namespace(c): (c.slots.tolist(), c.tokens.tolist()) for c in retained.chains()}


def test_equal_tokens_of_two_namespaces_are_two_chains_and_come_back_with_their_keys():
    table, buffer = new_table()
    for first, key in ((1, PLAIN), (5, TENANT), (9, SALTED)):
        assert table.commit_run([first, first + 1], [7, 8], table.root_of(key))
        table.commit_tokens([(first + 2, 9, first + 1)])
    assert len({int(table.hashes[slot]) for slot in (3, 7, 11)}) == 3
    expected = {
        PLAIN: ([1, 2, 3], [7, 8, 9]),
        TENANT: ([5, 6, 7], [7, 8, 9]),
        SALTED: ([9, 10, 11], [7, 8, 9]),
    }
    assert found(SlotTable.attach(buffer, SLOTS, b"model")) == expected


def test_an_entry_of_one_namespace_does_not_verify_in_another():
    table, _ = new_table()
    table.commit_run([1], [7], table.root_of(TENANT))
    table.commit_run([2], [7], table.root_of(SALTED))
    table._parent[1] = table._parent[2]
    assert found(table) == {SALTED: ([2], [7])}


def test_namespaces_go_along_when_slots_get_new_numbers():
    table, _ = new_table()
    table.commit_run([30, 31], [1, 2], table.root_of(SALTED))
    table.commit_run([20], [3], table.root_of(TENANT))
    new, _ = new_table(10)
    new.write_entries(retain(table.entries(), None, 10, 1).entries)
    assert found(new, 10) == {SALTED: ([2, 3], [1, 2]), TENANT: ([1], [3])}
    assert new.root_of(SALTED) == table.root_of(SALTED)


def test_places_are_used_again_when_all_are_taken_and_some_of_them_empty():
    table, _ = new_table(MOST_NAMESPACES + 3)
    for n in range(MOST_NAMESPACES):
        assert table.commit_run([n + 1], [5], table.root_of((f"key {n}", None)))
    last = MOST_NAMESPACES + 1
    assert table.root_of(("one more", None)) is None
    table.invalidate([8])
    assert table.commit_run([last], [5], table.root_of(("one more", None)))
    assert table.root_of(("another", None)) is None
    retained = found(table, MOST_NAMESPACES + 3)
    assert retained["one more", None] == ([last], [5])
    assert ("key 7", None) not in retained
    assert len(retained) == MOST_NAMESPACES


def test_a_key_that_is_too_long_has_no_root():
    table, _ = new_table()
    assert table.root_of(("x" * 1000, None)) is None
    assert table.root_of(("ü" * 200, None)) is not None


@pytest.mark.parametrize("elements", range(6))
def test_a_kill_while_a_namespace_is_entered_leaves_the_others_whole(elements):
    table, buffer = new_table()
    table.commit_run([1], [7], table.root_of(TENANT))
    try:
        with killed_after(elements):
            table.commit_run([2], [7], table.root_of(SALTED))
    except Killed:
        pass
    retained = found(SlotTable.attach(buffer, SLOTS, b"model"))
    assert retained[TENANT] == ([1], [7])
    assert set(retained) <= {TENANT, SALTED}


def test_torn_and_foreign_keys_are_no_namespaces():
    table, _ = new_table()
    table.commit_run([1], [7], table.root_of(TENANT))
    table._namespaces._keys[0] = np.void(b'["tenant-2",null]'.ljust(496, b"\0"))
    table._namespaces._lengths[0] = 17
    assert found(table) == {}
    table._namespaces._lengths[0] = 1 << 60
    assert found(table) == {}
