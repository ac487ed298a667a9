from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchortp_sglang.planning.intervals import Intervals, deal, intersect, locate, normalize, scale, subtract, total
from anchortp_sglang.planning.ownership.shares import even, proportional

unit_sets = st.frozensets(st.integers(0, 30))


def as_runs(units: frozenset[int]) -> Intervals:
    return normalize((unit, unit + 1) for unit in units)


def as_units(runs: Intervals) -> list[int]:
    return [unit for start, stop in runs for unit in range(start, stop)]


@given(unit_sets, unit_sets)
def test_intervals_behave_like_sets_of_units(left: frozenset[int], right: frozenset[int]) -> None:
    assert as_units(intersect(as_runs(left), as_runs(right))) == sorted(left & right)
    assert as_units(subtract(as_runs(left), as_runs(right))) == sorted(left - right)
    assert total(as_runs(left)) == len(left)


@given(unit_sets)
def test_equal_sets_have_equal_canonical_runs(units: frozenset[int]) -> None:
    runs = as_runs(units)
    assert normalize(reversed(runs)) == runs
    assert all(left[1] < right[0] for left, right in pairwise(runs))


@given(unit_sets)
def test_locate_is_the_position_in_layout_order(units: frozenset[int]) -> None:
    runs = as_runs(units)
    assert [locate(runs, unit) for unit in sorted(units)] == list(range(len(units)))
    with pytest.raises(ValueError, match="unit 31"):
        locate(runs, 31)


def test_a_reversed_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[5, 3\)"):
        normalize([(5, 3)])


def test_scale_counts_in_smaller_units() -> None:
    assert scale(((0, 2), (3, 4)), 16) == ((0, 32), (48, 64))


@given(unit_sets, st.data())
def test_deal_hands_out_every_unit_in_order(units: frozenset[int], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(units)), max_size=4)))
    counts = [stop - start for start, stop in pairwise([0, *cuts, len(units)])]
    hands = deal(as_runs(units), counts)
    assert [total(hand) for hand in hands] == counts
    assert [unit for hand in hands for unit in as_units(hand)] == sorted(units)


def test_deal_refuses_counts_that_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="3 units"):
        deal(((0, 3),), [1, 1])


def test_even_gives_the_larger_shares_first() -> None:
    assert even(4, 3) == (2, 1, 1)


@given(st.integers(0, 500), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_proportional_shares_are_within_one_unit_of_exact(units: int, weights: list[int]) -> None:
    shares = proportional(units, weights)
    assert sum(shares) == units
    assert all(abs(share * sum(weights) - units * w) < sum(weights) for share, w in zip(shares, weights, strict=True))
