"""A table that was followed gives the next generation what reading it whole does, whatever was seen on the way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp_sglang.kv import hash_index, slot_table
from anchortp_sglang.kv.chain_hash import MULTIPLIER, child_hashes, mix
from anchortp_sglang.kv.followed_table import FollowedTable
from anchortp_sglang.kv.retained_slots import retain
from anchortp_sglang.kv.slot_table import SlotTable

MODEL = b"model"
KEYS = [(None, None), ("adapter", None), (None, "salt"), ("adapter", "salt")]


def new_table(slots):
    return SlotTable.create(bytearray(SlotTable.nbytes(slots)), slots, MODEL)


def as_values(retained):
    entries = retained.entries
    return {
        "slots": retained.slots.tolist(),
        "numbers": retained.numbers.tolist(),
        "dropped": retained.dropped,
        "digest": retained.digest(),
        "hashes": entries.hashes.tolist(),
        "tokens": entries.tokens[retained.numbers].tolist(),
        "parents": entries.parents[retained.numbers].tolist(),
        "last_use": entries.last_use[retained.numbers].tolist(),
        "namespaces": entries.namespaces,
        "chains": [(c.slots.tolist(), c.tokens.tolist(), c.shared, c.last_use) for c in retained.chains()],
    }


def assert_as_whole(followed, table, page_size=1):
    """Compare what was followed with a whole reading of the table, of which nothing was seen before."""
    found = followed.retained(table.entries())
    assert found is not None
    assert as_values(found) == as_values(retain(table.entries(), None, table.slots, page_size))
    return found


class History:
    """A random history of a table, of requests that begin alike; in a few tokens, so that chains are often equal."""

    def __init__(self, rng, slots):
        self.rng, self.table = rng, new_table(slots)
        self.ends: list[list[int]] = []
        self.cut = False  # stores are carried out up to a random one, as a kill does

    def take(self, n):
        free = np.flatnonzero(self.table.hashes == 0)
        return self.rng.choice(free, min(n, len(free)), replace=False)

    def used(self, n):
        used = np.flatnonzero(self.table.hashes)[1:]
        return self.rng.choice(used, min(n, len(used)), replace=False)

    def tokens(self, n):
        return self.rng.integers(0, 2, n) if self.rng.random() < 0.7 else self.rng.integers(-(1 << 62), 1 << 62, n)

    def prompt(self):
        used = self.used(1)
        if used.size and self.rng.random() < 0.6:
            parent = int(used[0])
        else:
            parent = self.table.root_of(KEYS[self.rng.integers(len(KEYS))])
        if parent is not None:
            new = self.take(int(self.rng.integers(1, 12)))
            self.table.commit_run(new, self.tokens(len(new)), parent)

    def again(self):
        """Compute a chain again in other slots, from some token on."""
        chains = self.table.entries().intact_chains()
        if chains:
            chain = chains[self.rng.integers(len(chains))]
            begin = int(self.rng.integers(len(chain.slots)))
            parent = int(self.table.parents[chain.slots[begin]])
            new = self.take(len(chain.slots) - begin)
            self.table.commit_run(new, chain.tokens[begin : begin + len(new)], parent)

    def step(self):
        above = self.used(6)
        new = self.take(len(above))
        self.table.commit_step(new, self.tokens(len(new)), above[: len(new)])

    def overwrite(self):
        slots = self.used(4)
        if slots.size:
            self.table.commit_run(slots, self.tokens(len(slots)), 0)

    def free(self):
        self.table.invalidate(self.used(int(self.rng.integers(1, 8))))

    def free_ends(self):
        chains = self.table.entries().intact_chains()
        if chains:
            chain = chains[self.rng.integers(len(chains))]
            self.table.invalidate(chain.slots[max(chain.shared, int(self.rng.integers(len(chain.slots)))) :])

    def move(self):
        hashes = self.table.hashes
        for slot in self.used(3).tolist():
            parent = int(self.table.parents[slot])
            if 0 < parent < self.table.slots:
                equal = np.flatnonzero(hashes == hashes[parent])
                self.table.move_below([slot], [int(self.rng.choice(equal))])

    def spoil(self):
        entries = self.table.entries()
        slot = int(self.rng.integers(1, self.table.slots))
        values = [0, 1, -1, -2, -300, 1 << 40, slot, int(self.rng.integers(self.table.slots)), -(1 << 63)]
        value = values[self.rng.integers(len(values))]
        column = [entries.tokens, entries.parents, entries.last_use, entries.hashes.view(np.int64)]
        column[self.rng.integers(4)][slot] = value

    def spoil_namespace(self):
        seeds = self.table._namespaces.seeds
        place = int(self.rng.integers(3))
        seeds[place] = self.rng.choice([0, int(seeds[place]) ^ 1])

    STEPS = [prompt, prompt, again, step, step, step, overwrite, free, free_ends, free_ends, move, spoil]

    def play(self, monkeypatch, looks, steps):
        """Play a number of steps. ``looks`` are called now and then, also between two stores of a commit."""

        def apply(stores):
            for array, where, value in stores:
                if self.rng.random() < 0.1:
                    looks()
                if self.cut and self.rng.random() < 0.3:
                    return
                array[where] = value

        monkeypatch.setattr(slot_table, "_apply", apply)
        for _ in range(steps):
            self.cut = self.rng.random() < 0.1
            steps_ = [*self.STEPS, type(self).spoil_namespace] if self.rng.random() < 0.1 else self.STEPS
            steps_[self.rng.integers(len(steps_))](self)
            if self.rng.random() < 0.3:
                looks()
        monkeypatch.undo()


class PagedHistory(History):
    """Requests whose slots are pages, as SGLang's allocator gives them; and now and then any slots."""

    page_size = 1

    def take(self, n):
        if self.rng.random() < 0.05:
            return super().take(n)
        whole = self.table.slots // self.page_size * self.page_size
        free = np.flatnonzero((self.table.hashes[:whole].reshape(-1, self.page_size) == 0).all(axis=1))
        pages = self.rng.choice(free, min(-(-n // self.page_size), len(free)), replace=False)
        return (pages[:, None] * self.page_size + np.arange(self.page_size)).ravel()[:n]

    def used(self, n):
        found = super().used(n)
        if self.rng.random() < 0.5:  # ends of pages
            found = found[(found + 1) % self.page_size == 0]
        return found

    def again(self):
        """Compute a chain again from the start of a page on."""
        chains = self.table.entries().intact_chains()
        if chains:
            chain = chains[self.rng.integers(len(chains))]
            begin = int(self.rng.integers(len(chain.slots))) // self.page_size * self.page_size
            new = self.take(len(chain.slots) - begin)
            self.table.commit_run(
                new, chain.tokens[begin : begin + len(new)], int(self.table.parents[chain.slots[begin]])
            )

    def step(self):
        above = np.unique(self.used(6))
        inside = above[(above + 1) % self.page_size > 0]
        inside = inside[inside + 1 < self.table.slots]
        inside = inside[self.table.hashes[inside + 1] == 0]
        self.table.commit_step(inside + 1, self.tokens(len(inside)), inside)

    STEPS = [*History.STEPS, History.prompt, again, step, step]


@settings(deadline=None, max_examples=400)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 9, 60, 60, 400]),
    st.integers(0, 80),
    st.sampled_from([1, 1, 1, 2, 4, 4, 16]),
)
def test_what_was_followed_is_what_is_there_at_the_end_whatever_was_seen_before(seed, slots, steps, page_size):
    rng = np.random.default_rng(seed)
    history = History(rng, slots) if page_size == 1 else PagedHistory(rng, slots)
    history.page_size = page_size
    followers = [FollowedTable(history.table, page_size) for _ in range(3)]

    def looks():
        for follower in followers:
            if rng.random() < 0.5:
                follower.look()

    with pytest.MonkeyPatch.context() as patch:
        history.play(patch, looks, steps)
        followers.append(FollowedTable(history.table, page_size))  # one that begins in the middle
        history.play(patch, looks, steps // 4)
    for follower in followers:
        assert_as_whole(follower, history.table, page_size)


def test_in_whole_pages_copies_are_joined_page_by_page():
    table = new_table(40)
    followed = FollowedTable(table, 4)
    for begin, last in (4, 3), (8, 3), (12, 9):  # the third differs in the last token of its page
        table.commit_run(np.arange(begin, begin + 4), [1, 1, 1, last], 0)
        followed.look()
    table.commit_run(np.arange(16, 22), [5, 6, 7, 8, 9, 9], 11)  # below the second; two tokens of a page
    found = assert_as_whole(followed, table, 4)
    assert found.slots.tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 16, 17, 18, 19]
    assert found.dropped["incomplete_page"] == 2
    assert found.entries.parents[16] == 7


def test_a_look_that_is_stopped_does_nothing():
    table = new_table(9)
    followed = FollowedTable(table)
    table.commit_run([1, 2, 3], [1, 2, 3], 0)
    assert followed.compare(lambda: True) is None
    assert assert_as_whole(followed, table).slots.tolist() == [1, 2, 3]


@pytest.mark.parametrize("length", [1, 2, 3, 17, 500])
def test_there_is_room_for_all_chains_and_for_what_they_grow_by(length):
    slots = 3001
    table = new_table(slots)
    rng = np.random.default_rng(0)
    places = (rng.permutation(slots - 1) + 1)[: (slots - 1) // length * length].reshape(-1, length)
    followed = FollowedTable(table)
    ends = np.zeros(len(places), np.int64)
    for column in places.T:  # all chains grow by a token, as in decode steps
        table.commit_step(column[ends > 0], column[ends > 0], ends[ends > 0])
        for slot in column[ends == 0]:
            table.commit_run([slot], [slot], 0)
        ends = column.copy()
        followed.look()
    assert len(assert_as_whole(followed, table).slots) == places.size


def test_a_run_of_many_copies_is_left_once():
    """Requests of one prompt: their tokens lie in slots of their own until they differ or end."""
    table = new_table(5000)
    followed = FollowedTable(table)
    table.commit_run([1, 2], [1, 2], 0)
    ends = np.full(100, 2)
    for step in range(40):
        new = 3 + step + 40 * np.arange(100)
        table.commit_step(new, np.where((np.arange(100) < 5) & (step > 20), np.arange(100), 7), ends)
        ends = new
        followed.look()
    chains = assert_as_whole(followed, table).chains()
    assert [len(chain.slots) for chain in chains] == [42] * 6


def test_chains_of_equal_hashes_that_differ_are_told_by_a_whole_reading():
    table = new_table(9)
    # h = (root * A + m1) * A + m2 is equal for other tokens if the mixes differ by d and -d * A.
    tokens = np.arange(2)
    first = child_hashes(np.array([table.seed], np.uint64), tokens[:1])[0]
    other = child_hashes(np.array([table.seed], np.uint64), tokens[1:])[0]
    table.commit_run([1, 2], [0, 5], 0)
    table.commit_run([3], [1], 0)
    wanted = (int(table.hashes[2]) - int(other) * MULTIPLIER) % (1 << 64)
    token = unmixed(wanted)
    assert mix(np.array([token]).view(np.int64))[0] == wanted and first != other
    table.commit_step([4], np.array([token]).view(np.int64), [3])
    assert table.hashes[2] == table.hashes[4]
    followed = FollowedTable(table)
    followed.look()
    assert followed.retained(table.entries()) is None
    assert retain(table.entries(), None, 9, 1).slots.tolist() == [1, 2, 3]


def unmixed(value):
    """The token of a mix, which is a bijection."""

    def unshift(x, bits):
        y = x
        for _ in range(64 // bits + 1):
            y = x ^ (y >> bits)
        return y

    mask = (1 << 64) - 1
    x = unshift(value, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & mask
    x = unshift(x, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & mask
    return np.uint64(unshift(x, 30) ^ 0x9E3779B97F4A7C15)


@pytest.mark.parametrize("steps", [0, 1, 3, 40])
@pytest.mark.parametrize("page_size", [1, 2])
@pytest.mark.parametrize("looks", [True, False])
def test_work_that_there_is_no_room_for_is_done_by_a_whole_reading(steps, page_size, looks):
    table = new_table(200)
    followed = FollowedTable(table, page_size)
    followed._run_slots, followed._run_tokens = np.empty((2, 20), np.int64)
    for step in range(steps):
        table.commit_run([2 + 4 * step, 3 + 4 * step], [step, 1], 0)
        if looks:
            followed.look()
    found = followed.retained(table.entries())
    assert (found is None) == (steps == 40)


def test_the_hash_table_holds_what_was_entered_and_not_removed():
    rng = np.random.default_rng(0)
    hashes = rng.integers(1, 30, 100).astype(np.uint64) << np.uint64(32)
    index, (after, before) = np.full(256, -1, np.int32), np.empty((2, 100), np.int32)
    held: set[int] = set()
    for _ in range(3000):
        slot = int(rng.integers(100))
        equal = any(hashes[slot] == hashes[other] for other in held - {slot})
        args = (hashes, np.uint64(1), index, after, before, slot)
        if slot in held:
            held.remove(slot)
            assert bool(hash_index.unindex_slot(*args)) == equal
        else:
            held.add(slot)
            assert bool(hash_index.index_slot(*args)) == equal
        for value in np.unique(hashes):
            first = hash_index.first_with(hashes, np.uint64(1), index, value)
            found = set()
            while first >= 0:
                found.add(int(first))
                first = after[first]
            assert found == {other for other in held if hashes[other] == value}


def test_where_much_has_changed_the_whole_is_read():
    table = new_table(101)
    for most, told in (0.1, True), (0.09, False):
        followed = FollowedTable(table)
        followed.look()
        table.invalidate(np.arange(1, 101))
        table.commit_run(np.arange(1, 11), np.arange(10), 0)
        assert (followed.retained(table.entries(), most) is not None) == told
        table.invalidate(np.arange(1, 11))
