"""Experts in demand are dealt to different devices, at the start and after a loss."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import EXPERTS, model

from anchortp_sglang.planning.intervals import normalize
from anchortp_sglang.planning.layout.moves import fill_moves
from anchortp_sglang.planning.ownership.ownership import Ownership, split, validate
from anchortp_sglang.planning.placement.expert_load import ExpertCounts, imbalance, spread_hot_experts
from anchortp_sglang.planning.placement.reconfiguration import reconfigure, rotating_split
from anchortp_sglang.startup.expert_counts import read_expert_counts

LAYERS = 3
AXES = model((12, 4), "MixtralForCausalLM", whole_experts=True, num_hidden_layers=LAYERS)
VOCAB_PARAMS = {"model.embed_tokens.weight", "lm_head.weight"}

counts_of_layers = st.lists(
    st.lists(st.integers(0, 1000), min_size=EXPERTS, max_size=EXPERTS).map(tuple), min_size=LAYERS, max_size=LAYERS
).map(tuple)


def busiest(ownership: Ownership, counts: ExpertCounts, layer: int) -> int:
    return max(
        sum(counts[layer][expert] for start, stop in runs for expert in range(start, stop))
        for runs in ownership.ranks("expert", layer)
    )


def test_neighbours_in_demand_are_parted() -> None:
    counts = tuple((90, 90, 90, 1, 1, 1, 1, 1, 1) for _ in range(LAYERS))
    before = split(AXES, range(3))
    after = spread_hot_experts(AXES, before, counts)
    for layer in range(LAYERS):
        assert busiest(before, counts, layer) == 270
        assert busiest(after, counts, layer) == 92
    assert imbalance(after, counts) == pytest.approx(92 * 3 / 276)
    assert imbalance(before, counts) == pytest.approx(270 * 3 / 276)


@settings(max_examples=60, deadline=None)
@given(counts_of_layers, st.booleans(), st.data())
def test_experts_only_change_hands_and_no_layer_gets_worse(
    counts: ExpertCounts, rotate: bool, data: st.DataObject
) -> None:
    devices = range(data.draw(st.integers(1, 4)))
    plain = rotating_split(AXES, devices) if rotate else split(AXES, devices)
    ownership = spread_hot_experts(AXES, plain, counts)
    _check_exchange(plain, ownership, counts)
    while ownership.tp_size > 1:
        survivors = data.draw(st.lists(st.sampled_from(ownership.devices), min_size=1, unique=True))
        plain = reconfigure(AXES, ownership, survivors, rotate)
        after = spread_hot_experts(AXES, plain, counts, ownership)
        _check_exchange(plain, after, counts)
        moves = [move for rank in range(after.tp_size) for move in fill_moves(AXES, after, rank, ownership)]
        assert {move.param for move in moves if move.kind == "p2p"} <= VOCAB_PARAMS, "survivors keep what they have"
        if after == ownership:
            break
        ownership = after


def _check_exchange(plain: Ownership, spread: Ownership, counts: ExpertCounts) -> None:
    validate(AXES, spread)
    for layer in range(LAYERS):
        for rank in range(plain.tp_size):
            assert spread.units("expert", rank, layer) == plain.units("expert", rank, layer)
            assert spread.of("kv_head", rank, layer) == plain.of("kv_head", rank, layer)
        held = spread.ranks("expert", layer)
        assert normalize(run for runs in held for run in runs) == ((0, EXPERTS),)
        assert busiest(spread, counts, layer) <= busiest(plain, counts, layer)


def test_lost_experts_go_to_those_with_least_to_do() -> None:
    counts = tuple((50, 1, 1, 1, 1, 1, 40, 30, 1) for _ in range(LAYERS))
    before = split(AXES, range(3))  # 0-2, 3-5, 6-8
    after = spread_hot_experts(AXES, reconfigure(AXES, before, [0, 1]), counts, before)
    for layer in range(LAYERS):
        gained = {expert for start, stop in after.of("expert", 1, layer) for expert in range(start, stop)} - {3, 4, 5}
        assert {6} <= gained, "40 tokens go to the device with 3, not to the one with 52"


def test_without_demand_nothing_is_exchanged() -> None:
    before = split(AXES, range(3))
    assert spread_hot_experts(AXES, before, ((0,) * EXPERTS,) * LAYERS) == before


TABLE = [[expert + layer for expert in range(EXPERTS)] for layer in range(LAYERS)]


def test_counts_are_read_as_sglang_reads_them(tmp_path: Path) -> None:
    expected = tuple(map(tuple, TABLE))
    text = json.dumps({"logical_count": TABLE})
    assert read_expert_counts(text, AXES) == expected
    (tmp_path / "counts.json").write_text(text)
    assert read_expert_counts(str(tmp_path / "counts.json"), AXES) == expected
    torch.save({"logical_count": torch.tensor([TABLE, TABLE])}, tmp_path / "counts.pt")
    doubled = tuple(tuple(2 * count for count in layer) for layer in TABLE)
    assert read_expert_counts(str(tmp_path / "counts.pt"), AXES) == doubled, "steps are added up"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot be read"),
        ("/nowhere/counts.json", "cannot be read"),
        ("/nowhere/counts.pt", "cannot be read"),
        ("[1]", "no object"),
        (json.dumps({"physical_to_logical_map": [[0]]}), "only logical_count"),
        (json.dumps({"logical_count": TABLE[:2]}), r"shape \(2, 9\).*3 layers of 9 experts"),
        (json.dumps({"logical_count": [[-1] * EXPERTS] * LAYERS}), "from 0 on"),
        (json.dumps({"logical_count": [[0.5] * EXPERTS] * LAYERS}), "whole numbers"),
        (json.dumps({"logical_count": "many"}), "no table"),
        (json.dumps({"logical_count": [[1], [1, 2]]}), "no table"),
    ],
)
def test_counts_that_cannot_be_used_are_refused(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        read_expert_counts(text, AXES)
    assert "--init-expert-location" in str(error.value)


def test_experts_cut_by_columns_are_not_dealt() -> None:
    columns = model((12, 4), "MixtralForCausalLM")
    with pytest.raises(ValueError, match="add --ep-size"):
        read_expert_counts(json.dumps({"logical_count": TABLE}), columns)
