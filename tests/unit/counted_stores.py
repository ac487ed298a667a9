"""Shared memory whose writer is killed after so many stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Killed(Exception):
    """The writer is dead."""


class Counted:
    """A column that allows only the stores that are ``left``; columns of one table share that count."""

    def __init__(self, column: Any, left: list[int]) -> None:
        self.column, self.left = column, left

    @classmethod
    def all(cls, columns: Sequence[Any], stores: int) -> list[Counted]:
        left = [stores]
        return [cls(column, left) for column in columns]

    def __getitem__(self, where: Any) -> Any:
        return self.column[where]

    def __setitem__(self, where: Any, value: Any) -> None:
        if not self.left[0]:
            raise Killed
        self.left[0] -= 1
        self.column[where] = value
