"""Faults as an operator or a kernel would cause them: real signals, and proof that each took effect."""

import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from histories import until

from anchortp_sglang.recovery.processes.pidfd import died_within
from anchortp_sglang.testing.process_tree import is_gone
from anchortp_sglang.testing.server import Server

DEATH_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Fault:
    """What was done to a server of ``generation``. ``dead_at``: monotonic, when the victim was seen dead."""

    generation: int
    device: int
    pid: int
    dead_at: float


def kill_rank(server: Server, rank: int) -> Fault:
    """SIGKILL the process of ``rank``."""
    status = server.status()
    device = next(device for device in status["devices"] if device["rank"] == rank)
    kill(device["rank_pid"])
    return Fault(status["generation"], device["id"], device["rank_pid"], time.monotonic())


def lose_device(server: Server, device: int, order: tuple[str, str] = ("anchor_pid", "rank_pid")) -> Fault:
    """SIGKILL the anchor and the rank of a device."""
    status = server.status()
    victim = status["devices"][device]
    pids = [victim[name] for name in order]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        until(lambda pid=pid: is_gone(pid), f"process {pid} is not dead")
    return Fault(status["generation"], device, victim["rank_pid"], time.monotonic())


def kill(pid: int) -> None:
    """SIGKILL, and wait until the process is dead."""
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert died_within(pidfd, DEATH_TIMEOUT_S), f"process {pid} survives SIGKILL"
    finally:
        os.close(pidfd)


def standing_by(server: Server, rank: int) -> int:
    """The pid of a rank of the standby, once all of them are ready."""
    until(lambda: server.status()["standby"] == "ready", "no standby stands by", 60)
    return child_named(server, f"anchortp::standby_TP{rank}")


def kill_standby(server: Server) -> None:
    """SIGKILL the standby, if there is one now: the next recovery forks its ranks, and so takes longer."""
    for child in psutil.Process(server.pid).children(recursive=True):
        if "anchortp::standby" in _title(child):
            kill(child.pid)


def recovered(server: Server, fault: Fault, cause: str, device: int | None = None) -> dict[str, Any]:
    """Wait for the generation after ``fault``; its record. ``device``: to blame, if not the fault's own."""
    status = server.wait_serving(fault.generation + 1)
    records = [r for r in status["recoveries"] if r["generation"] > fault.generation]
    assert len(records) == 1, f"one fault, one recovery: {status['recoveries']}"
    blamed = fault.device if device is None else device
    assert (records[0]["cause"], records[0]["device"]) == (cause, blamed), records[0]
    assert is_gone(fault.pid)
    return dict(records[0])


def child_named(server: Server, title: str, grandchildren: bool = True) -> int:
    """The pid of the one descendant of ``server`` with this process title."""
    children = psutil.Process(server.pid).children(recursive=grandchildren)
    found = [child.pid for child in children if title in _title(child)]
    assert len(found) == 1, f"{len(found)} processes are called {title}"
    return found[0]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended, reaped or not
        return ""


# ---- memory

Inode = tuple[int, int]
_MAPPED = re.compile(r"^\S+ \S+ \S+ (\w+):(\w+) (\d+) +/memfd:")


def memfds_of(pid: int) -> dict[Inode, str]:
    """The memfds that a process has open: what identifies them, and their names."""
    found = {}
    for link in _links(pid):
        if (name := _target(link)).startswith("/memfd:"):
            facts = link.stat()
            found[facts.st_dev, facts.st_ino] = name
    return found


def weights_memory(anchor_pid: int) -> int:
    """Bytes of memory that an anchor's weights take."""
    links = [link for link in _links(anchor_pid) if _target(link).startswith("/memfd:weights-")]
    return sum(link.stat().st_blocks * 512 for link in links)


def holders(memory: dict[Inode, str]) -> dict[int, set[str]]:
    """Every process that has one of these memfds open or mapped, by pid, and which of them."""
    found = {}
    for pid in psutil.pids():
        held = {memory[inode] for inode in (*memfds_of(pid), *_mapped(pid)) if inode in memory}
        if held:
            found[pid] = held
    return found


def assert_memory_is_gone(memory: dict[Inode, str]) -> None:
    """No process can reach these memfds any more, so the kernel has freed their bytes."""
    assert memory, "there was no memory to lose"
    until(lambda: not holders(memory), lambda: f"the memory is still held, by {holders(memory)}", timeout_s=3)


def _links(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return []  # it has ended


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _mapped(pid: int) -> Iterator[Inode]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if match := _MAPPED.match(line):
            major, minor, inode = match.groups()
            yield os.makedev(int(major, 16), int(minor, 16)), int(inode)
