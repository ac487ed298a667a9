"""Whatever is sent to an anchor, it lives, keeps its memory, answers others, and counts what it dropped."""

from __future__ import annotations

import os
import random
import resource
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq
from anchor_rig import AnchorRig, eventually, exit_status, fork
from hypothesis import given
from hypothesis import strategies as st

from anchortp_sglang.anchor import messages as m
from anchortp_sglang.anchor.handles import CONNECTION_TIMEOUT_S, MAX_CONNECTIONS

NBYTES = 4096


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[AnchorRig]:
    """An anchor with one segment, which must be untouched in the end."""
    with AnchorRig(tmp_path) as rig:
        anchor = rig.start()
        rig.client().allocate(0, "kv", NBYTES)
        yield rig
        status = rig.client().status()
        assert (status.pid, status.generation) == (anchor.pid, 0)
        assert [(info.name, info.nbytes, info.sealed) for info in status.segments] == [("kv", NBYTES, False)]
        assert "internal_error" not in status.dropped


def dropped(rig: AnchorRig, reason: str) -> int:
    return rig.client().status().dropped.get(reason, 0)


@contextmanager
def dealer(rig: AnchorRig) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as made:
        made.setsockopt(zmq.LINGER, 200)
        made.connect(f"ipc://{rig.files().control}")
        yield made


def connect(rig: AnchorRig) -> socket.socket:
    """A raw connection to the handles socket."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(5.0)
    made.connect(rig.files().handles)
    return made


def send_frame(rig: AnchorRig, payload: bytes) -> m.Reply | None:
    """The reply, None if the connection was closed without one."""
    with connect(rig) as sock:
        sock.sendall(struct.pack("<I", len(payload)) + payload)
        answer = sock.makefile("rb").read()
    return m.decode_reply(answer[m.FRAME_HEADER_BYTES :]) if answer else None


def mutations(message: m.Message, count: int, seed: int) -> Iterator[bytes]:
    """Encodings of ``message`` with some bytes replaced, cut, or doubled."""
    chance = random.Random(seed)
    for _ in range(count):
        payload = bytearray(m.encode(message))
        for _ in range(chance.randint(1, 4)):
            payload[chance.randrange(len(payload))] = chance.randrange(256)
        cut = chance.randrange(len(payload))
        yield bytes(chance.choice([payload, payload[:cut], payload + payload[:cut]]))


# Of another run, so that a mutation that is still a message is refused for that.
FOREIGN = {"run_id": "x" * 16, "generation": 1}


@given(st.binary(max_size=200))
def test_random_bytes_are_no_message(payload: bytes) -> None:
    for decode in (m.decode_control, m.decode_handle_request, m.decode_reply):
        with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):
            decode(payload)


@pytest.mark.parametrize(
    "fields",
    [
        {"nbytes": 0},
        {"nbytes": -1},
        {"nbytes": 2**63},
        {"nbytes": 1.5},
        {"name": ""},
        {"name": "a" * 129},
        {"name": "a b"},
        {"name": "a\0b"},
        {"generation": -1},
        {"generation": 2**63},
        {"run_id": "r" * 513},
        {"run_id": None},
        {"type": "Destroy"},
        {"lazy": 1},
    ],
)
def test_fields_out_of_bounds_are_no_message(fields: dict[str, object]) -> None:
    good = {"type": "Allocate", "run_id": "r", "generation": 0, "name": "kv", "nbytes": 8}
    m.decode_control(msgspec.msgpack.encode(good))
    with pytest.raises(msgspec.ValidationError):
        m.decode_control(msgspec.msgpack.encode(good | fields))


class TestControl:
    def test_random_and_mutated_messages(self, rig: AnchorRig) -> None:
        chance = random.Random(1)
        payloads = [chance.randbytes(chance.randrange(400)) for _ in range(150)]
        payloads += mutations(m.Allocate(**FOREIGN, name="kv", nbytes=8), 150, seed=2)
        payloads += mutations(m.Attach(**FOREIGN, controller_pid=1, identity="i", linger_s=1.0), 150, seed=3)
        with dealer(rig) as sock:
            for payload in payloads:
                sock.send(payload)
                reply = m.decode_reply(sock.recv())
                assert isinstance(reply, m.Refused), payload
        counts = rig.client().status().dropped
        assert counts["undecodable"] + counts["wrong_run"] == len(payloads)
        assert counts["undecodable"] >= 150

    def test_deeply_nested_and_huge_announced_lengths(self, rig: AnchorRig) -> None:
        nested = b"\x84\xa4type\xa6Status\xa6run_id" + b"\x91" * 20_000
        with dealer(rig) as sock:
            for payload in (nested, b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"):
                sock.send(payload)
                assert isinstance(m.decode_reply(sock.recv()), m.Refused)
        assert dropped(rig, "undecodable") == 4

    def test_oversized_messages(self, rig: AnchorRig) -> None:
        with dealer(rig) as sock:
            sock.send(bytes(m.MAX_MESSAGE_BYTES + 1))
            reply = m.decode_reply(sock.recv())
        assert isinstance(reply, m.Refused) and reply.reason_code == "bad_message"
        assert dropped(rig, "oversized") == 1
        with dealer(rig) as sock:
            sock.send(bytes(16 * 2**20))  # libzmq cuts the connection
            assert not sock.poll(200)

    def test_messages_of_several_parts(self, rig: AnchorRig) -> None:
        with dealer(rig) as sock:
            sock.send_multipart([b"", b"two"])
            sock.send_multipart([b"x"] * 50)
            assert eventually(lambda: dropped(rig, "multipart") == 2)

    def test_bytes_that_are_not_even_zmq(self, rig: AnchorRig) -> None:
        chance = random.Random(4)
        for size in (0, 1, 63, 64, 5000):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.connect(rig.files().control)
                try:
                    sock.sendall(chance.randbytes(size))
                except (BrokenPipeError, ConnectionResetError):
                    pass  # it need not listen to the end
        rig.client().status()

    def test_clients_that_never_read(self, rig: AnchorRig) -> None:
        payload = m.encode(m.Status(run_id=rig.run.run_id, generation=0))
        with dealer(rig) as sock:
            for _ in range(2000):
                sock.send(payload)
            rig.client().status()

    def test_more_connections_than_a_process_may_open_by_default(self, rig: AnchorRig) -> None:
        # libzmq would abort the anchor when accept() fails for want of descriptors.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            anchor = rig.start(device=1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        crowd = []
        for _ in range(300):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(rig.files(1).control)
            crowd.append(sock)
        assert rig.client(1).status().pid == anchor.pid
        for sock in crowd:
            sock.close()


class TestHandles:
    def test_random_and_mutated_requests(self, rig: AnchorRig) -> None:
        chance = random.Random(5)
        payloads = [chance.randbytes(chance.randrange(400)) for _ in range(100)]
        payloads += mutations(m.OpenHandle(**FOREIGN, name="kv"), 100, seed=6)
        for payload in payloads:
            assert isinstance(send_frame(rig, payload), m.Refused), payload
        counts = rig.client().status().dropped
        assert counts["undecodable"] + counts["wrong_run"] == len(payloads)

    def test_random_streams(self, rig: AnchorRig) -> None:
        chance = random.Random(7)
        for _ in range(100):
            with connect(rig) as sock:
                sock.sendall(chance.randbytes(chance.randrange(1, 64)))
        assert eventually(lambda: _handle_drops(rig) >= 100)

    def test_control_requests_are_not_taken_here(self, rig: AnchorRig) -> None:
        payload = m.encode(m.Shutdown(run_id=rig.run.run_id, generation=0))
        assert isinstance(send_frame(rig, payload), m.Refused)
        assert dropped(rig, "undecodable") == 1

    def test_huge_announced_lengths(self, rig: AnchorRig) -> None:
        for length in (m.MAX_MESSAGE_BYTES + 1, 2**31, 2**32 - 1):
            with connect(rig) as sock:
                sock.sendall(struct.pack("<I", length))
                assert sock.recv(1) == b""
        assert dropped(rig, "oversized") == 3

    def test_half_a_frame(self, rig: AnchorRig) -> None:
        for part in (b"\x10", struct.pack("<I", 100) + b"abc"):
            with connect(rig) as sock:
                sock.sendall(part)
        assert eventually(lambda: dropped(rig, "truncated") == 2)

    def test_a_crowd_that_sends_nothing_holds_nobody_up(self, rig: AnchorRig) -> None:
        silent = [connect(rig) for _ in range(MAX_CONNECTIONS + 6)]
        started = time.monotonic()
        os.close(rig.client().open_handle(0, "kv").fd)
        assert time.monotonic() - started < CONNECTION_TIMEOUT_S / 2
        assert dropped(rig, "evicted") == 7  # six of the crowd's own, one for us
        assert dropped(rig, "slow") == 0
        assert eventually(lambda: dropped(rig, "slow") == MAX_CONNECTIONS - 1, 2 * CONNECTION_TIMEOUT_S)
        for sock in silent:
            assert sock.recv(1) == b""
            sock.close()

    def test_handles_nobody_asked_for_are_not_kept(self, rig: AnchorRig) -> None:
        anchor = psutil.Process(rig.client().status().pid)
        before = anchor.num_fds()
        reader, writer = os.pipe()
        open_kv = m.frame(m.OpenHandle(run_id=rig.run.run_id, generation=0, name="kv"))
        for payload, count in ((open_kv, 1), (open_kv, 3), (b"\x01", 200), (b"\xff" * 4, 1), (b"\x01", 1)):
            with connect(rig) as sock:
                socket.send_fds(sock, [payload], [reader] * count)
                time.sleep(0.02)
        adopt = m.AdoptHandle(run_id=rig.run.run_id, generation=0, name="new", nbytes=8, sealed=False)
        assert isinstance(send_frame(rig, m.encode(adopt)), m.Refused)
        assert eventually(lambda: (dropped(rig, "bad_handle"), dropped(rig, "too_many_handles")) == (1, 2))
        assert eventually(lambda: anchor.num_fds() == before)
        os.close(reader)
        os.close(writer)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
    def test_another_user_is_refused(self, rig: AnchorRig) -> None:
        rig.run.path.chmod(0o711)
        os.chmod(rig.files().handles, 0o777)

        def child() -> None:
            os.chdir(rig.run.path)
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(5.0)
                sock.connect(os.path.basename(rig.files().handles))
                try:
                    sock.sendall(m.frame(m.OpenHandle(run_id=rig.run.run_id, generation=0, name="kv")))
                    assert sock.recv(1) == b""
                except (BrokenPipeError, ConnectionResetError):
                    pass

        assert exit_status(fork(child)) == 0
        assert dropped(rig, "other_user") == 1


def _handle_drops(rig: AnchorRig) -> int:
    counts = rig.client().status().dropped
    return sum(counts.get(reason, 0) for reason in ("oversized", "truncated", "undecodable", "unsent"))
