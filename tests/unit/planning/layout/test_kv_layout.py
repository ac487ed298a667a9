"""Where KV heads lie in memory, what moves when devices come and go, and how many slots there is room for."""

import numpy as np
import pytest
from planning_cases import model as model_axes

from anchortp_sglang.planning.layout.kv_layout import (
    KVPlan,
    fit_slots,
    held_heads,
    kv_layout,
    kv_moves,
    lost_heads,
    mirror_moves,
)
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.ownership.ownership import InvalidOwnership, split
from anchortp_sglang.planning.placement.reconfiguration import reconfigure

PLAN = KVPlan(slots=64, page_size=1, dtype_bytes=4)
CHANGES = [
    ((12, 4), (0, 1, 2, 3), (0, 1, 3)),
    ((12, 4), (0, 1, 2), (2,)),
    ((12, 4), (0, 1), (0, 1, 2, 3)),
    ((6, 2), (0, 1, 2, 3), (0, 1, 3)),  # each head on two devices
    ((32, 8), (0, 1, 2), (1, 2)),
]


def heads_of(model, ownership, rank, layer):
    return [head for a, b in held_heads(model, ownership, rank, layer) for head in range(a, b)]


@pytest.mark.parametrize(("heads", "before", "after"), CHANGES)
def test_moves_fill_every_head_of_a_rank_once_from_whoever_has_it(heads, before, after):
    model = model_axes(heads)
    old = split(model, before)
    new = reconfigure(model, old, after) if set(after) <= set(before) else split(model, after)
    for rank in range(new.tp_size):
        filled = np.full((model.num_layers, len(heads_of(model, new, rank, 0))), -1)
        for move in kv_moves(model, new, rank, old):
            source = range(model.num_kv_heads)
            if move.device is not None:
                assert move.device in after
                source = heads_of(model, old, old.devices.index(move.device), 0)
            for layer in range(move.first_layer, move.first_layer + move.layers):
                where = slice(move.head, move.head + move.count)
                assert (filled[layer, where] == -1).all()
                filled[layer, where] = source[move.source_head : move.source_head + move.count]
        for layer in range(model.num_layers):
            assert filled[layer].tolist() == heads_of(model, new, rank, layer)


def test_only_heads_without_a_survivor_are_lost():
    four, two = model_axes((12, 4)), model_axes((6, 2))
    old = split(four, (0, 1, 2, 3))
    assert lost_heads(four, reconfigure(four, old, (0, 1, 3)), old)
    replicated = split(two, (0, 1, 2, 3))
    assert not lost_heads(two, reconfigure(two, replicated, (0, 1, 3)), replicated)
    assert not lost_heads(four, old, split(four, (0, 1)))


@pytest.mark.parametrize(("heads", "devices"), [((12, 4), 3), ((6, 2), 4), ((8, 8), 8)])
def test_every_head_goes_to_the_mirror_once(heads, devices):
    model = model_axes(heads)
    ownership = split(model, tuple(range(devices)))
    written = []
    for rank in range(devices):
        for move in mirror_moves(model, ownership, rank):
            assert (move.first_layer, move.layers) == (0, model.num_layers)
            mine = heads_of(model, ownership, rank, 0)
            assert mine[move.source_head : move.source_head + move.count] == list(
                range(move.head, move.head + move.count)
            )
            written += range(move.head, move.head + move.count)
    assert sorted(written) == list(range(model.num_kv_heads))


def test_a_device_whose_heads_and_slots_stay_has_the_same_segment():
    model = model_axes((12, 4))
    old = split(model, (0, 1, 2, 3))
    new = reconfigure(model, old, (0, 1, 3))
    same = [
        kv_layout(model, PLAN, new, rank).digest() == kv_layout(model, PLAN, old, old.devices.index(device)).digest()
        for rank, device in enumerate(new.devices)
    ]
    assert sorted(same) == [False, True, True], "one survivor takes over the lost head"
    fewer = KVPlan(slots=32, page_size=1, dtype_bytes=4)
    assert kv_layout(model, PLAN, new, 0).digest() != kv_layout(model, fewer, new, 0).digest()


@pytest.mark.parametrize("page_size", [1, 16])
def test_slots_are_as_many_as_the_fullest_device_has_room_for(page_size):
    model = model_axes((12, 4))
    ownership = split(model, (0, 1, 2), (2, 1, 1))
    weights = shard_layout(model, ownership, 0).total_bytes
    slot_bytes = 2 * model.num_layers * 2 * model.head_dim * 4
    most = KVPlan(64, page_size, 4)
    room = weights + (32 + page_size) * slot_bytes
    assert fit_slots(model, most, ownership, None) == most
    assert fit_slots(model, most, ownership, room).slots == 32
    assert fit_slots(model, most, ownership, room - 1).slots == 32 - page_size
    assert fit_slots(model, most, ownership, 2 * room) == most
    with pytest.raises(InvalidOwnership, match="device 0 has no room for KV"):
        fit_slots(model, most, ownership, weights)
