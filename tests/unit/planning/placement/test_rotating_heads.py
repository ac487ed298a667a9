"""Heads and whole experts that rotate over the layers: no device's KV is full before the others'."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import (
    FAMILIES,
    MOE_FAMILIES,
    SHAPES,
    attention,
    checkpoint,
    follow,
    fused,
    held_elements,
    materialize,
    mlp,
    model,
    overlap,
    source_shapes,
)

from anchortp_sglang.kv.capacity import kv_capacity
from anchortp_sglang.planning.intervals import normalize, total
from anchortp_sglang.planning.layout.coverage import check_coverage, check_sources
from anchortp_sglang.planning.layout.kv_layout import KVPlan, fit_slots, held_heads, kv_layout
from anchortp_sglang.planning.layout.moves import fill_moves
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import InvalidOwnership, Ownership, split, validate
from anchortp_sglang.planning.placement import contiguous
from anchortp_sglang.planning.placement.reconfiguration import reconfigure, rotating_split

VOCAB_PARAMS = {"model.embed_tokens.weight", "lm_head.weight"}
KV = KVPlan(slots=100, page_size=1, dtype_bytes=4)


def whole_heads(data: st.DataObject, most_layers: int = 12) -> tuple[ModelAxes, Ownership]:
    """A model, and devices of which each has whole KV heads."""
    heads, architecture = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(FAMILIES))
    whole_experts = architecture in MOE_FAMILIES and data.draw(st.booleans())
    layers = data.draw(st.integers(1, most_layers))
    axes = model(heads, architecture, whole_experts=whole_experts, num_hidden_layers=layers)
    return axes, rotating_split(axes, range(data.draw(st.integers(1, heads[1]))))


def after_a_loss(axes: ModelAxes, ownership: Ownership, data: st.DataObject) -> Ownership:
    survivors = data.draw(st.lists(st.sampled_from(ownership.devices), min_size=1, unique=True))
    return reconfigure(axes, ownership, survivors, rotate=True)


def over_all_layers(axes: ModelAxes, ownership: Ownership, axis: str) -> list[int]:
    layers = range(axes.num_layers)
    return [sum(ownership.units(axis, rank, layer) for layer in layers) for rank in range(ownership.tp_size)]


def test_four_kv_heads_on_three_devices_take_turns_at_the_fourth() -> None:
    axes = model((12, 4), num_hidden_layers=6)
    ownership = rotating_split(axes, range(3))
    assert sorted(map(tuple, ([ownership.units("kv_head", r, n) for r in range(3)] for n in range(6)))) == [
        *2 * [(1, 1, 2)],
        *2 * [(1, 2, 1)],
        *2 * [(2, 1, 1)],
    ]
    assert over_all_layers(axes, ownership, "kv_head") == [8, 8, 8]
    assert [ownership.units("mlp", rank) for rank in range(3)] == [21, 22, 22], "columns are alike in all layers"
    with pytest.raises(KeyError, match="differ by layer"):
        ownership.units("kv_head", 0)


def test_what_divides_is_alike_in_all_layers() -> None:
    axes = model((12, 4), num_hidden_layers=6)
    assert rotating_split(axes, range(4)).layers == ()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_unit_is_held_once_in_each_layer_and_no_device_is_a_head_ahead(data: st.DataObject) -> None:
    axes, ownership = whole_heads(data)
    while True:
        validate(axes, ownership)
        for layer in range(axes.num_layers):
            for axis in ("q_head", "kv_head", *(each.axis for each in axes.columns)):
                ranks = ownership.ranks(axis, layer)
                assert normalize(run for runs in ranks for run in runs) == ((0, axes.axes[axis]),)
                assert sum(map(total, ranks)) == axes.axes[axis]
        held = over_all_layers(axes, ownership, "kv_head")
        assert max(held) - min(held) <= 1
        head_of_a_layer = 2 * KV.rows * axes.head_dim * KV.dtype_bytes
        nbytes = [kv_layout(axes, KV, ownership, rank).total_bytes for rank in range(ownership.tp_size)]
        assert nbytes == [heads * head_of_a_layer for heads in held]
        if "expert" in axes.axes:
            experts = over_all_layers(axes, ownership, "expert")
            assert max(experts) - min(experts) <= 1
        if ownership.tp_size == 1:
            break
        ownership = after_a_loss(axes, ownership, data)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_shards_made_by_moves_are_exact_and_only_what_was_lost_is_reloaded(data: st.DataObject) -> None:
    axes, ownership = whole_heads(data, most_layers=4)
    whole = checkpoint(axes)
    shards = {d: materialize(shard_layout(axes, ownership, rank), whole) for rank, d in enumerate(ownership.devices)}
    while ownership.tp_size > 1:
        after = after_a_loss(axes, ownership, data)
        new, moved = {}, []
        for rank, device in enumerate(after.devices):
            layout = shard_layout(axes, after, rank)
            moves = fill_moves(axes, after, rank, ownership)
            new[device] = follow(moves, layout, whole, shards)
            for name, tensor in materialize(layout, whole).items():
                np.testing.assert_array_equal(new[device][name], tensor, err_msg=name)
            moved += moves
            for layer in range(axes.num_layers):
                for axis in axes.axes.keys() - {"vocab"}:
                    before = ownership.of(axis, ownership.devices.index(device), layer)
                    assert overlap(ownership, after, axis, device, layer) == before
        assert {move.param for move in moved if move.kind == "p2p"} <= VOCAB_PARAMS
        if after != ownership:
            _check_reloads(axes, ownership, after, moved)
            ownership, shards = after, new
        else:
            break


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_recovery_waits_for_an_integer_program(data: st.DataObject) -> None:
    """Nor for the import of scipy, which takes longer than a plan."""
    heads, architecture = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(FAMILIES))
    axes = model(heads, architecture, num_hidden_layers=data.draw(st.integers(1, 8)))
    devices = range(data.draw(st.integers(2, heads[0])))
    rotate = data.draw(st.booleans())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contiguous, "largest_overlap", None)
        ownership = rotating_split(axes, devices) if rotate else split(axes, devices)
        while len(ownership.devices) > 1:
            alive = ownership.devices
            left = data.draw(st.sets(st.sampled_from(alive), min_size=1, max_size=len(alive) - 1))
            ownership = reconfigure(axes, ownership, sorted(left), rotate)


def _check_reloads(axes: ModelAxes, before: Ownership, after: Ownership, moved: list) -> None:
    """Exactly what no survivor has, once."""
    left = [held_elements(axes, before, rank) for rank, d in enumerate(before.devices) if d in after.devices]
    gone = {element for rank in range(before.tp_size) for element in held_elements(axes, before, rank)}
    gone -= set[tuple[str, int]]().union(*left)
    reloaded = Counter(
        (move.source, element)
        for move in moved
        if move.kind == "reload"
        for element in range(move.source_start, move.source_start + move.length)
    )
    assert reloaded == Counter(gone)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(SHAPES), st.sampled_from(FAMILIES), st.data())
def test_ranks_together_compute_each_layer_of_the_whole_model(
    heads: tuple[int, int], architecture: str, data: st.DataObject
) -> None:
    axes = model(heads, architecture, num_hidden_layers=3)
    ownership = rotating_split(axes, range(data.draw(st.integers(1, min(8, heads[0])))))
    if ownership.tp_size > 2 and data.draw(st.booleans()):
        ownership = reconfigure(axes, ownership, ownership.devices[1:], rotate=True)
    whole, x = checkpoint(axes), np.linspace(-1, 1, axes.hidden_size)
    shards = [shard_layout(axes, ownership, rank) for rank in range(ownership.tp_size)]
    for shard in shards:
        check_coverage(shard)
    assert check_sources(axes, shards, source_shapes(axes), source_shapes(axes)) == ()
    ranks = [materialize(shard, whole) for shard in shards]
    for n in range(3):
        layer = f"model.layers.{n}"
        reference = fused(whole, layer)
        attended = sum(
            attention(rank, layer, ownership.units("q_head", r, n), ownership.units("kv_head", r, n), x)
            for r, rank in enumerate(ranks)
        )
        np.testing.assert_allclose(attended, attention(reference, layer, *heads, x))
        np.testing.assert_allclose(sum(mlp(rank, layer, x) for rank in ranks), mlp(reference, layer, x))


@pytest.mark.parametrize("heads", SHAPES)
def test_whatever_splits_alike_splits_rotating(heads: tuple[int, int]) -> None:
    """So that their capacities can always be compared."""
    for whole_experts in (False, True):
        axes = model(heads, "MixtralForCausalLM", whole_experts=whole_experts, num_hidden_layers=3)
        for tp_size in range(1, min(10, heads[0] + 1)):
            try:
                ownership = split(axes, range(tp_size))
            except InvalidOwnership:
                continue
            validate(axes, rotating_split(axes, range(tp_size)))
            assert kv_capacity(axes, KV, ownership, rotating=False).slots_alike == KV.slots


def test_too_many_devices_are_refused_as_without_rotation() -> None:
    with pytest.raises(InvalidOwnership, match="no units of q_head"):
        rotating_split(model((6, 2)), range(7))


def test_an_ownership_by_layer_is_a_value_that_survives_json() -> None:
    ownership = rotating_split(model((12, 4), num_hidden_layers=4), range(3))
    read = Ownership.from_json(ownership.to_json())
    assert read == ownership
    assert read.digest() == ownership.digest()
    assert "layers 0\n" in str(ownership)


@pytest.mark.parametrize(
    ("used", "layers"),
    [((0, 1, 2), ()), ((0, 1, 2), (1, 0, 2)), ((0, 1, 2), (0, 1, 1)), ((0, 0), (0, 1)), ((0,), (0, 0))],
)
def test_layouts_that_are_not_canonical_are_refused(used: tuple[int, ...], layers: tuple[int, ...]) -> None:
    ownership = rotating_split(model((12, 4), num_hidden_layers=4), range(3))
    with pytest.raises(InvalidOwnership, match="layout"):
        dataclasses.replace(ownership, layouts=tuple(ownership.layouts[n] for n in used), layers=layers)


def test_a_unit_missing_in_one_layer_is_noticed() -> None:
    axes = model((12, 4), num_hidden_layers=4)
    ownership = rotating_split(axes, range(3))
    *others, last = ownership.layouts
    short = tuple((axis, (*ranks[:2], ((11, 12),)) if axis == "q_head" else ranks) for axis, ranks in last)
    with pytest.raises(InvalidOwnership, match=r"q_head: units .* are on no rank"):
        validate(axes, dataclasses.replace(ownership, layouts=(*others, short)))


def test_shares_of_another_number_of_layers_are_refused() -> None:
    ownership = rotating_split(model((12, 4), num_hidden_layers=4), range(3))
    with pytest.raises(InvalidOwnership, match="4 layers for a model of 5"):
        validate(model((12, 4), num_hidden_layers=5), ownership)


def test_the_capacity_gained_is_that_of_the_fullest_device() -> None:
    axes = model((12, 4), num_hidden_layers=6, intermediate_size=6, vocab_size=64)
    alike = kv_capacity(axes, KVPlan(100_000, 1, 4), split(axes, range(3)), rotating=False)
    assert alike.slots_alike == alike.slots == 100_000
    assert alike.gain == pytest.approx(0.5, abs=0.01), "two heads in each layer against four thirds"
    back = kv_capacity(axes, KVPlan(alike.slots_rotating, 1, 4), rotating_split(axes, range(3)), rotating=True)
    assert back.slots_alike == pytest.approx(100_000, abs=2)
    assert back.gain == pytest.approx(alike.gain, abs=1e-4)
    assert "(+50%)" in str(alike)


def test_with_limited_memory_more_slots_outlive_a_lost_device() -> None:
    """Of four KV heads on three devices the fullest has two in each layer, or four thirds."""
    axes, most = model((12, 4), num_hidden_layers=6, intermediate_size=6), KVPlan(1_000_000, 1, 4)
    slots = []
    for rotate in (False, True):
        four = rotating_split(axes, range(4)) if rotate else split(axes, range(4))
        three = reconfigure(axes, four, [0, 1, 3], rotate)
        slots.append(fit_slots(axes, most, three, 50 << 20).slots)
    alike, rotating = slots
    assert rotating / alike == pytest.approx(1.5, abs=0.01)


def test_where_heads_divide_nothing_is_gained() -> None:
    axes = model((12, 4), intermediate_size=1024)
    capacity = kv_capacity(axes, KV, split(axes, range(4)), rotating=False)
    assert capacity.slots_rotating == capacity.slots
    assert "gain nothing" in str(capacity)


def test_kv_heads_are_told_layer_by_layer() -> None:
    axes = model((12, 4), num_hidden_layers=3)
    assert sorted(total(held_heads(axes, rotating_split(axes, range(3)), 0, layer)) for layer in range(3)) == [1, 1, 2]
