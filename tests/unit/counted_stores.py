"""Shared memory whose writer is killed after so many stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from anchortp_sglang.kv import slot_table
from anchortp_sglang.kv.slot_table import Store


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


@contextmanager
def killed_after(elements: int | None) -> Iterator[None]:
    """Stop the stores to shared memory after so many elements: within a store as well as between two."""
    carry_out, enter = slot_table._apply, slot_table._enter
    left = 1 << 60 if elements is None else elements

    def apply_some(stores: list[Store]) -> None:
        nonlocal left
        for array, where, value in stores:
            places = np.atleast_1d(np.arange(len(array))[where])
            values = np.broadcast_to(np.asarray(value), places.shape)
            carry_out([(np.asarray(array), places[:left], values[:left])])
            if left < len(places):
                raise Killed
            left -= len(places)

    def enter_some(columns: Any, step: int, found: Any) -> None:
        nonlocal left
        counted = Counted.all(columns, left)
        try:
            enter(counted, step, found)
        finally:
            left = counted[0].left[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_table, "_apply", apply_some)
        patch.setattr(slot_table, "_enter", enter_some)
        yield
