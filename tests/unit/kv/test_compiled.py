"""Loops are compiled when they are defined, never in a recovery, and also where the result cannot be kept."""

import inspect

import numpy as np
import pytest

from anchortp_sglang.kv import choice_loops, equal_hashes, follow_loops, forest_loops, hash_index, run_loops
from anchortp_sglang.kv.compiled import ID, IDS, compiled
from anchortp_sglang.kv.retained_slots import retain
from anchortp_sglang.kv.slot_table import SlotTable


def test_a_loop_that_can_be_kept_nowhere_is_compiled_for_this_process():
    defined = {}
    exec("def double(x): return 2 * x", defined)  # which has no file
    assert compiled(ID)(defined["double"])(21) == 42


def test_a_loop_is_not_compiled_again_for_other_types():
    @compiled(IDS)
    def total(numbers):
        return numbers.sum()

    assert total(np.arange(4)) == 6
    with pytest.raises(TypeError):
        total(np.arange(4, dtype=np.float32))


@pytest.mark.parametrize("module", [choice_loops, equal_hashes, follow_loops, forest_loops, hash_index, run_loops])
def test_all_loops_are_compiled_when_they_are_imported(module):
    loops = [loop for _, loop in inspect.getmembers(module, lambda member: hasattr(member, "signatures"))]
    assert loops and all(len(loop.signatures) == 1 for loop in loops)


def test_a_table_in_memory_that_is_read_only_is_read_where_it_is():
    buffer = bytearray(SlotTable.nbytes(9))
    SlotTable.create(buffer, 9, b"model").commit_run([4, 2, 7], [1, 2, 3], 0)
    entries = SlotTable.attach(bytes(buffer), 9, b"model").entries()
    assert not entries.parents.flags.owndata and not entries.parents.flags.writeable
    retained = [retain(entries, None, rows, 1) for rows in (9, 12, 4, 3)]
    assert [[chain.slots.tolist() for chain in each.chains()] for each in retained] == [
        [[4, 2, 7]],
        [[4, 2, 7]],
        [[2, 1, 3]],
        [[2, 1]],
    ]
