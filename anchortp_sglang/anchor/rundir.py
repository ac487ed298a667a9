"""The run directory with the sockets of one server's anchors; private to its user and to one running server.

It outlives the server, so that a restarted one finds lingering anchors. File locks show which processes run in it:
containers may share a file system, and a pid of one means nothing in another.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from anchortp_sglang.anchor.files import AnchorFiles, AnchorRecord, ServerRecord
from anchortp_sglang.anchor.outside import remove_outside
from anchortp_sglang.anchor.pids import start_ticks
from anchortp_sglang.anchor.run_base import RunDirError, check_private, default_base, make_private

__all__ = ["RunDir", "RunDirError", "RunDirInUse", "live_anchors", "make_again", "prepare_run_dir", "remove_run_dir"]

_KEY = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
_SERVER_RECORD = "server.json"
_SERVER_LOCK = "server.lock"
_LOCK = "lock"
_LONGEST_NAMED_DEVICE = 9999
_ENDING_S = 1.0  # an anchor that is just ending may still hold its log

_held: dict[Path, tuple[int, int]] = {}
"""The locked files, kept open, of run directories that this process owns."""


class RunDirInUse(RunDirError):
    """Another server runs in the directory."""


@dataclass(frozen=True)
class RunDir:
    """A run directory that this process owns. ``stale_anchors``: devices with anchors that linger from a dead server.

    They belong to ``run_id`` too: attach to them, or shut them down.
    """

    path: Path
    run_id: str
    stale_anchors: tuple[int, ...] = ()


def prepare_run_dir(base: Path | None, key: str) -> RunDir:
    """Create ``base/key``, or take it over from a dead server, and record this process as its owner.

    ``base`` None: ``run_base.default_base()``. ``key`` names the server, for example by its port. Files that dead
    servers of ``base`` have left elsewhere are removed. Raises ``RunDirInUse`` if a server runs there, ``RunDirError``
    if the directory is not private to this user or its path is too long for sockets.
    """
    if not _KEY.fullmatch(key):
        raise RunDirError(f"run key {key!r} must be letters, digits, '_', '.', '-', at most 64 of them")
    path = Path(os.path.abspath(default_base() if base is None else base)) / key
    try:
        AnchorFiles(str(path), _LONGEST_NAMED_DEVICE)
    except ValueError as error:
        raise RunDirError(str(error)) from error
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_private(path)
        with _locked(path):
            run_dir = _claim(path)
        _sweep(path)
        return run_dir
    except OSError as error:
        raise RunDirError(f"{path} cannot be used ({error.strerror}): choose another directory") from error


def make_again(run_dir: RunDir) -> bool:
    """Make our directory again if it was removed; return whether it was.

    Live anchors then bind their sockets in it again. Raises RunDirError if it cannot be made, or is another server's.
    """
    path = run_dir.path
    record = ServerRecord.read(str(path / _SERVER_RECORD))
    if record is not None and record.run_id == run_dir.run_id:
        return False
    if record is None and (path / _SERVER_RECORD).exists():
        return False  # it cannot be read for now: no descriptors are left
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_private(path)
        with _locked(path):
            _refuse_live_server(path)
            _own(path, run_dir.run_id)
    except OSError as error:
        raise RunDirError(f"{path} has vanished and cannot be made again ({error.strerror})") from error
    return True


def remove_run_dir(run_dir: RunDir) -> None:
    """Remove the directory. Raises ``RunDirInUse`` while another server or an anchor runs there."""
    path = run_dir.path
    if not path.exists():  # it has been removed already
        return _let_go(path)
    check_private(path)
    with _locked(path):
        _refuse_live_server(path, but_pid=os.getpid())
        if anchors := live_anchors(path):
            pids = ", ".join(str(anchor.pid) for anchor in anchors)
            raise RunDirInUse(f"anchors still run in {path} (pids {pids}): shut them down first")
        shutil.rmtree(path)
        _let_go(path)


def live_anchors(path: Path) -> list[AnchorRecord]:
    """Return the running anchors of a directory, sorted by device."""
    records = (AnchorRecord.read(str(file)) for file in path.glob("anchor-*.json"))
    return sorted((r for r in records if r is not None and r.alive()), key=lambda record: record.device)


def _claim(path: Path) -> RunDir:
    _refuse_live_server(path)
    anchors = live_anchors(path)
    _refuse_foreign_anchors(path, {AnchorFiles(str(path), anchor.device).log for anchor in anchors})
    run_ids = {anchor.run_id for anchor in anchors}
    if len(run_ids) > 1:
        pids = ", ".join(str(anchor.pid) for anchor in anchors)
        raise RunDirError(f"anchors of several runs linger in {path}: end the processes {pids} first")
    run_id = run_ids.pop() if run_ids else secrets.token_hex(8)
    remove_outside(path)
    _own(path, run_id)
    return RunDir(path, run_id, tuple(anchor.device for anchor in anchors))


def _own(path: Path, run_id: str) -> None:
    """Take the locks of the directory's owner, and write the record."""
    _let_go(path)
    server = os.open(path / _SERVER_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    # Forked children would hold a flock() too, and might outlive this process.
    fcntl.lockf(server, fcntl.LOCK_EX | fcntl.LOCK_NB)
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):
        fcntl.flock(directory, fcntl.LOCK_SH | fcntl.LOCK_NB)  # systemd-tmpfiles spares locked directories
    _held[path] = (server, directory)
    pid = os.getpid()
    ServerRecord(pid=pid, start_ticks=start_ticks(pid) or 0, run_id=run_id).write(str(path / _SERVER_RECORD))


def _let_go(path: Path) -> None:
    for fd in _held.pop(path, ()):
        os.close(fd)


def _refuse_live_server(path: Path, but_pid: int | None = None) -> None:
    server = ServerRecord.read(str(path / _SERVER_RECORD))
    if server is not None and server.alive():
        if server.pid != but_pid:
            raise RunDirInUse(
                f"a server, process {server.pid}, runs in {path}: stop it, or use another port or run directory"
            )
        return  # opening and closing the lock's file would release our own lock
    if _is_locked(path / _SERVER_LOCK, fcntl.lockf):
        raise RunDirInUse(f"a server of another container runs in {path}: stop it, or choose another directory")


def _refuse_foreign_anchors(path: Path, ours: set[str]) -> None:
    """Refuse a directory with live anchors of another pid namespace, to which this server cannot attach."""
    deadline = time.monotonic() + _ENDING_S
    logs = [log for log in path.glob("anchor-*.log") if str(log) not in ours]
    while held := [log for log in logs if _is_locked(log, fcntl.flock)]:
        if time.monotonic() > deadline:
            raise RunDirInUse(
                f"anchors of another container linger in {path} ({', '.join(log.stem for log in held)}): wait until "
                "they have ended, or choose another directory"
            )
        time.sleep(0.05)


def _is_locked(path: Path, lock: Callable[[int, int], None]) -> bool:
    """Return whether another process holds a lock of this kind on the file."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except (BlockingIOError, PermissionError):
        return True
    finally:
        os.close(fd)


def _sweep(mine: Path) -> None:
    """Clean up after dead servers beside this one, whose directories may never be claimed again.

    Directories of servers with a port stay, as their logs may be needed.
    """
    for path in mine.parent.glob("*-*"):
        with contextlib.suppress(OSError, RunDirError):
            if path == mine or not (path / _SERVER_RECORD).exists():
                continue
            check_private(path)
            with _locked(path):
                _refuse_live_server(path)
                remove_outside(path)
                if path.name.startswith("engine-") and not live_anchors(path):
                    shutil.rmtree(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path / _LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # close() would not do: a child forked meanwhile has it open too
