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
    """Run a block at the lowest priority that is not starved, if the kernel allows to take that back."""
    usual, lower = os.getpriority(os.PRIO_PROCESS, 0), 19
    if not _can_go_back(usual, lower):
        log.info("anchortp: a standby is built at the usual priority: lowering it for a while takes CAP_SYS_NICE")
        yield
        return
    os.setpriority(os.PRIO_PROCESS, 0, lower)
    try:
        yield
    finally:
        for thread in Path("/proc/self/task").iterdir():  # those that were started meanwhile have it, too
            with suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, int(thread.name), usual)


def _can_go_back(usual: int, lower: int) -> bool:
    """Try it in a thread, whose priority is its own."""
    allowed = []

    def attempt() -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, lower)
            os.setpriority(os.PRIO_PROCESS, 0, usual)
        except OSError:
            return
        allowed.append(True)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return bool(allowed)
