"""A device alone on its GPU: decode graphs before and after a recovery, how fast that is, a zygote without CUDA."""

import os
import re

import psutil
import pytest
from faults import kill_rank, recovered
from histories import prompt, request, until

from anchortp_sglang.bench.streams import Streams

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
        record = recovered(alone, kill_rank(alone, 0), "process")
    assert all(history.error is None and len(history.output_ids) == 120 for history in streams.histories)
    print(f"\ntime to first new token after SIGKILL: {record['tfs_s']:.2f} s")
    assert record["tfs_s"] <= TFS_S
    wait_captures(alone, 2)
    with Streams(alone.url, REQUESTS) as again:
        pass
    assert [history.output_ids for history in again.histories] == [h.output_ids for h in streams.histories]


def test_the_zygote_has_not_touched_the_driver(alone):
    (zygote,) = (
        process
        for process in psutil.Process(alone.pid).children(recursive=True)
        if "anchortp::zygote" in " ".join(process.cmdline())
    )
    opened = {os.readlink(f"/proc/{zygote.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{zygote.pid}/fd")}
    print(f"\nof NVIDIA's files the zygote has open: {sorted(name for name in opened if 'nvidia' in name)}")
    assert "/dev/nvidia-uvm" not in opened
    assert zygote.num_threads() == 1


def test_main_could_fork_the_zygote_itself(alone):
    """Else every start, and every recovery after the zygote's death, imports SGLang once more."""
    assert "cannot fork a zygote" not in alone.log.read_text(errors="replace")
