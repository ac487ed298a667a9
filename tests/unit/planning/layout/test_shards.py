import dataclasses
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import (
    EXPERTS,
    FAMILIES,
    MOE_FAMILIES,
    SHAPES,
    attention,
    checkpoint,
    fused,
    materialize,
    mlp,
    model,
)
from planning_cases import source_shapes as shapes

from anchortp_sglang.planning.layout.coverage import CoverageError, check_coverage, check_sources
from anchortp_sglang.planning.layout.shards import ParamSlot, ShardLayout, shard_layout, source_shape
from anchortp_sglang.planning.model.axes import ModelAxes, UnsupportedModel
from anchortp_sglang.planning.ownership.ownership import Ownership, split
from anchortp_sglang.planning.placement.reconfiguration import reconfigure

QWEN3 = model((12, 4))


def layouts(axes: ModelAxes, ownership: Ownership) -> list[ShardLayout]:
    return [shard_layout(axes, ownership, rank) for rank in range(ownership.tp_size)]


def check(axes: ModelAxes, shards: list[ShardLayout], found: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
    return check_sources(axes, shards, found, found)


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_layouts_cover_every_parameter_and_every_source_exactly_once(heads: tuple[int, int], architecture: str) -> None:
    axes = model(heads, architecture, attention_bias=True)
    for tp_size in range(1, min(8, heads[0]) + 1):
        shards = layouts(axes, split(axes, range(tp_size)))
        for shard in shards:
            check_coverage(shard)
        assert check(axes, shards, shapes(axes)) == ()


@pytest.mark.parametrize("tp_size", [1, 3, 4])
def test_parameters_are_aligned_and_do_not_overlap(tp_size: int) -> None:
    for shard in layouts(QWEN3, split(QWEN3, range(tp_size))):
        end, layer = 0, None
        for placed in shard.params:
            assert placed.offset_bytes % (64 if placed.layer == layer else 4096) == 0
            assert placed.offset_bytes >= end
            assert placed.nbytes == prod(placed.shape) * 4
            end, layer = placed.offset_bytes + placed.nbytes, placed.layer
        assert end <= shard.total_bytes < end + 4096
        assert shard.total_bytes % 4096 == 0


@pytest.mark.parametrize("whole_experts", [False, True])
@pytest.mark.parametrize("architecture", MOE_FAMILIES)
def test_slices_over_experts_lie_side_by_side(architecture: str, whole_experts: bool) -> None:
    axes = model((12, 4), architecture, whole_experts=whole_experts)
    for shard in layouts(axes, split(axes, range(4))):
        last: dict[str, ParamSlot] = {}
        for placed in shard.params:
            stacked, _, expert = placed.name.partition("[")
            if expert and (before := last.get(stacked)) is not None:
                assert placed.shape == before.shape
                assert placed.offset_bytes == before.offset_bytes + before.nbytes
            last[stacked] = placed


@pytest.mark.parametrize("architecture", MOE_FAMILIES)
def test_whole_experts_are_covered_and_lie_on_one_rank_each(architecture: str) -> None:
    axes = model((12, 4), architecture, whole_experts=True)
    ownership = split(axes, range(4))
    while True:
        shards = layouts(axes, ownership)
        for shard in shards:
            check_coverage(shard)
        assert check(axes, shards, shapes(axes)) == ()
        held = [p.name.partition("[")[2] for shard in shards for p in shard.params if p.layer == 0 and ".w2_" in p.name]
        assert sorted(held) == [f"{expert}]" for expert in range(EXPERTS)]
        if ownership.tp_size == 1:
            break
        ownership = reconfigure(axes, ownership, ownership.devices[1:])


def test_a_dense_model_has_no_experts_to_deal() -> None:
    with pytest.raises(UnsupportedModel, match="--ep-size"):
        model((12, 4), whole_experts=True)


def test_a_tensor_that_holds_several_projections_is_read_part_by_part() -> None:
    axes = model((12, 4), "Phi3ForCausalLM")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert source_shape(axes, name) == ((12 + 4 + 4) * 2, 8)
    pieces = [piece for piece in shard_layout(axes, split(axes, range(4)), 1).pieces if piece.param == name]
    assert [(piece.start, piece.source_start, piece.length) for piece in pieces] == [(0, 6, 6), (6, 26, 2), (8, 34, 2)]


def test_shapes_are_those_of_the_ranks_share() -> None:
    by_name = {p.name: p.shape for p in shard_layout(QWEN3, split(QWEN3, range(3), [2, 1, 1]), 0).params}
    assert by_name["model.layers.0.self_attn.qkv_proj.weight"] == ((6 + 2 + 2) * 2, 8)
    assert by_name["model.layers.0.self_attn.o_proj.weight"] == (8, 6 * 2)
    assert by_name["model.layers.0.mlp.gate_up_proj.weight"] == (2 * 33 * 16, 8)
    assert by_name["model.layers.0.mlp.down_proj.weight"] == (8, 33 * 16)
    assert by_name["model.embed_tokens.weight"] == (64, 8)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SHAPES), st.sampled_from(FAMILIES), st.data())
def test_ranks_together_compute_what_the_whole_model_computes(
    heads: tuple[int, int], architecture: str, data: st.DataObject
) -> None:
    axes = model(heads, architecture)
    ownership = split(axes, range(data.draw(st.integers(1, min(8, heads[0])))))
    if ownership.tp_size > 2 and data.draw(st.booleans()):
        ownership = reconfigure(axes, ownership, data.draw(st.permutations(ownership.devices))[:2])
    whole, x = checkpoint(axes), np.linspace(-1, 1, axes.hidden_size)
    ranks = [materialize(shard, whole) for shard in layouts(axes, ownership)]
    layer = "model.layers.1"
    reference = fused(whole, layer)
    heads_of = [(ownership.units("q_head", r), ownership.units("kv_head", r)) for r in range(len(ranks))]
    attended = sum(attention(rank, layer, *heads_of[r], x) for r, rank in enumerate(ranks))
    np.testing.assert_allclose(attended, attention(reference, layer, *heads, x))
    np.testing.assert_allclose(sum(mlp(rank, layer, x) for rank in ranks), mlp(reference, layer, x))
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = np.concatenate([rank[table] for rank in ranks])
        np.testing.assert_array_equal(rows[: axes.vocab_size], whole[table])
        assert not rows[axes.vocab_size :].any()
    assert all(np.array_equal(rank["model.norm.weight"], whole["model.norm.weight"]) for rank in ranks)


def test_a_rank_beyond_the_vocabulary_holds_padding_alone() -> None:
    axes = model((12, 4), vocab_size=65)
    shard = shard_layout(axes, split(axes, range(4)), 3)
    assert ("lm_head.weight", 0, 32) in shard.padding
    check_coverage(shard)


def corrupted(shard: ShardLayout, **fields: object) -> ShardLayout:
    return dataclasses.replace(shard, **fields)


def test_a_missing_a_doubled_or_a_shifted_piece_is_noticed() -> None:
    shard = shard_layout(QWEN3, split(QWEN3, range(3)), 2)
    for n, piece in enumerate(shard.pieces):
        others = shard.pieces[:n] + shard.pieces[n + 1 :]
        shifted = dataclasses.replace(piece, start=piece.start + 1)
        turned = dataclasses.replace(piece, dim=1 - piece.dim)
        for pieces in (others, (*shard.pieces, piece), (*others, shifted), (*others, turned)):
            with pytest.raises(CoverageError, match=piece.param):
                check_coverage(corrupted(shard, pieces=pieces))


def test_missing_padding_is_noticed() -> None:
    shard = shard_layout(QWEN3, split(QWEN3, range(3)), 2)
    assert shard.padding
    with pytest.raises(CoverageError, match="embed_tokens"):
        check_coverage(corrupted(shard, padding=shard.padding[1:]))


def test_overlapping_places_are_noticed() -> None:
    shard = shard_layout(QWEN3, split(QWEN3, range(3)), 0)
    moved = dataclasses.replace(shard.params[3], offset_bytes=shard.params[3].offset_bytes - 64)
    with pytest.raises(CoverageError, match="inside its neighbour"):
        check_coverage(corrupted(shard, params=(*shard.params[:3], moved, *shard.params[4:])))
    with pytest.raises(CoverageError, match="of a shard of"):
        check_coverage(corrupted(shard, total_bytes=shard.total_bytes - 4096))


def with_blocks(axes: ModelAxes, param: str, order: tuple[int, ...]) -> ModelAxes:
    """The same model, with a mistake in the rule of one parameter."""
    params = tuple(
        dataclasses.replace(spec, blocks=tuple(spec.blocks[n] for n in order)) if spec.name == param else spec
        for spec in axes.params
    )
    return dataclasses.replace(axes, params=params)


@pytest.mark.parametrize(
    ("param", "order", "reason"),
    [
        ("model.layers.1.self_attn.qkv_proj.weight", (0, 1), "no place for.*v_proj"),
        ("model.layers.1.self_attn.qkv_proj.weight", (0, 1, 1), "v_proj"),
        ("model.layers.1.self_attn.qkv_proj.weight", (0, 1, 2, 2), "v_proj.weight twice"),
        ("model.layers.0.mlp.gate_up_proj.weight", (0, 0), "up_proj"),
    ],
)
def test_a_missing_or_doubled_block_is_noticed(param: str, order: tuple[int, ...], reason: str) -> None:
    wrong = with_blocks(QWEN3, param, order)
    with pytest.raises(CoverageError, match=reason):
        check(wrong, layouts(wrong, split(wrong, range(3))), shapes(QWEN3))


def test_a_checkpoint_that_does_not_fit_is_refused() -> None:
    shards, found = layouts(QWEN3, split(QWEN3, range(3))), shapes(QWEN3)
    norm = "model.norm.weight"
    with pytest.raises(CoverageError, match=f"no {norm}"):
        check(QWEN3, shards, {name: shape for name, shape in found.items() if name != norm})
    with pytest.raises(CoverageError, match=f"{norm} has shape"):
        check(QWEN3, shards, found | {norm: (9,)})
    with pytest.raises(CoverageError, match=r"no place for: model\.layers\.0\.mlp\.gate_proj\.bias"):
        check(QWEN3, shards, found | {"model.layers.0.mlp.gate_proj.bias": (1040,)})


def test_elements_on_no_rank_are_noticed() -> None:
    shards = layouts(QWEN3, split(QWEN3, range(3)))
    with pytest.raises(CoverageError, match=r"no rank reads elements \(\("):
        check(QWEN3, shards[:2], shapes(QWEN3))


def test_tensors_that_sglang_skips_are_reported_as_unused() -> None:
    axes = model((12, 4), tie_word_embeddings=True)
    spare = ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    found = shapes(axes) | dict.fromkeys(spare, (1,))
    assert check(axes, layouts(axes, split(axes, range(2))), found) == spare
