"""A rehearsal leaves no trace: KV of its own, nothing counted. Live tests see that KV and tokens stay as they are."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from anchortp_sglang.rank import rehearsal
from anchortp_sglang.rank.rehearsal import Rehearsal


def test_all_ranks_end_in_the_same_turn_and_only_rank_0_brings_requests():
    schedulers = [SimpleNamespace(gracefully_exit=False) for _ in range(2)]
    turns = [Rehearsal(scheduler, rank) for rank, scheduler in enumerate(schedulers)]
    brought = []
    while not schedulers[0].gracefully_exit:
        assert not schedulers[1].gracefully_exit
        brought.append(len(turns[0].pull([])))
        assert turns[1].pull(None) is None
    assert schedulers[1].gracefully_exit
    assert sorted(brought, reverse=True)[:3] == [4, 4, 0]


def test_requests_of_both_rounds_have_the_same_prompts_under_other_names():
    first, again = (rehearsal._requests(turn) for turn in (1, 20))
    assert [one.input_ids for one in first] == [one.input_ids for one in again]
    assert not {one.rid for one in first} & {one.rid for one in again}


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("names", [("k_buffer", "v_buffer"), ("kv_buffer",)])
def test_kv_goes_to_buffers_that_are_dropped(page_size, names):
    kept = {name: [torch.ones(9000, 2, 3, dtype=torch.bfloat16)] for name in names}
    pool = SimpleNamespace(**kept)
    with rehearsal._own_buffers(pool, page_size):
        for name in names:
            [own] = getattr(pool, name)
            assert own.shape[1:] == (2, 3) and own.dtype == torch.bfloat16
            # Two rounds of four requests, each in pages of its own, behind the padding.
            assert page_size * (1 + 2 * 4 * (1 + -(-7 // page_size))) == own.shape[0]
            own += 1
    assert all(getattr(pool, name) is kept[name] and kept[name][0].eq(1).all() for name in names)


COUNTING = """
from prometheus_client import Counter, Gauge, Histogram
from anchortp_sglang.rank import rehearsal
counter, gauge, histogram = Counter("a", "."), Gauge("b", ".", multiprocess_mode="mostrecent"), Histogram("c", ".")
def count():
    counter.inc(); gauge.set(5); histogram.observe(1)
def read():
    return counter._value.get(), gauge._value.get(), histogram._sum.get()
with rehearsal._uncounted():
    count()
print(read())
count()
print(read())
"""


def test_nothing_is_counted_meanwhile_and_all_later(tmp_path):
    env = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COUNTING], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "(0.0, 0.0, 0.0)\n(1.0, 5.0, 1.0)\n"
