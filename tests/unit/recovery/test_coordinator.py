"""What the coordinator does at the same time, and what not: with a real event loop and real processes for ranks."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from planning_cases import model

from anchortp_sglang.planning.layout.extents import WeightPlacement, hold
from anchortp_sglang.planning.ownership.ownership import split
from anchortp_sglang.platforms.cpu.platform import CpuPlatform
from anchortp_sglang.recovery import coordinator as module
from anchortp_sglang.recovery import steps
from anchortp_sglang.recovery.coordinator import Coordinator
from anchortp_sglang.recovery.policy import Policy
from anchortp_sglang.recovery.processes.generation import Generation
from anchortp_sglang.recovery.processes.pidfd import process_state
from anchortp_sglang.recovery.processes.zygote import Child
from anchortp_sglang.recovery.requests.adapter_copies import AdapterCopies
from anchortp_sglang.recovery.state_machine import Phase, Verdict

AXES = model()
OWNERSHIP = split(AXES, (0, 1))


class Pipe:
    closed = False

    def poll(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True


def sleeping_generation(number: int, weights: WeightPlacement) -> Generation:
    """Its ranks run until they are killed."""
    processes = [subprocess.Popen(["sleep", "600"]) for _ in OWNERSHIP.devices]
    return Generation(number, weights, [Child(p.pid, os.pidfd_open(p.pid), Pipe()) for p in processes])


def runs(child: Child) -> bool:
    return process_state(child.pid) not in (None, "Z")


class SlowNextGeneration:
    """Forks take until ``go``; when each began and ended is written down."""

    def __init__(self) -> None:
        self.number, self.weights = 0, hold(AXES, OWNERSHIP)
        self.begun = threading.Semaphore(0)
        self.go = threading.Event()
        self.spans: list[tuple[float, float]] = []
        self.made: list[Generation] = []

    target = None

    def judge(self, *evidence: object) -> Verdict:
        return Verdict("process", 0, (), "a test")

    def plan(self, lost: object) -> object:
        self.number += 1
        return OWNERSHIP

    def running_hashes(self, *tokens: object) -> bytes:
        return b""

    def fork(self, ownership: object, running: bytes, old: Generation) -> Generation:
        began, number = time.monotonic(), self.number
        self.begun.release()
        assert self.go.wait(10)
        self.made.append(sleeping_generation(number, self.weights))
        self.spans.append((began, time.monotonic()))
        return self.made[-1]

    def on_generation_ready(self, generation: Generation) -> None:
        pass


@pytest.fixture
def next_generation(monkeypatch: pytest.MonkeyPatch) -> SlowNextGeneration:
    slow = SlowNextGeneration()
    monkeypatch.setattr(module, "NextGeneration", lambda *about: slow)
    monkeypatch.setattr(steps, "wait_ready", report)
    return slow


def report(generation: Generation, timeout_s: float, stall: object) -> None:
    """What ranks say when they are ready."""
    nothing_yet = {"stamps": {}, "moved_bytes": {}, "rebuilt": {}, "scheduler": {"max_req_input_len": 9}}
    generation.infos = [{"rank": n, "device": n} | nothing_yet for n in range(len(generation.ranks))]


def processes() -> SimpleNamespace:
    here = os.pidfd_open(os.getpid())
    anchors = SimpleNamespace(
        seal_and_free=lambda generation: None, map_control=lambda number: None, open_kv_usage=lambda generation: None,
        processes=dict.fromkeys((-1, 0, 1), SimpleNamespace(pidfd=here)),
    )  # fmt: skip
    return SimpleNamespace(
        plan=SimpleNamespace(platform=CpuPlatform(), graph_batch_sizes=()), anchors=anchors,
        detokenizer=SimpleNamespace(pidfd=here), kv_capacity=lambda ownership: None, resume_stopped=lambda: None,
    )  # fmt: skip


async def prepared(next_generation: SlowNextGeneration) -> Coordinator:
    """A coordinator that serves."""
    made = Coordinator(processes(), OWNERSHIP, Policy(1, 30.0, 60.0, standby="off"), AdapterCopies(Path("unused")))
    made._steps.generation = sleeping_generation(0, next_generation.weights)
    made._tm = SimpleNamespace(
        rid_to_state={"a": 1}, gracefully_exit=False, is_pause=False, server_status=SimpleNamespace(value="Up")
    )
    made._loop = asyncio.get_running_loop()
    made._fence_line = SimpleNamespace(drain=nothing)
    made.inflight = SimpleNamespace(
        outage=False, open_tokens=list, replay=lambda number: 1, struck=lambda evidence: {}, end_open=lambda reason: 0
    )
    made._detection.begin(made._loop)
    return made


async def nothing(*about: object) -> None:
    pass


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_helper_that_was_stopped_goes_on_while_a_start_waits_for_it(next_generation: SlowNextGeneration) -> None:
    async def scenario() -> None:
        coordinator = await prepared(next_generation)
        coordinator.processes.resume_stopped = next_generation.go.set
        began = time.monotonic()
        coordinator._fault("the first")
        await until(lambda: coordinator.state.phase is Phase.SERVING)
        assert time.monotonic() - began < 5, "it waited for as long as an anchor may take"

    asyncio.run(scenario())


def test_a_fault_while_ranks_are_forked_waits_for_that_fork_and_ends_what_it_made(
    next_generation: SlowNextGeneration,
) -> None:
    async def scenario() -> None:
        coordinator = await prepared(next_generation)
        coordinator._fault("the first")
        await until(lambda: next_generation.begun.acquire(blocking=False))
        coordinator._fault("the second, meanwhile")
        await asyncio.sleep(0.2)
        assert coordinator.state.attempt == 2
        assert not next_generation.begun.acquire(blocking=False), "a second fork began beside the first"
        next_generation.go.set()
        await until(lambda: coordinator.state.phase is Phase.SERVING)
        (_, first_ended), (second_began, _) = next_generation.spans
        assert second_began >= first_ended
        abandoned, current = next_generation.made
        assert (abandoned.number, current.number) == (1, 2)
        assert not any(runs(child) for child in abandoned.ranks)
        assert all(child.pipe.closed for child in abandoned.ranks), "its descriptors are kept"
        assert all(runs(child) for child in current.ranks)
        assert coordinator.generation is current
        coordinator.stop()
        current.kill()

    asyncio.run(scenario())
