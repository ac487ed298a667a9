"""Segments: their sizes are fixed, their protection holds, their bytes live as long as anybody holds them."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator

import pytest

from anchortp_sglang.memory import arena
from anchortp_sglang.memory.arena import BadHandle, MemfdArena, MemoryExhausted, Part

NBYTES = 64 * 1024


@pytest.fixture
def fd() -> Iterator[int]:
    made = arena.create_memfd("test", NBYTES)
    yield made
    os.close(made)


def test_a_new_segment_holds_zeros_and_no_memory(fd: int) -> None:
    assert arena.resident_bytes(fd) == 0
    with arena.map_fd(fd, NBYTES, writable=False) as memory:
        assert memory[:] == bytes(NBYTES)


def test_two_mappings_are_the_same_memory(fd: int) -> None:
    with arena.map_fd(fd, NBYTES, True) as first, arena.map_fd(fd, NBYTES, False) as second:
        first[10:15] = b"bytes"
        assert second[10:15] == b"bytes"
        assert arena.resident_bytes(fd) == mmap.PAGESIZE


def test_parts_of_segments_are_one_run_of_memory(fd: int) -> None:
    page = mmap.PAGESIZE
    other = arena.create_memfd("other", NBYTES)
    try:
        with arena.map_fd(fd, NBYTES, True) as first, arena.map_fd(other, NBYTES, True) as second:
            first[page] = 1
            second[3 * page] = 2
            arena.seal_read_only(fd)
            parts = [Part(other, 3 * page, page, True), Part(fd, page, 2 * page, False), Part(other, 0, page, True)]
            with arena.map_together(parts) as together:
                assert len(together) == 4 * page
                assert (together[0], together[page], together[3 * page]) == (2, 1, 0)
                together[3 * page + 5] = 7
                assert second[5] == 7
        assert arena.resident_bytes(fd) == page, "pages in between take memory"
    finally:
        os.close(other)


def test_a_sealed_segment_can_be_sealed_again_by_a_handle_that_is_open_for_reading_only(fd: int) -> None:
    """As of an anchor that was given its memory back."""
    arena.seal_read_only(fd)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        arena.seal_read_only(again)
        assert arena.inspect_handle(again).sealed
    finally:
        os.close(again)


def test_a_part_of_a_sealed_segment_cannot_be_mapped_to_be_written(fd: int) -> None:
    arena.seal_read_only(fd)
    with pytest.raises(PermissionError, match="cannot be mapped"):
        arena.map_together([Part(fd, 0, mmap.PAGESIZE, True)])


def test_a_read_only_mapping_refuses_writes(fd: int) -> None:
    with arena.map_fd(fd, NBYTES, writable=False) as memory, pytest.raises(TypeError):
        memory[0:1] = b"x"


def test_a_read_only_mapping_of_a_writable_handle_can_be_made_writable(fd: int) -> None:
    with arena.map_together([Part(fd, 0, NBYTES, writable=False)]) as memory, open("/dev/urandom", "rb") as random:
        with pytest.raises(OSError, match="Bad address"):  # the kernel finds it read-only, where a store would kill us
            os.readv(random.fileno(), [memory])
        arena.make_writable(address_of(memory), NBYTES)
        memory[NBYTES - 1] = 7
        with arena.map_fd(fd, NBYTES, writable=False) as other:
            assert other[NBYTES - 1] == 7


def test_a_mapping_of_a_sealed_segment_cannot_be_made_writable(fd: int) -> None:
    arena.seal_read_only(fd)
    memory = arena.map_together([Part(fd, 0, NBYTES, writable=False)])
    with pytest.raises(PermissionError, match="cannot be made writable"):
        arena.make_writable(address_of(memory), NBYTES)


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@pytest.mark.parametrize("size", [0, NBYTES - 1, NBYTES + 1])
def test_the_size_is_fixed(fd: int, size: int) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(fd, size)


def test_a_segment_is_not_inherited_by_executed_programs(fd: int) -> None:
    assert not os.get_inheritable(fd)


class TestSealed:
    def test_cannot_be_mapped_writable(self, fd: int) -> None:
        arena.seal_read_only(fd)
        with pytest.raises(PermissionError, match="sealed"):
            arena.map_fd(fd, NBYTES, writable=True)

    def test_cannot_be_written_to(self, fd: int) -> None:
        arena.seal_read_only(fd)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)

    def test_cannot_be_opened_anew_for_writing(self, fd: int) -> None:
        arena.seal_read_only(fd)
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        try:
            with pytest.raises(PermissionError):
                os.pwrite(again, b"x", 0)
            with pytest.raises(PermissionError):
                arena.map_fd(again, NBYTES, writable=True)
        finally:
            os.close(again)

    def test_a_read_only_mapping_cannot_be_made_writable(self, fd: int) -> None:
        arena.seal_read_only(fd)
        with arena.map_fd(fd, NBYTES, writable=False) as memory:
            assert memory[:4] == bytes(4)
            with pytest.raises(TypeError):
                memory[:4] = b"xxxx"

    def test_mappings_made_before_stay_writable(self, fd: int) -> None:
        with arena.map_fd(fd, NBYTES, writable=True) as old:
            arena.seal_read_only(fd)
            old[0:3] = b"old"
            with arena.map_fd(fd, NBYTES, writable=False) as new:
                assert new[0:3] == b"old"


class TestMemoryExhausted:
    def test_more_than_the_machine_has_is_refused(self) -> None:
        with pytest.raises(MemoryExhausted, match="free memory"):
            arena.create_memfd("huge", arena.available_bytes() + 2**40)

    def test_lazy_segments_are_not_checked(self) -> None:
        os.close(arena.create_memfd("huge", arena.available_bytes() + 2**40, lazy=True))

    def test_what_earlier_segments_will_still_touch_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(arena, "available_bytes", lambda: 3 * NBYTES)
        memory = MemfdArena()
        memory.create("lazy", 100 * NBYTES, lazy=True)
        memory.create("first", 2 * NBYTES, lazy=False)
        with pytest.raises(MemoryExhausted):
            memory.create("second", 2 * NBYTES, lazy=False)
        memory.close("first")
        memory.create("second", 2 * NBYTES, lazy=False)
        memory.close_all()

    def test_available_memory_is_no_more_than_the_container_may_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        files = {"memory.max": "1000000\n", "memory.current": "900000\n"}
        files["memory.stat"] = "anon 700000\ninactive_file 40000\nactive_file 10000\n"
        monkeypatch.setattr(arena, "_read_cgroup", files.__getitem__)
        assert arena.available_bytes() == 150_000
        files["memory.max"] = "max\n"
        assert arena.available_bytes() > 1_000_000


def _pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def _file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _growing_memfd() -> int:
    return os.memfd_create("growing", os.MFD_ALLOW_SEALING)


def _read_only_handle_of_a_writable_segment() -> int:
    fd = arena.create_memfd("writable", NBYTES)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


@pytest.mark.parametrize("make", [_pipe, _file, _growing_memfd, _read_only_handle_of_a_writable_segment])
def test_what_is_no_segment_is_not_taken_for_one(make: Callable[[], int]) -> None:
    fd = make()
    try:
        with pytest.raises(BadHandle):
            arena.inspect_handle(fd)
    finally:
        os.close(fd)


class TestMemfdArena:
    def test_handles_of_sealed_segments_are_open_for_reading_only(self) -> None:
        memory = MemfdArena()
        memory.create("weights", NBYTES, lazy=False)
        memory.seal("weights")
        fd = memory.open("weights")
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert arena.inspect_handle(fd).sealed
        os.close(fd)
        memory.close_all()

    def test_an_adopted_segment_outlives_its_giver(self, fd: int) -> None:
        os.pwrite(fd, b"kept", 0)
        giver = os.dup(fd)
        memory = MemfdArena()
        memory.adopt("kv", giver, NBYTES)
        os.close(giver)
        again = memory.open("kv")
        assert os.pread(again, 4, 0) == b"kept"
        os.close(again)
        memory.close_all()

    def test_the_same_segment_may_be_given_twice_but_not_another(self, fd: int) -> None:
        memory = MemfdArena()
        memory.adopt("kv", fd, NBYTES)
        memory.adopt("kv", fd, NBYTES)
        other = arena.create_memfd("other", NBYTES)
        with pytest.raises(BadHandle, match="another segment"):
            memory.adopt("kv", other, NBYTES)
        os.close(other)
        memory.close_all()
