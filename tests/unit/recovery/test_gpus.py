"""What the coordinator does about GPUs, without any: verdicts, the health process, graphs, beats meanwhile."""

from __future__ import annotations

import asyncio
import mmap
import time
from pathlib import Path
from typing import Any, cast

import pytest
from planning_cases import model

from anchortp_sglang.memory.gpu import GpuShare
from anchortp_sglang.planning.layout.kv_layout import KVPlan
from anchortp_sglang.planning.ownership.ownership import split
from anchortp_sglang.platforms.base import Platform
from anchortp_sglang.platforms.cpu.platform import CpuPlatform
from anchortp_sglang.platforms.cuda import detection, probe
from anchortp_sglang.platforms.cuda.detection import GpuDetection
from anchortp_sglang.platforms.cuda.health import GpuLost
from anchortp_sglang.platforms.cuda.platform import CudaPlatform
from anchortp_sglang.rank import heartbeat
from anchortp_sglang.recovery import graphs
from anchortp_sglang.recovery.graphs import GraphCapture
from anchortp_sglang.recovery.next_generation import NextGeneration
from anchortp_sglang.recovery.processes.generation import Generation
from anchortp_sglang.recovery.processes.server_plan import ServerPlan
from anchortp_sglang.recovery.processes.server_processes import ServerProcesses
from anchortp_sglang.recovery.processes.zygote import Zygote
from anchortp_sglang.recovery.state_machine import DeviceEvidence, judge

SERVING = Generation(1, None, [])
SHARES = (GpuShare("GPU-a", 1), GpuShare("GPU-b", 1), GpuShare("GPU-a", 1))
CUDA = CudaPlatform(shares=SHARES)


def test_a_failed_gpu_is_lost_though_its_anchor_lives() -> None:
    evidence = [
        DeviceEvidence(0, anchor_alive=True, rank_died=True),
        DeviceEvidence(1, anchor_alive=True, rank_died=True, device_error="Xid 79: fallen off the bus"),
    ]
    verdict = judge(evidence, "the process of rank 1 died")
    assert (verdict.cause, verdict.device, verdict.lost) == ("device", 1, (1,))
    assert verdict.reason == "device 1: Xid 79: fallen off the bus"


@pytest.mark.parametrize(
    "platform, lost, kept",
    [(CpuPlatform(), (1,), True), (CUDA, (1,), False), (CUDA, (), True)],
    ids=["cpu", "gpu", "process"],
)
def test_kv_of_gpus_stays_after_the_death_of_a_process_and_goes_with_a_device(
    platform: Platform, lost: tuple[int, ...], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = model((12, 4))
    plan = ServerPlan(
        run_dir=Path("/nowhere"), run_id="r", identity="i", checkpoint=Path("/nowhere"), model=axes,
        kv=KVPlan(100, 1, 4), rotate_heads=False, expert_counts=None, device_bytes=None, mirror=None, linger_s=0.0,
        server_args=lambda tp_size: None, controller_pid=0, platform=platform,
    )  # fmt: skip
    processes = ServerProcesses(plan, cast(Zygote, None))
    monkeypatch.setattr(processes.anchors, "alive", lambda device: True)
    next_generation = NextGeneration(processes, split(axes, (0, 1, 2)), min_devices=1)
    next_generation.held, next_generation.kv_valid = plan.hold(split(axes, (0, 1, 2)), None), True
    planned = next_generation.plan(lost)
    assert planned.devices == tuple(device for device in (0, 1, 2) if device not in lost)
    assert next_generation.kv_valid is kept


class TestDetection:
    def test_all_devices_on_a_lost_gpu_are_lost_and_reported_once(self) -> None:
        faults: list[str] = []
        detection = GpuDetection(SHARES, faults.append)
        detection.lost(GpuLost("GPU-a", "Xid 79"))
        detection.lost(GpuLost("GPU-a", "NVML: lost"))
        assert detection.errors == {0: "Xid 79", 2: "Xid 79"}
        assert faults == ["device 0: Xid 79"]

    def test_a_probe_asks_only_those_not_known_to_be_lost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[set[str]] = []

        def touch_all(uuids: set[str], timeout_s: float) -> dict[str, str]:
            asked.append(uuids)
            return {"GPU-b": "does not answer within 10 s"}

        monkeypatch.setattr(probe, "touch_all", touch_all)
        faults: list[str] = []
        detection = GpuDetection(SHARES, faults.append)
        detection.lost(GpuLost("GPU-a", "Xid 79"))
        asyncio.run(detection.probe())
        assert asked == [{"GPU-b"}] and detection.errors[1] == "does not answer within 10 s"
        assert len(faults) == 1  # the probe is part of answering a fault, and makes none

    @pytest.mark.parametrize("answers", [[{}, {}, {}], [{}, {"GPU-a": "out of memory"}]])
    def test_a_gpu_that_was_lost_must_answer_several_times(
        self, answers: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(detection, "_RECHECK_AFTER_S", 0.01)
        left = list(answers)
        monkeypatch.setattr(probe, "touch_all", lambda uuids, timeout_s: left.pop(0))
        faults: list[str] = []
        watch = GpuDetection(SHARES, faults.append)
        watch.lost(GpuLost("GPU-a", "Xid 79"))
        reason = asyncio.run(watch.recheck(0))
        assert left == []
        assert reason == answers[-1].get("GPU-a", "")
        assert watch.errors == ({0: "Xid 79", 2: "Xid 79"} if reason else {2: "Xid 79"})
        watch.lost(GpuLost("GPU-a", "Xid 79 again"))
        assert len(faults) == (1 if reason else 2), "a device that is well can be lost anew"


class TestGraphCapture:
    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(graphs, "_POLL_S", 0.01)
        monkeypatch.setattr(graphs, "_PATIENCE_S", 0.1)

    def made(self, *sizes: int, idle: bool = True) -> GraphCapture:
        self.sent: list[list[int]] = []
        return GraphCapture(sizes, lambda: SERVING, lambda: idle, lambda message: self.sent.append(message.batch_sizes))

    def capture(self, capture: GraphCapture, generation: Any = None) -> list[list[int]]:
        self.sent.clear()
        asyncio.run(capture.capture(SERVING if generation is None else generation))
        return list(self.sent)

    def test_ranks_are_asked_when_nobody_waits(self) -> None:
        assert self.capture(self.made(1, 2)) == [[1, 2]]

    def test_under_constant_load_they_are_asked_in_the_end(self) -> None:
        started = time.monotonic()
        assert len(self.capture(self.made(1, idle=False))) == 1
        assert time.monotonic() - started > 0.1

    def test_a_superseded_generation_is_not_asked_and_none_where_ranks_stay_eager(self) -> None:
        assert self.capture(self.made(1), generation=Generation(0, None, [])) == []
        assert self.capture(self.made()) == []

    @pytest.mark.parametrize("captured", [True, False])
    def test_ranks_that_die_while_they_capture_are_not_asked_again(self, captured: bool) -> None:
        capture = self.made(1)
        assert len(self.capture(capture)) == 1
        memory = mmap.mmap(-1, heartbeat.BYTES)
        if captured:
            heartbeat.Counters(memory, 0).note_graphs()
        capture.on_fault(Generation(1, None, [], control=memory))
        assert len(self.capture(capture)) == (1 if captured else 0)

    def test_a_fault_before_they_were_asked_changes_nothing(self) -> None:
        capture = self.made(1)
        capture.on_fault(SERVING)
        assert len(self.capture(capture)) == 1


def test_a_rank_beats_while_it_captures_but_not_for_ever() -> None:
    memory = mmap.mmap(-1, heartbeat.BYTES)
    first, other = heartbeat.Counters(memory, 0), heartbeat.Counters(memory, 3)
    with other.beating(limit_s=0.05, every_s=0.01):
        time.sleep(0.3)
    assert 3 <= heartbeat.read_beats(memory, 4)[3] <= 5
    other.note_graphs()
    assert not heartbeat.read_graphs(memory), "it is rank 0's to say"
    first.note_graphs()
    assert heartbeat.read_graphs(memory) and heartbeat.read_tokens(memory) == (0, 0)
