"""Keeps a rank that stands by away from the generation that still serves, until it takes its place.

It reaches nobody, by three means:

- its KV is mapped read-only (``Attachment.kv_tensor``), and so are weights, as in any rank: a write would be a crash of
  its own. Only what a planned change newly gives its device is filled, through a mapping of its own, before anybody
  else knows of it. The slot table is mapped read-only, too (``rank/kv/following.py``), and the mirror not at all;
- its sockets are connected to nothing (``apart``), and its load is published to a file of its own;
- its event loop runs only to rehearse (``rank/rehearsal.py``), so that it takes no request.
"""

import copy
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import setproctitle
import zmq

log = logging.getLogger(__name__)

_IDLE_S = 1.5
"""How long a standby is built in what processors leave idle alone: shorter than those wait whom it talks to (2 s,
anchor/handles.py). After that it has a small share of a machine that is never idle, too."""
_LOWEST = 19

_APART = "inproc://standby-"
APART_ID = "-standby"


def apart(port_args: Any) -> Any:
    """Return SGLang's PortArgs with endpoints that nobody else has, and an instance id of standbys only."""
    made = copy.copy(port_args)
    for name in ipc_names(made):
        setattr(made, name, _APART + name)
    made.instance_id += APART_ID
    return made


def ipc_names(port_args: Any) -> list[str]:
    """Return the names of the endpoints in SGLang's PortArgs."""
    return [name for name in vars(port_args) if name.endswith("_ipc_name") and getattr(port_args, name)]


def connect(scheduler: Any, port_args: Any) -> None:
    """Connect a scheduler made with ``apart`` arguments to the server's sockets: ``port_args``."""
    from sglang.srt.managers.load_snapshot import create_load_snapshot_writer

    channels = scheduler.ipc_channels
    for field in fields(channels):
        channel = getattr(channels, field.name)
        socket = getattr(channel, "socket", channel)
        if socket is None:
            continue
        endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        socket.disconnect(endpoint)
        socket.connect(getattr(port_args, endpoint.removeprefix(_APART)))
    writer = scheduler.load_snapshot_writer
    if writer is not None:
        writer.close()
        made = create_load_snapshot_writer(port_args, writer.dp_size, writer.dp_rank, writer.publish_interval)
        scheduler.load_snapshot_writer = made


def rename(rank: int) -> str:
    """Name this process a standby; return the name that it had."""
    before = str(setproctitle.getproctitle())
    setproctitle.setproctitle(f"anchortp::standby_TP{rank}")
    return before


@contextmanager
def low_priority() -> Iterator[None]:
    """Run a block at a lower priority than the processes that serve, if the kernel allows to take that back.

    Its threads get what others leave idle: a rank that serves and wakes up takes a processor from them at once, where
    it would wait for the end of a nice process's time slice, in each step.
    """
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    if not _can_go_back(usual, _LOWEST):
        log.info("anchortp: a standby is built at the usual priority: lowering it for a while takes CAP_SYS_NICE")
        yield
        return
    _schedule(0, os.SCHED_IDLE, _LOWEST)
    patience = threading.Timer(_IDLE_S, _schedule_all, (os.SCHED_OTHER, _LOWEST))
    patience.daemon = True
    patience.start()
    try:
        yield
    finally:
        patience.cancel()
        _schedule_all(os.SCHED_OTHER, usual)  # the timer, too, or it might be long in ending
        patience.join()
        _schedule_all(os.SCHED_OTHER, usual)  # should it have been at it


def _schedule(thread: int, policy: int, nice: int) -> None:
    """Schedule one thread. ``thread``: its number; 0 for the one that calls."""
    os.sched_setscheduler(thread, policy, os.sched_param(0))
    os.setpriority(os.PRIO_PROCESS, thread, nice)


def _schedule_all(policy: int, nice: int) -> None:
    """Schedule all threads of this process, those included that were started meanwhile."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            _schedule(int(thread.name), policy, nice)


def _can_go_back(usual: int, lower: int) -> bool:
    """Try it in a thread, whose priority is its own."""
    allowed = []

    def attempt() -> None:
        try:
            _schedule(0, os.SCHED_IDLE, lower)
            _schedule(0, os.SCHED_OTHER, usual)
        except OSError:
            return
        allowed.append(True)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return bool(allowed)
