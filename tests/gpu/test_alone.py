"""A device alone on its GPU: decode graphs before and after a recovery, how fast that is, a zygote without CUDA."""

import os
import re

import psutil
import pytest
from faults import kill_rank, recovered
from histories import prompt, request, until

from anchortp_sglang.testing.streams import Streams

TFS_S = 3.0
REQUESTS = [request(prompt(seed, 40), 120) for seed in range(4)]


@pytest.fixture(scope="module")
def alone(launch):
    with launch(1) as server:
        yield server


def captures(server):
    return len(re.findall(r"decode graphs captured", server.log.read_text(errors="replace")))


def wait_captures(server, count):
    until(lambda: captures(server) >= count, f"graphs were not captured {count} times", timeout_s=300)


def test_graphs_are_captured_after_the_start_and_after_a_recovery(alone):
    with Streams(alone.url, REQUESTS[:1]):
        pass
    wait_captures(alone, 1)
    with Streams(alone.url, REQUESTS) as streams:
        streams.wait_tokens(20)
        recovered(alone, kill_rank(alone, 0), "process")
    assert all(history.error is None and len(history.output_ids) == 120 for history in streams.histories)
    tfs_s = alone.status()["recoveries"][-1]["tfs_s"]
    print(f"\ntime to first new token after SIGKILL: {tfs_s:.2f} s")
    assert tfs_s <= TFS_S
    wait_captures(alone, 2)
    with Streams(alone.url, REQUESTS) as again:
        pass
    assert [history.output_ids for history in again.histories] == [h.output_ids for h in streams.histories]


def test_the_zygote_is_free_of_cuda_wherever_it_comes_from(alone):
    """Forked from main if nothing there has touched CUDA, else started in an interpreter of its own."""
    spawned = "cannot fork a zygote" in alone.log.read_text(errors="replace")
    children = psutil.Process(alone.pid).children()
    (zygote,) = (child for child in children if "anchortp::zygote" in " ".join(child.cmdline()))
    print(f"\nthe zygote was {'spawned' if spawned else 'forked'}; it has open: {driver_files(zygote.pid)}")
    assert spawned == ("/dev/nvidia-uvm" in driver_files(alone.pid))
    assert "/dev/nvidia-uvm" not in driver_files(zygote.pid)
    assert zygote.num_threads() == 1


def driver_files(pid):
    opened = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    return sorted(name for name in opened if name.startswith("/dev/nvidia"))
