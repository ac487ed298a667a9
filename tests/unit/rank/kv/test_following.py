"""A rank that stands by follows the table in a thread that takes little of a core and may fail or hang."""

import os
import threading
import time

import numpy as np
import pytest

from anchortp_sglang.kv.followed_table import FollowedTable
from anchortp_sglang.kv.slot_table import SlotTable
from anchortp_sglang.rank.kv import following as module
from anchortp_sglang.rank.kv.following import Following

SLOTS = 50


@pytest.fixture
def table():
    return SlotTable.create(bytearray(SlotTable.nbytes(SLOTS)), SLOTS, b"model")


@pytest.fixture
def started(table, monkeypatch):
    monkeypatch.setattr(module, "_LEAST_PAUSE_S", 0.001)
    made = []

    def start():
        made.append(Following(table, 1, (1, 2)))
        made[-1].start()
        return made[-1]

    yield start
    for each in made:
        each._stopped.set()
        each.join(5)


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def looked_at(following, table):
    """Wait for a look at the table as it is."""
    until(lambda: following._followed is not None)
    until(lambda: np.array_equal(following._followed._hashes[1:], table.hashes[1:]))


def test_it_hands_over_what_it_has_followed(table, started):
    following = started()
    table.commit_run([3, 1, 2], [7, 8, 9], 0)
    looked_at(following, table)
    table.commit_step([4], [5], [2])
    found = following.take().retained(table.entries())
    assert [chain.slots.tolist() for chain in found.chains()] == [[3, 1, 2, 4]]
    assert not following.is_alive() and following.take() is None, "it is handed over once"


def test_it_looks_again_only_after_a_commit(table, started, monkeypatch):
    looks = []
    compare = FollowedTable.compare
    monkeypatch.setattr(FollowedTable, "compare", lambda *args: looks.append(0) or compare(*args))
    following = started()
    table.commit_run([3], [7], 0)
    looked_at(following, table)
    before = len(looks)
    time.sleep(0.1)
    assert len(looks) <= before + 1
    table.commit_run([4], [7], 3)
    until(lambda: len(looks) > before)


def test_its_priority_is_lower_than_that_of_its_process(started):
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    following = started()
    until(lambda: os.getpriority(os.PRIO_PROCESS, following.native_id) == min(usual + 10, 19))
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == usual


def test_comparisons_take_a_two_hundredth_of_a_core(table, monkeypatch):
    monkeypatch.setattr(module, "_LEAST_PAUSE_S", 0.0)
    following = Following(table, 1, (1, 2))
    pauses = []
    table.commit_run([3], [7], 0)
    clock = iter([0.0, 0.5, 1.0, 9.0])
    monkeypatch.setattr(module.time, "thread_time", lambda: next(clock))
    following._stopped.wait = lambda pause: pauses.append(pause) or len(pauses) == 2
    following._follow(FollowedTable(table))
    assert pauses == pytest.approx([0.0, 99.5])


def test_one_that_hangs_or_fails_has_followed_nothing(started, monkeypatch, caplog):
    hang = threading.Event()
    monkeypatch.setattr(FollowedTable, "compare", lambda *args: hang.wait(10))
    following = started()
    began = time.monotonic()
    assert following.take() is None and time.monotonic() < began + 2
    hang.set()

    def fail(*args):
        raise RuntimeError("some mistake")

    monkeypatch.setattr(FollowedTable, "compare", fail)
    following = started()
    until(lambda: not following.is_alive())
    assert following.take() is None and "some mistake" in caplog.text
