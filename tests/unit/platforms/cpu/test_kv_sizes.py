"""How many KV slots a server has, and whether there is a mirror of them."""

from types import SimpleNamespace

import pytest
from planning_cases import model as model_axes

from anchortp_sglang.memory.cgroups import MemoryRoom
from anchortp_sglang.options import AnchorOptions
from anchortp_sglang.planning.layout.kv_layout import KVPlan, MirrorPlan
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.ownership.ownership import split
from anchortp_sglang.platforms.cpu.kv_sizes import plan_kv, plan_mirror, plan_standby, process_bytes, standby_bytes

MODEL = model_axes((12, 4))
OWNERSHIP = split(MODEL, (0, 1))
KV = KVPlan(999, 1, 4)
SLOT_BYTES = 2 * 2 * 4 * 2 * 4  # planes, layers, heads, head_dim, float32
WEIGHTS = sum(shard_layout(MODEL, OWNERSHIP, rank).total_bytes for rank in range(2))
PLENTY = 10 * (WEIGHTS + 2000 * SLOT_BYTES)


def view(**changes):
    values = {"page_size": 1, "kv_cache_dtype": "auto", "mem_fraction_static": 0.5, "max_total_tokens": None}
    values["enable_forward_pass_metrics"] = False
    return SimpleNamespace(**values | changes)


def room(nbytes):
    return MemoryRoom(nbytes, "of the host's memory")


def plan(available, device_bytes=None, ownership=OWNERSHIP, **changes):
    return plan_kv(MODEL, ownership, view(**changes), device_bytes, room(available))


def mirror(available, ownership=OWNERSHIP, **options):
    return plan_mirror(MODEL, ownership, KV, AnchorOptions(**options), room(available))


def standby(available, mirrored=None, **options):
    return plan_standby(MODEL, OWNERSHIP, KV, mirrored, AnchorOptions(**options), view(), room(available))


def test_a_standby_is_warm_where_its_ranks_have_room_beside_all_else():
    held = WEIGHTS + 2 * (KV.rows * SLOT_BYTES)
    needed = standby_bytes(MODEL, OWNERSHIP)
    assert needed == 2 * (128 << 20) + WEIGHTS // 256
    assert standby(held + needed) == ("warm", "warm: it takes 256 MiB, 256 MiB are free")
    assert standby(held + needed - 1)[0] == "cold"
    mirrored = MirrorPlan(10, 1e9)
    assert standby(held + needed, mirrored)[0] == "cold"
    assert standby(held + needed + 10 * SLOT_BYTES, mirrored)[0] == "warm"
    alone = split(MODEL, (0,))  # there is no second copy
    needed = standby_bytes(MODEL, alone)
    held = WEIGHTS + KV.rows * SLOT_BYTES
    assert plan_standby(MODEL, alone, KV, None, AnchorOptions(), view(), room(held + needed))[0] == "warm"
    assert standby(0)[1] == "cold, not warm: it takes 256 MiB, 0 MiB are free"


def test_schedulers_that_bind_a_socket_cannot_stand_by():
    def plan_with(**given):
        binding = view(enable_forward_pass_metrics=True)
        return plan_standby(MODEL, OWNERSHIP, KV, None, AnchorOptions(**given), binding, room(1 << 40))

    assert plan_with()[0] == "cold" and plan_with(standby="off")[0] == "off"
    with pytest.raises(ValueError, match=r"bind a socket .* use cold"):
        plan_with(standby="warm")


@pytest.mark.parametrize("mode", ["off", "cold", "warm"])
def test_the_operator_decides_what_stands_by(mode):
    assert standby(0, standby=mode) == (mode, f"{mode}, as --anchor-standby says")


def test_slots_are_those_asked_for_or_what_half_of_the_memory_holds():
    assert plan(PLENTY, max_total_tokens=500) == KVPlan(500, 1, 4)
    assert plan(2 * (WEIGHTS + 700 * SLOT_BYTES)).slots == 700
    assert plan(PLENTY, max_total_tokens=509, page_size=16).slots == 496


def test_slots_that_nobody_chose_leave_room_for_a_standby_if_that_is_little():
    reserved = standby_bytes(MODEL, OWNERSHIP)
    slots = 11 * reserved // SLOT_BYTES
    plenty = WEIGHTS + reserved + 2 * (slots + 1) * SLOT_BYTES
    found = plan(plenty, mem_fraction_static=0.99)
    assert found.slots == slots and standby_of(found, plenty) == "warm"
    unreserved = plan_kv(MODEL, OWNERSHIP, view(mem_fraction_static=0.99), None, room(plenty), standby=False)
    assert unreserved.slots > slots and standby_of(unreserved, plenty) == "cold"
    asked_for = plan(plenty, max_total_tokens=unreserved.slots)
    assert asked_for.slots == unreserved.slots


def standby_of(kv, available):
    return plan_standby(MODEL, OWNERSHIP, kv, None, AnchorOptions(), view(), room(available))[0]


def test_slots_that_nobody_chose_leave_room_for_the_second_copy_that_a_lost_device_makes():
    available = WEIGHTS + 2 * 700 * SLOT_BYTES
    assert plan(available, mem_fraction_static=0.99).slots == 700
    alone = split(MODEL, (0,))  # nothing is ever copied
    assert plan(2 * (WEIGHTS + 700 * SLOT_BYTES), ownership=alone, mem_fraction_static=0.99).slots > 1300


def test_an_8_bit_cache_holds_four_times_as_many_slots_as_float32():
    kv = plan(2 * (WEIGHTS + 700 * SLOT_BYTES), kv_cache_dtype="fp8_e4m3")
    assert (kv.slots, kv.dtype_bytes) == (2800, 1)


def test_too_little_memory_is_refused():
    with pytest.raises(ValueError, match="lower --max-total-tokens"):
        plan(WEIGHTS, max_total_tokens=500)
    with pytest.raises(ValueError, match="--anchor-device-gib has room for"):
        plan(PLENTY, WEIGHTS, max_total_tokens=5000)


def test_a_refusal_names_the_limit_and_what_the_processes_take():
    limit = MemoryRoom(3 << 30, "/sys/fs/cgroup/memory.max is 3072 MiB").less(process_bytes(2))
    with pytest.raises(
        ValueError, match=r"1792 MiB are available \(\S+max is 3072 MiB, less 1280 MiB for processes and adapters\)"
    ):
        plan_kv(MODEL, OWNERSHIP, view(max_total_tokens=10**8), None, limit)
    with pytest.raises(ValueError, match="0 MiB are available"):
        plan_kv(MODEL, OWNERSHIP, view(), None, MemoryRoom(1 << 20, "x").less(process_bytes(2)))


def test_the_mirror_is_whole_where_memory_allows_and_else_left_out():
    plan, said = mirror(PLENTY)
    assert (plan.rows, plan.bytes_per_s) == (KV.rows, 4e9)
    assert "1000 of 1000 slots" in said
    plan, said = mirror(WEIGHTS + 1100 * SLOT_BYTES)
    assert plan is None
    assert said.startswith("off: it would take")


def test_a_mirror_that_is_asked_for_and_does_not_fit_is_refused():
    for options in ({"kv_mirror": "host"}, {"kv_mirror_gib": 1000 * SLOT_BYTES / 2**30}):
        with pytest.raises(ValueError, match="change --anchor-kv-mirror-gib"):
            mirror(WEIGHTS + 1100 * SLOT_BYTES, **options)
    with pytest.raises(ValueError, match=f"one slot takes {SLOT_BYTES} bytes"):
        mirror(PLENTY, kv_mirror_gib=1e-9)


def test_a_mirror_may_be_smaller_than_the_cache_or_off():
    plan, _ = mirror(PLENTY, kv_mirror_gib=100 * SLOT_BYTES / 2**30, kv_mirror_gbps=0.5)
    assert (plan.rows, plan.bytes_per_s) == (100, 5e8)
    assert mirror(PLENTY, kv_mirror="off") == (None, "off, as --anchor-kv-mirror says")


def test_there_is_nothing_to_mirror_where_no_device_can_take_heads_along():
    assert mirror(PLENTY, split(MODEL, (0,)))[0] is None
    one_head = model_axes((4, 1))
    plan, said = plan_mirror(one_head, split(one_head, (0, 1)), KV, AnchorOptions(), room(PLENTY))
    assert (plan, said) == (None, "off, as every device holds all KV heads")
