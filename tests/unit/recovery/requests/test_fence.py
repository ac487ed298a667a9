"""The watch over the detokenizer, with a real socket in its place that answers or does not."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq
from sglang.srt.managers.io_struct import sock_recv
from sglang.utils import TypeBasedDispatcher

from anchortp_sglang.rank import messages
from anchortp_sglang.recovery.requests import fence as module
from anchortp_sglang.recovery.requests.fence import FenceLine

messages.register()


class Rig:
    """A line whose other end hands pings back while ``answers``. ``events``: what was done to the detokenizer."""

    def __init__(self, endpoint: str) -> None:
        self.tm = SimpleNamespace(_result_dispatcher=TypeBasedDispatcher([]), rid_to_state={"a": 1})
        self.pull = zmq.Context.instance().socket(zmq.PULL)
        self.pull.bind(endpoint)
        self.line = FenceLine(self.tm, endpoint)
        self.answers, self.serving, self.pings = True, True, 0
        self.events: list[str] = []
        self.processes = SimpleNamespace(
            resume_stopped=lambda: self.events.append("resumed"), end_detokenizer=lambda: self.events.append("killed")
        )

    async def run(self, enough: Callable[[], bool]) -> None:
        watch = asyncio.create_task(self.line.watch(self.processes, lambda: self.serving))
        async with asyncio.timeout(20):
            while not enough():
                await asyncio.sleep(0.002)
                if self.answers and self.pull.poll(0):
                    self.pings += 1
                    message = sock_recv(self.pull)
                    if not isinstance(message, messages.Reseed):
                        self.tm._result_dispatcher(message)
        watch.cancel()


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_PING_EVERY_S", 0.1)
    made = Rig(f"ipc://{tmp_path}/detokenizer")
    yield made
    made.pull.close(0)
    made.line._push.close(0)


def test_a_detokenizer_that_answers_is_left_alone(rig: Rig) -> None:
    asyncio.run(rig.run(lambda: rig.pings == 12))
    assert "killed" not in rig.events


def test_one_that_answers_nothing_is_let_go_on_and_then_killed(rig: Rig) -> None:
    rig.answers = False
    asyncio.run(rig.run(lambda: "killed" in rig.events))
    assert rig.events == ["resumed"] * 4 + ["killed"]


def test_nothing_is_asked_while_nobody_waits_for_tokens_or_nobody_serves(rig: Rig) -> None:
    for state in ({"rid_to_state": {}}, {"rid_to_state": {"a": 1}}):
        rig.tm.__dict__.update(state)
        rig.serving = not state["rid_to_state"]
        ticks = iter(range(200))
        asyncio.run(rig.run(lambda ticks=ticks: next(ticks) == 199))
    assert rig.pings == 0 and rig.events == []


def test_a_detokenizer_that_is_told_of_many_requests_at_once_is_left_alone(rig: Rig) -> None:
    nothing = messages.Reseed(
        rids=[], decode_ids=[], context_tokens=[], sent_chars=[], skip_special=[], space_special=[]
    )
    told: list[None] = []

    async def tell() -> None:
        rig.answers = False
        telling = asyncio.gather(*(rig.line.reseed(nothing) for _ in range(20)))
        await asyncio.sleep(0.25)  # it takes its time, but not that of many pings
        assert not told
        rig.answers = True
        told.extend(await telling)

    async def both() -> None:
        telling = asyncio.create_task(tell())
        await rig.run(lambda: len(told) == 20)
        await telling

    asyncio.run(both())
    assert "killed" not in rig.events
