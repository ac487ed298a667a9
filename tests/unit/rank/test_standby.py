"""A rank that stands by: its sockets reach nobody until they are connected, and its low priority is taken back."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from anchortp_sglang.rank import standby


@dataclass
class Ports:
    scheduler_input_ipc_name: str
    detokenizer_ipc_name: str
    rpc_ipc_name: str
    instance_id: str = "some-server"
    metrics_ipc_name: str = ""


@dataclass(frozen=True)
class Channels:
    """As SGLang's SchedulerIpcChannels: sockets, or senders with one."""

    recv_from_tokenizer: Any
    send_to_detokenizer: Any
    recv_from_rpc: Any
    send_metrics_from_scheduler: Any = None


@pytest.fixture
def context():
    with zmq.Context() as made:
        yield made


@pytest.fixture
def ports(tmp_path):
    return Ports(*(f"ipc://{tmp_path}/{name}" for name in ("input", "detokenizer", "rpc")))


def connected(context, kind, endpoint):
    socket = context.socket(kind)
    socket.connect(endpoint)
    socket.linger = 0
    return socket


def listening(context, kind, endpoint):
    socket = context.socket(kind)
    socket.linger = 0
    socket.rcvtimeo = 5000
    socket.bind(endpoint)
    return socket


def scheduler(context, ports):
    channels = Channels(
        connected(context, zmq.PULL, ports.scheduler_input_ipc_name),
        SimpleNamespace(socket=connected(context, zmq.PUSH, ports.detokenizer_ipc_name)),
        connected(context, zmq.DEALER, ports.rpc_ipc_name),
    )
    return SimpleNamespace(ipc_channels=channels, load_snapshot_writer=None)


def test_its_sockets_reach_nobody_until_they_are_connected(context, ports):
    requests = listening(context, zmq.PUSH, ports.scheduler_input_ipc_name)
    outputs = listening(context, zmq.PULL, ports.detokenizer_ipc_name)
    calls = listening(context, zmq.DEALER, ports.rpc_ipc_name)
    serving = connected(context, zmq.PULL, ports.scheduler_input_ipc_name)
    serving.rcvtimeo = 5000
    made = scheduler(context, standby.apart(ports))
    for number in range(20):  # a PUSH socket deals its messages to all that are connected
        requests.send(b"%d" % number)
        assert serving.recv() == b"%d" % number
    serving.close()

    standby.connect(made, ports)
    channels = made.ipc_channels
    channels.recv_from_tokenizer.rcvtimeo = channels.recv_from_rpc.rcvtimeo = 5000
    requests.send(b"request")
    assert channels.recv_from_tokenizer.recv() == b"request"
    channels.send_to_detokenizer.socket.send(b"output")
    assert outputs.recv() == b"output"
    calls.send(b"call")
    assert channels.recv_from_rpc.recv() == b"call"
    for socket in (requests, outputs, calls, *(getattr(each, "socket", each) for each in vars(channels).values())):
        if socket is not None:
            socket.close()


def test_its_arguments_are_a_copy(ports):
    apart = standby.apart(ports)
    assert apart.instance_id != ports.instance_id == "some-server"
    assert not apart.metrics_ipc_name, "it is not used"
    assert ports.rpc_ipc_name.startswith("ipc://") and apart.rpc_ipc_name.startswith("inproc://")


def scheduling_of(thread: threading.Thread | None = None) -> tuple[int, int]:
    number = thread.native_id if thread else 0
    assert number is not None
    return os.sched_getscheduler(number), os.getpriority(os.PRIO_PROCESS, number)


@pytest.fixture
def thread() -> Iterator[Callable[[], threading.Thread]]:
    """A function that starts a thread, which lives as long as the test."""
    ended, threads = threading.Event(), []

    def start() -> threading.Thread:
        threads.append(threading.Thread(target=ended.wait))
        threads[-1].start()
        return threads[-1]

    yield start
    ended.set()
    for each in threads:
        each.join()


needs_way_back = pytest.mark.skipif(not standby._can_go_back(0, 19), reason="takes CAP_SYS_NICE")


@needs_way_back
def test_it_is_built_in_what_is_left_idle_and_then_all_threads_are_as_before(thread):
    usual = scheduling_of()
    with standby.low_priority():
        meanwhile = thread()
        assert scheduling_of() == scheduling_of(meanwhile) == (os.SCHED_IDLE, 19)
    assert scheduling_of() == scheduling_of(meanwhile) == usual


@needs_way_back
def test_it_is_built_on_a_machine_that_is_never_idle_too(thread, monkeypatch):
    monkeypatch.setattr(standby, "_IDLE_S", 0.01)
    usual = scheduling_of()
    with standby.low_priority():
        meanwhile = thread()
        deadline = time.monotonic() + 5
        while not scheduling_of() == scheduling_of(meanwhile) == (os.SCHED_OTHER, 19):
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert scheduling_of() == scheduling_of(meanwhile) == usual


def test_priority_stays_where_it_could_not_be_taken_back(monkeypatch):
    usual, setpriority = os.getpriority(os.PRIO_PROCESS, 0), os.setpriority

    def lower_only(which, who, priority):
        if priority < os.getpriority(which, who):
            raise PermissionError("as for a user without CAP_SYS_NICE")
        setpriority(which, who, priority)

    monkeypatch.setattr(os, "setpriority", lower_only)
    with standby.low_priority():
        assert os.getpriority(os.PRIO_PROCESS, 0) == usual
