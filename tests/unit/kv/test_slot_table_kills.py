"""A random life of a small slot table: allocation, reuse, decode, eviction, and kills at any instant.

The model keeps, for each slot, what its KV was really computed from. After each kill the table claims nothing
else, and has lost nothing that was committed and not reused.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from counted_stores import Killed, killed_after
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from anchortp_sglang.kv.slot_table import SlotTable

NAMESPACE = b"model-a"
SLOTS = 20
HALF_WRITTEN = (-1,)

Content = tuple[int, ...]
seeds = st.integers(0, 1 << 32)
kills = st.none() | st.integers(0, 40)


@dataclass(frozen=True)
class Entry:
    parent: int
    content: Content


class ServerLife(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.buffer = bytearray(SlotTable.nbytes(SLOTS))
        self.table = SlotTable.create(self.buffer, SLOTS, NAMESPACE)
        self.kv: dict[int, Content] = {}  # slot -> the tokens that its KV was really computed from
        self.entries: dict[int, Entry] = {}  # slot -> what was committed, until the slot is freed
        self.sequences: list[list[int]] = []  # running and cached; slots in none of them are free

    # --- what a server does

    @rule(seed=seeds, n=st.integers(1, 5), committed=st.booleans(), kill_commit=kills)
    def extend(self, seed: int, n: int, committed: bool, kill_commit: int | None) -> None:
        """A request arrives, perhaps on a cached prefix; its extend may stay in flight while others go on."""
        rng = random.Random(seed)
        prefix = self.some_prefix(rng)
        slots = self.allocate(rng, n)
        if not slots:
            return
        tokens = [rng.randrange(3) for _ in slots]
        content = self.kv[prefix[-1]] if prefix else ()
        self.write_kv(rng, slots, [content + tuple(tokens[: i + 1]) for i in range(len(slots))])
        self.sequences.append(prefix + slots)
        if committed:
            self.commit_run(prefix + slots, len(prefix), kill_commit)

    @rule(seed=seeds, kill=kills)
    def commit_late_or_again(self, seed: int, kill: int | None) -> None:
        rng = random.Random(seed)
        if self.sequences:
            sequence = rng.choice(self.sequences)
            self.commit_run(sequence, rng.randrange(len(sequence)), kill)

    @rule(seed=seeds, one_by_one=st.booleans(), kill_commit=kills)
    def decode(self, seed: int, one_by_one: bool, kill_commit: int | None) -> None:
        rng = random.Random(seed)
        batch = rng.sample(self.sequences, min(len(self.sequences), 3))
        slots = self.allocate(rng, len(batch))
        if not slots:
            return
        parents = [sequence[-1] for sequence in batch]
        tokens = [rng.randrange(3) for _ in batch]
        contents = [(*self.kv[parent], token) for parent, token in zip(parents, tokens, strict=True)]
        self.write_kv(rng, slots, contents)
        for sequence, slot in zip(batch, slots, strict=True):
            sequence.append(slot)
        new = {
            slot: Entry(parent, content)
            for slot, parent, content in zip(slots, parents, contents, strict=True)
            if parent in self.entries
        }
        try:
            with killed_after(kill_commit):
                self.commit_step(slots, tokens, parents, one_by_one)
        except Killed:
            return self.recover(possible=new)
        self.entries |= new

    @rule(seed=seeds, kill=kills)
    def evict(self, seed: int, kill: int | None) -> None:
        """A slot is freed, with what hangs on it, and forgotten before it can be had anew."""
        rng = random.Random(seed)
        used = self.used_slots()
        if not used:
            return
        victim = rng.choice(sorted(used))
        cut = [s[: s.index(victim)] if victim in s else s for s in self.sequences]
        self.sequences = [sequence for sequence in cut if sequence]
        freed = sorted(used - self.used_slots())
        forgotten = {slot: self.entries.pop(slot) for slot in freed if slot in self.entries}
        try:
            with killed_after(kill):
                self.table.invalidate(np.array(freed))
        except Killed:
            self.recover(possible=forgotten)

    @rule()
    def kill(self) -> None:
        self.recover()

    # --- its parts

    def some_prefix(self, rng: random.Random) -> list[int]:
        if not self.sequences or rng.random() < 0.3:
            return []
        sequence = rng.choice(self.sequences)
        return sequence[: rng.randint(1, len(sequence))]

    def used_slots(self) -> set[int]:
        return {slot for sequence in self.sequences for slot in sequence}

    def allocate(self, rng: random.Random, n: int) -> list[int]:
        free = sorted(set(range(1, SLOTS)) - self.used_slots())
        if len(free) < n or n == 0:
            return []
        slots = rng.sample(free, n)
        for slot in slots:
            self.kv[slot] = HALF_WRITTEN
        return slots

    def commit_step(self, slots: list[int], tokens: list[int], parents: list[int], one_by_one: bool) -> None:
        if not one_by_one:
            return self.table.commit_step(np.array(slots), np.array(tokens), np.array(parents))
        for slot, token, parent in zip(slots, tokens, parents, strict=True):
            self.table.commit_tokens([(slot, token, parent)])

    def write_kv(self, rng: random.Random, slots: list[int], contents: list[Content]) -> None:
        """The KV is written in any order; whoever looks in between must not take any of it for whole."""
        for slot, content in rng.sample(list(zip(slots, contents, strict=True)), len(slots)):
            self.check_against_kv(self.table)
            self.kv[slot] = content

    def commit_run(self, sequence: list[int], start: int, kill: int | None) -> None:
        parent = sequence[start - 1] if start else 0
        slots = sequence[start:]
        tokens = [self.kv[slot][-1] for slot in slots]
        parents = [parent, *slots[:-1]]
        new = {slot: Entry(above, self.kv[slot]) for slot, above in zip(slots, parents, strict=True)}
        changed = {slot: entry for slot, entry in new.items() if self.entries.get(slot) != entry}
        known = parent == 0 or parent in self.entries
        try:
            with killed_after(kill):
                assert self.table.commit_run(np.array(slots), np.array(tokens), parent) == known
        except Killed:
            for slot in changed:
                self.entries.pop(slot, None)
            return self.recover(possible=changed)
        if known:
            self.entries |= new

    def recover(self, possible: dict[int, Entry] | None = None) -> None:
        """All ranks are dead, the next generation reads; ``possible`` was being written or cleared."""
        self.table = SlotTable.attach(self.buffer, SLOTS, NAMESPACE)
        self.check_against_kv(self.table)
        found = set(self.table.retained_slots().tolist())
        assert intact(self.entries) <= found <= intact(self.entries | (possible or {}))
        self.check_chains()
        self.entries = {s: e for s, e in (self.entries | (possible or {})).items() if s in found}
        self.sequences = [chain.slots.tolist() for chain in self.table.entries().intact_chains()]
        # The next rank 0 does so before it writes, else what a kill left of an entry could verify again one day.
        self.table.invalidate(np.array(sorted(set(range(1, SLOTS)) - self.used_slots()), np.int64))

    # --- what is promised

    @invariant()
    def committed_and_not_reused_is_found(self) -> None:
        self.check_against_kv(self.table)
        assert set(self.table.retained_slots().tolist()) == intact(self.entries)
        self.check_chains()

    def check_against_kv(self, table: SlotTable) -> None:
        for chain in table.entries().intact_chains():
            tokens = tuple(chain.tokens.tolist())
            for i, slot in enumerate(chain.slots.tolist()):
                assert self.kv[slot] == tokens[: i + 1]

    def check_chains(self) -> None:
        chains, seen = self.table.entries().intact_chains(), set[int]()
        for chain in chains:
            slots = chain.slots.tolist()
            assert seen.issuperset(slots[: chain.shared])
            assert seen.isdisjoint(slots[chain.shared :])
            seen.update(slots)
        assert sorted(seen) == self.table.retained_slots().tolist()
        stamps = [chain.last_use for chain in chains]
        assert stamps == sorted(stamps)


def intact(entries: dict[int, Entry]) -> set[int]:
    """The slots from which parents of the right content lead to the root."""

    def is_intact(entry: Entry) -> bool:
        if entry.parent == 0:
            return len(entry.content) == 1
        above = entries.get(entry.parent)
        return above is not None and above.content == entry.content[:-1] and is_intact(above)

    return {slot for slot, entry in entries.items() if is_intact(entry)}


TestServerLife = ServerLife.TestCase
TestServerLife.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
