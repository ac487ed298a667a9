"""The mirror: what counts as mirrored, cut off anywhere and beside a server that writes; and what is mirrored first."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from planning_cases import model as model_axes

from anchortp_sglang.kv.chain_hash import UNKNOWN, child_hash, root_hash
from anchortp_sglang.kv.copy import KVSegment, copy_slots, runs
from anchortp_sglang.kv.mirror import KVMirror, MirrorMismatch, MirrorShape
from anchortp_sglang.kv.mirror_schedule import MirrorSchedule, TokenBucket, mirror_facts
from anchortp_sglang.kv.mirror_writer import MirrorWriter
from anchortp_sglang.kv.slot_table import SlotTable
from anchortp_sglang.planning.layout.kv_layout import KVPlan, kv_layout, mirror_moves, whole_layout
from anchortp_sglang.planning.ownership.ownership import split

MODEL = model_axes((12, 4))
NAMESPACE = b"model"
ROWS = 17
FAR = 1e9


class Rig:
    """Two ranks with two heads each, a slot table and a mirror; KV of a slot is one byte repeated."""

    def __init__(self, rows: int = ROWS, mirror_rows: int = ROWS, devices: int = 2) -> None:
        self.shape = MirrorShape(whole_layout(MODEL, KVPlan(rows - 1, 1, 4), mirror_rows), root_hash(NAMESPACE))
        self.table = SlotTable.create(bytearray(SlotTable.nbytes(rows)), rows, NAMESPACE)
        self.memory = bytearray(self.shape.nbytes)
        self.mirror = KVMirror.attach_or_create(self.memory, self.shape)
        self.begin(0, devices, rows)

    def begin(self, generation: int, devices: int, rows: int = ROWS) -> None:
        ownership, plan = split(MODEL, tuple(range(devices))), KVPlan(rows - 1, 1, 4)
        layouts = [kv_layout(MODEL, plan, ownership, rank) for rank in range(devices)]
        self.kv = [KVSegment(bytearray(layout.total_bytes), layout) for layout in layouts]
        self.moves = [mirror_moves(MODEL, ownership, rank) for rank in range(devices)]
        self.mirror.begin(generation, devices)
        self.writers = [
            MirrorWriter(rank, self.moves[rank], self.kv[rank], self.table, self.mirror) for rank in range(devices)
        ]
        self.schedule = MirrorSchedule(self.table, self.mirror, FAR)

    def write(self, slot: int, value: int) -> None:
        for segment in self.kv:
            for _, units in segment.heads(0, MODEL.num_layers, 0, 4):
                units[:, :, slot] = np.void(bytes([value]) * 8)

    def compute(self, slots: list[int], tokens: list[int], parent: int = 0) -> None:
        for slot, token in zip(slots, tokens, strict=True):
            self.write(slot, token)
        assert self.table.commit_run(slots, tokens, parent)

    def held(self, row: int) -> set[int]:
        """The bytes that a row holds, over all heads and layers."""
        [(_, units)] = self.mirror.kv.heads(0, MODEL.num_layers, 0, MODEL.num_kv_heads)
        return set(units[:, :, row].tobytes())

    def mirrored(self) -> list[int]:
        rows = np.flatnonzero(self.mirror.complete())
        return sorted(self.mirror.slots[rows].tolist())

    def mirror_all(self, now: float = 1.0) -> None:
        self.schedule.assign(now)
        for writer in self.writers:
            while writer.write_some():
                pass


def copy_all(writer: MirrorWriter, moves, batch) -> None:
    for move in moves:
        writer.copy(batch, move)


def test_a_row_counts_when_every_writer_has_signed_it():
    rig = Rig()
    rig.compute([3, 4], [30, 40])
    rig.schedule.assign(1.0)
    assert rig.mirrored() == []
    rig.writers[0].write_some()
    assert rig.mirrored() == []
    batch = rig.writers[1].take()
    copy_all(rig.writers[1], rig.moves[1], batch)
    assert rig.mirrored() == []
    rig.writers[1].sign(batch)
    assert rig.mirrored() == [3, 4]
    assert [rig.held(row) for row in rig.mirror.rows_of(rig.table.hashes[[3, 4]])] == [{30}, {40}]


def test_a_slot_that_is_reused_under_the_copy_is_not_signed():
    rig = Rig()
    rig.compute([3, 4], [30, 40])
    rig.schedule.assign(1.0)
    rig.writers[0].write_some()
    batch = rig.writers[1].take()
    rig.table.invalidate([4])
    rig.write(4, 99)
    copy_all(rig.writers[1], rig.moves[1], batch)
    rig.writers[1].sign(batch)
    assert rig.mirrored() == [3]


def test_a_slot_that_is_reused_and_computed_again_under_the_copy_is_not_signed():
    rig = Rig()
    rig.compute([3, 4], [30, 40])
    rig.schedule.assign(1.0)
    rig.writers[0].write_some()
    batch = rig.writers[1].take()
    rig.table.invalidate([4])
    rig.write(4, 99)
    copy_all(rig.writers[1], rig.moves[1], batch)  # copies the 99
    rig.compute([4], [40], parent=3)
    rig.writers[1].sign(batch)
    assert rig.mirrored() == [3]
    rig.mirror_all(2.0)
    assert rig.mirrored() == [3, 4]


def test_what_a_killed_writer_left_half_written_does_not_count_when_its_row_is_assigned_for_the_same_again():
    rig = Rig()
    rig.compute([3], [30])
    rig.mirror_all()
    [row] = rig.mirror.rows_of(rig.table.hashes[[3]])
    rig.mirror.free(np.array([row]))
    rig.compute([5], [50])
    rig.mirror.assign(np.array([row]), np.array([5]), rig.table.hashes[[5]])
    batch = rig.writers[0].take()
    rig.writers[0].copy(batch, rig.moves[0][0])  # killed here: the row holds 50 in some heads
    rig.mirror.free(np.array([row]))
    rig.mirror.assign(np.array([row]), np.array([3]), rig.table.hashes[[3]])
    assert rig.mirrored() == []


def test_a_new_generation_keeps_complete_rows_whoever_wrote_them_and_no_others():
    rig = Rig(devices=2)
    rig.compute([3], [30])
    rig.mirror_all()
    rig.compute([4], [40], parent=3)
    rig.schedule.assign(2.0)
    rig.writers[0].write_some()  # half of slot 4
    for generation, devices in ((1, 4), (2, 1), (3, 3)):
        rig.begin(generation, devices)
        assert rig.mirrored() == [3]
        assert rig.held(int(rig.mirror.rows_of(rig.table.hashes[[3]])[0])) == {30}


def test_a_writer_that_answers_for_other_heads_now_does_not_pass_with_an_old_tag():
    rig = Rig(devices=4)
    rig.compute([3], [30])
    rig.schedule.assign(1.0)
    rig.writers[0].write_some()  # one head of four, signed
    rig.begin(1, 2)  # rank 0 answers for two heads
    rig.write(3, 30)
    rig.schedule.assign(2.0)
    rig.writers[1].write_some()
    assert rig.mirrored() == []
    rig.writers[0].write_some()
    assert rig.mirrored() == [3]
    assert rig.held(3) == {30}


@pytest.mark.parametrize("stored", [0, 1, 2, 3])
def test_a_generation_that_dies_while_it_takes_over_loses_no_complete_row(stored):
    rig = Rig(devices=2)
    rig.compute([3, 4], [30, 40])
    rig.mirror_all()
    rig.mirror._header[5] = 0  # as begin(…, 4) does, one store after the other
    if stored > 0:
        rig.mirror.hashes[~rig.mirror.complete()] = UNKNOWN
    if stored > 1:
        rig.mirror._tags[:4] = rig.mirror.hashes
    if stored > 2:
        rig.mirror._header[4] = 4
    assert rig.mirrored() == [3, 4]
    rig.begin(2, 3)
    assert rig.mirrored() == [3, 4]


def test_a_buffer_that_holds_another_mirror_is_not_read():
    rig = Rig()
    with pytest.raises(MirrorMismatch):
        KVMirror.attach(rig.memory, MirrorShape(rig.shape.layout, root_hash(b"another model")))
    with pytest.raises(MirrorMismatch, match="needs"):
        KVMirror.attach(rig.memory, MirrorShape(whole_layout(MODEL, KVPlan(ROWS, 1, 4), 99), root_hash(NAMESPACE)))
    with pytest.raises(MirrorMismatch):
        KVMirror.attach(bytearray(rig.shape.nbytes), rig.shape)


def test_copies_beside_a_server_that_reuses_its_slots_never_count_if_torn():
    """A thread writes, commits and frees as fast as it can; another one mirrors meanwhile."""
    rig = Rig(rows=9, mirror_rows=9)
    values, root = {}, int(rig.table.hashes[0])
    stop = threading.Event()

    def serve() -> None:
        value = 0
        while not stop.is_set():
            slot = 1 + value % 8
            value += 1
            token = value % 250
            rig.table.invalidate([slot])
            rig.write(slot, token)
            values[child_hash(root, token)] = token  # before the mirror can see it
            rig.table.commit_tokens([(slot, token, 0)])

    server = threading.Thread(target=serve)
    server.start()
    checked = 0
    try:
        for round_ in range(2000):
            rig.mirror_all(float(round_))
            hashes = rig.mirror.hashes.copy()
            for row in np.flatnonzero(rig.mirror.complete()):
                assert rig.held(row) == {values[int(hashes[row])]}
                checked += 1
    finally:
        stop.set()
        server.join()
    assert checked > 100


# ---- what is mirrored


def test_the_newest_come_first_within_the_bandwidth():
    rig = Rig()
    rig.compute([1, 2, 3], [10, 20, 30])
    rig.compute([4, 5, 6], [40, 50, 60])
    two_rows = 2 * rig.shape.row_bytes
    rig.schedule = MirrorSchedule(rig.table, rig.mirror, 4 * two_rows)  # a quarter of a second's worth: two rows
    rig.mirror_all(1.0)
    assert rig.mirrored() == [4, 5]
    rig.mirror_all(1.1)
    assert rig.mirrored() == [4, 5]
    rig.mirror_all(1.25)
    assert rig.mirrored() == [1, 4, 5, 6]


def test_a_mirror_that_is_too_small_holds_what_was_used_last_with_all_that_is_above_it():
    rig = Rig(mirror_rows=4)
    rig.compute([1, 2, 3], [10, 20, 30])
    rig.mirror_all(1.0)
    rig.compute([4, 5], [40, 50])
    rig.compute([6], [60], parent=2)
    rig.mirror_all(10.0)
    assert rig.mirrored() == [1, 2, 4, 6]
    facts = mirror_facts(rig.table, rig.mirror)
    assert (facts.used, facts.mirrored, facts.lag_slots) == (6, 4, 0)
    assert facts.coverage == pytest.approx(4 / 6)


def test_rows_of_slots_that_were_freed_are_given_to_others():
    rig = Rig(mirror_rows=4)
    rig.compute([1, 2, 3, 4], [10, 20, 30, 40])
    rig.mirror_all(1.0)
    rig.table.invalidate([3, 4])
    rig.compute([7, 8], [70, 80])
    rig.mirror_all(2.0)
    assert rig.mirrored() == [1, 2, 7, 8]


def test_lag_is_what_has_not_been_copied_yet():
    rig = Rig()
    rig.compute([1, 2, 3], [10, 20, 30])
    assert mirror_facts(rig.table, rig.mirror).lag_slots == 3
    rig.mirror_all()
    rig.compute([4], [40], parent=3)
    facts = mirror_facts(rig.table, rig.mirror)
    assert (facts.used, facts.mirrored, facts.lag_slots, facts.coverage) == (4, 3, 1, 0.75)


def test_slots_that_were_renumbered_keep_their_rows():
    rig = Rig()
    rig.compute([5, 9], [50, 90])
    rig.mirror_all()
    renumbered = SlotTable.create(bytearray(SlotTable.nbytes(ROWS)), ROWS, NAMESPACE)
    renumbered.commit_run([1, 2], [50, 90], 0)
    rig.table = renumbered
    rig.begin(1, 2)
    assert rig.schedule.assign(5.0) == 0, "they are mirrored already"
    assert rig.mirrored() == [1, 2]


def test_a_token_bucket_lets_through_its_rate_and_no_burst_beyond_a_quarter_second():
    bucket = TokenBucket(bytes_per_s=1000, piece_bytes=10)
    assert bucket.allowance(100.0) == 25
    bucket.spend(25)
    assert bucket.allowance(100.125) == 12
    bucket.spend(12)
    assert bucket.allowance(200.0) == 25


# ---- copies


def test_runs_are_consecutive_on_both_sides_and_bridge_only_what_they_may():
    into, source = np.array([1, 2, 3, 7, 8, 12]), np.array([11, 12, 13, 17, 18, 19])
    assert list(runs(into, source)) == [(1, 11, 3), (7, 17, 2), (12, 19, 1)]
    assert list(runs(into, source, bridged=8)) == [(1, 11, 8), (12, 19, 1)]
    assert list(runs(into[::-1], source[::-1])) == [(r, s, 1) for r, s in zip(into[::-1], source[::-1], strict=True)]


def test_copied_slots_are_those_asked_for_and_no_others():
    rng = np.random.default_rng(1)
    source = np.frombuffer(rng.bytes(3 * 2 * 20 * 4 * 16), "V16").reshape(3, 2, 20, 4)
    into = np.zeros((3, 2, 30, 2), "V16")
    rows, source_rows = np.array([2, 3, 4, 29, 9]), np.array([0, 1, 2, 19, 7])
    assert copy_slots(into, rows, source[:, :, :, 1:3], source_rows) == 5 * 3 * 2 * 2 * 16
    for row, source_row in zip(rows, source_rows, strict=True):
        assert into[:, :, row].tobytes() == source[:, :, source_row, 1:3].tobytes()
    rest = np.setdiff1d(np.arange(30), rows)
    assert not any(into[:, :, rest].tobytes())
