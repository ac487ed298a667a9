"""Paths of a forest, compared with a walk of each slot by itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchortp_sglang.kv.paths import ROOT, paths_of
from anchortp_sglang.kv.prefix_forest import best_below

NOWHERE = -1


@st.composite
def forests(draw):
    """(members, parents, slots): parents are earlier or later members, others, the root or the slot itself."""
    slots = draw(st.integers(2, 300))
    seed, style = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from(["long", "bushy", "wild"]))
    rng = np.random.default_rng(seed)
    members = np.flatnonzero(rng.random(slots) < draw(st.sampled_from([0.5, 1.0])))
    members = members[members != ROOT]
    parents = rng.integers(0, slots, len(members))
    if style != "wild":  # most hang below one that is near in a random order, so that chains are long
        order = np.append(ROOT, rng.permutation(members))
        back = 1 + (rng.random(len(members)) < (0.02 if style == "long" else 0.5)) * rng.integers(0, 20, len(members))
        above = order[np.maximum(np.arange(len(members)) + 1 - back, 0)]
        parents = above[np.argsort(order[1:])]
        parents[rng.random(len(members)) < 0.01] = ROOT
    return members, parents, slots


def lineages(members, parents):
    """Each member's slots up to the root, itself first; None if it has none."""
    above = dict(zip(members.tolist(), parents.tolist(), strict=True))
    found = {}
    for member in above:
        line, seen = [member], {member}
        while (up := above.get(line[-1])) is not None and up not in seen:
            line.append(up)
            seen.add(up)
        found[member] = line[:-1] if line[-1] == ROOT else None
    return found


@given(forests())
def test_each_slot_is_where_a_walk_finds_it(forest):
    members, parents, slots = forest
    paths, expected = paths_of(members, parents, slots), lineages(members, parents)
    rooted = [member for member, line in expected.items() if line is not None]
    assert np.flatnonzero(paths.rooted).tolist() == rooted
    assert paths.depths(np.array(rooted, np.int64)).tolist() == [len(expected[member]) for member in rooted]
    assert paths.lengths.sum() == len(rooted)
    for member in rooted:
        path, place = paths.path[member], paths.place[member]
        first = expected[member][place]
        above = expected[member][place + 1 :]
        assert (paths.path[expected[member][: place + 1]] == path).all() and paths.place[first] == 0
        assert paths.parent[path] == (paths.path[above[0]] if above else NOWHERE)
        assert not above or paths.ends[paths.parent[path]] == above[0]
        assert paths.above[path] == len(above)
    tops = {expected[member][paths.place[member]] for member in rooted}
    assert len(tops) == len(paths.ends)
    above_others = {line[1] for line in expected.values() if line is not None and len(line) > 1}
    assert sorted(paths.ends[paths.leaves].tolist()) == sorted(set(rooted) - above_others)


@given(forests(), st.integers(0, 2**32 - 1))
def test_the_best_below_a_slot_is_that_of_all_that_have_it_as_an_ancestor(forest, seed):
    members, parents, slots = forest
    paths = paths_of(members, parents, slots)
    ranks = np.random.default_rng(seed).permutation(slots)
    expected = np.zeros(slots, np.int64)
    for line in lineages(members, parents).values():
        for slot in line or ():
            expected[slot] = max(expected[slot], ranks[line[0]])
    assert best_below(paths, ranks).tolist() == expected.tolist()


@pytest.mark.parametrize("slots", [2, 70, 5000])
def test_one_long_path_and_one_long_cycle(slots):
    members = np.arange(1, slots)
    paths = paths_of(members, members - 1, slots)
    assert paths.place[1:].tolist() == list(range(slots - 1)) and paths.lengths.tolist() == [slots - 1]
    circle = paths_of(members, np.roll(members, 1), slots)
    assert not circle.rooted.any() and not len(circle.ends)


def test_of_no_members_there_are_no_paths():
    none = np.zeros(0, np.int64)
    paths = paths_of(none, none, 5)
    assert (
        not paths.rooted.any() and paths.leaves.tolist() == [] and best_below(paths, np.arange(5)).tolist() == [0] * 5
    )
