"""Threads for long texts, which would block main's event loop while they are tokenized.

SGLang tokenizes the text of /generate, /v1/completions, /tokenize and /detokenize on the loop (for the first two in
TokenizerManager._tokenize_texts). 20 MB take about 20 s, in which no probe is answered, no token delivered and no
recovery begun. A thread does not block the loop, as the tokenizer releases Python's lock; SGLang itself tokenizes chats
in one (serving_base.handle_request).
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

LONG_CHARS = 1 << 16
"""Characters that take about 50 ms."""

_threads = ThreadPoolExecutor(2, thread_name_prefix="anchortp-tokenize")
"""Apart from the loop's default pool, in which recovery steps run. Threads are started when first used."""


def is_long(texts: Any) -> bool:
    """Return whether ``texts`` (a string, or a list of strings or pairs) has more than LONG_CHARS characters."""
    return _chars(texts) > LONG_CHARS


def _chars(texts: Any) -> int:
    if isinstance(texts, str):
        return len(texts)
    return sum(map(_chars, texts)) if isinstance(texts, list) else 0


async def run_in_thread(function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
    """Run a coroutine function that awaits nothing in a thread; return its result, or raise its error."""
    return await asyncio.get_running_loop().run_in_executor(_threads, _run, function, args)


async def around_tokenize_request(original: Callable[..., Any], serving: Any, *requests: Any) -> Any:
    """AROUND OpenAIServingTokenize and OpenAIServingDetokenize._handle_non_streaming_request: in a thread.

    The answer is written there, too: FastAPI would write a list of all tokens on the loop.
    """
    return await asyncio.get_running_loop().run_in_executor(_threads, _answer, original, (serving, *requests))


def _answer(function: Callable[..., Coroutine[Any, Any, Any]], args: tuple[Any, ...]) -> Any:
    from fastapi import Response
    from pydantic import BaseModel

    result = _run(function, args)
    if isinstance(result, BaseModel):
        return Response(result.model_dump_json(by_alias=True), media_type="application/json")
    return result


def _run(function: Callable[..., Coroutine[Any, Any, Any]], args: tuple[Any, ...]) -> Any:
    try:
        function(*args).send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError(f"{function!r} awaits something: it cannot run in a thread")
