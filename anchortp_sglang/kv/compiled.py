"""Compiles loops over arrays, with numba, when the module that defines them is imported.

The compiled code is kept beside that module or in the user's cache, by numba's rules; where neither can be written, it
is compiled at each start. A loop takes the types that it was compiled for and no others, so that none is ever compiled
later, in a recovery. It does not hold the GIL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

__all__ = ["FLAGS", "HASH", "HASHES", "ID", "IDS", "NODES", "Mask", "Nodes", "compiled", "written"]

Mask = NDArray[np.bool_]
Nodes = NDArray[np.int32]
_Function = TypeVar("_Function", bound=Callable[..., Any])

ID, HASH = types.int64, types.uint64


def _array(element: Any) -> Any:
    return types.Array(element, 1, "C", readonly=True)


IDS, HASHES, NODES, FLAGS = map(_array, (types.int64, types.uint64, types.int32, types.boolean))
"""Arrays of one dimension that a loop reads."""


def written(array: Any, ndim: int = 1) -> Any:
    """Return the type of such an array, of ``ndim`` dimensions, that a loop writes to."""
    return types.Array(array.dtype, ndim, "C")


def compiled(*arguments: Any) -> Callable[[_Function], _Function]:
    """Return a decorator that compiles a function of arguments of these types."""

    def compile_now(function: _Function) -> _Function:
        found: _Function
        try:
            found = numba.njit([arguments], cache=True, nogil=True, error_model="numpy")(function)
        except (OSError, RuntimeError):  # there is nowhere to keep it
            found = numba.njit([arguments], nogil=True, error_model="numpy")(function)
        return found

    return compile_now
