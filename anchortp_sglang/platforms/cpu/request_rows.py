"""Keeps the table of requests' slots in memory that is zero until it is touched.

SGLang zeroes a row of the whole context length for each request that might ever run: more than 100 MB on every rank, of
which a server touches some pages. That was a third of a recovery.
"""

import mmap
from collections.abc import Callable
from typing import Any

import torch

from anchortp_sglang.rank.attachment import current


def around_req_to_token_pool_init(
    original: Callable[..., None], pool: Any, size: int, max_context_len: int, device: str, enable_memory_saver: bool
) -> None:
    """AROUND ReqToTokenPool.__init__."""
    if current() is None or device != "cpu" or not max_context_len:
        return original(pool, size, max_context_len, device, enable_memory_saver)
    original(pool, size, 0, device, enable_memory_saver)
    pool.max_context_len = max_context_len
    pool.req_to_token = lazy_zeros(len(pool.req_to_token), max_context_len)


def lazy_zeros(rows: int, columns: int) -> torch.Tensor:
    """Make int32[rows, columns] of zeros, of which the kernel allocates a page when it is first touched."""
    memory = mmap.mmap(-1, 4 * rows * columns, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.int32).view(rows, columns)
