"""Starts anchors and finds running ones."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from anchortp_sglang.anchor.files import AnchorFiles, AnchorRecord, device_name
from anchortp_sglang.anchor.pids import wait_readable
from anchortp_sglang.anchor.run_base import make_private
from anchortp_sglang.anchor.rundir import (
    RunDir,
    RunDirError,
    RunDirInUse,
    live_anchors,
    prepare_run_dir,
    remove_run_dir,
)
from anchortp_sglang.memory.arena_kinds import HOST_MEMORY, ArenaSpec

__all__ = [
    "AnchorProcess",
    "AnchorStartError",
    "RunDir",
    "RunDirError",
    "RunDirInUse",
    "find_anchor",
    "live_anchors",
    "prepare_run_dir",
    "remove_run_dir",
    "start_anchor",
]

_LOG_TAIL_BYTES = 2000
_DROPPED_VARIABLES = ("LD_PRELOAD",)  # torch_memory_saver's, say, brings CUDA into every process


class AnchorStartError(Exception):
    """An anchor did not start."""


@dataclass(frozen=True)
class AnchorProcess:
    """A running anchor. ``pidfd`` becomes readable when it ends; the receiver closes it."""

    device: int
    pid: int
    pidfd: int


def start_anchor(
    run_dir: Path,
    run_id: str,
    device: int,
    identity: str,
    controller_pid: int,
    linger_s: float,
    timeout_s: float = 10.0,
    generation: int = 0,
    arena: ArenaSpec = HOST_MEMORY,
) -> AnchorProcess:
    """Start the anchor of ``device`` (-1: the host) outside our process tree, and wait until it answers.

    It keeps its memory for ``linger_s`` seconds after the process ``controller_pid`` has died. ``identity`` names the
    model and ownership that its memory is for. ``generation``: the one at which it is fenced from the start, if it
    replaces a dead anchor. ``arena``: kind of memory of its segments. Raises ``AnchorStartError`` if it is not ready
    within ``timeout_s``, or if the device already has an anchor here.
    """
    files = AnchorFiles(str(run_dir), device)
    options = {
        "run-dir": run_dir,
        "run-id": run_id,
        "device": device,
        "identity": identity,
        "controller-pid": controller_pid,
        "linger-s": linger_s,
        "generation": generation,
    }
    options |= {"arena": arena.kind, "arena-uuid": arena.uuid, "arena-bytes": arena.budget_bytes}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    name = f"anchor of device {device_name(device)}"
    if rival := find_anchor(run_dir, device):
        os.close(rival.pidfd)
        raise AnchorStartError(f"the {name} runs in {run_dir} already: process {rival.pid}")
    make_private(run_dir)  # it may have been removed
    failure = _spawn(arguments, files, arena.packages, time.monotonic() + timeout_s)
    anchor = find_anchor(run_dir, device)
    if failure or anchor is None:
        if anchor:
            _end(anchor)  # it became ready while we gave up; one that does later finds our pipe closed
        raise AnchorStartError(f"the {name} {failure or 'ended at once'}; {_tail(files.log)}")
    return anchor


def find_anchor(run_dir: Path, device: int) -> AnchorProcess | None:
    """Return the running anchor of ``device`` in ``run_dir``, or None."""
    record = AnchorRecord.read(AnchorFiles(str(run_dir), device).record)
    if record is None:
        return None
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return None
    if not record.alive():  # asked again, now that the pidfd pins the process
        os.close(pidfd)
        return None
    return AnchorProcess(device, record.pid, pidfd)


def _spawn(arguments: list[str], files: AnchorFiles, packages: Sequence[str], deadline: float) -> str | None:
    """Spawn an anchor; return why it failed, or None."""
    ready, signal_ready = os.pipe()
    try:
        try:
            starter = _popen([*arguments, f"--ready-fd={signal_ready}"], files.log, packages, signal_ready)
        finally:
            os.close(signal_ready)
        return _wait(starter, ready, deadline)
    finally:
        os.close(ready)


def _popen(arguments: list[str], log_path: str, packages: Sequence[str], signal_ready: int) -> subprocess.Popen[bytes]:
    # -S -s -P: no .pth file or sitecustomize may pull something heavy into an anchor.
    command = [sys.executable, "-S", "-s", "-P", "-m", "anchortp_sglang.anchor.server", *arguments]
    with open(log_path, "ab", opener=_private) as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=_environment(packages),
            pass_fds=(signal_ready,),
        )


def _wait(starter: subprocess.Popen[bytes], ready: int, deadline: float) -> str | None:
    try:
        if not wait_readable(ready, deadline - time.monotonic()):
            return "is not ready in time"
        return None if os.read(ready, 1) else "failed to start"
    finally:
        try:
            starter.wait(max(0.1, deadline - time.monotonic()))  # it only forks: the anchor is no child
        except subprocess.TimeoutExpired:
            starter.kill()
            starter.wait()


def _end(anchor: AnchorProcess) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(anchor.pidfd, signal.SIGTERM)
    os.close(anchor.pidfd)


def _environment(packages: Sequence[str]) -> dict[str, str]:
    files = (os.path.dirname(__file__), zmq.__file__, msgspec.__file__)
    origins = [os.path.dirname(os.path.dirname(os.path.abspath(file))) for file in files]
    for name in packages:  # a namespace package has folders, but no file
        if spec := importlib.util.find_spec(name):
            origins += [os.path.dirname(where) for where in spec.submodule_search_locations or (spec.origin or "",)]
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _DROPPED_VARIABLES and not name.startswith("PYTHON")
    }
    return {**inherited, "PYTHONPATH": os.pathsep.join(dict.fromkeys(origins))}


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _tail(path: str) -> str:
    try:
        with open(path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _LOG_TAIL_BYTES))
            return f"end of {path}:\n{log.read().decode(errors='replace')}"
    except OSError:
        return f"no log at {path}"
