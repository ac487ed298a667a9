"""What a device keeps stays in its pages, and they hold what the new shard wants there, loss after loss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import Tensors, checkpoint, materialize, model

from anchortp_sglang.planning.layout import extents
from anchortp_sglang.planning.layout.extents import WeightPlacement, hold
from anchortp_sglang.planning.layout.moves import fill_moves, moved_bytes
from anchortp_sglang.planning.layout.shards import PAGE_BYTES, shard_layout
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import Ownership, split
from anchortp_sglang.planning.placement.reconfiguration import reconfigure

Memory = dict[tuple[int, str], np.ndarray]
"""Bytes by device and segment."""


def shard_bytes(axes: ModelAxes, ownership: Ownership, rank: int, whole: Tensors) -> np.ndarray:
    """A rank's shard as it should lie in memory. What belongs to no parameter is 0."""
    layout = shard_layout(axes, ownership, rank)
    memory = np.zeros(layout.total_bytes, np.uint8)
    for placed, values in zip(layout.params, materialize(layout, whole).values(), strict=True):
        stored = values.T if placed.column_major else values
        raw = np.ascontiguousarray(stored, dtype=placed.dtype).view(np.uint8).reshape(-1)
        memory[placed.offset_bytes : placed.offset_bytes + placed.nbytes] = raw
    return memory


def fill(axes: ModelAxes, placement: WeightPlacement, memory: Memory, whole: Tensors) -> None:
    """Check what is there already, and add what is missing to the segments made for it."""
    for rank, (device, shard) in enumerate(zip(placement.ownership.devices, placement.shards, strict=True)):
        expected = shard_bytes(axes, placement.ownership, rank, whole)
        added = memory.setdefault((device, shard.added), np.zeros(shard.added_bytes, np.uint8))
        end = 0
        for extent in shard.extents:
            assert extent.start == end and not (extent.start | extent.nbytes | extent.offset) % PAGE_BYTES
            wanted = expected[extent.start : extent.stop]
            if extent.segment == shard.added:
                assert list(shard.to_fill((extent.start, extent.stop))) == [(extent.start, extent.stop)]
                added[extent.offset : extent.offset + extent.nbytes] = wanted
            else:
                assert not shard.to_fill((extent.start, extent.stop))
                kept = memory[device, extent.segment][extent.offset : extent.offset + extent.nbytes]
                np.testing.assert_array_equal(kept, wanted)
            end = extent.stop
        assert end == len(expected) == shard.total_bytes
        assert {segment for held, segment in memory if held == device} >= shard.sizes.keys()


@settings(max_examples=25, deadline=None)
@given(
    heads=st.sampled_from([(8, 4), (12, 4), (8, 8)]),
    columns=st.sampled_from([64, 200, 257]),
    hidden=st.sampled_from([512, 1024]),
    architecture=st.sampled_from(["Qwen3ForCausalLM", "Phi3ForCausalLM", "MixtralForCausalLM"]),
    losses=st.permutations([0, 1, 2, 3]).map(lambda order: order[:3]),
    rotate=st.booleans(),
)
def test_pages_that_stay_hold_what_the_new_shard_wants(heads, columns, hidden, architecture, losses, rotate) -> None:
    shape = {"hidden_size": hidden, "head_dim": 16, "intermediate_size": columns, "num_local_experts": 2}
    axes = model(heads, architecture, **shape)
    whole, memory = checkpoint(axes), {}
    ownership = split(axes, (0, 1, 2, 3))
    placement = hold(axes, ownership)
    fill(axes, placement, memory, whole)
    for lost in losses:
        survivors = [device for device in ownership.devices if device != lost]
        ownership = reconfigure(axes, ownership, survivors, rotate)
        placement = hold(axes, ownership, placement)
        fill(axes, placement, memory, whole)
        for shard in placement.shards:
            assert sum(shard.sizes.values()) <= shard.total_bytes * 8 / 7 + PAGE_BYTES, "more is kept than is of use"


def test_of_a_large_model_nothing_that_stays_is_copied() -> None:
    """The norms' few bytes are, and what shares a page with something else."""
    axes = model((16, 4), hidden_size=2048, head_dim=128, intermediate_size=6144, num_hidden_layers=20, vocab_size=2048)
    before = split(axes, (0, 1, 2, 3))
    after = reconfigure(axes, before, (0, 1, 3))
    held = hold(axes, before)
    for rank, shard in enumerate(hold(axes, after, held).shards):
        moved = moved_bytes(fill_moves(axes, after, rank, before))
        assert shard.reused_bytes > 0.99 * moved["copy"]
        assert shard.added_bytes < 1.02 * (moved["reload"] + moved["p2p"])
        assert shard.reused_bytes + shard.added_bytes == shard.total_bytes
        assert shard.total_bytes == shard_layout(axes, after, rank).total_bytes


def test_rows_that_are_no_pages_are_copied_into_a_segment_of_their_own() -> None:
    axes = model((12, 4))
    before = split(axes, (0, 1, 2, 3))
    after = reconfigure(axes, before, (0, 1, 3))
    for shard in hold(axes, after, hold(axes, before)).shards:
        assert list(shard.sizes) == [shard.added] and shard.reused_bytes == 0


def test_shards_of_too_many_pieces_to_be_mapped_are_made_anew() -> None:
    shape = {"hidden_size": 1024, "head_dim": 16, "moe_intermediate_size": 64}
    before, kept = split(model((8, 4), "Qwen3MoeForCausalLM", **shape), (0, 1, 2, 3)), []
    for experts in (9, 600):
        axes = model((8, 4), "Qwen3MoeForCausalLM", **(shape | {"num_local_experts": experts}))
        after = reconfigure(axes, before, (0, 1, 3))
        kept.append([shard.reused_bytes for shard in hold(axes, after, hold(axes, before)).shards])
    assert min(kept[0]) > 0 and max(kept[1]) == 0


def test_a_shard_that_has_fallen_into_too_many_pieces_is_made_anew(monkeypatch) -> None:
    axes = model((8, 4), hidden_size=1024, head_dim=16, intermediate_size=1040)
    before = split(axes, (0, 1, 2, 3))
    after, held = reconfigure(axes, before, (0, 1, 3)), hold(axes, before)
    most = max(len(shard.extents) for shard in hold(axes, after, held).shards)
    monkeypatch.setattr(extents, "_MOST_EXTENTS", most - 1)
    made = hold(axes, after, held).shards
    assert min(shard.reused_bytes for shard in made) == 0 < max(len(shard.extents) for shard in made) < most


def test_the_same_ownership_stays_where_it_is() -> None:
    axes = model((12, 4))
    held = hold(axes, split(axes, (0, 1)))
    assert hold(axes, split(axes, (0, 1)), held) is held


def test_a_segment_is_named_for_what_it_adds_to() -> None:
    """So that one left over from a recovery that was broken off is never taken for another one."""
    axes = model((8, 8), hidden_size=1024, head_dim=16)
    four, three, two = (split(axes, devices) for devices in ((0, 1, 2, 3), (0, 1, 2), (0, 1)))
    held = hold(axes, four)
    names = {
        hold(axes, two).shards[0].added,
        hold(axes, two, held).shards[0].added,
        hold(axes, two, hold(axes, three, held)).shards[0].added,
    }
    assert len(names) == 3
    assert hold(axes, two, held).shards[0].added == hold(axes, two, hold(axes, four)).shards[0].added


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrices_split_by_columns_stay_row_major_unless_they_are_float32(dtype: str) -> None:
    axes = model((8, 4), dtype=dtype)
    assert not any(placed.column_major for placed in shard_layout(axes, split(axes, (0, 1)), 0).params)
    axes = model((8, 4), dtype="float32")
    turned = {p.name.split(".")[-2] for p in shard_layout(axes, split(axes, (0, 1)), 0).params if p.column_major}
    assert turned == {"o_proj", "down_proj"}
