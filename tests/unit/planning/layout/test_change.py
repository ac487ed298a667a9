"""What a change of devices moves, beside the least that shares of that size need."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import model

from anchortp_sglang.planning.layout.change import change_of
from anchortp_sglang.planning.layout.extents import hold
from anchortp_sglang.planning.ownership.ownership import split
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
