"""A server's files outside of its run directory, listed in it: the next server removes those of a killed one."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

__all__ = ["note_outside", "remove_files", "remove_outside"]

_LIST = "outside.txt"


def note_outside(run_dir: Path, paths: Iterable[str | Path]) -> None:
    """Add files or folders to the list of those to remove once the server is dead."""
    with open(run_dir / _LIST, "ab") as notes:
        for path in paths:
            notes.write(os.fsencode(os.path.abspath(path)) + b"\n")


def remove_outside(run_dir: Path) -> None:
    """Remove the listed files that belong to this user. The directory's server must be dead."""
    with contextlib.suppress(FileNotFoundError):
        remove_files(map(os.fsdecode, (run_dir / _LIST).read_bytes().splitlines()))
        (run_dir / _LIST).unlink()


def remove_files(paths: Iterable[str]) -> None:
    """Remove files and folders that belong to this user and exist."""
    for path in paths:
        with contextlib.suppress(OSError):
            if os.lstat(path).st_uid != os.geteuid():
                continue
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)
