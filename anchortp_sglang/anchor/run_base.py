"""The default folder of run directories: one of this user that stays as long as the server does."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["RunDirError", "check_private", "default_base", "make_private"]

_OF_A_LOGIN = re.compile(r"/run/user/\d+/*")
_SHARED = ("/run", "/tmp", "/var/tmp", "/dev/shm")


class RunDirError(ValueError):
    """The run directory cannot be used."""


def default_base() -> Path:
    """Return the first writable candidate, made if it is missing. Raises RunDirError if there is none.

    Candidates: ``$RUNTIME_DIRECTORY/anchortp`` of a systemd service; ``$XDG_RUNTIME_DIR/anchortp``, unless it ends with
    a login; then ``anchortp-<uid>`` in ``/run`` (writable for root only), ``$TMPDIR``, ``/tmp`` and others.
    """
    tried = []
    for base in _candidates(os.environ):
        if _writable(base.parent, own=base.name == "anchortp"):
            make_private(base)
            return base
        tried.append(str(base.parent))
    raise RunDirError(
        f"no folder for sockets can be made, as none of {', '.join(tried)} can be written; choose one with "
        "--anchor-run-dir"
    )


def make_private(path: Path) -> None:
    """Make the directory, unless it exists. Raises RunDirError if it is not private to this user."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    check_private(path)


def check_private(path: Path) -> None:
    facts = os.lstat(path)
    if not stat.S_ISDIR(facts.st_mode):
        raise RunDirError(f"{path} is not a directory (symbolic links are refused): remove it, or choose another")
    if facts.st_uid != os.geteuid():
        raise RunDirError(f"{path} belongs to user {facts.st_uid}, not {os.geteuid()}: choose another directory")
    if stat.S_IMODE(facts.st_mode) & 0o077:
        raise RunDirError(f"others may enter {path}: run chmod 700 on it, if all files in it are yours")


def _candidates(environ: Mapping[str, str]) -> Iterator[Path]:
    for folder in environ.get("RUNTIME_DIRECTORY", "").split(":"):
        if os.path.isabs(folder):
            yield Path(folder, "anchortp")
    login = environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(login) and not _OF_A_LOGIN.fullmatch(login):
        yield Path(login, "anchortp")
    shared = (_SHARED[0], environ.get("TMPDIR", ""), *_SHARED[1:])
    for folder in dict.fromkeys(folder for folder in shared if os.path.isabs(folder)):
        yield Path(folder, f"anchortp-{os.geteuid()}")


def _writable(folder: Path, own: bool) -> bool:
    try:
        return (not own or os.stat(folder).st_uid == os.geteuid()) and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False
