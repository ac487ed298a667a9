"""Where KV heads lie in memory, what moves when devices come and go, and how many slots there is room for."""

import hashlib
import json

import numpy as np
import pytest
from planning_cases import model as model_axes

from anchortp_sglang.kv.copy import KVSegment, copy_move, copy_slots
from anchortp_sglang.planning.layout.kv_layout import (
    KVPlan,
    fit_slots,
    held_heads,
    kv_layout,
    kv_moves,
    lost_heads,
    mirror_moves,
    whole_layout,
)
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.model.axes import read_model_axes
from anchortp_sglang.planning.model.wrappers import language_model
from anchortp_sglang.planning.ownership.ownership import InvalidOwnership, split
from anchortp_sglang.planning.placement.reconfiguration import reconfigure
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

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


@pytest.mark.parametrize(("before", "after"), [((0, 1, 2, 3), (0, 1, 3)), ((0, 1, 2), (2,)), ((0, 1), (0, 1, 2, 3))])
@pytest.mark.parametrize("kind", ["gemma4_text", "gemma4_small"])
def test_layers_with_heads_of_their_own_are_moved_whole(tmp_path, kind, before, after):
    """Bytes of a slot tell layer, head and plane; a survivor's are copied, others come from the mirror."""
    model = read_model_axes(language_model(config_of(tmp_path, kind)))
    old = split(model, before)
    new = reconfigure(model, old, after) if set(after) <= set(before) else split(model, after)
    mirror_layout = whole_layout(model, PLAN, PLAN.rows)
    segments = {device: empty_segment(model, kv_layout(model, PLAN, old, r)) for r, device in enumerate(before)}
    for rank, device in enumerate(before):
        write_marks(model, old, rank, segments[device])
    mirror = empty_segment(model, mirror_layout)
    rows = np.arange(PLAN.rows)
    for rank, device in enumerate(before):
        for move in mirror_moves(model, old, rank):
            for (_, into), (_, source) in zip(
                mirror.heads(move.first_layer, move.layers, move.head, move.count),
                segments[device].heads(move.first_layer, move.layers, move.source_head, move.count),
                strict=True,
            ):
                copy_slots(into, rows, source, rows)
    for rank in range(new.tp_size):
        target = empty_segment(model, kv_layout(model, PLAN, new, rank))
        for move in kv_moves(model, new, rank, old):
            copy_move(target, rows, mirror if move.device is None else segments[move.device], rows, move)
        expected = empty_segment(model, kv_layout(model, PLAN, new, rank))
        write_marks(model, new, rank, expected)
        assert bytes(target.memory) == bytes(expected.memory)


def config_of(folder, kind):
    shape = {"num_layers": 6, "hidden_size": 96, "num_q_heads": 12, "num_kv_heads": 4, "head_dim": 8}
    write_checkpoint(folder, kind, **shape, intermediate_size=64)
    return json.loads((folder / "config.json").read_text())


class Segment(KVSegment):
    """A segment that keeps its memory at hand."""

    def __init__(self, memory, layout):
        super().__init__(memory, layout)
        self.memory = memory


def empty_segment(model, layout):
    return Segment(bytearray(layout.total_bytes), layout)


def write_marks(model, ownership, rank, segment):
    """Give each unit of each slot bytes that no other has, whatever the rank that holds it."""
    for layer in range(model.num_layers):
        for position, head in enumerate(heads_of(model, ownership, rank, layer)):
            for _, units in segment.heads(layer, 1, position, 1):
                for plane in range(2):
                    for row in range(units.shape[2]):
                        mark = hashlib.sha256(f"{layer} {head} {plane} {row}".encode()).digest()
                        units[0, plane, row, 0] = np.void((mark * units.itemsize)[: units.itemsize])


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
