"""Bandwidth of moves against plain copies, and the time to attach: printed, and held against what is promised."""

import time

import pytest
import torch
from arena_platforms import gpu_uuid

SHARD_BYTES = 30 << 30
ATTACH_S = 0.1
SHARE_OF_BANDWIDTH = 0.8
GIB = 1 << 30


@pytest.fixture(scope="module")
def device():
    from anchortp_sglang.memory.cuda_driver import device_by_uuid

    torch.cuda.init()
    return torch.device("cuda", device_by_uuid(gpu_uuid()))


def seconds(work):
    """The best of five; what is timed is warm then."""
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def moved(device, make):
    """A mover's own work, without its buffers, which a rank makes once."""
    from anchortp_sglang.platforms.cuda.mover import CudaMover

    mover = CudaMover(device)
    with mover:
        make(mover)
    return mover.moved


def compare(name, nbytes, plain_s, ours_s):
    print(f"\n{name}: plain {nbytes / plain_s / 1e9:.1f} GB/s, mover {nbytes / ours_s / 1e9:.1f} GB/s")
    assert plain_s / ours_s >= SHARE_OF_BANDWIDTH


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_a_local_re_layout_is_nearly_as_fast_as_a_copy(device, dim):
    """A quarter of each of 16 matrices, of rows or of columns, into another place."""
    shards = [torch.ones(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(16)]
    into = [torch.empty_like(shard) for shard in shards]
    flat, other = torch.ones(GIB, dtype=torch.uint8, device=device), torch.empty(GIB, dtype=torch.uint8, device=device)

    def work(mover):
        for source, target in zip(shards, into, strict=True):
            mover.copy(target.narrow(dim, 4096, 2048), source.narrow(dim, 0, 2048))

    nbytes = 16 * 2048 * 8192 * 2
    plain = seconds(lambda: other.copy_(flat)) / GIB * nbytes
    ours = min(moved(device, work).seconds for _ in range(5))
    compare(f"re-layout of {'rows' if dim == 0 else 'columns'}", nbytes, plain, ours)


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_a_reload_is_nearly_as_fast_as_a_pinned_copy(device, dim):
    pinned = torch.ones(GIB, dtype=torch.uint8, pin_memory=True)
    other = torch.empty(GIB, dtype=torch.uint8, device=device)
    plain = seconds(lambda: other.copy_(pinned))
    source = torch.ones(8192, 4096, dtype=torch.bfloat16)
    target = torch.empty(8192, 8192, dtype=torch.bfloat16, device=device)

    def work(mover):
        for _ in range(16):
            mover.load(target.narrow(1, 0, 4096) if dim else target.view(16384, 4096)[:8192], source)

    ours = min(moved(device, work).seconds for _ in range(5))
    compare(
        f"reload of {'rows' if dim == 0 else 'columns'}", 16 * source.nbytes, plain / GIB * 16 * source.nbytes, ours
    )


def test_a_large_shard_is_attached_at_once(device):
    from anchortp_sglang.memory.cuda_vmm import create, map_fd

    free, _ = torch.cuda.mem_get_info(device)
    nbytes = min(SHARD_BYTES, int(free * 0.8))
    fd = create(device.index, nbytes)
    began = time.perf_counter()
    mapping = map_fd(fd, nbytes, device.index, writable=False)
    took = time.perf_counter() - began
    mapping.unmap()
    print(f"\n{nbytes / GIB:.1f} GiB attached in {took * 1000:.1f} ms")
    assert took <= ATTACH_S
