from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import (
    FAMILIES,
    MOE_FAMILIES,
    SHAPES,
    Tensors,
    checkpoint,
    follow,
    held_elements,
    materialize,
    model,
)

from anchortp_sglang.planning.layout.moves import Move, fill_moves, moved_bytes
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import Ownership, split
from anchortp_sglang.planning.placement.reconfiguration import reconfigure

QWEN3 = model((12, 4))
VOCAB_PARAMS = {"model.embed_tokens.weight", "lm_head.weight"}


def moved_shards(
    axes: ModelAxes,
    whole: Tensors,
    old: Ownership | None,
    shards: dict[int, Tensors],
    new: Ownership,
    leaving: tuple[int, ...] = (),
) -> dict[int, Tensors]:
    """Each device's new shard, made from its old one; checked against the shard made from nothing."""
    after = {}
    for rank, device in enumerate(new.devices):
        layout = shard_layout(axes, new, rank)
        moves = fill_moves(axes, new, rank, old, leaving)
        assert not leaving or all(move.kind != "reload" for move in moves), "what leaves was not asked"
        after[device] = follow(moves, layout, whole, shards)
        for name, tensor in materialize(layout, whole).items():
            np.testing.assert_array_equal(after[device][name], tensor, err_msg=name)
            assert not np.isnan(tensor).any()
    return after


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(SHAPES), st.sampled_from(FAMILIES), st.data())
def test_shards_made_by_moves_equal_shards_made_from_nothing(
    heads: tuple[int, int], architecture: str, data: st.DataObject
) -> None:
    whole_experts = architecture in MOE_FAMILIES and data.draw(st.booleans())
    axes = model(heads, architecture, whole_experts=whole_experts)
    whole = checkpoint(axes)
    ownership = split(axes, range(min(4, heads[0])))
    shards = moved_shards(axes, whole, None, {}, ownership)
    for _ in range(4):
        devices = set(data.draw(st.lists(st.sampled_from(range(min(4, heads[0]))), min_size=1, unique=True)))
        devices.add(data.draw(st.sampled_from(ownership.devices)))
        gone = tuple(device for device in ownership.devices if device not in devices)
        leaving = gone if data.draw(st.booleans()) else ()  # else they are lost
        after = reconfigure(axes, ownership, sorted(devices))
        shards = moved_shards(axes, whole, ownership, shards, after, leaving)
        ownership = after


@pytest.mark.parametrize("lost", [{0}, {1}, {3}, {0, 2}, {1, 2, 3}])
@pytest.mark.parametrize("heads", [(12, 4), (6, 2)])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_was_lost_is_reloaded_once_for_each_that_needs_it_and_nothing_else(
    lost: set[int], heads: tuple[int, int], architecture: str
) -> None:
    axes = model(heads, architecture)
    before = split(axes, range(4))
    after = reconfigure(axes, before, sorted(set(range(4)) - lost))
    left = [held_elements(axes, before, rank) for rank in range(4) if rank not in lost]
    needed = [held_elements(axes, after, rank) for rank in range(after.tp_size)]
    survived = set[tuple[str, int]]().union(*left)
    moves = [move for rank in range(after.tp_size) for move in fill_moves(axes, after, rank, before)]
    reloaded = [
        (move.source, element)
        for move in moves
        if move.kind == "reload"
        for element in range(move.source_start, move.source_start + move.length)
    ]
    assert sorted(reloaded) == sorted(element for each in needed for element in each - survived)
    if heads == (12, 4):
        assert {move.param for move in moves if move.kind == "p2p"} <= VOCAB_PARAMS
        assert len(reloaded) == len(set(reloaded))


def test_bytes_moved_are_the_whole_shard_less_its_padding() -> None:
    before = split(QWEN3, range(4))
    after = reconfigure(QWEN3, before, [0, 1, 3])
    for rank in range(3):
        shard = shard_layout(QWEN3, after, rank)
        padded = sum(length for _, _, length in shard.padding) * QWEN3.hidden_size * 4
        moved = moved_bytes(fill_moves(QWEN3, after, rank, before))
        assert sum(moved.values()) == sum(placed.nbytes for placed in shard.params) - padded


def test_a_device_that_held_nothing_takes_everything_from_its_peers() -> None:
    before, after = split(QWEN3, [0, 1]), split(QWEN3, [0, 1, 2])
    moves = fill_moves(QWEN3, after, 2, before)
    assert {move.kind for move in moves} == {"p2p"}
    assert {move.device for move in moves} == {0, 1}
    assert sum(moved_bytes(moves).values()) == moved_bytes(fill_moves(QWEN3, after, 2, None))["reload"]


def test_what_several_have_is_not_taken_from_the_same_one_by_all() -> None:
    before, after = split(QWEN3, [0, 1]), split(QWEN3, [2, 0, 3, 1])
    asked = [
        next(move.device for move in fill_moves(QWEN3, after, rank, before) if move.param == "model.norm.weight")
        for rank in (0, 2)
    ]
    assert asked == [0, 1]


def test_an_unchanged_ownership_copies_each_parameter_in_one_move() -> None:
    ownership = split(QWEN3, range(3))
    moves = fill_moves(QWEN3, ownership, 1, ownership)
    assert [move.param for move in moves] == [spec.name for spec in QWEN3.params]
    assert {move.kind for move in moves} == {"copy"}


def test_moves_come_in_the_order_of_execution_and_are_coalesced() -> None:
    before = split(QWEN3, range(4))
    moves = fill_moves(QWEN3, reconfigure(QWEN3, before, [0, 1, 3]), 0, before)
    order = [spec.name for spec in QWEN3.params]
    positions = [(order.index(move.param), move.start) for move in moves]
    assert positions == sorted(positions)
    assert not any(_touch(left, right) for left, right in pairwise(moves))


def _touch(left: Move, right: Move) -> bool:
    return (
        (left.kind, left.param, left.source) == (right.kind, right.param, right.source)
        and left.start + left.length == right.start
        and left.source_start + left.length == right.source_start
    )
