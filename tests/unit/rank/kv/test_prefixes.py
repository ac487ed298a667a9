"""A rank's prefixes go through their states in one order, and hooks outside of a rank leave SGLang as it is."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from anchortp_sglang.kv.slot_table import SlotTable
from anchortp_sglang.platforms.cpu.platform import CpuPlatform
from anchortp_sglang.rank.attachment import current
from anchortp_sglang.rank.kv import slot_table_hooks
from anchortp_sglang.rank.kv.prefixes import Prefixes, State, WrongOrder

ROWS = 8
BUILT = SimpleNamespace(token_to_kv_pool_allocator=None, disable_radix_cache=False)


def prefixes(rank: int = 0) -> Prefixes:
    return Prefixes(rank, ROWS, b"model", bytearray(SlotTable.nbytes(ROWS)), CpuPlatform())


def restoration() -> SimpleNamespace:
    return SimpleNamespace(start=lambda: None)


def test_rank_0_writes_its_table_only_after_all_ranks_have_built_their_trees() -> None:
    made = prefixes()
    assert (made.state, made.table) == (State.OPENED, None)
    made.build(BUILT)
    assert made.finish() == 0.0 and made.report == {}
    assert (made.state, made.table) == (State.BUILT, None)
    made.start_writing()
    assert made.state is State.WRITING and made.table is not None


def test_other_ranks_write_no_table() -> None:
    made = prefixes(rank=1)
    made.build(BUILT)
    made.finish()
    assert (made.state, made.table) == (State.BUILT, None)


def written() -> Prefixes:
    made = prefixes()
    made.build(BUILT)
    made.start_writing()
    return made


@pytest.mark.parametrize(
    ("taken", "step", "complaint"),
    [
        (prefixes, lambda made: made.start_writing(), "opened: writing follows built"),
        (prefixes, lambda made: made.finish(), "opened: built follows built"),
        (written, lambda made: made.start_writing(), "writing: writing follows built"),
        (written, lambda made: made.build(BUILT), "writing: built follows opened or restoring"),
        (written, lambda made: made.restore(restoration(), None), "writing: restoring follows opened"),
    ],
)
def test_a_step_out_of_order_is_refused(taken, step, complaint) -> None:
    with pytest.raises(WrongOrder, match=complaint):
        step(taken())


def test_in_a_process_that_is_no_rank_the_hooks_leave_sglang_as_it_is() -> None:
    assert current() is None
    untouched = object()
    slot_table_hooks.before_free(untouched, untouched)
    slot_table_hooks.before_release_page_ids(untouched, untouched)
    slot_table_hooks.before_copy_result_to_cpu(untouched, untouched, untouched)
    slot_table_hooks.before_process_batch_result(untouched, untouched, untouched)
    slot_table_hooks.after_build_kv_cache(untouched)
    assert slot_table_hooks.after_flush_cache(True, untouched) is True
    assert slot_table_hooks.after_whole_embedding(torch.ones(1)) == 1
    assert slot_table_hooks.around_checkpoint_into_tree(lambda *about, up_to: up_to, None, None, up_to=3) == 3


def test_what_is_moved_below_a_token_that_is_still_computed_is_intact_once_it_is_known() -> None:
    """Two requests begin alike. One ends with a step in flight, and the other continues in its slots, the last too."""
    made = written()
    assert made.table is not None
    made.table.commit_run([1], [10], 0)
    made.table.commit_run([3, 4, 5], [10, 20, 30], 0)
    made.commit_later(2, 20, 1)  # the first one's second token
    made.move_below(np.array([5]), np.array([2]))
    made.forget(np.array([3, 4]))
    assert made.table.retained_slots().tolist() == [1]
    made.commit_pending()
    assert made.table.retained_slots().tolist() == [1, 2, 5]
    [chain] = made.table.entries().intact_chains()
    assert chain.tokens.tolist() == [10, 20, 30]


@pytest.mark.parametrize("freed", [2, 5])
def test_what_is_freed_meanwhile_is_moved_nowhere(freed) -> None:
    made = written()
    assert made.table is not None
    made.table.commit_run([1], [10], 0)
    made.table.commit_run([3, 4, 5], [10, 20, 30], 0)
    made.commit_later(2, 20, 1)
    made.move_below(np.array([5]), np.array([2]))
    made.forget(np.array([3, 4, freed]))
    made.table.commit_run([freed], [77], 0)
    made.commit_pending()
    assert freed in made.table.retained_slots().tolist()
    assert made.table.parents[freed] == 0
