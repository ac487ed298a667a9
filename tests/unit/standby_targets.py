"""Roles of the forked children in test_standby."""

from anchortp_sglang.rank.spare import await_order

RUN = b"hashes of the open requests' tokens"


def stand_by(rank, pipe):
    assert await_order(pipe) == RUN
    pipe.send(("ready", rank))
    pipe.recv()


def fail(rank, pipe):
    pipe.send(("failed", "no room"))


def hang(rank, pipe):
    """Report rank 0 alone: rank 1 is built for ever."""
    if rank == 0:
        stand_by(rank, pipe)
    pipe.recv()
