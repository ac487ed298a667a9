"""Memory in a real anchor: shared, protected, and alive as long as the anchor or anybody else holds it."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from anchor_rig import AnchorRig, ended, eventually, exit_status, fork, holders, kill

from anchortp_sglang.anchor.client import AnchorGone, AnchorRefused, HandleGrant, open_handle
from anchortp_sglang.memory.arena import available_bytes, create_memfd, map_fd

NBYTES = 256 * 1024


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[AnchorRig]:
    with AnchorRig(tmp_path) as rig:
        yield rig


@pytest.fixture
def name() -> str:
    """A segment's name that no other process on this machine uses."""
    return f"segment-{secrets.token_hex(8)}"


def read(grant: HandleGrant, start: int, stop: int) -> bytes:
    with map_fd(grant.fd, grant.nbytes, writable=False) as memory:
        return memory[start:stop]


def write(grant: HandleGrant, start: int, data: bytes) -> None:
    with map_fd(grant.fd, grant.nbytes, writable=True) as memory:
        memory[start : start + len(data)] = data


def refusal(error: pytest.ExceptionInfo[AnchorRefused]) -> str:
    return error.value.code


def test_two_processes_share_a_segment(rig: AnchorRig, name: str) -> None:
    rig.start()
    client = rig.client()
    assert client.allocate(0, name, NBYTES).created
    mine = client.open_handle(0, name)
    write(mine, 0, b"from the parent")

    def child() -> None:
        assert client.status().segments[0].nbytes == NBYTES  # a client goes along through a fork
        theirs = open_handle(rig.run.path, rig.run.run_id, 0, 0, name)
        assert read(theirs, 0, 15) == b"from the parent"
        write(theirs, 1000, b"from the child")

    assert exit_status(fork(child)) == 0
    assert read(mine, 1000, 1014) == b"from the child"
    assert client.status().segments[0].resident_bytes >= 4096
    os.close(mine.fd)


def test_memory_survives_a_killed_client(rig: AnchorRig, name: str) -> None:
    rig.start()
    rig.client().allocate(0, name, NBYTES)
    ready, tell = os.pipe()

    def child() -> None:
        grant = rig.client().open_handle(0, name)
        with map_fd(grant.fd, grant.nbytes, writable=True) as memory:
            memory[-4:] = b"last"
            os.write(tell, b"1")
            time.sleep(600)

    pid = fork(child)
    os.close(tell)
    assert os.read(ready, 1) == b"1"
    os.close(ready)
    os.kill(pid, signal.SIGKILL)
    assert exit_status(pid) == -signal.SIGKILL
    grant = rig.client().open_handle(0, name)
    assert read(grant, NBYTES - 4, NBYTES) == b"last"
    os.close(grant.fd)


def test_memory_is_gone_with_a_killed_anchor_if_nobody_holds_it(rig: AnchorRig, name: str) -> None:
    first = rig.start()
    rig.client().allocate(0, name, NBYTES)
    grant = rig.client().open_handle(0, name)
    write(grant, 0, b"lost")
    os.close(grant.fd)
    assert holders(name) == {first.pid}
    kill(first)
    assert holders(name) == set()
    with pytest.raises(AnchorGone):
        rig.client().status()
    rig.start()
    with pytest.raises(AnchorRefused) as error:
        rig.client().open_handle(0, name)
    assert refusal(error) == "unknown_segment"


@pytest.mark.parametrize("sealed, opened_since", [(False, False), (True, True), (True, False)])
def test_a_restarted_anchor_takes_its_memory_back(rig: AnchorRig, name: str, sealed: bool, opened_since: bool) -> None:
    first = rig.start()
    rig.client().allocate(0, name, NBYTES)
    grant = rig.client().open_handle(0, name)
    write(grant, 0, b"kept")
    if sealed:
        rig.client().seal(0, name)
    if opened_since:
        os.close(grant.fd)
        grant = rig.client().open_handle(0, name)
    kill(first)
    assert holders(name) == {os.getpid()}

    second = rig.start(generation=3)
    client = rig.client()
    client.adopt_handle(3, name, *grant)
    client.adopt_handle(3, name, *grant)  # two ranks may have it
    os.close(grant.fd)
    assert holders(name) == {second.pid}
    again = client.open_handle(3, name)
    assert read(again, 0, 4) == b"kept"
    assert again.sealed == sealed
    os.close(again.fd)


def test_what_is_given_back_must_be_what_it_is_said_to_be(rig: AnchorRig) -> None:
    rig.start()
    segment, other = create_memfd("one", NBYTES), create_memfd("other", NBYTES)
    reader, writer = os.pipe()
    client = rig.client()
    for fd, nbytes, sealed in [(segment, NBYTES - 1, False), (segment, NBYTES, True), (reader, NBYTES, False)]:
        with pytest.raises(AnchorRefused) as error:
            client.adopt_handle(0, "kv", fd, nbytes, sealed)
        assert refusal(error) == "bad_handle"
    client.adopt_handle(0, "kv", segment, NBYTES, False)
    with pytest.raises(AnchorRefused, match="another segment"):
        client.adopt_handle(0, "kv", other, NBYTES, False)
    assert [info.name for info in client.status().segments] == ["kv"]
    for fd in (segment, other, reader, writer):
        os.close(fd)


def test_a_sealed_segment_cannot_be_spoiled(rig: AnchorRig, name: str) -> None:
    rig.start()
    client = rig.client()
    client.allocate(0, name, NBYTES)
    filling = client.open_handle(0, name)
    write(filling, 0, b"weights")
    client.seal(0, name)
    client.seal(0, name)
    serving = client.open_handle(0, name)
    assert serving.sealed and client.allocate(0, name, NBYTES).sealed
    for grant in (filling, serving):
        with pytest.raises(PermissionError):
            map_fd(grant.fd, grant.nbytes, writable=True)
        with pytest.raises(OSError):
            os.pwrite(grant.fd, b"x", 0)
        assert read(grant, 0, 7) == b"weights"
        os.close(grant.fd)


def test_released_memory_is_freed_and_its_name_is_free(rig: AnchorRig, name: str) -> None:
    rig.start()
    client = rig.client()
    client.allocate(0, name, NBYTES)
    client.release(0, name)
    assert holders(name) == set()
    assert client.allocate(0, name, 2 * NBYTES).created


def test_more_memory_than_there_is_is_refused_and_the_anchor_goes_on(rig: AnchorRig) -> None:
    rig.start()
    client = rig.client()
    with pytest.raises(AnchorRefused, match="free memory") as error:
        client.allocate(0, "huge", available_bytes() + 2**40)
    assert refusal(error) == "no_memory"
    assert client.status().segments == []
    assert client.allocate(0, "huge", available_bytes() + 2**40, lazy=True).created


def test_a_superseded_generation_gets_no_memory_and_changes_nothing(rig: AnchorRig) -> None:
    rig.start()
    client = rig.client()
    client.allocate(1, "kv", NBYTES)
    grant = client.open_handle(1, "kv")
    client.fence(2)
    stale = [
        lambda: client.fence(1),
        lambda: client.allocate(1, "more", NBYTES),
        lambda: client.seal(1, "kv"),
        lambda: client.release(1, "kv"),
        lambda: client.open_handle(1, "kv"),
        lambda: client.adopt_handle(1, "again", *grant),
        lambda: client.shutdown(1),
    ]
    for call in stale:
        with pytest.raises(AnchorRefused) as error:
            call()
        assert refusal(error) == "stale_generation"
    status = client.status()
    assert (status.generation, status.dropped["stale_generation"]) == (2, len(stale))
    assert [(info.name, info.sealed, info.generation) for info in status.segments] == [("kv", False, 1)]
    os.close(grant.fd)


def test_shutdown_frees_the_memory_before_it_returns(rig: AnchorRig, name: str) -> None:
    anchor = rig.start(generation=7)
    rig.client().allocate(7, name, NBYTES)
    rig.client().shutdown()
    assert ended(anchor, 0)
    assert eventually(lambda: holders(name) == set(), 0.1)
