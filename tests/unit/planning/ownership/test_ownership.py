import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import SHAPES, model, overlap

from anchortp_sglang.planning.intervals import subtract, total
from anchortp_sglang.planning.ownership.ownership import InvalidOwnership, Ownership, split, validate
from anchortp_sglang.planning.placement.reconfiguration import reconfigure

MODELS = {heads: model(heads) for heads in SHAPES}


def units(ownership: Ownership, axis: str) -> list[int]:
    return [ownership.units(axis, rank) for rank in range(ownership.tp_size)]


def replaced(ownership: Ownership, axis: str, *ranks: tuple[tuple[int, int], ...]) -> Ownership:
    (shares,) = ownership.layouts
    return dataclasses.replace(ownership, layouts=(tuple((a, ranks if a == axis else r) for a, r in shares),))


@st.composite
def widths(draw: st.DrawFn, kv_heads: int) -> list[int]:
    cuts = draw(st.sets(st.integers(1, kv_heads - 1), max_size=kv_heads - 1))
    edges = [0, *sorted(cuts), kv_heads]
    return [stop - start for start, stop in pairwise(edges)]


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("tp_size", range(1, 9))
def test_every_size_up_to_the_query_heads_splits_validly(heads: tuple[int, int], tp_size: int) -> None:
    if tp_size > heads[0]:
        with pytest.raises(InvalidOwnership, match=f"largest tensor-parallel size of this model is {heads[0]}"):
            split(MODELS[heads], range(tp_size))
        return
    ownership = split(MODELS[heads], range(tp_size))
    validate(MODELS[heads], ownership)
    assert sum(units(ownership, "q_head")) == heads[0]
    assert sum(units(ownership, "kv_head")) == max(heads[1], tp_size)


def test_four_kv_heads_over_three_devices_are_two_one_one() -> None:
    ownership = split(MODELS[12, 4], [5, 0, 9])
    assert ownership.devices == (5, 0, 9)
    assert units(ownership, "kv_head") == [2, 1, 1]
    assert units(ownership, "q_head") == [6, 3, 3]
    assert units(ownership, "mlp") == [22, 22, 21]


def test_more_devices_than_kv_heads_share_the_query_heads_of_one() -> None:
    ownership = split(MODELS[6, 2], range(3))
    assert [ownership.of("kv_head", rank) for rank in range(3)] == [((0, 1),), ((0, 1),), ((1, 2),)]
    assert units(ownership, "q_head") == [2, 1, 3]


def test_mlp_columns_follow_explicit_widths() -> None:
    assert units(split(MODELS[12, 4], range(3), [2, 1, 1]), "mlp") == [33, 16, 16]


@settings(max_examples=50, deadline=None)
@given(widths(8))
def test_any_widths_that_add_up_are_split_validly(given_widths: list[int]) -> None:
    ownership = split(MODELS[32, 8], range(len(given_widths)), given_widths)
    validate(MODELS[32, 8], ownership)
    assert units(ownership, "kv_head") == given_widths


@pytest.mark.parametrize("bad", [[2, 1], [2, 1, 0, 1], [2, 2, 1], [4, 0, 0], []])
def test_widths_that_do_not_add_up_are_refused_with_an_example(bad: list[int]) -> None:
    with pytest.raises(InvalidOwnership, match="such as 2,1,1"):
        split(MODELS[12, 4], range(3), bad)


def test_widths_are_refused_where_kv_heads_are_replicated() -> None:
    with pytest.raises(InvalidOwnership, match="at most 2 devices"):
        split(MODELS[6, 2], range(3), [1, 1, 1])


def test_devices_must_be_distinct_and_present() -> None:
    with pytest.raises(InvalidOwnership, match="distinct"):
        split(MODELS[12, 4], [1, 1])
    with pytest.raises(InvalidOwnership, match="0 devices"):
        split(MODELS[12, 4], [])


def test_a_device_without_mlp_units_is_refused() -> None:
    with pytest.raises(InvalidOwnership, match="no units of mlp"):
        split(model((8, 8), intermediate_size=4), range(8))


@pytest.mark.parametrize(
    ("axis", "ranks", "reason"),
    [
        ("q_head", (((0, 6),), ((7, 12),)), "on no rank"),
        ("q_head", (((0, 7),), ((6, 12),)), "on two ranks"),
        ("mlp", (((0, 65),), ((60, 65),)), "on two ranks"),
        ("mlp", (((0, 33),), ((33, 66),)), "beyond"),
        ("kv_head", (((0, 2),), ((1, 4),)), "its query heads need"),
        ("kv_head", (((0, 1),), ((2, 4),)), "its query heads need"),
        ("vocab", (((0, 100),), ((100, 192),)), "equal cut"),
    ],
)
def test_broken_shares_are_refused(axis: str, ranks: tuple[tuple[tuple[int, int], ...], ...], reason: str) -> None:
    with pytest.raises(InvalidOwnership, match=reason):
        validate(MODELS[12, 4], replaced(split(MODELS[12, 4], range(2)), axis, *ranks))


def test_unequal_groups_on_one_rank_are_refused() -> None:
    broken = replaced(split(MODELS[12, 4], range(2)), "q_head", ((0, 5),), ((5, 12),))
    broken = replaced(broken, "kv_head", ((0, 2),), ((1, 4),))
    with pytest.raises(InvalidOwnership, match="unequal numbers"):
        validate(MODELS[12, 4], broken)


def test_shares_that_are_not_canonical_are_refused() -> None:
    with pytest.raises(InvalidOwnership, match="coalesced"):
        replaced(split(MODELS[12, 4], range(2)), "mlp", ((0, 1), (1, 33)), ((33, 65),))


@given(widths(8), st.data())
@settings(max_examples=50, deadline=None)
def test_adopting_keeps_every_unit_and_levels_the_lost_ones(given_widths: list[int], data: st.DataObject) -> None:
    axes = MODELS[32, 8]
    ownership = split(axes, range(10, 10 + len(given_widths)), given_widths)
    while ownership.tp_size > 1:
        survivors = data.draw(st.lists(st.sampled_from(ownership.devices), min_size=1, unique=True))
        after = reconfigure(axes, ownership, survivors)
        validate(axes, after)
        assert after.devices == tuple(device for device in ownership.devices if device in survivors)
        for axis in ("q_head", "kv_head", "mlp"):
            for device in after.devices:
                before = ownership.of(axis, ownership.devices.index(device))
                assert overlap(ownership, after, axis, device) == before
            _check_levelled(ownership, after, axis, axes.group_size if axis == "q_head" else 1)
        if after == ownership:
            break
        ownership = after


def _check_levelled(before: Ownership, after: Ownership, axis: str, step: int) -> None:
    """Whoever gained holds no more than anybody else, but for the last unit handed out."""
    for rank, device in enumerate(after.devices):
        if after.units(axis, rank) > before.units(axis, before.devices.index(device)):
            assert after.units(axis, rank) <= min(units(after, axis)) + step


def test_lost_mlp_units_are_handed_out_in_single_runs() -> None:
    before = split(MODELS[12, 4], range(4))
    after = reconfigure(MODELS[12, 4], before, [0, 1, 3])
    gained = [subtract(after.of("mlp", rank), before.of("mlp", d)) for rank, d in enumerate(after.devices)]
    assert [len(runs) for runs in gained] == [1, 1, 1]
    assert max(units(after, "mlp")) - min(units(after, "mlp")) <= 1


def test_losing_nobody_changes_nothing() -> None:
    before = split(MODELS[12, 4], range(3))
    assert reconfigure(MODELS[12, 4], before, [2, 1, 0]) == before


def test_of_replicated_kv_heads_lost_queries_go_to_whoever_has_their_kv_head() -> None:
    before = split(MODELS[6, 2], range(4))
    after = reconfigure(MODELS[6, 2], before, [0, 2, 3])
    for device in after.devices:
        assert overlap(before, after, "kv_head", device) == after.of("kv_head", after.devices.index(device))
        assert overlap(before, after, "q_head", device) == before.of("q_head", device)


def test_a_kv_head_whose_holders_all_died_is_dealt_anew() -> None:
    after = reconfigure(MODELS[6, 2], split(MODELS[6, 2], range(4)), [0, 1])
    assert [after.of("kv_head", rank) for rank in range(2)] == [((0, 1),), ((1, 2),)]
    assert units(after, "q_head") == [3, 3]


@pytest.mark.parametrize("devices", [[], [7], [0, -1]])
def test_some_previous_device_must_stay(devices: list[int]) -> None:
    with pytest.raises(InvalidOwnership, match="must include some of"):
        reconfigure(MODELS[12, 4], split(MODELS[12, 4], range(3)), devices)


@given(st.sampled_from([(12, 4), (32, 8), (6, 2)]), st.data())
@settings(max_examples=60, deadline=None)
def test_chains_of_leaving_and_joining_end_balanced(heads: tuple[int, int], data: st.DataObject) -> None:
    axes = MODELS[heads]
    ownership = split(axes, range(4))
    for _ in range(data.draw(st.integers(1, 5))):
        devices = data.draw(st.lists(st.integers(0, 3), min_size=1, unique=True))
        if not set(devices) & set(ownership.devices):
            continue
        before, ownership = ownership, reconfigure(axes, ownership, devices)
        validate(axes, ownership)
        assert set(ownership.devices) == set(devices)
        if set(devices) - set(before.devices):
            for device in set(devices) & set(before.devices):
                had, has = (one.units("mlp", one.devices.index(device)) for one in (before, ownership))
                kept = total(overlap(before, ownership, "mlp", device))
                assert kept == min(had, has)  # nothing moves but what a device has too much or too little of
    after = reconfigure(axes, ownership, range(4))
    if after != ownership:
        assert max(units(after, "mlp")) - min(units(after, "mlp")) <= 1
        assert sorted(units(after, "q_head")) == sorted(units(split(axes, range(4)), "q_head"))


def test_a_device_that_is_gone_keeps_nothing() -> None:
    before, after = split(MODELS[12, 4], range(3)), split(MODELS[12, 4], range(2))
    assert overlap(before, after, "mlp", 2) == ()
    assert total(overlap(before, after, "mlp", 0)) == 22


def test_an_ownership_is_a_value_that_survives_json() -> None:
    first, second = split(MODELS[12, 4], range(3)), split(MODELS[12, 4], range(3))
    other = split(MODELS[12, 4], range(3), [1, 2, 1])
    assert first == second
    assert hash(first) == hash(second)
    assert first.digest() == second.digest() != other.digest()
    assert len(first.digest()) == 16
    assert Ownership.from_json(other.to_json()) == other
    assert "device 1: q_head 6-8  kv_head 2-2" in str(first)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"devices":[0],"layouts":[{}],"layers":[]}', '{"devices":["x"],"layouts":[],"layers":[]}']
)
def test_text_that_is_no_ownership_is_refused(text: str) -> None:
    with pytest.raises(InvalidOwnership):
        Ownership.from_json(text)
