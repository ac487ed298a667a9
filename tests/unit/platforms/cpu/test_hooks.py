"""What the CPU hooks promise: calls for all ranks go through shared memory, every other one stays stock."""

import mmap
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from rank_processes import TIMEOUT_S, run_ranks

from anchortp_sglang.platforms.cpu import futex, hooks
from anchortp_sglang.platforms.cpu.collectives import SharedMemoryGroup, region_bytes
from anchortp_sglang.rank import attachment

pytestmark = pytest.mark.skipif(not futex.supported(), reason="the store order of x86-64 is assumed")


def stock(*_args, **_kwargs):
    return "stock"


def from_another_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(TIMEOUT_S)


def hooked_calls(region, rank, world_size):
    attachment._current = SimpleNamespace(collectives=hooks.share(region, rank, world_size))
    everyone = SimpleNamespace(world_size=world_size, size=lambda: world_size)
    some = SimpleNamespace(world_size=world_size - 1, size=lambda: world_size - 1)
    ones = torch.ones(2, 3)
    assert torch.equal(hooks.all_reduce(stock, everyone, ones), torch.full((2, 3), float(world_size)))
    assert hooks.all_gather(stock, everyone, torch.ones(2, 3)).shape == (2, 3 * world_size)
    gathered = torch.zeros(2 * world_size, 3)
    hooks.all_gather_into_tensor(stock, everyone, gathered, torch.ones(2, 3))
    assert gathered.sum() == 6 * world_size
    for data in ([], ["request", {"rid": 7}]):
        assert hooks.broadcast_pyobj(stock, data if rank == 0 else None, rank, everyone, src=0) == data
    for call in (
        lambda: hooks.all_reduce(stock, some, ones),
        lambda: hooks.all_reduce(stock, everyone, torch.ones(3, device="meta")),
        lambda: hooks.all_reduce(stock, everyone, torch.ones(3, dtype=torch.bool)),
        lambda: hooks.all_gather(stock, everyone, ones, 0, output_tensor_list=[ones]),
        lambda: hooks.broadcast_pyobj(stock, [], rank, some),
        lambda: hooks.broadcast_pyobj(stock, [], rank, everyone, 0, force_cpu_device=False),
        lambda: from_another_thread(hooks.broadcast_pyobj, stock, [], rank, everyone),
    ):
        assert call() == "stock"


def test_the_hooks_take_over_calls_for_all_ranks_and_no_others():
    run_ranks(3, hooked_calls)


def test_without_a_region_the_hooks_are_stock():
    group = SimpleNamespace(world_size=2, size=lambda: 2)
    assert hooks.all_reduce(stock, group, torch.ones(2)) == "stock"
    assert hooks.all_gather(stock, group, torch.ones(2)) == "stock"
    assert hooks.broadcast_pyobj(stock, [], 0, group) == "stock"
    assert hooks.share(mmap.mmap(-1, region_bytes(1)), 0, 1) is None, "a single rank has nobody to talk to"


def test_another_machine_keeps_gloo(monkeypatch):
    monkeypatch.setattr(futex.platform, "machine", lambda: "aarch64")
    assert hooks.share(mmap.mmap(-1, region_bytes(2)), 0, 2) is None
    with pytest.raises(RuntimeError, match="x86-64"):
        SharedMemoryGroup(mmap.mmap(-1, region_bytes(2)), 0, 2)
