"""Main waits for its ranks: what they say decides whether a generation is ready."""

import os
from multiprocessing import Pipe

import pytest

from anchortp_sglang.recovery.processes.generation import Generation, KVUnusable, StartFailed, wait_ready
from anchortp_sglang.recovery.processes.zygote import Child


@pytest.fixture
def answered():
    """wait_ready of ranks that have sent these messages."""
    children = []

    def answered(*messages):
        for message in messages:
            ours, theirs = Pipe()
            theirs.send(message)
            children.append(Child(os.getpid(), os.pidfd_open(os.getpid()), ours))
        generation = Generation(1, None, children)
        wait_ready(generation, 5.0)
        return generation.infos

    yield answered
    for child in children:
        child.close()


def ready(**rebuilt):
    return "ready", {"rebuilt": rebuilt}


def test_ranks_that_kept_the_same_slots_are_ready(answered):
    assert answered(ready(digest="a"), ready(digest="a")) == [{"rebuilt": {"digest": "a"}}] * 2


def test_ranks_without_kv_are_ready(answered):
    assert len(answered(ready(), ready(), ready())) == 3


def test_ranks_that_retained_different_slots_are_not(answered):
    with pytest.raises(KVUnusable, match="different KV slots"):
        answered(ready(digest="a"), ready(digest="b"))


def test_a_rank_that_cannot_use_the_kv_says_so(answered):
    with pytest.raises(KVUnusable, match="rank 1: torn"):
        answered(ready(digest="a"), ("unrestored", "torn"))


def test_a_rank_that_fails_otherwise_says_nothing_about_the_kv(answered):
    with pytest.raises(StartFailed, match="rank 0: no memory") as error:
        answered(("failed", "no memory"), ready())
    assert not isinstance(error.value, KVUnusable)
