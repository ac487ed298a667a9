"""A forest of slots as paths: runs of slots of which each is the only child of the one before.

A prefix forest is a few long paths: slots branch only where sequences part. So what is asked of each slot (is it below
a root, how deep, under which leaves) is computed for paths, of which there are few, and then handed to their slots.
Slots are ranked along their paths as in list ranking: a walk from the first slot of each path would take as many steps
as the longest has slots, so walks also start at every eighth slot or so, all at once, and their pieces are joined.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from anchortp_sglang.kv.chain_hash import Ids

Mask = NDArray[np.bool_]

ROOT = 0

_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_START_BITS = 3


@dataclass(frozen=True, eq=False)
class Paths:
    """The paths of the members of a forest that lead to the root, which is slot 0 and no member.

    ``path`` (int64[slots]): the path that a slot is on, -1 if it leads to no root. ``place`` (int64[slots]): its
    distance from the path's first slot. ``ends``, ``lengths`` (int64[paths]): the last slot of each path, and how many
    it has. ``parent`` (int64[paths]): the path whose last slot it hangs below, -1 for the root. ``above``
    (int64[paths]): how many slots there are from the root to its first one.
    """

    path: Ids
    place: Ids
    ends: Ids
    lengths: Ids
    parent: Ids
    above: Ids

    @property
    def rooted(self) -> Mask:
        """bool[slots]: the slots that are below the root."""
        rooted: Mask = self.path >= 0
        return rooted

    def depths(self, slots: Ids) -> Ids:
        """Return the number of slots from the root to each of ``slots`` (int64[n], all rooted), at least 1."""
        depths: Ids = self.above[self.path[slots]] + self.place[slots] + 1
        return depths

    @cached_property
    def leaves(self) -> Ids:
        """int64[leaves]: the paths that none hangs below, ascending."""
        is_leaf = np.ones(len(self.ends), np.bool_)
        is_leaf[self.parent[self.parent >= 0]] = False
        return np.flatnonzero(is_leaf)

    def most_below(self, values: Ids) -> Ids:
        """Return int64[paths]: the largest of ``values`` (int64[paths]) over each path and all below it."""
        return self._gathered(values, np.maximum)

    def least_below(self, values: Ids) -> Ids:
        """Return int64[paths]: the smallest of ``values`` (int64[paths]) over each path and all below it."""
        return self._gathered(values, np.minimum)

    def _gathered(self, values: Ids, better: np.ufunc) -> Ids:
        found, up = values.copy(), self.parent.copy()
        # Invariant of round k: `up` is the 2**k-th ancestor, `found` has seen all descendants closer than 2**k.
        climbing = np.arange(len(up))
        while (climbing := climbing[up[climbing] >= 0]).size:
            above = up[climbing]
            better.at(found, above, found[climbing])
            up[climbing] = up[above]
        return found


def paths_of(members: Ids, parents: Ids, slots: int) -> Paths:
    """Return the paths of ``members`` (int64[n], ascending, without 0), whose parents are ``parents`` (int64[n]).

    Members whose ancestors do not end at the root, 0, are on no path: an ancestor is no member, or they are in or below
    a cycle. ``slots``: more than any member or parent.
    """
    is_member = np.zeros(slots, np.bool_)
    is_member[members] = True
    below_member = is_member[parents]
    children = np.bincount(parents[below_member], minlength=slots)
    is_only = below_member & (children[parents] == 1)
    below = np.full(slots, ROOT, np.int64)
    below[parents[is_only]] = members[is_only]

    path, place, lengths = _ranked(members, is_only, below, slots)
    first, its_parent = members[~is_only], parents[~is_only]
    ends = np.empty(len(first), np.int64)
    on_path = members[path[members] >= 0]
    is_end = on_path[below[on_path] == ROOT]
    ends[path[is_end]] = is_end
    return _rooted(path, place, ends, lengths, its_parent, below_member[~is_only])


def _ranked(members: Ids, is_only: Mask, below: Ids, slots: int) -> tuple[Ids, Ids, Ids]:
    """Return each slot's path (int64[slots], -1 for none and in cycles) and place on it, and the paths' lengths.

    ``is_only`` (bool[members]): whether a member is its parent's only child; the others begin paths, numbered in their
    order. ``below`` (int64[slots]): the only child of a slot, 0 if it has none or several.
    """
    is_sampled = members.astype(np.uint64) * _SPREAD >> np.uint64(64 - _START_BITS) == 0
    begins = ~is_only | is_sampled
    starts = members[begins]
    is_start = np.zeros(slots, np.bool_)
    is_start[starts] = True
    piece, place = np.full(slots, -1, np.int64), np.zeros(slots, np.int64)
    piece[starts] = np.arange(len(starts))
    lengths, after = np.zeros(len(starts), np.int64), np.full(len(starts), -1, np.int64)
    at, of, step = starts, np.arange(len(starts)), 0
    while at.size:
        step += 1
        next_at = below[at]
        goes_on = next_at != ROOT
        reaches = goes_on & is_start[next_at]
        after[of[reaches]] = piece[next_at[reaches]]
        goes_on &= ~reaches
        lengths[of[~goes_on]] = step
        at, of = next_at[goes_on], of[goes_on]
        piece[at] = of
        place[at] = step

    # Join the pieces: each learns its path's first piece, and how many slots there are before its own.
    up, before = np.arange(len(starts)), np.zeros(len(starts), np.int64)
    joined = after >= 0
    up[after[joined]] = np.flatnonzero(joined)
    before[after[joined]] = lengths[joined]
    is_first = ~is_only[begins]
    for _ in range(len(starts).bit_length()):  # what is in a cycle never arrives
        climbing = np.flatnonzero(~is_first[up])
        if not climbing.size:
            break
        above = up[climbing]
        before[climbing] += before[above]
        up[climbing] = up[above]
    number = np.where(is_first, np.cumsum(is_first) - 1, -1)
    of_piece = number[up]
    whole = np.zeros(np.count_nonzero(is_first), np.int64)
    np.add.at(whole, of_piece[of_piece >= 0], lengths[of_piece >= 0])
    on_piece = np.flatnonzero(piece >= 0)
    place[on_piece] += before[piece[on_piece]]
    path = np.full(slots, -1, np.int64)
    path[on_piece] = of_piece[piece[on_piece]]
    return path, place, whole


def _rooted(path: Ids, place: Ids, ends: Ids, lengths: Ids, its_parent: Ids, below_member: Mask) -> Paths:
    """Leave out the paths that do not lead to the root. ``its_parent``: the slot above the first of each path."""
    count = len(ends)
    root, nowhere = count, count + 1
    up = np.append(
        np.where(below_member, path[its_parent], np.where(its_parent == ROOT, root, nowhere)), (root, nowhere)
    )
    up[up < 0] = nowhere  # below a cycle
    parent = up[:count].copy()
    above = np.append(np.where(parent < count, np.append(lengths, (0, 0))[parent], 0), (0, 0))
    for _ in range(count.bit_length()):
        climbing = np.flatnonzero(up < root)
        if not climbing.size:
            break
        over = up[climbing]
        above[climbing] += above[over]
        up[climbing] = up[over]
    is_rooted = up[:count] == root
    if is_rooted.all():
        return Paths(path, place, ends, lengths, np.where(parent < count, parent, -1), above[:count])
    number = np.append(np.where(is_rooted, np.cumsum(is_rooted) - 1, -1), (-1, -1))
    new_path = number[np.where(path < 0, nowhere, path)]
    kept = np.flatnonzero(is_rooted)
    return Paths(new_path, place, ends[kept], lengths[kept], number[parent[kept]], above[kept])
