"""Long texts are tokenized in a thread, and the event loop goes on meanwhile."""

import asyncio
import threading
import time

import pytest

from anchortp_sglang.admission.long_texts import LONG_CHARS, is_long, run_in_thread

LONG = "x" * (LONG_CHARS + 1)


@pytest.mark.parametrize("texts", [LONG, [LONG], ["a", LONG], [LONG[: LONG_CHARS // 2]] * 3, [["query", LONG]]])
def test_texts_are_long_together(texts):
    assert is_long(texts)


@pytest.mark.parametrize("texts", [None, "", "hello", LONG[:-1], [], ["hello"] * 100, [["query", "text"]], 7])
def test_the_usual_prompts_and_nonsense_are_not_long(texts):
    assert not is_long(texts)


def test_the_loop_goes_on_meanwhile():
    async def scenario():
        working = asyncio.create_task(run_in_thread(tokenize, LONG))
        await asyncio.sleep(0.05)
        turned_at = time.monotonic()
        (ended_at, thread), turns = await working, turned_at
        return ended_at - turns, thread

    after_s, thread = asyncio.run(scenario())
    assert after_s > 0.1, "the loop did not turn before the text was tokenized"
    assert thread != threading.main_thread().name


async def tokenize(text):
    time.sleep(0.3)  # as the tokenizer does: it awaits nothing
    return time.monotonic(), threading.current_thread().name


def test_an_error_is_the_callers():
    async def fail(text):
        raise ValueError("texts cannot be empty")

    with pytest.raises(ValueError, match="cannot be empty"):
        asyncio.run(run_in_thread(fail, LONG))
