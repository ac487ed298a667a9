"""What every platform promises, asked of both implementations; what needs a GPU is skipped where there is none."""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anchor_rig import AnchorRig
from arena_platforms import BUDGET_BYTES, gpu_uuid
from planning_cases import model

from anchortp_sglang.admission.checks import check_server_args
from anchortp_sglang.hooks import preload
from anchortp_sglang.memory.arena import Part
from anchortp_sglang.memory.arena_kinds import HOST_MEMORY
from anchortp_sglang.options import AnchorOptions
from anchortp_sglang.planning.layout.kv_layout import KVPlan, kv_layout
from anchortp_sglang.planning.ownership.ownership import split
from anchortp_sglang.planning.placement.reconfiguration import reconfigure
from anchortp_sglang.platforms.base import Platform, describe
from anchortp_sglang.platforms.cpu.platform import CpuPlatform
from anchortp_sglang.platforms.cuda.platform import CudaPlatform
from anchortp_sglang.platforms.cuda.probe import GpuFacts
from anchortp_sglang.recovery.processes.server_plan import ServerPlan
from anchortp_sglang.startup import device as startup_device
from anchortp_sglang.startup.device import choose_platform

MODEL = model((12, 4))
DEVICES = (0, 1, 2, 3)
LARGE = model((8, 4), hidden_size=1024, head_dim=128, intermediate_size=6144, vocab_size=2048)
OWNERSHIP = split(MODEL, DEVICES)
KV = KVPlan(slots=64, page_size=1, dtype_bytes=4)
KV_BYTES = kv_layout(MODEL, KV, OWNERSHIP, 0).total_bytes
GIB = 1 << 30
FOLDERS = ("anchortp_sglang.platforms.cpu", "anchortp_sglang.platforms.cuda")
MAIN_ONLY = {"anchortp_sglang.platforms.cpu.kv_sizes", "anchortp_sglang.platforms.cuda.detection"}
UUIDS = [f"GPU-{device}" for device in DEVICES]
GPUS = tuple(
    GpuFacts(uuid=uuid, name="H100", total_bytes=80 * GIB, free_bytes=79 * GIB, sharing="vmm", peers=UUIDS)
    for uuid in UUIDS
)
VIEW: dict[str, Any] = {
    "tp_size": len(DEVICES), "page_size": 1, "kv_cache_dtype": "auto", "mem_fraction_static": 0.5,
    "max_total_tokens": 64,
    "enable_forward_pass_metrics": False,
    "cuda_graph_config": SimpleNamespace(decode=SimpleNamespace(backend="full", bs=[1, 2])),
}  # fmt: skip


@pytest.fixture(params=[CpuPlatform(), CudaPlatform(gpus=GPUS)], ids=["cpu", "cuda"])
def chosen(request: pytest.FixtureRequest) -> Platform:
    """As the choice at the start leaves it."""
    return request.param


def in_host_memory(planned: Platform) -> bool:
    return planned.arena(0) == HOST_MEMORY


def plan(platform: Platform, **flags: Any) -> Any:
    options, view = AnchorOptions(), SimpleNamespace(**(VIEW | flags))
    return platform.plan_memory(MODEL, OWNERSHIP, view, options, spreads_experts=False, adapter_bytes=0)


@pytest.fixture
def planned(chosen: Platform) -> Platform:
    """As server plan and ranks have it."""
    return plan(chosen).platform


class TestStart:
    def test_defaults_name_the_device_and_leave_alone_what_was_given(self, chosen: Platform) -> None:
        fresh = chosen.defaults({}, {}, 2)
        assert fresh.flags["device"] == chosen.rules.device
        assert fresh.flags["device"] in describe(fresh)
        again = chosen.defaults(fresh.flags, fresh.env, 2)
        assert (again.flags, again.env) == ({}, {})

    def test_asking_changes_nothing(self, chosen: Platform) -> None:
        before = dict(os.environ)
        chosen.defaults({}, os.environ, 2)
        assert dict(os.environ) == before

    def test_what_it_sets_itself_is_not_refused(self, chosen: Platform) -> None:
        assert check_server_args(chosen.defaults({}, {}, 2).flags, chosen.rules, {}) == []

    def test_its_rules_refuse_other_devices_with_a_way_out(self, chosen: Platform) -> None:
        for device in {"cpu", "cuda", "xpu"} - {chosen.rules.device}:
            (refusal,) = check_server_args({"device": device}, chosen.rules, {})
            assert refusal.flag == "--device" and "--device" in refusal.way_out

    def test_every_attention_backend_of_its_rules_is_let_in_and_others_are_not(self, chosen: Platform) -> None:
        flags = chosen.defaults({}, {}, 2).flags
        for backend in chosen.rules.attention_backends:
            assert check_server_args(flags | {"attention_backend": backend}, chosen.rules, {}) == []
        (refusal,) = check_server_args(flags | {"attention_backend": "other"}, chosen.rules, {})
        assert refusal.flag == "--attention-backend"


class TestPlan:
    def test_slots_are_those_that_were_asked_for(self, chosen: Platform) -> None:
        assert plan(chosen).kv.slots == VIEW["max_total_tokens"]

    def test_what_does_not_fit_is_refused_with_a_flag_to_change(self, chosen: Platform) -> None:
        with pytest.raises(ValueError, match="--max-total-tokens"):
            plan(chosen, max_total_tokens=1 << 40)

    def test_there_is_a_mirror_or_a_reason(self, chosen: Platform) -> None:
        memory = plan(chosen)
        assert memory.mirror_text
        assert memory.mirror is None or memory.platform.moves_kv, "nothing could be read back from it"

    def test_it_survives_the_pipe_to_a_rank(self, planned: Platform) -> None:
        there = pickle.loads(pickle.dumps(planned))
        assert there == planned
        assert [there.arena(device) for device in DEVICES] == [planned.arena(device) for device in DEVICES]
        assert len(pickle.dumps(planned)) < 2048

    def test_the_arena_of_a_device_is_on_the_anchors_command_line(self, planned: Platform) -> None:
        for device in DEVICES:
            arena = planned.arena(device)
            assert arena == HOST_MEMORY or (arena.uuid and arena.budget_bytes > KV_BYTES)

    def test_servers_of_other_devices_have_another_identity(self, planned: Platform) -> None:
        described = {planned.arena(device) for device in DEVICES}
        assert (planned.identity == ()) == (described == {HOST_MEMORY})

    def test_a_seal_travels_exactly_with_host_memory(self, planned: Platform) -> None:
        assert {planned.arena(device).seal_travels for device in DEVICES} == {in_host_memory(planned)}

    def test_graphs_are_captured_late_or_not_at_all(self, planned: Platform) -> None:
        sizes = planned.graph_batch_sizes(SimpleNamespace(**VIEW))
        assert sizes == () or planned.rank_overrides["disable_cuda_graph"] is True

    def test_collectives_need_more_room_for_more_ranks(self, planned: Platform) -> None:
        assert 0 < planned.collectives_bytes(2) < planned.collectives_bytes(4)


class TestAnswersFitTogether:
    def test_kv_that_moves_is_in_host_memory(self, planned: Platform) -> None:
        """It is moved by host code (``kv.copy``)."""
        assert in_host_memory(planned) or not planned.moves_kv

    def test_memory_that_comes_page_by_page_comes_as_zeros(self, planned: Platform) -> None:
        assert planned.new_memory_is_zero or not planned.lazy_memory

    def test_shards_stay_in_place_exactly_where_parts_can_be_mapped(self, planned: Platform) -> None:
        server = server_plan(planned)
        before = server.hold(split(LARGE, DEVICES), None)
        after = server.hold(reconfigure(LARGE, before.ownership, DEVICES[:3]), before)
        assert any(shard.reused_bytes for shard in after.shards) is planned.maps_parts

    def test_the_host_anchor_is_the_same_everywhere(self, planned: Platform) -> None:
        assert server_plan(planned).arena(-1) == HOST_MEMORY


class TestRank:
    def test_gpu_ids_of_ranks_need_no_driver_in_host_memory(self, planned: Platform) -> None:
        if not in_host_memory(planned):
            pytest.skip("these GPUs are made up")
        assert [planned.gpu_id(device, rank) for rank, device in enumerate((0, 2, 3))] == [0, 1, 2]
        assert planned.wait_for_forward() is None


class TestWatch:
    def test_nothing_is_lost_at_first(self, planned: Platform) -> None:
        faults: list[str] = []
        assert planned.watch(faults.append).errors == {} and faults == []

    def test_where_there_is_nothing_to_watch_nothing_is_asked_or_started(self, planned: Platform) -> None:
        if not in_host_memory(planned):
            pytest.skip("it has GPUs to ask")

        async def both() -> None:
            watch = planned.watch(lambda reason: None)
            await watch.probe()
            await asyncio.wait_for(watch.watch(), 1)

        asyncio.run(both())


@dataclass
class Device:
    """A device whose anchor runs."""

    platform: Platform
    rig: AnchorRig

    def part(self, name: str, nbytes: int, writable: bool = True) -> Part:
        grant = self.rig.client().open_handle(0, name)
        return Part(grant.fd, 0, nbytes, writable)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Device]:
    if request.param == "cpu":
        platform, gpu = CpuPlatform(), None
    else:
        uuid = gpu_uuid()
        if uuid is None or not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        from anchortp_sglang.memory.gpu import GpuShare

        gpu = GpuShare(uuid, BUDGET_BYTES)
        platform = CudaPlatform(shares=(gpu,))
    with AnchorRig(tmp_path, gpu) as rig:
        rig.start()
        yield Device(platform, rig)


class TestMemory:
    """With a real anchor, on a real device."""

    NBYTES = 4 << 20

    def allocate(self, device: Device, *names: str) -> None:
        for name in names:
            device.rig.client().allocate(0, name, self.NBYTES)

    def test_two_tensors_of_a_segment_are_the_same_memory(self, device: Device) -> None:
        self.allocate(device, "kv")
        first, end_first = device.platform.byte_tensor(0, [device.part("kv", self.NBYTES)])
        second, end_second = device.platform.byte_tensor(0, [device.part("kv", self.NBYTES)])
        first[:4] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
        device.platform.wait_for_forward()
        assert second[:4].tolist() == [1, 2, 3, 4] and len(second) == self.NBYTES
        assert second.cpu().numpy()[:4].tolist() == [1, 2, 3, 4]
        del first, second
        end_first()
        end_second()

    def test_new_memory_is_zero_where_that_is_promised(self, device: Device) -> None:
        if not device.platform.new_memory_is_zero:
            pytest.skip("it is not promised")
        self.allocate(device, "kv")
        assert not device.platform.byte_tensor(0, [device.part("kv", self.NBYTES)])[0].any()

    def test_parts_are_mapped_as_one_where_that_is_promised(self, device: Device) -> None:
        if not device.platform.maps_parts:
            pytest.skip("it is not promised")
        self.allocate(device, "a", "b")
        whole = [device.part("a", self.NBYTES), device.part("b", self.NBYTES)]
        device.platform.byte_tensor(0, whole[1:])[0].fill_(7)
        both, _ = device.platform.byte_tensor(0, whole)
        assert len(both) == 2 * self.NBYTES
        assert not both[: self.NBYTES].any() and (both[self.NBYTES :] == 7).all()

    def test_its_mover_fills_a_shard(self, device: Device) -> None:
        self.allocate(device, "weights")
        tensor, end = device.platform.byte_tensor(0, [device.part("weights", self.NBYTES)])

        def write(part: torch.Tensor, data: memoryview) -> None:
            part.view(torch.uint8).view(-1).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))

        with device.platform.mover(0, lambda: write) as mover:
            mover.load(tensor[:1000], torch.arange(1000).to(torch.uint8))
            mover.layer_done(0)
        assert tensor[:1000].tolist() == [n % 256 for n in range(1000)]
        assert mover.moved.loaded_bytes == 1000 and 0 in mover.moved.layer_ready_s
        del tensor
        end()


def test_both_can_be_chosen_without_numpy_or_torch() -> None:
    """The environment is set afterwards, and either reads it when it is imported."""
    script = """
        import sys
        from anchortp_sglang.startup.device import choose_platform
        from anchortp_sglang.platforms.cuda.platform import CudaPlatform
        choose_platform({}).defaults({}, {}, 2)
        print(sorted({"numpy", "torch", "sglang"} & sys.modules.keys()))
    """
    assert run(script) == "[]"


@pytest.mark.parametrize("platform", [CpuPlatform, CudaPlatform])
def test_what_a_platform_imports_in_a_rank_is_there_before_the_fork(platform: type) -> None:
    """In a rank it would be part of every recovery."""
    late = imported(inspect.getsource(platform)) - MAIN_ONLY
    with_the_table = imported(Path(preload.__file__).with_name("table.py").read_text())
    assert late and late <= with_the_table | {"anchortp_sglang.platforms.cpu.collectives"} | set(preload._LATE)


def imported(source: str) -> set[str]:
    """Modules of the platforms that a source imports anywhere."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module]
    of_folders = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names if node.module in FOLDERS}
    return of_folders | {str(node.module) for node in nodes if str(node.module).startswith(FOLDERS)} - set(FOLDERS)


def test_an_anchor_needs_no_implementation() -> None:
    script = """
        import sys
        import anchortp_sglang.anchor.server
        heavy = {"numpy", "torch", "anchortp_sglang.platforms", "cuda", "pynvml"}
        print(sorted(heavy & sys.modules.keys()))
    """
    assert run(script) == "[]"


def test_without_a_device_gpus_are_chosen_if_there_are_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup_device, "_DRIVER", str(tmp_path / "nvidiactl"))
    assert isinstance(choose_platform({}), CpuPlatform)
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(CudaPlatform, "of_this_machine", classmethod(lambda cls: cls()))
    assert isinstance(choose_platform({"device": None}), CudaPlatform)
    assert isinstance(choose_platform({"device": "cpu"}), CpuPlatform)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert isinstance(choose_platform({}), CpuPlatform)
    with pytest.raises(ValueError, match="--device xpu is not supported; use --device cuda or --device cpu"):
        choose_platform({"device": "xpu"})


def test_a_machine_without_visible_gpus_is_told_where_to_look() -> None:
    with pytest.raises(ValueError, match=r"no GPU is visible: see nvidia-smi.*or use --device cpu"):
        CudaPlatform().defaults({"device": "cuda"}, {}, 1)


def test_a_rank_has_torch_initialise_cuda_before_anything_else_calls_the_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ranks whose first call came from cuda-bindings died of a segmentation fault in torch's own."""
    from anchortp_sglang.platforms.cuda import platform as module

    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "init", lambda: calls.append("torch"))
    monkeypatch.setattr(module, "device_by_uuid", lambda uuid: calls.append(uuid) or 5)
    assert plan(CudaPlatform(gpus=GPUS)).platform.gpu_id(2, 1) == 5
    assert calls == ["torch", "GPU-2"]


def server_plan(platform: Platform) -> ServerPlan:
    return ServerPlan(
        run_dir=Path("/nowhere"), run_id="r", identity="i", checkpoint=Path("/nowhere"), model=LARGE,
        kv=KV, rotate_heads=False, expert_counts=None, device_bytes=None, mirror=None, linger_s=0.0,
        server_args=lambda tp_size: None, controller_pid=0, platform=platform,
    )  # fmt: skip


def run(script: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
