"""An anchor owns GPU memory without a context, and its memory is freed when the last holder lets go."""

import contextlib

import pynvml
import pytest
from anchor_rig import AnchorRig, kill
from arena_platforms import gpu_uuid
from arena_user import ArenaUser
from histories import until

from anchortp_sglang.memory.gpu import GpuShare

NBYTES = 1 << 30
SLACK = 256 << 20  # contexts of other processes come and go


@pytest.fixture
def gpu():
    pynvml.nvmlInit()
    yield pynvml.nvmlDeviceGetHandleByUUID(gpu_uuid())
    pynvml.nvmlShutdown()


@pytest.fixture
def rig(tmp_path):
    with AnchorRig(tmp_path, GpuShare(gpu_uuid(), 4 * NBYTES)) as rig:
        yield rig


def used(gpu):
    return pynvml.nvmlDeviceGetMemoryInfo(gpu).used


def processes(gpu):
    return {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)}


def test_the_anchor_has_memory_but_no_context(gpu, rig):
    before = used(gpu)
    anchor = rig.start()
    rig.client().allocate(0, "weights", NBYTES)
    assert used(gpu) - before == pytest.approx(NBYTES, abs=SLACK)
    assert anchor.pid not in processes(gpu)
    with contextlib.closing(_Attached(rig)) as rank:  # and the list is not just empty
        assert rank.process.pid in processes(gpu)
        assert anchor.pid not in processes(gpu)


def test_memory_is_freed_when_both_are_dead_and_not_before(gpu, rig):
    before = used(gpu)
    anchor = rig.start()
    rig.client().allocate(0, "weights", NBYTES)
    rank = _Attached(rig)
    kill(anchor)
    assert used(gpu) - before > NBYTES - SLACK
    rank.close()
    until(lambda: used(gpu) - before < SLACK, "the memory was not freed")


class _Attached(ArenaUser):
    def __init__(self, rig):
        super().__init__(rig.run, rig.gpu)
        self.open("weights", 0, True)

    def close(self):
        self.kill()
