"""What a server's real anchors hold from one generation to the next: what is needed, and nothing else."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from anchor_rig import TIMEOUT_S, eventually
from planning_cases import model

from anchortp_sglang.anchor.client import AnchorError
from anchortp_sglang.anchor.launch import prepare_run_dir
from anchortp_sglang.planning.layout.extents import WeightPlacement
from anchortp_sglang.planning.layout.kv_layout import KVPlan, MirrorPlan
from anchortp_sglang.planning.ownership.ownership import split
from anchortp_sglang.planning.placement.reconfiguration import reconfigure
from anchortp_sglang.platforms.cpu.platform import CpuPlatform
from anchortp_sglang.rank.attachment import HOST_DEVICE
from anchortp_sglang.recovery.processes.anchor_respawn import restore_anchor
from anchortp_sglang.recovery.processes.anchors import Anchors
from anchortp_sglang.recovery.processes.generation import Generation
from anchortp_sglang.recovery.processes.pidfd import is_dead
from anchortp_sglang.recovery.processes.server_plan import ServerPlan

# So many rows of vocabulary that what shifts of them decides which segments are worth keeping.
AXES = model((16, 8), hidden_size=1024, head_dim=64, intermediate_size=3072, num_hidden_layers=12, vocab_size=60000)
KV = KVPlan(slots=64, page_size=1, dtype_bytes=4)


@pytest.fixture
def anchors(tmp_path: Path) -> Iterator[Anchors]:
    run = prepare_run_dir(tmp_path, "run")
    plan = ServerPlan(
        Path(run.path), run.run_id, "model", tmp_path, AXES, KV, False, None, None, MirrorPlan(65, 1e9), 0.0,
        server_args=lambda tp_size: None, controller_pid=os.getpid(),
        platform=CpuPlatform(),
    )  # fmt: skip
    made = Anchors(plan)
    made.start(range(4))
    yield made
    made.shut_down(1000)
    for anchor in made.processes.values():
        assert eventually(lambda anchor=anchor: is_dead(anchor.pidfd)), "it was told to end"


def names(anchors: Anchors, device: int) -> set[str]:
    return {segment.name for segment in anchors.client(device).status().segments}


def sealed(anchors: Anchors, device: int) -> set[str]:
    return {segment.name for segment in anchors.client(device).status().segments if segment.sealed}


def begin(
    anchors: Anchors, number: int, devices: Sequence[int], held: WeightPlacement | None, kv_valid: bool = True
) -> WeightPlacement:
    """As the next_generation does it, up to the ranks."""
    plan = anchors.plan
    ownership = split(AXES, devices) if held is None else reconfigure(AXES, held.ownership, devices)
    weights = plan.hold(ownership, held)
    anchors.fence(number, devices)
    if held is not None:
        anchors.free_unneeded(number, held, weights, kv_valid)
    anchors.allocate(number, weights)
    return weights


def test_an_anchor_holds_what_its_own_device_uses_however_many_are_lost(anchors: Anchors) -> None:
    devices, held, dropped = [0, 1, 2, 3], None, 0
    for number, lost in enumerate((None, 3, 0, 2)):
        devices = [device for device in devices if device != lost]
        before, held = held, begin(anchors, number, devices, held)
        anchors.seal_and_free(Generation(number, held, []))
        for device in devices:
            weights = {name for name in names(anchors, device) if name.startswith("weights-")}
            assert weights == held.shard_of(device).sizes.keys() == sealed(anchors, device)
            assert sum(name.startswith("kv-") for name in names(anchors, device)) == 1
            if before is not None:
                others = {name for each in held.shards for name in each.sizes}
                dropped += bool((before.shard_of(device).sizes.keys() & others) - held.shard_of(device).sizes.keys())
    assert dropped, "no device gave a segment up that another one keeps: the test shows nothing"


def test_what_an_attempt_left_that_was_broken_off_makes_room_for_the_next(anchors: Anchors) -> None:
    first = begin(anchors, 0, [0, 1, 2, 3], None)
    anchors.seal_and_free(Generation(0, first, []))
    given_up = begin(anchors, 1, [0, 1, 2], first)
    last = begin(anchors, 2, [0, 1], first)
    for device in (0, 1):
        assert given_up.shard_of(device).added not in names(anchors, device)
        assert first.shard_of(device).sizes.keys() | last.shard_of(device).sizes.keys() <= names(anchors, device)


def test_kv_that_cannot_be_used_goes_with_its_slot_table_and_the_mirror_stays(anchors: Anchors) -> None:
    held = begin(anchors, 0, [0, 1, 2, 3], None)
    before = {device: names(anchors, device) for device in (HOST_DEVICE, 0)}
    anchors.fence(1, [0, 1, 2, 3])
    anchors.free_unneeded(1, held, held, kv_valid=False)
    assert before[0] - names(anchors, 0) == {name for name in before[0] if name.startswith("kv-")}
    assert {name.split("-")[0] for name in before[HOST_DEVICE] - names(anchors, HOST_DEVICE)} == {"slot", "control"}
    assert names(anchors, HOST_DEVICE) == {"kv-mirror-65"}


def test_an_anchor_that_has_lost_weights_is_no_base_to_build_on(anchors: Anchors) -> None:
    held = begin(anchors, 0, [0, 1, 2, 3], None)
    anchors.client(2).release(0, held.shard_of(2).added)
    with pytest.raises(AnchorError, match="device 2 has lost segments"):
        begin(anchors, 1, [0, 1, 2], held)


def test_settling_goes_on_past_an_anchor_that_fails(anchors: Anchors) -> None:
    first = begin(anchors, 0, [0, 1, 2, 3], None)
    anchors.seal_and_free(Generation(0, first, []))
    second = begin(anchors, 1, [0, 1, 2], first)
    kill(anchors, 1)
    with pytest.raises(AnchorError):
        anchors.seal_and_free(Generation(1, second, []))
    assert second.shard_of(2).sizes.keys() <= sealed(anchors, 2)
    assert names(anchors, 2) == anchors.segments_of(1, second)[2]


def test_an_anchor_that_dies_before_its_weights_were_sealed_is_restored_and_settled(anchors: Anchors) -> None:
    held = begin(anchors, 0, [0, 1, 2, 3], None)
    fds = {}
    for name in names(anchors, 1):  # this process is the rank
        grant = anchors.client(1).open_handle(0, name)
        fds[1, name] = grant.fd, grant.nbytes
    here = SimpleNamespace(pidfd=os.pidfd_open(os.getpid()))
    generation = Generation(0, held, [here] * 4, [{"fds": {}}, {"fds": fds}, {"fds": {}}, {"fds": {}}])
    dead = anchors.processes[1]
    kill(anchors, 1)
    assert set(restore_anchor(anchors, generation, 1)) == {name for _, name in fds}
    assert anchors.alive(1) and anchors.processes[1] is not dead
    assert not sealed(anchors, 1)
    anchors.seal_and_free(generation)
    assert sealed(anchors, 1) == held.shard_of(1).sizes.keys()
    for fd, _ in fds.values():
        os.close(fd)
    os.close(here.pidfd)


def test_an_anchor_that_cannot_be_restored_is_never_taken_for_one(anchors: Anchors) -> None:
    held = begin(anchors, 0, [0, 1, 2, 3], None)
    here = SimpleNamespace(pidfd=os.pidfd_open(os.getpid()))
    gone = {(1, held.shard_of(1).added): (10**6, 4096)}  # no such descriptor
    generation = Generation(0, held, [here] * 4, [{"fds": gone}] * 4)
    kill(anchors, 1)
    with pytest.raises(OSError, match="pidfd_getfd"):
        restore_anchor(anchors, generation, 1)
    assert not anchors.alive(1)
    os.close(here.pidfd)


def kill(anchors: Anchors, device: int) -> None:
    pidfd = anchors.processes[device].pidfd
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert eventually(lambda: is_dead(pidfd), TIMEOUT_S)


@pytest.mark.parametrize("device", [HOST_DEVICE, 1])
def test_a_stopped_anchor_is_found_at_a_fence_and_replaced_with_all_that_it_holds(
    anchors: Anchors, device: int
) -> None:
    held = begin(anchors, 0, [0, 1, 2, 3], None)
    anchors.seal_and_free(Generation(0, held, []))
    before, was_sealed = names(anchors, device), sealed(anchors, device)
    inodes = {name: inode(anchors, 0, device, name) for name in before}
    silent = anchors.processes[device]
    pidfd = os.pidfd_open(silent.pid)
    os.kill(silent.pid, signal.SIGSTOP)
    began = time.monotonic()
    anchors.fence(1, [0, 1, 2, 3])
    assert time.monotonic() - began < 6
    assert is_dead(pidfd) and anchors.processes[device].pid != silent.pid
    os.close(pidfd)
    assert names(anchors, device) == before and sealed(anchors, device) == was_sealed
    assert {name: inode(anchors, 1, device, name) for name in before} == inodes, "another memory than before"


def inode(anchors: Anchors, number: int, device: int, name: str) -> int:
    fd, _, _ = anchors.client(device).open_handle(number, name)
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def test_a_stopped_anchor_does_not_outlive_the_server(anchors: Anchors) -> None:
    """It cannot be told to end, and is let go on first."""
    os.kill(anchors.processes[2].pid, signal.SIGSTOP)
    anchors.shut_down(0)
    assert all(is_dead(anchor.pidfd) for anchor in anchors.processes.values())
