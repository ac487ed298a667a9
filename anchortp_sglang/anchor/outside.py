"""Files that a server has outside of its run directory, noted in it: the next server removes those of a killed one."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

__all__ = ["note_outside", "remove_files", "remove_outside"]

_LIST = "outside.txt"


def note_outside(run_dir: Path, paths: Iterable[str | Path]) -> None:
    """Add files or folders to those that go when the server is dead."""
    with open(run_dir / _LIST, "ab") as notes:
        for path in paths:
            notes.write(os.fsencode(os.path.abspath(path)) + b"\n")


def remove_outside(run_dir: Path) -> None:
    """Remove what is noted and belongs to this user. The server of the directory must be dead."""
    with contextlib.suppress(FileNotFoundError):
        remove_files(map(os.fsdecode, (run_dir / _LIST).read_bytes().splitlines()))
        (run_dir / _LIST).unlink()


def remove_files(paths: Iterable[str]) -> None:
    """Remove files and folders that belong to this user; what is not there is no error."""
    for path in paths:
        with contextlib.suppress(OSError):
            if os.lstat(path).st_uid != os.geteuid():
                continue
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)
