"""What a slot table holds, whose it is, and what a kill between two of its stores leaves."""

from __future__ import annotations

import mmap
import os
import timeit
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from counted_stores import Counted, Killed

from anchortp_sglang.kv import slot_table
from anchortp_sglang.kv.slot_table import SlotTable, SlotTableMismatch

NAMESPACE = b"model-a"
SLOTS = 64


def new_table(slots: int = SLOTS) -> tuple[SlotTable, bytearray]:
    buffer = bytearray(SlotTable.nbytes(slots))
    return SlotTable.create(buffer, slots, NAMESPACE), buffer


def attached(buffer: bytearray, slots: int = SLOTS) -> SlotTable:
    return SlotTable.attach(bytes(buffer), slots, NAMESPACE)


def described(table: SlotTable) -> list[tuple[list[int], list[int], int]]:
    return [(chain.slots.tolist(), chain.tokens.tolist(), chain.shared) for chain in table.entries().intact_chains()]


def test_an_empty_table_has_no_chains() -> None:
    table, _ = new_table()
    assert not table.retained_slots().size
    assert table.entries().intact_chains() == []


def test_chains_come_oldest_first_and_name_what_they_share() -> None:
    table, buffer = new_table()
    assert table.commit_run([10, 11, 12, 13], [1, 2, 3, 4], 0)
    assert table.commit_run([20, 21], [7, 8], 11)
    assert table.commit_run([30], [9], 0)
    table.commit_step([14, 22], [5, 9], [13, 21])
    assert described(attached(buffer)) == [
        ([30], [9], 0),
        ([10, 11, 12, 13, 14], [1, 2, 3, 4, 5], 0),
        ([10, 11, 20, 21, 22], [1, 2, 7, 8, 9], 2),
    ]
    stamps = [chain.last_use for chain in table.entries().intact_chains()]
    assert stamps == sorted(stamps)
    assert attached(buffer).retained_slots().tolist() == [10, 11, 12, 13, 14, 20, 21, 22, 30]


def test_equal_content_in_two_slots_stays_two_chains() -> None:
    table, _ = new_table()
    table.commit_run([1, 2, 3], [5, 6, 7], 0)
    table.commit_run([4, 5], [6, 7], 1)
    assert described(table) == [([1, 2, 3], [5, 6, 7], 0), ([1, 4, 5], [5, 6, 7], 1)]


def test_an_entry_committed_again_below_an_equal_parent_hangs_on_that_one() -> None:
    table, _ = new_table()
    table.commit_run([1, 2, 3], [5, 6, 7], 0)
    table.commit_run([4], [5], 0)
    table.commit_run([2], [6], 4)
    table.invalidate([1])
    assert described(table) == [([4, 2, 3], [5, 6, 7], 0)]


def test_nothing_is_committed_below_an_unknown_parent() -> None:
    table, buffer = new_table()
    before = bytes(buffer)
    assert not table.commit_run([5, 6], [1, 2], 4)
    table.commit_step([5], [1], [4])
    assert bytes(buffer) == before
    table.commit_run([1, 2], [1, 2], 0)
    table.commit_step([7, 8], [3, 3], [9, 2])
    assert described(table) == [([1, 2, 8], [1, 2, 3], 0)]


def test_padding_in_a_step_is_skipped() -> None:
    table, buffer = new_table()
    table.commit_run([1], [1], 0)
    table.invalidate([0, 2])
    table.commit_step([2, 0, 0], [2, 0, 5], [1, 0, 1])
    assert described(attached(buffer)) == [([1, 2], [1, 2], 0)]


def test_an_invalidated_slot_takes_its_descendants_with_it_until_it_holds_the_same_again() -> None:
    table, _ = new_table()
    table.commit_run([1, 2, 3, 4], [1, 2, 3, 4], 0)
    table.invalidate([2])
    assert described(table) == [([1], [1], 0)]
    table.commit_run([2], [99], 1)
    assert described(table) == [([1, 2], [1, 99], 0)]
    table.invalidate([2])
    table.commit_run([2], [2], 1)
    assert described(table) == [([1, 2, 3, 4], [1, 2, 3, 4], 0)]


def test_a_step_committed_token_by_token_is_the_same() -> None:
    in_arrays, _ = new_table()
    in_integers, _ = new_table()
    step = ([3, 5, 0, 6, 7], [9, 9, 9, 1 << 40, 8], [2, 0, 2, 4, 40])
    for table in (in_arrays, in_integers):
        table.commit_run([1, 2], [1, 2], 0)
        table.commit_run([4, 6], [4, 5], 0)
    in_arrays.commit_step(*step)
    for slot, token, parent in zip(*step, strict=True):
        in_integers.commit_tokens([(slot, token, parent)])
    assert described(in_integers) == described(in_arrays)
    assert in_integers._hash.tolist() == in_arrays._hash.tolist()


@pytest.mark.parametrize(("slot", "parent"), [(SLOTS, 0), (-1, 0), (1, SLOTS), (1, -1000)])
def test_ids_out_of_range_are_refused_and_nothing_is_written(slot: int, parent: int) -> None:
    table, buffer = new_table()
    before = bytes(buffer)
    with pytest.raises(ValueError, match="not all within"):
        table.commit_run([slot], [1], parent)
    with pytest.raises(ValueError, match="not all within"):
        table.commit_step([slot], [1], [parent])
    with pytest.raises(ValueError, match="not both within"):
        table.commit_tokens([(slot, 1, parent)])
    assert bytes(buffer) == before


def test_malformed_runs_are_refused_and_nothing_is_written() -> None:
    table, buffer = new_table()
    before = bytes(buffer)
    with pytest.raises(ValueError, match="padding slot"):
        table.commit_run([1, 0], [1, 2], 0)
    with pytest.raises(ValueError, match="one token and one parent"):
        table.commit_run([1, 2], [1], 0)
    assert table.commit_run([], [], 0)
    assert bytes(buffer) == before


def test_another_mapping_of_the_same_memfd_sees_the_chains() -> None:
    fd = os.memfd_create("slot-table")
    os.ftruncate(fd, SlotTable.nbytes(SLOTS))
    writer = SlotTable.create(mmap.mmap(fd, 0), SLOTS, NAMESPACE)
    reader = SlotTable.attach(mmap.mmap(fd, 0, prot=mmap.PROT_READ), SLOTS, NAMESPACE)
    os.close(fd)
    writer.commit_run([3, 1], [8, 9], 0)
    assert described(reader) == [([3, 1], [8, 9], 0)]


def test_a_table_of_another_model_or_size_is_refused() -> None:
    _, buffer = new_table()
    with pytest.raises(SlotTableMismatch, match="namespace"):
        SlotTable.attach(buffer, SLOTS, b"model-b")
    with pytest.raises(SlotTableMismatch, match="slots"):
        SlotTable.attach(buffer, SLOTS - 1, NAMESPACE)
    with pytest.raises(SlotTableMismatch, match="bytes"):
        SlotTable.attach(buffer, SLOTS + 1, NAMESPACE)
    with pytest.raises(ValueError, match="bytes"):
        SlotTable.create(buffer, SLOTS + 1, NAMESPACE)


@pytest.mark.parametrize("word", [0, 1, 2, 3, 4, 8])
def test_a_spoiled_header_is_refused(word: int) -> None:
    _, buffer = new_table()
    buffer[8 * word + 7] ^= 0x80
    with pytest.raises(SlotTableMismatch):
        attached(buffer)


def test_a_decode_step_costs_microseconds() -> None:
    table, _ = new_table(4_097)
    parents = np.arange(1, 33)
    for parent in parents:
        table.commit_run([parent], [parent], 0)
    fresh = iter(np.arange(33, 33 + 32 * 100).reshape(100, 32))
    rounds = timeit.repeat(lambda: table.commit_step(next(fresh), parents, parents), number=10, repeat=10)
    assert len(table.entries().intact_chains()) == 32 * 100
    assert min(rounds) / 10 < 200e-6


@pytest.mark.parametrize("n_stores", range(7))
def test_a_kill_while_a_token_is_replaced_leaves_the_old_or_the_new_or_nothing(
    n_stores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, buffer = new_table()
    table.commit_run([1, 2, 3], [1, 2, 3], 0)
    stop_after(monkeypatch, n_stores)
    table.commit_tokens([(3, 9, 1)])
    old, new, nothing = [([1, 2, 3], [1, 2, 3], 0)], [([1, 2], [1, 2], 0), ([1, 3], [1, 9], 1)], [([1, 2], [1, 2], 0)]
    assert described(attached(buffer)) == (old if n_stores < 2 else nothing if n_stores < 6 else new)


def stop_after(monkeypatch: pytest.MonkeyPatch, n_stores: int) -> None:
    """From here on, a call dies after so many stores to the shared memory."""
    carry_out, enter = slot_table._apply, slot_table._enter

    def enter_some(columns: Any, step: int, entries: Any) -> None:
        with suppress(Killed):
            enter(Counted.all(columns, n_stores), step, entries)

    monkeypatch.setattr(slot_table, "_apply", lambda stores: carry_out(stores[:n_stores]))
    monkeypatch.setattr(slot_table, "_enter", enter_some)


@pytest.mark.parametrize("n_stores", range(1, 10))
def test_a_kill_while_a_table_is_made_anew_leaves_none_or_an_empty_one(
    n_stores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, buffer = new_table()
    table.commit_run([1, 2, 3], [1, 2, 3], 0)
    assert len(table._create_stores()) == 9
    stop_after(monkeypatch, n_stores)
    SlotTable.create(buffer, SLOTS, NAMESPACE)
    if n_stores == 9:
        assert described(attached(buffer)) == []
    else:
        with pytest.raises(SlotTableMismatch):
            attached(buffer)


@pytest.mark.parametrize("n_stores", range(8))
def test_a_kill_while_entries_are_replaced_leaves_each_old_or_new_or_unknown(
    n_stores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {1: (1, 0), 2: (2, 1), 3: (3, 2), 4: (4, 3)}
    new = {1: (1, 0), 3: (7, 1), 2: (8, 3), 5: (9, 2)}
    table, buffer = new_table()
    table.commit_run([1, 2, 3, 4], [1, 2, 3, 4], 0)
    stop_after(monkeypatch, n_stores)
    table.commit_run([3, 2, 5], [7, 8, 9], 1)
    survivor = attached(buffer)
    retained = survivor.retained_slots().tolist()
    assert 1 in retained
    for slot in retained:
        assert (survivor._token[slot], survivor._parent[slot]) in (old.get(slot), new.get(slot))
    assert (retained == [1, 2, 3, 5]) == (n_stores == 7)


@pytest.mark.parametrize("n_stores", range(8))
def test_a_kill_while_entries_are_committed_again_loses_nothing(n_stores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table, buffer = new_table()
    table.commit_run([1, 2, 3, 4], [1, 2, 3, 4], 0)
    stop_after(monkeypatch, n_stores)
    table.commit_run([2, 3], [2, 3], 1)
    table.commit_step([2], [2], [1])
    table.commit_tokens([(2, 2, 1)])
    assert described(attached(buffer)) == [([1, 2, 3, 4], [1, 2, 3, 4], 0)]
