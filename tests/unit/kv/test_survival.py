"""A random life of a server's KV: allocation, reuse, eviction, mirroring cut off anywhere, ranks killed and devices
lost at any instant, fewer and more slots. Whatever is kept is what was written, on every rank and in every head."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from planning_cases import model as model_axes

from anchortp_sglang.kv.chain_hash import RunHasher, root_hash
from anchortp_sglang.kv.copy import KVSegment
from anchortp_sglang.kv.mirror import KVMirror, MirrorShape
from anchortp_sglang.kv.mirror_schedule import MirrorSchedule, mirror_facts
from anchortp_sglang.kv.mirror_writer import Batch, MirrorWriter
from anchortp_sglang.kv.moving import move_retained, restorable_slots
from anchortp_sglang.kv.namespaces import namespace_seed
from anchortp_sglang.kv.retained_slots import RetainedSlots, retain
from anchortp_sglang.kv.slot_table import SlotTable
from anchortp_sglang.planning.layout.kv_layout import (
    KVPlan,
    held_heads,
    kv_layout,
    kv_moves,
    lost_heads,
    mirror_moves,
    whole_layout,
)
from anchortp_sglang.planning.ownership.ownership import Ownership, split
from anchortp_sglang.planning.placement.reconfiguration import reconfigure

MODEL = model_axes((12, 4))  # 2 layers, 4 KV heads of 8 bytes
NAMESPACE = b"model"
DEVICES = (0, 1, 2, 3)
ROWS = (24, 18, 13)  # fewer when devices have gone
FAR = 1e9
GARBAGE = (-1,)

KEYS = [(None, None), ("tenant", None), ("tenant", "salt")]

Content = tuple[int, ...]
"""The number of a namespace, then tokens."""

seeds = st.integers(0, 1 << 32)


def fingerprint(content: Content, layer: int, plane: int, head: int) -> bytes:
    """What a rank computes for the last token of a sequence."""
    return np.uint64(hash((content, layer, plane, head)) & (2**64 - 1)).tobytes()


@dataclass
class Generation:
    number: int
    ownership: Ownership
    plan: KVPlan
    table: SlotTable
    kv: list[KVSegment]
    writers: list[MirrorWriter]
    schedule: MirrorSchedule
    batches: dict[int, tuple[Batch, int]]
    """By writer: what it is copying, and how many of its moves are done."""


class KVLife(RuleBasedStateMachine):
    page_size = 1
    mirror_rows = 24

    def __init__(self) -> None:
        super().__init__()
        layout = whole_layout(MODEL, self.plan(len(DEVICES)), self.mirror_rows)
        self.mirror_shape = MirrorShape(layout, root_hash(NAMESPACE))
        self.mirror_memory = bytearray(self.mirror_shape.nbytes)
        self.now = 0.0
        self.content: dict[int, Content] = {}  # slot -> what its KV was computed from
        self.sequences: list[list[int]] = []
        ownership, plan = split(MODEL, DEVICES), self.plan(len(DEVICES))
        table = SlotTable.create(bytearray(SlotTable.nbytes(plan.rows)), plan.rows, NAMESPACE)
        kv = [self.new_segment(plan, ownership, rank) for rank in range(ownership.tp_size)]
        self.begin(0, ownership, plan, table, kv)

    def plan(self, devices: int) -> KVPlan:
        rows = ROWS[max(0, len(DEVICES) - devices)] // self.page_size * self.page_size if devices > 1 else 12
        return KVPlan(rows - self.page_size, self.page_size, 4)

    def new_segment(self, plan: KVPlan, ownership: Ownership, rank: int) -> KVSegment:
        layout = kv_layout(MODEL, plan, ownership, rank)
        return KVSegment(bytearray(random.randbytes(layout.total_bytes)), layout)

    def begin(self, number: int, ownership: Ownership, plan: KVPlan, table: SlotTable, kv: list[KVSegment]) -> None:
        mirror = KVMirror.attach_or_create(self.mirror_memory, self.mirror_shape)
        mirror.begin(number, ownership.tp_size)
        writers = [
            MirrorWriter(rank, mirror_moves(MODEL, ownership, rank), kv[rank], table, mirror)
            for rank in range(ownership.tp_size)
        ]
        self.at = Generation(number, ownership, plan, table, kv, writers, MirrorSchedule(table, mirror, FAR), {})

    @property
    def mirror(self) -> KVMirror:
        return KVMirror.attach(self.mirror_memory, self.mirror_shape)

    # --- what a server does

    def used(self) -> set[int]:
        return {slot for sequence in self.sequences for slot in sequence}

    def allocate(self, rng: random.Random, pages: int) -> list[int]:
        """Slots of free pages, in order."""
        size = self.page_size
        busy = {slot // size for slot in self.used()}
        free = [page for page in range(1, self.at.plan.rows // size) if page not in busy]
        if len(free) < pages:
            return []
        return [page * size + i for page in rng.sample(free, pages) for i in range(size)]

    def write_kv(self, slot: int, content: Content) -> None:
        self.content[slot] = content
        for rank, segment in enumerate(self.at.kv):
            write(segment, self.at.ownership, rank, slot, content)

    @rule(seed=seeds, n=st.integers(1, 5), committed=st.booleans())
    def extend(self, seed: int, n: int, committed: bool) -> None:
        """A request arrives, perhaps on a cached prefix; what it computes is committed, or it is killed before."""
        rng = random.Random(seed)
        size = self.page_size
        prefix: list[int] = []
        if self.sequences and rng.random() < 0.6:
            whole = rng.choice(self.sequences)
            prefix = whole[: rng.randint(0, len(whole)) // size * size]
        slots = self.allocate(rng, -(-n // size))[:n]
        if not slots:
            return
        namespace = rng.randrange(len(KEYS))
        content = self.content[prefix[-1]] if prefix else (namespace,)
        tokens = [rng.randrange(3) for _ in slots]
        for i, slot in enumerate(slots):
            self.write_kv(slot, content + tuple(tokens[: i + 1]))
        self.sequences.append(prefix + slots)
        if committed:
            self.at.table.commit_run(slots, tokens, prefix[-1] if prefix else self.at.table.root_of(KEYS[namespace]))

    @rule(seed=seeds)
    def decode(self, seed: int) -> None:
        rng = random.Random(seed)
        for sequence in rng.sample(self.sequences, min(2, len(self.sequences))):
            shared = any(sequence is not other and sequence[-1] in other for other in self.sequences)
            last = sequence[-1]
            room = (last + 1) % self.page_size and not shared
            slot = last + 1 if room else next(iter(self.allocate(rng, 1)), None)
            if slot is None or (not room and (last + 1) % self.page_size):
                continue
            token = rng.randrange(3)
            self.write_kv(slot, (*self.content[last], token))
            self.at.table.commit_tokens([(slot, token, last)])
            sequence.append(slot)

    @rule(seed=seeds)
    def evict(self, seed: int) -> None:
        """Some slot is freed with all that hangs on it, and perhaps written anew at once, by half of the ranks."""
        rng = random.Random(seed)
        used = sorted(self.used())
        if not used:
            return
        victim = rng.choice(used) // self.page_size * self.page_size
        cut = [s[: s.index(victim)] if victim in s else s for s in self.sequences]
        self.sequences = [sequence for sequence in cut if sequence]
        freed = [slot for slot in used if slot not in self.used()]
        self.at.table.invalidate(freed)
        for slot in freed:
            if rng.random() < 0.5:
                rank = rng.randrange(len(self.at.kv))
                write(self.at.kv[rank], self.at.ownership, rank, slot, GARBAGE)

    @rule()
    def assign(self) -> None:
        self.now += 10
        self.at.schedule.assign(self.now)

    @rule(seed=seeds)
    def mirror_a_little(self, seed: int) -> None:
        """A writer begins, copies some of its heads, or signs; anything may happen before its next step."""
        rng = random.Random(seed)
        rank = rng.randrange(len(self.at.writers))
        writer, moves = self.at.writers[rank], mirror_moves(MODEL, self.at.ownership, rank)
        batch, done = self.at.batches.pop(rank, (None, 0))
        if batch is None:
            batch = writer.take()
        elif done < len(moves):
            writer.copy(batch, moves[done])
            done += 1
        else:
            return writer.sign(batch)
        if batch is not None:
            self.at.batches[rank] = batch, done

    @rule()
    def mirror_all(self) -> None:
        self.assign()
        self.at.batches.clear()  # a rank's one writer has one batch at a time
        for writer in self.at.writers:
            while writer.write_some():
                pass

    @rule(seed=seeds, again=st.booleans())
    def a_slot_changes_under_the_copy(self, seed: int, again: bool) -> None:
        """It is freed and garbage is written to it; perhaps the same tokens are computed there again before the
        writer signs."""
        rng = random.Random(seed)
        self.assign()
        rank = rng.randrange(len(self.at.writers))
        writer = self.at.writers[rank]
        self.at.batches.pop(rank, None)
        batch = writer.take()
        leaves = {s[-1]: s for s in self.sequences if sum(s[-1] in other for other in self.sequences) == 1}
        victims = [] if batch is None else [slot for slot in batch.slots.tolist() if slot in leaves]
        if not victims:
            return
        slot = rng.choice(victims)
        sequence, content = leaves[slot], self.content[slot]
        self.at.table.invalidate([slot])
        self.write_kv(slot, GARBAGE)
        for move in mirror_moves(MODEL, self.at.ownership, rank):
            writer.copy(batch, move)
        sequence.pop()
        if not sequence:
            self.sequences.remove(sequence)
        elif again:
            self.write_kv(slot, content)
            self.at.table.commit_tokens([(slot, content[-1], sequence[-1])])
            sequence.append(slot)
        writer.sign(batch)

    @rule(seed=seeds)
    def some_ranks_mirror(self, seed: int) -> None:
        rng = random.Random(seed)
        for rank in rng.sample(range(len(self.at.writers)), rng.randint(1, len(self.at.writers))):
            self.at.batches.pop(rank, None)
            self.at.writers[rank].write_some()

    # --- what happens to it

    @rule()
    def ranks_die(self) -> None:
        self.recover(self.at.ownership, self.at.plan)

    @precondition(lambda self: self.at.ownership.tp_size > 1)
    @rule(seed=seeds, abandoned=st.booleans())
    def a_device_is_lost(self, seed: int, abandoned: bool) -> None:
        """Its memory is gone; the first attempt to go on may be cut off while it writes."""
        devices = self.at.ownership.devices
        lost = random.Random(seed).choice(devices)
        self.at.kv[devices.index(lost)] = None  # type: ignore[call-overload]
        ownership = reconfigure(MODEL, self.at.ownership, [device for device in devices if device != lost])
        if abandoned:
            self.restore(ownership, self.plan(ownership.tp_size), cut_off=True)
        self.recover(ownership, self.plan(ownership.tp_size))

    @rule(seed=seeds)
    def devices_are_changed(self, seed: int) -> None:
        """Some leave, whose KV is still there; some join, with none."""
        rng = random.Random(seed)
        devices = set(rng.sample(DEVICES, rng.randint(1, len(DEVICES))))
        devices.add(rng.choice(self.at.ownership.devices))
        ownership = reconfigure(MODEL, self.at.ownership, sorted(devices))
        leaving = tuple(device for device in self.at.ownership.devices if device not in devices)
        self.recover(ownership, self.plan(ownership.tp_size), leaving)

    def restore(
        self, ownership: Ownership, plan: KVPlan, cut_off: bool = False, leaving: tuple[int, ...] = ()
    ) -> tuple[RetainedSlots, list[KVSegment]]:
        """What the new ranks do, each by itself, before any of them is ready."""
        old = self.at
        found, segments = set(), []
        for rank in range(ownership.tp_size):
            entries, mirror, usable = old.table.entries(), None, None
            if lost_heads(MODEL, ownership, old.ownership, leaving):
                mirror = self.mirror
                usable = restorable_slots(entries, mirror)
            retained = retain(entries, usable, plan.rows, plan.page_size)
            found.add(retained.digest())
            segment = self.new_segment(plan, ownership, rank)
            moves = kv_moves(MODEL, ownership, rank, old.ownership, leaving)
            moves = moves[: len(moves) // 2] if cut_off else moves
            move_retained(retained, segment, moves, lambda device: old.kv[old.ownership.devices.index(device)], mirror)
            segments.append(segment)
        assert len(found) == 1, "ranks keep different slots"
        return retained, segments

    def recover(self, ownership: Ownership, plan: KVPlan, leaving: tuple[int, ...] = ()) -> None:
        old = self.at
        lost = lost_heads(MODEL, ownership, old.ownership, leaving)
        assert not (lost and leaving), "all that a change needs is on some device"
        expected = self.expected_retained(lost)
        retained, kv = self.restore(ownership, plan, leaving=leaving)
        assert set(retained.slots.tolist()) <= expected
        wanted, found = self.chains_that_end_pages(expected), self.chains_that_end_pages(retained.slots.tolist())
        assert len(retained.slots) == len(found) * self.page_size
        if plan.rows >= old.plan.rows:
            assert sorted(found) == sorted(set(wanted)), "each chain is kept, and once"
        else:
            assert len(set(found)) == len(found) <= len(set(wanted))
            assert len(retained.slots) >= min(len(set(wanted)) * self.page_size, plan.slots) - self.page_size + 1
        table = SlotTable.create(bytearray(SlotTable.nbytes(plan.rows)), plan.rows, NAMESPACE)
        table.write_entries(retained.entries)
        numbers = dict(zip(retained.slots.tolist(), retained.numbers.tolist(), strict=True))
        self.content = {new: self.content[old] for old, new in numbers.items()}
        self.sequences = [chain.slots.tolist() for chain in retained.chains()]
        for chain in retained.chains():
            namespace, *tokens = self.content[int(chain.slots[-1])]
            assert (retained.entries.namespace(chain), chain.tokens.tolist()) == (KEYS[namespace], tokens)
        assert self.used() == set(numbers.values())
        self.begin(old.number + 1, ownership, plan, table, kv)

    def chains_that_end_pages(self, slots: Iterable[int]) -> list[Content]:
        return [self.content[slot] for slot in slots if (slot + 1) % self.page_size == 0]

    def expected_retained(self, lost: bool) -> set[int]:
        """Committed and, if heads are lost, mirrored, as are all ancestors, in whole pages: said without the code."""
        table, size = self.at.table, self.page_size
        complete = set(self.mirror.hashes[self.mirror.complete()].tolist()) if lost else None
        good: set[int] = set()
        for sequence in self.sequences:
            for i in range(0, len(sequence) - size + 1, size):
                hashes = [int(table.hashes[slot]) for slot in sequence[i : i + size]]
                if not all(hashes) or (complete is not None and not complete.issuperset(hashes)):
                    break
                good.update(sequence[i : i + size])
        return good

    # --- what is promised

    @invariant()
    def what_is_known_is_what_was_written(self) -> None:
        for slot in np.flatnonzero(self.at.table.entries().verified()).tolist():
            for rank, segment in enumerate(self.at.kv):
                check(segment, self.at.ownership, rank, slot, self.content[slot])

    @invariant()
    def complete_rows_hold_what_their_hash_says(self) -> None:
        by_hash = {chain_hash(content): content for content in self.content.values() if content != GARBAGE}
        mirror = self.mirror
        for row in np.flatnonzero(mirror.complete()).tolist():
            content = by_hash.get(int(mirror.hashes[row]))
            if content is not None:
                check_whole(mirror.kv, row, content)

    @invariant()
    def facts_are_true(self) -> None:
        facts = mirror_facts(self.at.table, self.mirror)
        assert 0 <= facts.mirrored <= facts.used == np.count_nonzero(self.at.table.hashes) - 1


def chain_hash(content: Content) -> int:
    seed = namespace_seed(root_hash(NAMESPACE), KEYS[content[0]])
    return int(RunHasher().run_hashes(seed, np.array(content[1:], np.int64))[-1])


def heads_of(ownership: Ownership, rank: int, layer: int) -> list[int]:
    return [head for a, b in held_heads(MODEL, ownership, rank, layer) for head in range(a, b)]


def write(segment: KVSegment, ownership: Ownership, rank: int, slot: int, content: Content) -> None:
    for layer in range(MODEL.num_layers):
        for at, head in enumerate(heads_of(ownership, rank, layer)):
            [(_, units)] = segment.heads(layer, 1, at, 1)
            for plane in range(2):
                units[0, plane, slot, 0] = np.void(fingerprint(content, layer, plane, head))


def check(segment: KVSegment, ownership: Ownership, rank: int, slot: int, content: Content) -> None:
    for layer in range(MODEL.num_layers):
        for at, head in enumerate(heads_of(ownership, rank, layer)):
            [(_, units)] = segment.heads(layer, 1, at, 1)
            for plane in range(2):
                assert units[0, plane, slot, 0].tobytes() == fingerprint(content, layer, plane, head)


def check_whole(kv: KVSegment, row: int, content: Content) -> None:
    for layer in range(MODEL.num_layers):
        [(_, units)] = kv.heads(layer, 1, 0, MODEL.num_kv_heads)
        for plane in range(2):
            for head in range(MODEL.num_kv_heads):
                assert units[0, plane, row, head].tobytes() == fingerprint(content, layer, plane, head)


class KVLifeWithASmallMirror(KVLife):
    mirror_rows = 7


class KVLifeInPages(KVLife):
    page_size = 4
    mirror_rows = 24


TestKVLife = KVLife.TestCase
TestKVLifeWithASmallMirror = KVLifeWithASmallMirror.TestCase
TestKVLifeInPages = KVLifeInPages.TestCase
for _case in (TestKVLife, TestKVLifeWithASmallMirror, TestKVLifeInPages):
    _case.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
del _case  # pytest would take it for another test
