"""Files that a server has outside of its run directory, noted in it: the next server removes those of a killed one."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

__all__ = ["note_outside", "remove_outside"]

_LIST = "outside.txt"


def note_outside(run_dir: Path, paths: Iterable[str | Path]) -> None:
    """Add files or folders to those that go when the server is dead."""
    with open(run_dir / _LIST, "ab") as notes:
        for path in paths:
            notes.write(os.fsencode(os.path.abspath(path)) + b"\n")


def remove_outside(run_dir: Path) -> None:
    """Remove what is noted and belongs to this user. The server of the directory must be dead."""
    with contextlib.suppress(FileNotFoundError):
        for line in (run_dir / _LIST).read_bytes().splitlines():
            _remove(os.fsdecode(line))
        (run_dir / _LIST).unlink()


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        if os.lstat(path).st_uid != os.geteuid():
            return
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)
