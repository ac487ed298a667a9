"""What is decided for GPUs without asking any: shares, slots, settings, and which errors cost a device."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from planning_cases import model

from anchortp_sglang.memory.gpu import GpuShare
from anchortp_sglang.options import AnchorOptions
from anchortp_sglang.planning.layout.kv_layout import KVPlan
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.ownership.ownership import Ownership, split
from anchortp_sglang.planning.placement.reconfiguration import reconfigure
from anchortp_sglang.platforms.cuda.environment import cuda_defaults
from anchortp_sglang.platforms.cuda.health import reason_of_xid
from anchortp_sglang.platforms.cuda.plan import check_gpu_plan, describe_losses, graph_batch_sizes, plan_gpu_kv
from anchortp_sglang.platforms.cuda.probe import GpuFacts
from anchortp_sglang.platforms.cuda.shares import share_out

GIB = 1 << 30
UUIDS = tuple(f"GPU-{index}" for index in range(4))
MODEL = model((12, 4), hidden_size=4096, intermediate_size=16640)  # 1.6 GiB of weights


def facts(count: int, peers: tuple[str, ...] = UUIDS) -> list[GpuFacts]:
    return [
        GpuFacts(uuid=uuid, name="GPU", total_bytes=80 * GIB, free_bytes=79 * GIB, sharing="vmm", peers=[uuid, *peers])
        for uuid in UUIDS[:count]
    ]


class TestShares:
    def test_each_device_has_a_gpu_of_its_own_in_order(self) -> None:
        shares = share_out(facts(4), 3, 0.5, may_share=False)
        assert shares == tuple(GpuShare(uuid, 40 * GIB) for uuid in UUIDS[:3])

    def test_devices_on_one_gpu_share_its_budget_and_know_it(self) -> None:
        shares = share_out(facts(2), 3, 0.75, may_share=True)
        assert [(share.uuid, share.budget_bytes, share.alone) for share in shares] == [
            ("GPU-0", 30 * GIB, False),
            ("GPU-1", 60 * GIB, True),
            ("GPU-0", 30 * GIB, False),
        ]

    def test_too_few_gpus_are_refused_unless_they_may_be_shared(self) -> None:
        with pytest.raises(ValueError, match=r"2 visible GPUs.*--anchor-share-gpus"):
            share_out(facts(2), 3, 0.8, may_share=False)
        with pytest.raises(ValueError, match="no GPU is visible"):
            share_out([], 1, 0.8, may_share=True)

    def test_gpus_that_cannot_reach_each_other_are_refused(self) -> None:
        with pytest.raises(ValueError, match="GPU-0 cannot map the memory of GPU-1"):
            share_out(facts(2, peers=()), 2, 0.8, may_share=False)
        assert len(share_out(facts(1, peers=()), 2, 0.8, may_share=True)) == 2


@pytest.mark.parametrize("uuid, budget", [("MIG-1", 1), ("0", 1), ("GPU-1", 0)])
def test_a_share_is_of_a_whole_gpu_and_of_something(uuid: str, budget: int) -> None:
    with pytest.raises(ValueError):
        GpuShare(uuid, budget)


class TestSlots:
    """Budgets are such that everything but KV just fits a device."""

    def plan(self, budget_bytes: int, min_devices: int = 1, asked: int | None = None) -> int:
        return self.plan_and_fewest(budget_bytes, min_devices, asked)[0]

    def plan_and_fewest(
        self, budget_bytes: int, min_devices: int | None = None, asked: int | None = None, starting: int | None = None
    ) -> tuple[int, int]:
        gpus = [GpuShare(uuid, budget_bytes) for uuid in UUIDS]
        view = SimpleNamespace(page_size=1, max_total_tokens=asked)
        kv, fewest = plan_gpu_kv(MODEL, split(MODEL, (0, 1, 2, 3)), gpus, min_devices, view, starting)
        return kv.slots, fewest

    def test_the_last_survivor_holds_all_heads_and_for_a_moment_two_shards(self) -> None:
        budget = 4 * GIB
        slots = self.plan(budget)
        held: Ownership = split(MODEL, (0, 1, 2, 3))
        for devices in ([0, 1, 2], [0, 1], [0]):
            new = reconfigure(MODEL, held, devices)
            for rank, device in enumerate(devices):
                before = shard_layout(MODEL, held, held.devices.index(device)).total_bytes
                kv = 2 * MODEL.num_layers * (slots + 1) * new.units("kv_head", rank) * MODEL.head_dim * 4
                taken = before + shard_layout(MODEL, new, rank).total_bytes + kv
                assert taken <= budget
            held = new
        one_more = 2 * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_dim * 4
        assert taken + one_more > budget - (64 << 20)  # nothing much is wasted

    def test_fewer_losses_to_survive_leave_more_slots(self) -> None:
        assert self.plan(4 * GIB, min_devices=4) > self.plan(4 * GIB, min_devices=2) > self.plan(4 * GIB, min_devices=1)

    @pytest.mark.parametrize("budget_mib, fewest", [(450, 4), (1100, 4), (3000, 3), (40 * 1024, 2)])
    def test_a_model_that_needs_its_gpus_starts_and_survives_what_leaves_a_third_of_the_slots(
        self, budget_mib: int, fewest: int
    ) -> None:
        by_width = [self.plan_or_none(budget_mib << 20, width) for width in (1, 2, 3, 4)]
        slots, found = self.plan_and_fewest(budget_mib << 20)
        assert found == fewest and slots == by_width[fewest - 1]
        assert 3 * slots >= by_width[3] and all(3 * less < by_width[3] for less in by_width[: fewest - 1])

    def plan_or_none(self, budget_bytes: int, min_devices: int) -> int:
        try:
            return self.plan(budget_bytes, min_devices)
        except ValueError:
            return 0

    def test_who_asks_for_slots_gets_them_with_as_many_losses_as_they_allow(self) -> None:
        two = self.plan(4 * GIB, min_devices=2)
        assert self.plan_and_fewest(4 * GIB, asked=two) == (two, 2)
        assert self.plan_and_fewest(4 * GIB, asked=100) == (100, 1)

    def test_who_starts_with_fewer_devices_gets_what_these_have_room_for(self) -> None:
        assert self.plan_and_fewest(1100 << 20, starting=3) == (self.plan(1100 << 20, min_devices=3), 3)
        with pytest.raises(ValueError, match="room for 0 KV slots besides weights, down to 3 of 4"):
            self.plan_and_fewest(450 << 20, starting=3)

    @pytest.mark.parametrize(
        "fewest, text", [(1, "the loss of 3 of 4 GPUs"), (4, "no loss of a GPU: all 4 are needed")]
    )
    def test_a_start_says_what_it_survives(self, fewest: int, text: str) -> None:
        said = describe_losses(4, fewest, KVPlan(1000, 1, 2), chosen_here=True)
        assert said.startswith(f"1000 KV slots fit, and the server survives {text}; --anchor-min-devices")

    def test_the_operator_gets_the_slots_asked_for_or_a_refusal(self) -> None:
        assert self.plan(4 * GIB, asked=1000) == 1000
        with pytest.raises(ValueError, match=r"room for .* KV slots.*down to 1 of 4"):
            self.plan(4 * GIB, asked=self.plan(4 * GIB) + 1)
        with pytest.raises(ValueError, match="room for 0 KV slots"):
            self.plan(1 << 20)


class TestWhatIsNotThere:
    VIEW = SimpleNamespace(page_size=1, kv_cache_dtype="auto")

    def test_a_plain_server_may_start(self) -> None:
        check_gpu_plan(MODEL, self.VIEW, AnchorOptions(), spreads=False)
        check_gpu_plan(MODEL, self.VIEW, AnchorOptions(kv_mirror="off"), spreads=False)

    @pytest.mark.parametrize(
        "said, view, options",
        [
            ("--page-size 16", {"page_size": 16}, {}),
            ("--kv-cache-dtype fp8_e4m3", {"kv_cache_dtype": "fp8_e4m3"}, {}),
            ("--anchor-kv-mirror host", {}, {"kv_mirror": "host"}),
            ("--anchor-kv-mirror host", {}, {"kv_mirror_gib": 1.0}),
            ("--anchor-device-gib", {}, {"device_gib": 1.0}),
            ("--anchor-rotate-heads", {}, {"rotate_heads": True}),
        ],
    )
    def test_is_refused_by_name(self, said: str, view: dict[str, object], options: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=f"^{said} is not supported on GPUs"):
            check_gpu_plan(MODEL, SimpleNamespace(**vars(self.VIEW) | view), AnchorOptions(**options), spreads=False)

    def test_neither_latents_nor_counted_experts(self) -> None:
        with pytest.raises(ValueError, match=r"^--init-expert-location is not"):
            check_gpu_plan(MODEL, self.VIEW, AnchorOptions(), spreads=True)
        latent = dataclasses.replace(MODEL, latent_kv=True)
        with pytest.raises(ValueError, match=r"^latent KV"):
            check_gpu_plan(latent, self.VIEW, AnchorOptions(), spreads=False)

    def test_nor_layers_of_several_shapes(self) -> None:
        unlike = dataclasses.replace(MODEL, architecture="Gemma4TextForCausalLM")
        with pytest.raises(ValueError, match=r"^layers of several shapes"):
            check_gpu_plan(unlike, self.VIEW, AnchorOptions(), spreads=False)


class TestGraphs:
    VIEW = SimpleNamespace(cuda_graph_config=SimpleNamespace(decode=SimpleNamespace(backend="full", bs=[1, 2, 4])))
    ALONE = GpuShare("GPU-0", GIB)
    SHARED = GpuShare("GPU-0", GIB, alone=False)

    def test_are_captured_for_the_batch_sizes_of_sglang(self) -> None:
        assert graph_batch_sizes(self.VIEW, [self.ALONE, self.ALONE]) == (1, 2, 4)
        assert graph_batch_sizes(self.VIEW, []) == ()

    def test_are_not_captured_when_switched_off_or_with_gloo(self) -> None:
        off = SimpleNamespace(cuda_graph_config=SimpleNamespace(decode=SimpleNamespace(backend="disabled", bs=[1])))
        assert graph_batch_sizes(off, [self.ALONE]) == ()
        assert graph_batch_sizes(self.VIEW, [self.SHARED, self.SHARED]) == ()


class TestSettings:
    def test_what_was_given_stays(self) -> None:
        defaults = cuda_defaults({"device": "cuda"}, {"OPENBLAS_NUM_THREADS": "4"}, False)
        assert defaults.flags == {}
        assert "OPENBLAS_NUM_THREADS" not in defaults.env
        assert defaults.env["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"

    def test_ranks_on_one_gpu_do_without_nccl_and_custom_all_reduce(self) -> None:
        shared, apart = cuda_defaults({}, {}, True), cuda_defaults({}, {}, False)
        assert shared.flags.keys() - apart.flags.keys() == {"disable_custom_all_reduce"}
        assert shared.env.keys() - apart.env.keys() == {"SGLANG_NCCL_SO_PATH"}


def test_xids_of_applications_cost_no_device() -> None:
    assert reason_of_xid(79) == "Xid 79: fallen off the bus"
    assert [xid for xid in (13, 31, 43, 45, 94) if reason_of_xid(xid)] == []
