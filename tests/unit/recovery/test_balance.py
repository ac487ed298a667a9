"""Shares that follow what devices were measured to bear."""

import asyncio
import itertools
import mmap
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planning_cases import model

from anchortp_sglang.planning.layout.extents import hold
from anchortp_sglang.planning.ownership.ownership import split
from anchortp_sglang.planning.placement.reconfiguration import fewest_units, reconfigure
from anchortp_sglang.rank import heartbeat
from anchortp_sglang.rank.measure import bytes_per_s
from anchortp_sglang.recovery import balance

AXES = model((32, 8))


def shares(found):
    return balance.shares(found, fewest_units(AXES, len(found)))


def answering(speeds, free, later=0):
    """A generation whose ranks answer the message that they are sent, rank 0 after some turns of the loop."""
    memory = mmap.mmap(-1, heartbeat.BYTES)
    counters = [heartbeat.Counters(memory, rank) for rank in range(len(speeds))]
    turns, sent = [], []

    def measured(number):
        turns.append(number)
        if sent and len(turns) > later:
            for rank, own in enumerate(counters):
                own.report(sent[0].number, speeds[rank], free[rank])
        return heartbeat.read_measured(memory, len(speeds), number)

    ownership = SimpleNamespace(devices=tuple(range(10, 10 + len(speeds))))
    return SimpleNamespace(measured=measured, ownership=ownership), sent


@pytest.mark.parametrize(
    ("aim", "free", "found"),
    [
        ("speed", [5, 6], {10: 900, 11: 300}),
        ("memory", [5, 6], {10: 105, 11: 56}),
        ("memory", [0, 0], {10: 1, 11: 1}),  # one memory for all
    ],
)
def test_all_ranks_are_asked_at_once_and_waited_for(aim, free, found):
    generation, sent = answering([900, 300], free, later=3)
    assert asyncio.run(balance.measure(generation, aim, [100, 50], sent.append, lambda: True)) == found
    assert len(sent) == 1


def test_ranks_that_do_not_answer_are_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(balance, "_TIMEOUT_S", 0.05)
    generation, _ = answering([1, 1], [0, 0])
    with pytest.raises(TimeoutError, match="did not measure"):
        asyncio.run(balance.measure(generation, "speed", [1, 1], lambda message: None, lambda: True))


def test_ranks_that_died_are_not_waited_for():
    generation, _ = answering([1, 1], [0, 0])
    serves = [True, True, False]
    assert (
        asyncio.run(balance.measure(generation, "speed", [1, 1], lambda message: None, lambda: serves.pop(0))) is None
    )


def test_an_older_answer_is_not_taken_for_this_one():
    memory = mmap.mmap(-1, heartbeat.BYTES)
    first, second = heartbeat.Counters(memory, 0), heartbeat.Counters(memory, 1)
    first.report(1, 70, 7)
    second.report(1, 80, 8)
    first.report(2, 90, 9)
    assert heartbeat.read_measured(memory, 2, 1) is None
    assert heartbeat.read_measured(memory, 2, 2) is None
    second.report(2, 60, 6)
    assert heartbeat.read_measured(memory, 2, 2) == ([90, 60], [9, 6])
    assert heartbeat.read_beats(memory, 2) == (0, 0) and heartbeat.read_tokens(memory) == (0, 0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=3), st.integers(0, 5))
def test_no_other_deal_burdens_the_most_burdened_less(found, more):
    units, found = len(found) + more, dict(enumerate(found))
    dealt = balance.shares(found, units)

    def load(deal):
        return max(count / found[device] for device, count in enumerate(deal))

    others = itertools.product(range(1, units + 1), repeat=len(found))
    assert min(dealt.values()) >= 1 and sum(dealt.values()) == units
    assert load(dealt.values()) == min(load(deal) for deal in others if sum(deal) == units)


@pytest.mark.parametrize(
    ("speeds", "heads"),
    [
        ({0: 100, 1: 100, 2: 100, 3: 100}, [2, 2, 2, 2]),
        ({0: 300, 1: 100, 2: 200, 3: 200}, [3, 1, 2, 2]),
        ({0: 300, 1: 101, 2: 200, 3: 200}, [3, 1, 2, 2]),
        ({0: 1000, 1: 1, 2: 1000, 3: 1000}, [3, 1, 2, 2]),  # a head is the least
        ({0: 1, 1: 1, 2: 1, 3: 1000}, [1, 1, 1, 5]),
    ],
)
def test_shares_follow_speeds(speeds, heads):
    held = hold(AXES, split(AXES, range(4)))
    after = hold(AXES, reconfigure(AXES, held.ownership, range(4), weights=shares(speeds)), held)
    widths = [sum(stop - start for start, stop in share) for share in after.ownership.ranks("kv_head", 0)]
    assert sorted(widths) == sorted(heads) and widths[1] == heads[1]
    assert balance.is_worth_it(held, after, speeds) is (heads != [2, 2, 2, 2])


def test_little_is_not_worth_a_change():
    held = hold(AXES, split(AXES, range(4)))
    speeds = {0: 102, 1: 98, 2: 100, 3: 100}
    after = hold(AXES, reconfigure(AXES, held.ownership, range(4), weights=shares(speeds)), held)
    assert not balance.is_worth_it(held, after, speeds)


def test_weights_of_any_type_are_read():
    waits = []
    weights = [torch.ones(64, 32), torch.ones(64, dtype=torch.bfloat16), torch.ones(8, 8, dtype=torch.int8)]
    weights += [torch.ones(16, dtype=torch.float8_e4m3fn), torch.zeros(4, 4).t()[1:]]
    weights += [torch.ones(8, 4, dtype=torch.int32).t(), torch.ones(3, dtype=torch.bool)]
    assert bytes_per_s(weights, lambda: waits.append(1)) > 1
    assert len(waits) >= 2
