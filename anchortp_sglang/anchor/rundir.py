"""The run directory: where one server's anchors are met. Private to its user, and to one running server.

It outlives the server, so that a restarted one finds the anchors that linger.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anchortp_sglang.anchor.files import AnchorFiles, AnchorRecord, ServerRecord
from anchortp_sglang.anchor.pids import start_ticks

__all__ = ["RunDir", "RunDirError", "RunDirInUse", "live_anchors", "prepare_run_dir", "remove_run_dir"]

_KEY = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
_SERVER_RECORD = "server.json"
_LOCK = "lock"
_LONGEST_NAMED_DEVICE = 9999


class RunDirError(Exception):
    """The run directory cannot be used."""


class RunDirInUse(RunDirError):
    """Another server runs in it."""


@dataclass(frozen=True)
class RunDir:
    """A run directory that is ours. ``stale_anchors``: devices whose anchors linger from a server that died.

    They belong to ``run_id`` too: attach to them, or shut them down.
    """

    path: Path
    run_id: str
    stale_anchors: tuple[int, ...] = ()


def prepare_run_dir(base: Path | None, key: str) -> RunDir:
    """Create ``base/key``, or take it over from a dead server, and record this process as its owner.

    ``base`` None: ``$XDG_RUNTIME_DIR/anchortp`` if there is such a directory, else ``/tmp/anchortp-<uid>``.
    ``key`` names the server, e.g. by its port. ``RunDirInUse`` if a server runs there; ``RunDirError`` if the
    directory is not a private one of this user, or its path is too long for sockets.
    """
    if not _KEY.fullmatch(key):
        raise RunDirError(f"run key {key!r} must be letters, digits, '_', '.', '-', at most 64 of them")
    if base is None:
        base = _default_base()
        _make_private(base)
    path = Path(os.path.abspath(base)) / key
    try:
        AnchorFiles(str(path), _LONGEST_NAMED_DEVICE)
    except ValueError as error:
        raise RunDirError(str(error)) from error
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_private(path)
        with _locked(path):
            return _claim(path)
    except OSError as error:
        raise RunDirError(f"{path} cannot be used ({error.strerror}): choose another directory") from error


def remove_run_dir(run_dir: RunDir) -> None:
    """Remove the directory and all in it. ``RunDirInUse`` while another server or an anchor runs there."""
    path = run_dir.path
    _check_private(path)
    with _locked(path):
        _refuse_live_server(path, but_pid=os.getpid())
        if anchors := live_anchors(path):
            pids = ", ".join(str(anchor.pid) for anchor in anchors)
            raise RunDirInUse(f"anchors still run in {path} (pids {pids}): shut them down first")
        shutil.rmtree(path)


def live_anchors(path: Path) -> list[AnchorRecord]:
    """The anchors that run in a directory, by device."""
    records = (AnchorRecord.read(str(file)) for file in path.glob("anchor-*.json"))
    return sorted((r for r in records if r is not None and r.alive()), key=lambda record: record.device)


def _claim(path: Path) -> RunDir:
    _refuse_live_server(path)
    anchors = live_anchors(path)
    run_ids = {anchor.run_id for anchor in anchors}
    if len(run_ids) > 1:
        pids = ", ".join(str(anchor.pid) for anchor in anchors)
        raise RunDirError(f"anchors of several runs linger in {path}: end the processes {pids} first")
    run_id = run_ids.pop() if run_ids else secrets.token_hex(8)
    pid = os.getpid()
    ServerRecord(pid=pid, start_ticks=start_ticks(pid) or 0, run_id=run_id).write(str(path / _SERVER_RECORD))
    return RunDir(path, run_id, tuple(anchor.device for anchor in anchors))


def _refuse_live_server(path: Path, but_pid: int | None = None) -> None:
    server = ServerRecord.read(str(path / _SERVER_RECORD))
    if server is not None and server.pid != but_pid and server.alive():
        raise RunDirInUse(f"a server, process {server.pid}, runs in {path}: stop it, or choose another key")


def _default_base() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        return Path(runtime) / "anchortp"
    return Path(f"/tmp/anchortp-{os.geteuid()}")


def _make_private(path: Path) -> None:
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    _check_private(path)


def _check_private(path: Path) -> None:
    facts = os.lstat(path)
    if not stat.S_ISDIR(facts.st_mode):
        raise RunDirError(f"{path} is not a directory (a link will not do): remove it, or choose another")
    if facts.st_uid != os.geteuid():
        raise RunDirError(f"{path} belongs to user {facts.st_uid}, not {os.geteuid()}: choose another directory")
    if stat.S_IMODE(facts.st_mode) & 0o077:
        raise RunDirError(f"others may enter {path}: chmod 700 it if nothing in it is theirs")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path / _LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # not by close(): a process forked meanwhile has it open too
