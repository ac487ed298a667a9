"""A pause of the operator's: what waits, what is sent to new ranks, and what ends."""

import asyncio

import pytest
from open_requests import dispatch
from sglang.srt.managers.io_struct import (
    AbortReq,
    ConfigureLoggingReq,
    ContinueGenerationReqInput,
    FreezeGCReq,
    PauseGenerationReqInput,
)

from anchortp_sglang.admission.hooks import asking
from anchortp_sglang.recovery.requests.down import ServerDown
from anchortp_sglang.recovery.requests.isolation import Evidence
from anchortp_sglang.recovery.requests.pause import pause_and_abort

PAUSE = PauseGenerationReqInput(mode="in_place")
CONTINUE = ContinueGenerationReqInput()


class Asked:
    def __init__(self, rid):
        self.rid = rid


def kinds(sent):
    return [type(message).__name__ for message in sent]


def test_new_ranks_pause_before_they_take_a_request_and_get_it_when_they_go_on(inflight, manager, sent):
    dispatch(inflight, manager, "a")
    inflight.dispatch(PAUSE)
    inflight.outage = True
    sent.clear()
    inflight.replay(1)
    assert kinds(sent) == ["GenerationStart", "PauseGenerationReqInput"]
    inflight.dispatch(CONTINUE)
    assert kinds(sent)[2:] == ["ContinueGenerationReqInput", "Resume"]


def test_new_ranks_are_told_the_last_log_level_and_of_frozen_garbage_once(inflight, sent):
    inflight.dispatch(ConfigureLoggingReq(log_level="debug"))
    inflight.outage = True
    sent.clear()
    inflight.dispatch(ConfigureLoggingReq(log_level="info"))
    inflight.dispatch(FreezeGCReq())
    assert sent == []
    for generation in (1, 2):
        inflight.replay(generation)
        assert kinds(sent) == ["GenerationStart", "ConfigureLoggingReq", "FreezeGCReq"]
        assert sent[1].log_level == "info"
        sent.clear()


def test_continued_in_the_outage_new_ranks_do_not_pause(inflight, manager, sent):
    dispatch(inflight, manager, "a")
    inflight.dispatch(PAUSE)
    inflight.outage = True
    sent.clear()
    inflight.dispatch(CONTINUE)
    assert sent == []
    inflight.replay(1)
    assert kinds(sent) == ["GenerationStart", "Resume"]


def test_a_server_that_is_down_can_be_continued(inflight, manager, sent):
    inflight.dispatch(PAUSE)
    inflight.outage = True
    inflight.give_up("all devices are lost")
    inflight.dispatch(CONTINUE)
    sent.clear()
    inflight.replay(1)
    assert kinds(sent) == ["GenerationStart"]


async def waiting(inflight, manager, rid):
    """A task that asks for a request while the server is paused, as far as the gate."""
    manager.open(rid)

    async def ask():
        asking.set(Asked(rid))
        async with inflight.gate:
            await inflight.gate.wait_for(lambda: not manager.is_pause)

    task = asyncio.create_task(ask())
    await asyncio.sleep(0.01)
    assert not task.done()
    return task


def in_loop(inflight, manager, work):
    async def run():
        manager.event_loop, manager.is_pause = asyncio.get_running_loop(), True
        await work()

    asyncio.run(asyncio.wait_for(run(), 5))


def test_what_waits_goes_on_when_the_pause_ends_and_ends_when_the_server_is_down(inflight, manager):
    async def work():
        first = await waiting(inflight, manager, "a")
        manager.is_pause = False
        await inflight.gate.look()
        await first
        manager.is_pause = True
        second = await waiting(inflight, manager, "b")
        inflight.outage = True
        inflight.give_up("all devices are lost")
        with pytest.raises(ServerDown, match="all devices are lost"):
            await second

    in_loop(inflight, manager, work)


def test_what_comes_while_the_server_is_down_does_not_wait(inflight, manager):
    """Engine has no middleware that would refuse it before."""

    async def work():
        manager.open("a")
        inflight.outage = True
        inflight.give_up("all devices are lost")
        async with inflight.gate:
            with pytest.raises(ServerDown, match="all devices are lost"):
                await inflight.gate.wait_for(lambda: not manager.is_pause)

    in_loop(inflight, manager, work)


@pytest.mark.parametrize("outage", [False, True])
def test_an_abort_ends_what_waits_and_leaves_the_others_waiting(inflight, manager, outage):
    async def work():
        tasks = [await waiting(inflight, manager, rid) for rid in ("a", "b")]
        inflight.outage = outage
        inflight.dispatch(AbortReq(rid="a", abort_all=False))
        with pytest.raises(ValueError, match="aborted while the server was paused"):
            await tasks[0]
        assert not tasks[1].done()
        tasks[1].cancel()

    in_loop(inflight, manager, work)


def test_a_pause_that_aborts_ends_what_paused_ranks_hold_and_nothing_that_waits(inflight, manager, sent):
    async def work():
        dispatch(inflight, manager, "a")
        inflight.dispatch(PAUSE)
        later = await waiting(inflight, manager, "b")
        sent.clear()
        pausing = asyncio.create_task(pause_and_abort(manager, inflight))
        await asyncio.sleep(0.05)
        assert kinds(sent) == ["ContinueGenerationReqInput", "AbortReq"] and not pausing.done()
        manager.rid_to_state.pop("a")  # the ranks have ended it
        await pausing
        assert manager.is_pause and not later.done() and not manager.rid_to_state["b"].abort_sent
        later.cancel()

    in_loop(inflight, manager, work)


def test_a_pause_that_aborts_ends_with_the_pause(inflight, manager):
    async def work():
        dispatch(inflight, manager, "a")
        pausing = asyncio.create_task(pause_and_abort(manager, inflight))
        await asyncio.sleep(0.05)
        assert not pausing.done()
        manager.is_pause = False
        await pausing

    in_loop(inflight, manager, work)


def test_in_an_outage_it_ends_them_at_once(inflight, manager, sent):
    async def work():
        dispatch(inflight, manager, "a", "b")
        inflight.struck(Evidence("signal", "a rank died"))
        await pause_and_abort(manager, inflight)
        assert sorted(manager.ended) == ["a", "b"]

    in_loop(inflight, manager, work)
