"""Which slots a new generation keeps, and under which numbers."""

import numpy as np
import pytest

from anchortp_sglang.kv.chain_hash import RunHasher, root_hash
from anchortp_sglang.kv.retained_slots import retain
from anchortp_sglang.kv.slot_table import SlotTable

NAMESPACE = b"model"


def table_of(rows, *commits):
    """A slot table after ``commits``: (slots, tokens, parent)."""
    table = SlotTable.create(bytearray(SlotTable.nbytes(rows)), rows, NAMESPACE)
    for slots, tokens, parent in commits:
        assert table.commit_run(slots, tokens, parent)
    return table


def retained(table, rows, page_size=1, usable=None, running=None):
    return retain(table.entries(), usable, rows, page_size, running)


def renumbered(result):
    return dict(zip(result.slots.tolist(), result.numbers.tolist(), strict=True))


def test_all_is_kept_under_its_number_where_there_is_room():
    table = table_of(12, ([2, 5, 3], [7, 8, 9], 0), ([9], [1], 5))
    result = retained(table, 12)
    assert renumbered(result) == {2: 2, 3: 3, 5: 5, 9: 9}
    assert set(result.dropped.values()) == {0}
    assert [(c.slots.tolist(), c.tokens.tolist(), c.shared) for c in result.chains()] == [
        ([2, 5, 3], [7, 8, 9], 0),
        ([2, 5, 9], [7, 8, 1], 2),
    ]


def test_what_hangs_on_a_slot_whose_kv_is_lost_is_lost_too():
    table = table_of(12, ([2, 5, 3], [7, 8, 9], 0), ([6, 7], [1, 1], 0))
    usable = np.ones(12, bool)
    usable[5] = False
    result = retained(table, 12, usable=usable)
    assert result.slots.tolist() == [2, 6, 7]
    assert result.dropped["lost_with_device"] == 2


def test_a_table_filled_with_what_is_kept_rebuilds_the_same_forest():
    table = table_of(12, ([2, 5, 3], [7, 8, 9], 0), ([9, 10], [1, 1], 5))
    result = retained(table, 6)
    assert len(result.slots) == 5
    new = SlotTable.create(bytearray(SlotTable.nbytes(6)), 6, NAMESPACE)
    new.write_entries(result.entries)
    again = retain(new.entries(), None, 6, 1)
    assert again.slots.tolist() == result.numbers.tolist() == [1, 2, 3, 4, 5]
    assert [c.tokens.tolist() for c in again.chains()] == [[7, 8, 9], [7, 8, 1, 1]]
    assert new.commit_run([], [], 5), "a kept slot is a parent"


def test_with_less_room_the_last_used_stay_with_all_that_is_above_them():
    table = table_of(
        20,
        ([1, 2], [1, 2], 0),  # old, but above the newest
        ([3, 4, 5], [3, 4, 5], 0),
        ([6, 7], [6, 7], 0),
        ([8], [8], 2),
    )
    result = retained(table, 1 + 6)
    assert renumbered(result) == {1: 1, 2: 2, 3: 3, 6: 4, 7: 5, 8: 6}, "of the chain at the edge the first tokens stay"


def test_running_requests_come_before_what_was_used_later():
    table = table_of(20, ([1, 2, 3], [1, 2, 3], 0), ([4, 5, 6], [4, 5, 6], 0))
    running = RunHasher().run_hashes(root_hash(NAMESPACE), np.array([1, 2, 3, 99]))
    assert retained(table, 1 + 3).slots.tolist() == [4, 5, 6]
    assert retained(table, 1 + 3, running=running).slots.tolist() == [1, 2, 3]
    assert retained(table, 1 + 4, running=running).slots.tolist() == [1, 2, 3, 4]


def test_running_requests_are_kept_one_after_the_other_not_a_part_of_each():
    table = table_of(20, ([1, 2, 3], [1, 2, 3], 0), ([4, 5, 6], [4, 5, 6], 0), ([7, 8, 9], [7, 8, 9], 0))
    table.commit_step([10, 11, 12], [0, 0, 0], [3, 6, 9])
    hasher, root = RunHasher(), root_hash(NAMESPACE)
    running = np.concatenate(
        [hasher.run_hashes(root, np.array([*tokens, 0])) for tokens in ([7, 8, 9], [1, 2, 3], [4, 5, 6])]
    )
    assert retained(table, 1 + 6, running=running).slots.tolist() == [1, 2, 7, 8, 9, 12]
    assert retained(table, 1 + 8).slots.tolist() == [4, 5, 6, 7, 8, 9, 11, 12], "two whole ones"


def test_only_whole_pages_of_consecutive_tokens_are_kept():
    table = table_of(
        24,
        ([4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6], 0),  # a page and a half
        ([12, 13, 14, 15], [5, 5, 5, 5], 7),
        ([17, 16, 18, 19], [9, 9, 9, 9], 0),  # a full page in the wrong order
    )
    result = retained(table, 24, page_size=4)
    assert result.slots.tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    assert [c.tokens.tolist() for c in result.chains()] == [[1, 2, 3, 4, 5, 5, 5, 5]]
    smaller = retained(table, 4 + 4, page_size=4)
    assert renumbered(smaller) == {4: 4, 5: 5, 6: 6, 7: 7}


@pytest.mark.parametrize("rows", [20, 9, 2])
def test_one_digest_means_the_same_slots_and_numbers(rows):
    one = table_of(20, ([1, 2, 3], [1, 2, 3], 0), ([5, 6], [5, 6], 2))
    other = table_of(20, ([1, 2, 3], [1, 2, 3], 0), ([5, 7], [5, 6], 2))
    assert retained(one, rows).digest() == retained(one, rows).digest()
    if rows > 2:
        assert retained(one, rows).digest() != retained(other, rows).digest()


def test_of_equal_chains_one_is_kept_and_what_hangs_on_the_others_hangs_on_it():
    table = table_of(20, ([4, 5, 6], [1, 2, 3], 0), ([2, 3, 7], [1, 2, 9], 0), ([8], [3], 3), ([9, 10], [5, 5], 6))
    result = retained(table, 20)
    assert result.slots.tolist() == [2, 3, 6, 7, 9, 10]
    assert sorted(c.tokens.tolist() for c in result.chains()) == [[1, 2, 3, 5, 5], [1, 2, 9]]
    assert result.entries.parents[[6, 7]].tolist() == [3, 3]
    assert set(result.dropped.values()) == {0}, "no content is lost"


def test_of_pages_that_hold_equal_chains_one_is_kept_and_of_those_that_begin_alike_both():
    table = table_of(32, (range(4, 12), [1, 2, 3, 4, 5, 6, 7, 8], 0), (range(16, 24), [1, 2, 3, 4, 5, 6, 0, 0], 0))
    result = retained(table, 32, page_size=4)
    assert result.slots.tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23]
    assert result.entries.parents[[8, 20]].tolist() == [7, 7]


def token_of(mixed):
    """The token of which ``chain_hash.mix`` makes this."""
    x, mask = int(mixed), (1 << 64) - 1
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        unshifted = x
        for _ in range(64 // shift):
            unshifted = x ^ unshifted >> shift
        x = unshifted * pow(factor, -1, 1 << 64) & mask
    return int(np.uint64(x ^ 0x9E3779B97F4A7C15).astype(np.int64))


def test_chains_that_only_have_the_same_hash_are_not_taken_for_equal():
    table = table_of(20, ([2, 3], [1, 2], 0), ([4], [7], 0))
    forged = token_of((int(table.hashes[3]) - int(table.hashes[4]) * 6364136223846793005) % (1 << 64))
    assert table.commit_run([5, 6], [forged, 8], 4) and table.commit_run([7], [9], 3)
    assert table.hashes[5] == table.hashes[3]
    result = retained(table, 20)
    assert sorted(c.tokens.tolist() for c in result.chains()) == [[1, 2, 9], [7]]
