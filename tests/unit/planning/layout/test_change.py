"""What a change of devices moves, beside the least that shares of that size need."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import model

from anchortp_sglang.planning.layout.change import change_of
from anchortp_sglang.planning.layout.extents import hold
from anchortp_sglang.planning.layout.moves import fill_moves, moved_bytes
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import Ownership, split
from anchortp_sglang.planning.placement.reconfiguration import reconfigure

AXES = model((32, 8))


def vocabulary(axes):
    """Bytes of all rows that are cut equally by rank: their cut shifts with the number of devices."""
    return sum(
        2 * axes.vocab_size * axes.hidden_size * spec.element_bytes
        for spec in axes.params
        if "embed_tokens" in spec.name or "lm_head" in spec.name
    )


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_chains_of_changes_move_no_more_than_balance_needs_besides_the_vocabulary(data: st.DataObject) -> None:
    held = hold(AXES, split(AXES, range(4)))
    for _ in range(4):
        devices = set(data.draw(st.lists(st.integers(0, 3), min_size=1, unique=True)))
        devices.add(data.draw(st.sampled_from(held.ownership.devices)))
        after = hold(AXES, reconfigure(AXES, held.ownership, sorted(devices)), held)
        change = change_of(AXES, held, after)
        assert change["least_bytes"] <= change["moved_bytes"] <= change["least_bytes"] + vocabulary(AXES)
        assert all(device["reload_bytes"] == 0 for device in change["devices"]), "all of it is on some device"
        for device in change["devices"]:
            parts = ("stay_bytes", "local_bytes", "p2p_bytes")
            assert sum(device[part] for part in parts) <= device["weight_bytes"]
        held = after


def held_bytes(ownership: Ownership, rank: int) -> int:
    return sum(moved_bytes(fill_moves(AXES, ownership, rank, None)).values())


def bytes_of_all_ranks(axes: ModelAxes) -> int:
    """Bytes that every rank has, however many there are."""
    one, two = (held_bytes(split(axes, range(n)), 0) for n in (1, 2))
    both = two + held_bytes(split(axes, range(2)), 1)
    return both - one


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_chains_of_losses_and_rejoins_reload_what_nobody_holds_and_move_the_least(data: st.DataObject) -> None:
    ownership, everywhere = split(AXES, range(4)), bytes_of_all_ranks(AXES)
    for _ in range(5):
        alive = set(ownership.devices)
        lost = data.draw(st.sets(st.sampled_from(sorted(alive)), max_size=len(alive) - 1))
        joining = set() if lost else data.draw(st.sets(st.sampled_from(range(4)))) - alive
        before, ownership = ownership, reconfigure(AXES, ownership, sorted((alive - lost) | joining))
        had = {device: held_bytes(before, rank) for rank, device in enumerate(before.devices)}
        moved = [moved_bytes(fill_moves(AXES, ownership, rank, before)) for rank in range(ownership.tp_size)]
        assert sum(each["reload"] for each in moved) == sum(had[device] - everywhere for device in lost)
        new = [held_bytes(ownership, rank) - had.get(device, 0) for rank, device in enumerate(ownership.devices)]
        least = sum(max(0, missing) for missing in new)
        assert least <= sum(each["reload"] + each["p2p"] for each in moved) <= least + vocabulary(AXES)


@pytest.mark.parametrize("devices", [(0, 1, 3), (1, 2), (3,)])
def test_there_and_back_again_ends_with_equal_shares(devices: tuple[int, ...]) -> None:
    four = hold(AXES, split(AXES, range(4)))
    fewer = hold(AXES, reconfigure(AXES, four.ownership, devices), four)
    back = reconfigure(AXES, fewer.ownership, range(4))
    assert [back.units("kv_head", rank) for rank in range(4)] == [2, 2, 2, 2]
    change = change_of(AXES, fewer, hold(AXES, back, fewer))
    assert {device["id"] for device in change["devices"] if device["stay_bytes"]} <= set(devices)


def test_widths_shift_shares_between_devices_that_stay() -> None:
    four = split(AXES, range(4))
    shifted = reconfigure(AXES, four, range(4), weights={0: 3, 1: 1, 2: 2, 3: 2})
    assert [shifted.units("kv_head", rank) for rank in range(4)] == [3, 1, 2, 2]
    assert shifted.of("kv_head", 2) == four.of("kv_head", 2)
    assert reconfigure(AXES, shifted, range(4), weights=dict.fromkeys(range(4), 2)) != shifted
