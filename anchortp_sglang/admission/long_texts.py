"""Long texts are tokenized beside the event loop of main.

SGLang tokenizes the text of /generate and /v1/completions on the loop (TokenizerManager._tokenize_texts): 20 MB take
about 20 s, in which no probe is answered, no token is delivered and no recovery begins. Chats it tokenizes in a thread
already (serving_base.handle_request), as the tokenizer leaves Python's lock alone. /tokenize and /detokenize take texts
of any length, and work on the loop as well.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

LONG_CHARS = 1 << 16
"""Takes about 50 ms."""

_threads = ThreadPoolExecutor(2, thread_name_prefix="anchortp-tokenize")
"""Not the loop's own, in which the steps of recoveries run. Threads are started when they are needed."""


def is_long(texts: Any) -> bool:
    """``texts``: a string, or a list of strings or of pairs of them."""
    return _chars(texts) > LONG_CHARS


def _chars(texts: Any) -> int:
    if isinstance(texts, str):
        return len(texts)
    return sum(map(_chars, texts)) if isinstance(texts, list) else 0


async def run_in_thread(function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
    """What a coroutine function that awaits nothing returns, or raises, without keeping the event loop."""
    return await asyncio.get_running_loop().run_in_executor(_threads, _run, function, args)


async def around_tokenize_request(original: Callable[..., Any], serving: Any, *requests: Any) -> Any:
    """AROUND OpenAIServingTokenize and OpenAIServingDetokenize._handle_non_streaming_request: in a thread."""
    return await run_in_thread(original, serving, *requests)


def _run(function: Callable[..., Coroutine[Any, Any, Any]], args: tuple[Any, ...]) -> Any:
    try:
        function(*args).send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("it was to await nothing")
