"""What the anchor tests share: a run directory, anchors that end with the test, controllers that can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from anchortp_sglang.anchor.client import AnchorClient
from anchortp_sglang.anchor.files import AnchorFiles
from anchortp_sglang.anchor.launch import AnchorProcess, prepare_run_dir, start_anchor
from anchortp_sglang.anchor.pids import wait_readable
from anchortp_sglang.memory.arena_kinds import HOST_MEMORY, ArenaSpec
from anchortp_sglang.memory.gpu import GpuShare

IDENTITY = "model:tp2"
TIMEOUT_S = 5.0


class AnchorRig:
    """Starts anchors in a run directory of its own; leaving the context kills what it started."""

    def __init__(self, base: Path, gpu: GpuShare | None = None) -> None:
        self.run = prepare_run_dir(base, "run")
        self.gpu = gpu
        self._arena = HOST_MEMORY if gpu is None else ArenaSpec(gpu.sharing, gpu.uuid, gpu.budget_bytes)
        self._anchors: list[AnchorProcess] = []
        self._controllers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> AnchorRig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for anchor in self._anchors:
            if not ended(anchor, 0):
                kill(anchor)
            os.close(anchor.pidfd)
        for controller in self._controllers:
            controller.kill()
            controller.wait()

    def start(
        self, device: int = 0, linger_s: float = 0.0, controller_pid: int | None = None, generation: int = 0
    ) -> AnchorProcess:
        pid = os.getpid() if controller_pid is None else controller_pid
        identity = (self.run.path, self.run.run_id, device, IDENTITY)
        anchor = start_anchor(*identity, pid, linger_s, TIMEOUT_S, generation, self._arena)
        self._anchors.append(anchor)
        return anchor

    def client(self, device: int = 0, timeout_s: float = TIMEOUT_S) -> AnchorClient:
        return AnchorClient(self.run.path, self.run.run_id, device, timeout_s)

    def files(self, device: int = 0) -> AnchorFiles:
        return AnchorFiles(str(self.run.path), device)

    def controller(self) -> subprocess.Popen[bytes]:
        """A process that lives until it is killed."""
        controller = subprocess.Popen(["sleep", "600"])
        self._controllers.append(controller)
        return controller


def ended(anchor: AnchorProcess, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether the anchor ends in time."""
    return wait_readable(anchor.pidfd, timeout_s)


def kill(anchor: AnchorProcess) -> None:
    """SIGKILL, and wait until it is dead."""
    signal.pidfd_send_signal(anchor.pidfd, signal.SIGKILL)
    assert ended(anchor)


def eventually(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def fork(body: Callable[[], None]) -> int:
    """Run ``body`` in a forked child, which exits with 0 if it returns and 1 if it raises; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        body()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def exit_status(pid: int) -> int:
    """Reap a forked child."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def holders(segment: str) -> set[int]:
    """The processes that have the memfd of this (unique) name open or mapped."""
    mark = f"/memfd:{segment} "
    return {int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _holds(pid, mark)}


def _holds(pid: str, mark: str) -> bool:
    try:
        fds = os.listdir(f"/proc/{pid}/fd")
        return mark in Path(f"/proc/{pid}/maps").read_text() or any(_leads_to(pid, fd, mark) for fd in fds)
    except OSError:
        return False


def _leads_to(pid: str, fd: str, mark: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}").startswith(mark)
    except FileNotFoundError:
        return False  # closed meanwhile
