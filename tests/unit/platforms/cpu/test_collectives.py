"""What the shared-memory collectives promise, with real processes on one region."""

import mmap
import multiprocessing
import pickle
import random
import signal
import time

import pytest
import torch
from rank_processes import run_ranks

from anchortp_sglang.platforms.cpu import futex
from anchortp_sglang.platforms.cpu.collectives import Lane, SharedMemoryGroup, region_bytes

pytestmark = pytest.mark.skipif(not futex.supported(), reason="the store order of x86-64 is assumed")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)


def random_tensor(generator, dtype, shape):
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if dtype is torch.int64:
        return torch.randint(-(2**40), 2**40, shape, generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


def sum_in_rank_order(tensors):
    total = tensors[0].clone()
    if len(tensors) > 2 and total.dtype in (torch.bfloat16, torch.float16):
        total = total.float()
    for tensor in tensors[1:]:
        total = total + tensor
    return total.to(tensors[0].dtype)


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found, expected)


def check_one_operation(group, choice, generator):
    """One random collective against its definition; all ranks draw the same numbers."""
    dtype = choice.choice(DTYPES)
    shape = [choice.choice((1, 2, 3, 7, 64)) for _ in range(choice.randint(1, 3))]
    parts = [random_tensor(generator, dtype, shape) for _ in range(group.world_size)]
    own = parts[group.rank].clone()
    operation = choice.choice(("all_reduce", "all_gather", "all_gather_into", "broadcast"))
    if operation == "all_reduce" and dtype is not torch.bool:
        result = group.all_reduce(own)
        assert result is own
        assert_same_bits(own, sum_in_rank_order(parts))
    elif operation == "broadcast":
        src = choice.randrange(group.world_size)
        payload = choice.randbytes(choice.choice((0, 1, 100, 5000)))
        assert group.broadcast_bytes(payload if group.rank == src else None, src) == payload
    elif operation == "all_gather_into":
        output = torch.empty([group.world_size * shape[0], *shape[1:]], dtype=dtype)
        group.all_gather_into(output, own)
        assert_same_bits(output, torch.cat(parts))
    else:
        dim = choice.randrange(-len(shape), len(shape))
        assert_same_bits(group.all_gather(own, dim), torch.cat(parts, dim))


def mixed_operations(region, rank, world_size, count):
    lanes = [SharedMemoryGroup(region, rank, world_size, lane) for lane in Lane]
    choice, generator = random.Random(7), torch.Generator().manual_seed(7)
    stagger = random.Random(rank)
    for _ in range(count):
        if stagger.random() < 0.01:
            time.sleep(0.001)  # past the yields, into the futex
        check_one_operation(choice.choice(lanes), choice, generator)


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_any_order_of_operations_gives_what_each_is_defined_to_give(world_size):
    run_ranks(world_size, mixed_operations, 3000 if world_size < 8 else 600)


def decode_steps(region, rank, world_size, count):
    group = SharedMemoryGroup(region, rank, world_size)
    hidden = torch.full((1, 320), float(rank + 1))
    expected = float(sum(range(1, world_size + 1)))
    for step in range(count):
        hidden.fill_(rank + 1 + step)
        group.all_reduce(hidden)
        if hidden[0, 0] != expected + world_size * step or hidden[0, -1] != hidden[0, 0]:
            return f"step {step}: {hidden[0, 0]}"
    return "ok"


@pytest.mark.parametrize("world_size", [2, 4])
def test_thousands_of_small_reductions_never_mix_steps(world_size):
    assert run_ranks(world_size, decode_steps, 8000) == ["ok"] * world_size


def large_payloads(region, rank, world_size):
    tensors, objects = (SharedMemoryGroup(region, rank, world_size, lane) for lane in Lane)
    generator = torch.Generator().manual_seed(1)
    for dtype, shape in (
        (torch.float32, (411, 1111)),
        (torch.bfloat16, (3, 500_001)),
        (torch.int64, (200_003,)),
    ):
        parts = [random_tensor(generator, dtype, shape) for _ in range(world_size)]
        assert_same_bits(tensors.all_gather(parts[rank], -1), torch.cat(parts, -1))
        assert_same_bits(tensors.all_reduce(parts[rank].clone()), sum_in_rank_order(parts))
    payload = random.Random(1).randbytes(3_000_001)
    for src in (0, world_size - 1):
        assert objects.broadcast_bytes(payload if rank == src else None, src) == payload


@pytest.mark.parametrize("world_size", [2, 3])
def test_payloads_larger_than_a_slot_pass_through_in_pieces(world_size):
    run_ranks(world_size, large_payloads)


def awkward_tensors(region, rank, world_size):
    group = SharedMemoryGroup(region, rank, world_size)
    backing = torch.arange(24.0).view(4, 6)
    columns = backing[:, ::2]
    group.all_reduce(columns)
    assert torch.equal(columns, torch.arange(24.0).view(4, 6)[:, ::2] * world_size)
    assert torch.equal(backing[:, 1::2], torch.arange(24.0).view(4, 6)[:, 1::2]), "only the view was reduced"
    assert torch.equal(group.all_gather(backing.t(), 0), torch.cat([backing.t()] * world_size, 0))
    assert group.all_reduce(torch.tensor(2)).item() == 2 * world_size
    assert group.all_reduce(torch.empty(0, 5)).shape == (0, 5)
    assert group.all_gather(torch.empty(3, 0), 0).shape == (3 * world_size, 0)
    with torch.inference_mode():
        assert torch.equal(group.all_reduce(torch.ones(3)), torch.full((3,), float(world_size)))


def test_strided_scalar_and_empty_tensors_are_fine():
    run_ranks(2, awkward_tensors)


def wait_for_message(region, rank, world_size, idle_s):
    group = SharedMemoryGroup(region, rank, world_size, Lane.OBJECTS)
    if rank == 0:
        time.sleep(idle_s)
        group.broadcast_bytes(pickle.dumps(time.monotonic()), 0)
        return 0.0, 0.0
    cpu_before = time.process_time()
    sent = pickle.loads(group.broadcast_bytes(None, 0))
    return time.process_time() - cpu_before, time.monotonic() - sent


def test_an_idle_rank_sleeps_and_still_hears_at_once():
    (_, *others) = run_ranks(3, wait_for_message, 1.5)
    for cpu_s, delay_s in others:
        assert cpu_s < 0.15, f"{cpu_s} s of CPU for 1.5 s of waiting"
        assert delay_s < 0.5, "woken by the sender, not by the once-a-second look"


def test_a_rank_that_waits_for_a_dead_peer_can_be_killed():
    region = mmap.mmap(-1, region_bytes(2))
    waiting = multiprocessing.get_context("fork").Process(
        target=lambda: SharedMemoryGroup(region, 1, 2).all_reduce(torch.ones(4))
    )
    waiting.start()
    waiting.join(0.3)
    assert waiting.exitcode is None, "it waits: nobody else is there"
    waiting.kill()
    waiting.join(5)
    assert waiting.exitcode == -signal.SIGKILL


def test_a_used_region_is_refused():
    region = mmap.mmap(-1, region_bytes(1))
    SharedMemoryGroup(region, 0, 1).broadcast_bytes(b"x", 0)
    with pytest.raises(RuntimeError, match="fresh"):
        SharedMemoryGroup(region, 0, 1)


def test_a_small_region_is_refused():
    with pytest.raises(ValueError, match="region_bytes"):
        SharedMemoryGroup(mmap.mmap(-1, region_bytes(2)), 0, 3)
