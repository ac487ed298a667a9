"""A inflight that has given up: what awaits the ranks ends with the reason, with SGLang's own communicators."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import fastapi
import pytest
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import AbortReq, FlushCacheReqInput, ShutdownReq

from anchortp_sglang.recovery.requests.adapter_copies import AdapterCopies
from anchortp_sglang.recovery.requests.down import ServerDown
from anchortp_sglang.recovery.requests.inflight import InflightRequests

REASON = "The server cannot recover: 1 of 2 devices are left"
FLUSH = FlushCacheReqInput()


def ledger_and_calls(mode):
    manager = SimpleNamespace(rid_to_state={}, is_pause=False)
    inflight = InflightRequests(manager, lambda message: None, AdapterCopies(Path("unused")))
    inflight.outage = False
    communicator = FanOutCommunicator(inflight.dispatch, 1, mode)
    return inflight, lambda: inflight.control_calls.run(FanOutCommunicator.__call__, communicator, FLUSH), communicator


@pytest.mark.parametrize("mode", ["queueing", "watching"])
def test_calls_that_wait_end_with_the_reason_and_so_do_later_ones(mode):
    async def scenario():
        inflight, call, _ = ledger_and_calls(mode)
        waiting = [asyncio.create_task(call()) for _ in range(3)]
        await asyncio.sleep(0.01)
        inflight.outage = True
        inflight.give_up(REASON)
        later = [await asyncio.gather(call(), return_exceptions=True) for _ in range(2)]
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        return ended + [error for errors in later for error in errors]

    ended = asyncio.run(asyncio.wait_for(scenario(), 5))
    assert [(type(error), str(error), error.status_code) for error in ended] == [(ServerDown, REASON, 503)] * 5


@pytest.mark.parametrize("mode", ["queueing", "watching"])
def test_answers_come_through_while_the_server_is_up(mode):
    async def scenario():
        _, call, communicator = ledger_and_calls(mode)
        waiting = asyncio.create_task(call())
        await asyncio.sleep(0.01)
        communicator.handle_recv("flushed")
        return await waiting

    assert asyncio.run(scenario()) == ["flushed"]


@pytest.mark.parametrize("mode", ["queueing", "watching"])
def test_calls_are_answered_again_when_another_try_brings_the_server_back(mode):
    async def scenario():
        inflight, call, communicator = ledger_and_calls(mode)
        before = asyncio.create_task(call())
        await asyncio.sleep(0.01)
        inflight.outage = True
        inflight.give_up(REASON)
        await asyncio.gather(before, return_exceptions=True)
        sent = []
        inflight.control._send = sent.append
        inflight.outage, inflight.refusal = False, None  # as InflightRequests.replay does
        after = asyncio.create_task(call())
        await asyncio.sleep(0.01)
        communicator.handle_recv("flushed")
        return len(sent), await after

    assert asyncio.run(asyncio.wait_for(scenario(), 5)) == (1, ["flushed"])


def test_a_caller_that_gives_up_is_cancelled_and_hears_nothing_of_the_server():
    async def scenario():
        _, call, _ = ledger_and_calls("queueing")
        waiting = asyncio.create_task(call())
        await asyncio.sleep(0.01)
        waiting.cancel()
        await waiting

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(scenario())


def test_what_is_sent_to_dead_ranks_raises_but_aborts_and_the_order_to_end_do_not():
    inflight, _, _ = ledger_and_calls("queueing")
    inflight.outage = True
    inflight.dispatch(FLUSH)  # held back: a recovery is under way
    inflight.give_up(REASON)
    with pytest.raises(ServerDown, match="1 of 2 devices"):
        inflight.dispatch(FLUSH)
    inflight.dispatch(AbortReq(rid="gone"))
    inflight.dispatch(ShutdownReq())


def test_the_error_is_what_each_of_sglangs_ways_out_looks_for():
    error = ServerDown(REASON)
    assert isinstance(error, ValueError) and isinstance(error, fastapi.HTTPException)
    assert (error.status_code, error.detail, str(error)) == (503, REASON, REASON)
