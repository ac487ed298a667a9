"""Threads for what blocks. The event loop's own are SGLang's too, which tokenizes in them: they may all be busy."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="anchortp")


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Run a function that blocks; call on an event loop."""
    return await asyncio.get_running_loop().run_in_executor(_threads, function, *args)
