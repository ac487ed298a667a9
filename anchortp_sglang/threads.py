"""Threads for blocking functions. The event loop's default pool may be busy, as SGLang tokenizes in it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="anchortp")


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Run a blocking function in a thread and return its result. Call it on an event loop."""
    return await asyncio.get_running_loop().run_in_executor(_threads, function, *args)
