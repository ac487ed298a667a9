"""Batches that share prefixes, chunks, retractions, evictions, and kills at any store: what was committed is kept.

SGLang's own allocator and prefix tree, in both of its cores, with pages of one and of several slots.
"""

from __future__ import annotations

import random

import pytest
from counted_stores import Killed, killed_after
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from scheduled_kv import LONGEST, PLAIN, Server, hooked_memory, new_request

from anchortp_sglang.kv.slot_table import SlotTable

SLOTS = 96
KEYS = [PLAIN, PLAIN, PLAIN, ("tenant", None), ("tenant", "salt")]

seeds = st.integers(0, 1 << 32)
kills = st.none() | st.integers(0, 60)


@pytest.fixture(scope="module", autouse=True)
def _hooked():
    with hooked_memory():
        yield


@pytest.mark.parametrize(("page_size", "core"), [(1, "rust"), (4, "python")])
def test_a_request_that_is_moved_to_the_slots_of_another_is_kept_whole_at_every_store(page_size, core):
    """The second is computed beside the first, but only a chunk of it, which the tree takes at the next step."""
    common, whole, kill = [1] * 8, False, -1
    while not whole:
        kill += 1
        server = Server(SLOTS, page_size, core)
        buffer = bytearray(SlotTable.nbytes(server.rows))
        server.start_empty(buffer)
        first = new_request("first", [*common, 2, 2, 2, 2, 2], PLAIN, 9)
        second = new_request("second", [*common, *[0] * 20], PLAIN, 9)
        assert server.prefill([first, second], 13 + 16) == []
        assert server.chunked is second and len(server.promised) == (13 + 8 if page_size == 1 else 3 + 2)
        try:
            with killed_after(kill):
                server.prefill([], 40)
            server.check()
            whole = True
        except Killed:
            promised = server.promised
            successor = Server(SLOTS, page_size, core)
            kept = successor.take_over(buffer, server.written)
            assert promised <= {server.written[slot] for slot in kept.slots.tolist()}
            successor.prefixes.start_writing()
            successor.check()
    assert kill > len(common), "the first of these stores forget its own slots"


class SharedPrefixes(RuleBasedStateMachine):
    page_size = 1
    core = "rust"
    overlap = False
    mixed = False

    def __init__(self) -> None:
        super().__init__()
        self.server = Server(SLOTS, self.page_size, self.core, self.overlap, self.mixed)
        self.buffer = bytearray(SlotTable.nbytes(self.server.rows))
        self.server.start_empty(self.buffer)
        self.waiting: list = []
        self.texts: list[list[int]] = [[]]
        self.made = 0

    @rule(seed=seeds, n=st.integers(1, 4), budget=st.integers(4, 60), kill=kills)
    def requests_arrive(self, seed, n, budget, kill):
        """Some begin with the same tokens, some are the same, some branch off within."""
        rng = random.Random(seed)
        common = rng.choice(self.texts) + [rng.randrange(3) for _ in range(rng.randint(0, 12))]
        for _ in range(n):
            stem = common[: rng.randint(0, len(common))] if rng.random() < 0.5 else common
            tokens = (stem + [rng.randrange(3) for _ in range(rng.randint(1, 8))])[: LONGEST // 2]
            self.texts = [*self.texts[-3:], tokens]
            self.made += 1
            self.waiting.append(new_request(f"r{self.made}", tokens, rng.choice(KEYS), rng.randint(1, 12)))
        self.prefill(budget, kill)

    @rule(budget=st.integers(4, 60), kill=kills)
    def prefill(self, budget, kill):
        def run():
            self.waiting = self.server.prefill(self.waiting, budget)

        self.unless_killed(kill, run)

    @rule(steps=st.integers(1, 3), kill=kills)
    def decode(self, steps, kill):
        for _ in range(steps):
            if not self.unless_killed(kill, self.server.decode):
                return

    @rule(seed=seeds, kill=kills)
    def retract(self, seed, kill):
        if self.server.running:
            req = random.Random(seed).choice(self.server.running)
            if self.unless_killed(kill, lambda: self.server.retract(req)):
                self.waiting.append(req)

    @rule(tokens=st.integers(1, 40), kill=kills)
    def evict(self, tokens, kill):
        self.unless_killed(kill, lambda: self.server.evict(tokens))

    @rule(kill=kills)
    def all_ranks_die(self, kill):
        self.recover(kill)

    def unless_killed(self, kill, action) -> bool:
        """Whether ``action`` was carried out, and not cut off by a kill at the store number ``kill``."""
        open_requests = self.open_requests()
        try:
            with killed_after(kill):
                action()
        except Killed:
            self.recover(None, open_requests)
            return False
        return True

    def open_requests(self):
        chunked = [] if self.server.chunked is None else [self.server.chunked]
        return [*self.server.running, *chunked, *self.waiting]

    def recover(self, kill, open_requests=None) -> None:
        """The next generation; a ``kill`` may hit it before it is ready."""
        old = self.server
        self.waiting = [again(req) for req in (open_requests or self.open_requests())]
        self.server = Server(SLOTS, self.page_size, self.core, self.overlap, self.mixed)
        kept = self.server.take_over(self.buffer, old.written)
        contents = [old.written[slot] for slot in kept.slots.tolist()]
        ends = [content for content in contents if (len(content) - 1) % self.page_size == 0]
        assert old.promised <= set(ends), "something committed is not kept"
        assert len(ends) == len(set(ends)), "something is kept twice"
        assert sorted(self.server.tree.all_values_flatten().tolist()) == kept.slots.tolist()
        try:
            with killed_after(kill):
                self.server.prefixes.start_writing()
        except Killed:
            self.recover(None)

    @invariant()
    def allocator_tree_and_table_agree(self):
        self.server.check()


def again(req):
    """A request that goes on in another generation, after the tokens that it has."""
    fresh = new_request(req.rid, req.origin_input_ids, (req.extra_key, req.cache_salt), 12)
    fresh.sampling_params = req.sampling_params
    fresh.output_ids.extend(req.output_ids)
    return fresh


class SharedPrefixesInPages(SharedPrefixes):
    page_size = 4


class SharedPrefixesInPython(SharedPrefixes):
    core = "python"


class SharedPrefixesWithOverlap(SharedPrefixes):
    overlap = True


class SharedPrefixesInPagesWithOverlap(SharedPrefixesInPages):
    overlap = True


class SharedPrefixesInMixedBatches(SharedPrefixes):
    mixed = True


class SharedPrefixesInMixedBatchesWithOverlap(SharedPrefixesWithOverlap):
    mixed = True


TestSharedPrefixes = SharedPrefixes.TestCase
TestSharedPrefixesInPages = SharedPrefixesInPages.TestCase
TestSharedPrefixesInPython = SharedPrefixesInPython.TestCase
TestSharedPrefixesWithOverlap = SharedPrefixesWithOverlap.TestCase
TestSharedPrefixesInPagesWithOverlap = SharedPrefixesInPagesWithOverlap.TestCase
TestSharedPrefixesInMixedBatches = SharedPrefixesInMixedBatches.TestCase
TestSharedPrefixesInMixedBatchesWithOverlap = SharedPrefixesInMixedBatchesWithOverlap.TestCase
for _case in (
    TestSharedPrefixes,
    TestSharedPrefixesInPages,
    TestSharedPrefixesInPython,
    TestSharedPrefixesWithOverlap,
    TestSharedPrefixesInPagesWithOverlap,
    TestSharedPrefixesInMixedBatches,
    TestSharedPrefixesInMixedBatchesWithOverlap,
):
    _case.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
del _case  # pytest would take it for another test
