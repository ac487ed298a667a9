"""The forest, the choice and the chains, compared with what plain Python finds by walking up from every slot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp_sglang.kv.chain_hash import MULTIPLIER, UNKNOWN, child_hash, root_hash
from anchortp_sglang.kv.equal_hashes import first_places, places_of
from anchortp_sglang.kv.namespaces import namespace_seed
from anchortp_sglang.kv.prefix_forest import ROOT, forest_of
from anchortp_sglang.kv.retained_slots import most_urgent, retain
from anchortp_sglang.kv.slot_table import SlotTable

SEED = root_hash(b"model")
FOREIGN = [-(1 << 63), -257, -256, -2, -1, 1 << 32, (1 << 32) + 1, (1 << 63) - 1]


@st.composite
def parents(draw):
    """A parent, or -1, for each slot: earlier or later slots, the root, the slot itself."""
    slots, seed = draw(st.integers(1, 300)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    up = rng.integers(0, slots, slots)
    if (style := draw(st.sampled_from(["long", "bushy", "wild"]))) != "wild":
        order = np.append(ROOT, rng.permutation(np.arange(1, slots)))
        back = 1 + (rng.random(slots - 1) < (0.02 if style == "long" else 0.5)) * rng.integers(0, 20, slots - 1)
        up[order[1:]] = order[np.maximum(np.arange(1, slots) - back, 0)]
        up[rng.random(slots) < 0.01] = ROOT
    up[rng.random(slots) < draw(st.sampled_from([0.0, 0.3]))] = -1
    up[ROOT] = -1
    return up.tolist()


def lineage(up, slot):
    """The slots from ``slot`` up to its root, which is left out; None if it has none."""
    line = [slot]
    while up[line[-1]] > ROOT:
        if (above := up[line[-1]]) in line:
            return None
        line.append(above)
    return line if up[line[-1]] == ROOT else None


def as_links(up):
    return np.stack((np.zeros(len(up), np.int32), np.array(up, np.int32)), axis=1)


@settings(deadline=None)
@given(parents())
def test_each_slot_that_leads_to_the_root_is_a_node_below_its_parent(up):
    forest = forest_of(as_links(up))
    lines = [lineage(up, slot) for slot in range(len(up))]
    rooted = [slot for slot, line in enumerate(lines) if line and slot]
    assert forest.ascending.tolist() == rooted and sorted(forest.slots.tolist()) == rooted
    depths = [len(lines[slot]) for slot in forest.slots]
    assert depths == sorted(depths)
    for node, (slot, above) in enumerate(zip(forest.slots.tolist(), forest.above.tolist(), strict=True)):
        assert above < node and (forest.slots[above] if above >= 0 else ROOT) == up[slot]
    assert sorted(forest.slots[forest.leaves()].tolist()) == sorted(set(rooted) - {up[slot] for slot in rooted})


@settings(deadline=None)
@given(parents(), st.integers(0, 2**32 - 1))
def test_closed_are_the_nodes_that_are_wanted_with_all_their_ancestors(up, seed):
    forest = forest_of(as_links(up))
    wanted = np.random.default_rng(seed).random(len(up)) < 0.9
    closed = forest.closed(wanted[forest.slots])
    assert closed.ascending.tolist() == [s for s in forest.ascending.tolist() if wanted[lineage(up, s)].all()]
    again = forest_of(as_links([parent if kept else -1 for parent, kept in zip(up, closed.mask(), strict=True)]))
    assert set(again.slots.tolist()) == set(closed.slots.tolist())


@pytest.mark.parametrize("slots", [1, 2, 70, 5000])
def test_one_long_path_and_one_long_cycle(slots):
    path = forest_of(as_links(range(-1, slots - 1)))
    assert path.slots.tolist() == list(range(1, slots)) and path.above.tolist() == list(range(-1, slots - 2))
    assert not len(forest_of(as_links([-1, *np.roll(np.arange(1, slots), 1)])))


@st.composite
def tables(draw):
    """A table after commits of few tokens, so that prefixes are equal; then, perhaps, spoiled."""
    page_size = draw(st.sampled_from([1, 1, 1, 2, 4]))
    slots = page_size * draw(st.sampled_from([2, 8, 40]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    table = SlotTable.create(bytearray(SlotTable.nbytes(slots)), slots, b"model")
    ends = [ROOT, table.root_of(("tenant", None))]
    pages = rng.permutation(np.arange(1, slots // page_size))
    while pages.size:
        own, pages = pages[: (n := rng.integers(1, 6))], pages[n:]
        run = (own[:, None] * page_size + np.arange(page_size)).ravel()
        run = run[: rng.integers(1, len(run) + 1)]
        table.commit_run(run, rng.integers(0, 2, len(run)), int(ends[rng.integers(len(ends))]))
        ends += run.tolist()
    for _ in range(draw(st.sampled_from([0, 0, 2, 10]))):
        spoil(table, rng)
    return table, page_size, rng


def spoil(table, rng):
    slot, other = rng.integers(0, table.slots, 2)
    kind = rng.integers(5)
    if kind == 0:
        table._hash[slot] = rng.choice([0, int(table._hash[other])])
    elif kind == 1:
        table._token[slot] = rng.choice([-1, 0, 1, 1 << 62])
    elif kind == 2:
        table._parent[slot] = rng.choice([*FOREIGN, table.slots, slot, other])
    elif kind == 3:
        table._last_use[slot] = rng.choice([-(1 << 63), (1 << 63) - 1, 0, 3])
    else:  # an entry that follows from its parent, and has another slot's hash
        table._token[slot] = token_of(int(table._hash[slot]) - int(table._hash[other]) * MULTIPLIER)
        table._parent[slot] = other


def token_of(mixed):
    """The token of which ``chain_hash.mix`` makes this."""
    x, mask = mixed % (1 << 64), (1 << 64) - 1
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        unshifted = x
        for _ in range(64 // shift):
            unshifted = x ^ unshifted >> shift
        x = unshifted * pow(factor, -1, 1 << 64) & mask
    return int(np.uint64(x ^ 0x9E3779B97F4A7C15).astype(np.int64))


class Reference:
    """Return what is retained of ``entries``, by definition."""

    def __init__(self, entries):
        self.hashes, self.tokens, self.parents, self.last_use = (
            column.tolist() for column in (entries.hashes, entries.tokens, entries.parents, entries.last_use)
        )
        slots = range(len(self.hashes))
        self.above = dict(enumerate(self.hashes)) | {ROOT: SEED}
        self.above |= {-1 - place: namespace_seed(SEED, key) for place, key in entries.namespaces.items()}
        self.up = [max(self.parents[slot], ROOT) if slot and self.agrees(slot) else -1 for slot in slots]
        self.kept = {slot for slot in slots if slot and lineage(self.up, slot)}

    def agrees(self, slot):
        above = self.above.get(self.parents[slot], UNKNOWN)
        return above != UNKNOWN and self.hashes[slot] == child_hash(above, self.tokens[slot])

    def close(self, wanted, up=None):
        up = up or self.up
        found, grown = set(), True
        while grown:
            grown = {slot for slot in wanted - found if up[slot] == ROOT or up[slot] in found}
            found |= grown
        self.kept = found

    def keep_whole_pages(self, size):
        def whole(page):
            slots = range(page * size, (page + 1) * size)
            follow = all(self.up[slot] == slot - 1 for slot in slots[1:])
            begins = self.up[slots[0]] == ROOT or (self.up[slots[0]] + 1) % size == 0
            return self.kept.issuperset(slots) and follow and begins

        pages = [page for page in range(len(self.up) // size) if whole(page)]
        self.close({slot for page in pages for slot in range(page * size, (page + 1) * size)})

    def join_copies(self, size):
        pages = {}
        for slot in sorted(self.kept):
            if (slot + 1) % size == 0:
                pages.setdefault(self.hashes[slot], slot // size)
        first = {slot: pages[self.hashes[slot - slot % size + size - 1]] * size + slot % size for slot in self.kept}
        joined = [first.get(parent, parent) for parent in self.parents]
        proven = {s for s in self.kept if (self.tokens[s], joined[s]) == (self.tokens[first[s]], joined[first[s]])}
        self.close(proven)
        self.up = [max(parent, ROOT) for parent in joined]
        self.close({slot for slot in self.kept if first[slot] == slot}, self.up)

    def keep_most_urgent(self, capacity, size, urgency):
        if len(self.kept) <= capacity:
            return
        lines = {slot: lineage(self.up, slot) for slot in self.kept}
        taken = []
        for best in sorted(self.kept, key=lambda slot: (urgency[slot], len(lines[slot]), slot), reverse=True):
            taken += [slot for slot in reversed(lines[best]) if slot % size == 0 and slot not in taken]
        self.kept = {slot + i for slot in taken[: capacity // size] for i in range(size)}

    def chains(self):
        leaves = self.kept - {self.up[slot] for slot in self.kept}
        seen, found = set(), []
        for leaf in sorted(leaves, key=lambda slot: (self.last_use[slot], slot)):
            line = lineage(self.up, leaf)[::-1]
            found.append((line, [self.tokens[s] for s in line], len(seen.intersection(line)), self.last_use[leaf]))
            seen.update(line)
        return found


def as_tuples(chains):
    return [(chain.slots.tolist(), chain.tokens.tolist(), chain.shared, chain.last_use) for chain in chains]


@settings(deadline=None)
@given(tables())
def test_what_is_intact_is_what_a_walk_from_each_slot_finds(made):
    entries = made[0].entries()
    reference = Reference(entries)
    assert entries.forest().ascending.tolist() == sorted(reference.kept)
    assert as_tuples(entries.intact_chains()) == reference.chains()


@settings(deadline=None)
@given(tables())
def test_what_is_retained_is_what_the_rules_say(made):
    table, page_size, rng = made
    entries, slots = table.entries(), table.slots
    reference = Reference(entries)
    usable = rng.random(slots) < rng.choice([0.9, 1.0])
    reference.close(reference.kept & set(np.flatnonzero(usable).tolist()))
    reference.keep_whole_pages(page_size)
    reference.join_copies(page_size)
    rows = int(rng.choice([slots, slots + page_size, page_size * max(1, slots // page_size // 2)]))
    running = entries.hashes[rng.integers(0, slots, rng.integers(0, 5))]
    urgency = list(reference.last_use)
    for place, own in reversed(list(enumerate(running.tolist()))):
        for slot in range(slots):
            if reference.hashes[slot] == own:
                urgency[slot] = entries.step + len(running) - place
    if rows < slots:
        reference.keep_most_urgent(rows - page_size, page_size, urgency)
    retained = retain(entries, usable, rows, page_size, running)
    assert retained.slots.tolist() == sorted(reference.kept)
    number = dict(zip(retained.slots.tolist(), retained.numbers.tolist(), strict=True))
    assert list(number.values()) == (list(number) if rows >= slots else list(range(page_size, page_size + len(number))))
    expected = [([number[slot] for slot in line], *rest) for line, *rest in reference.chains()]
    assert as_tuples(retained.chains()) == expected
    new = retained.entries
    for slot, own in number.items():
        parent = reference.up[slot] or min(reference.parents[slot], ROOT)
        of_new = [int(column[own]) for column in (new.hashes, new.tokens, new.parents, new.last_use)]
        assert of_new[:2] == [reference.hashes[slot], reference.tokens[slot]]
        assert of_new[2:] == [number.get(parent, parent), reference.last_use[slot]]
    assert np.count_nonzero(new.hashes[1:]) == len(number)


@settings(deadline=None)
@given(tables(), st.integers(0, 40))
def test_a_smaller_mirror_holds_the_chains_that_were_used_last(made, capacity):
    entries = made[0].entries()
    reference = Reference(entries)
    reference.keep_most_urgent(capacity, 1, reference.last_use)
    assert most_urgent(entries.forest(), entries, capacity, 1).ascending.tolist() == sorted(reference.kept)


@settings(deadline=None)
@given(st.lists(st.integers(0, 20) | st.integers(0, 2**64 - 1)), st.lists(st.integers(0, 20)))
def test_the_first_of_equal_hashes_is_found(keys, wanted):
    first, copies = first_places(np.array(keys, np.uint64))
    assert first.tolist() == [keys.index(key) for key in keys]
    assert copies == len(keys) - len(set(keys))
    found = places_of(np.array(keys, np.uint64), np.array(wanted, np.uint64))
    assert found.tolist() == [keys.index(key) if key in keys else -1 for key in wanted]


def test_a_long_table_of_equal_and_of_near_hashes_takes_no_longer():
    keys = np.concatenate((np.zeros(200_000), np.arange(200_000))).astype(np.uint64)
    first, copies = first_places(keys)
    assert copies == 200_000 and (first[200_000:] == np.append(0, np.arange(200_001, 400_000))).all()
