"""A start takes no more memory than stock's, and half the time."""

import os
import time
from pathlib import Path

import footprint
import pytest

from anchortp_sglang.platforms.cpu.environment import cpu_defaults
from anchortp_sglang.startup.device import as_arguments
from anchortp_sglang.testing.memory import total_bytes
from anchortp_sglang.testing.server import Server

TP_SIZE = 4
FLAGS = ["--dtype", "float32", "--max-total-tokens", "16384"]
MOST = 1.05


def measure(server, run_base=None):
    """(seconds from a cold start to the first token, bytes of the whole server)."""
    began = time.monotonic()
    with server:
        server.post("/generate", {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 1}})
        seconds = time.monotonic() - began
        server.post("/generate", {"input_ids": list(range(200)), "sampling_params": {"max_new_tokens": 32}})
        return seconds, total_bytes(footprint.server_pids(server.pid, run_base))


@pytest.mark.skipif("ANCHORTP_FOOTPRINT" not in os.environ, reason="takes two minutes: set ANCHORTP_FOOTPRINT=1")
@pytest.mark.timeout(300)
def test_a_start_takes_no_more_memory_than_stock_and_is_faster(checkpoint, places, run_base, tmp_path):
    model = checkpoint["qwen3"]
    defaults = cpu_defaults({}, os.environ, TP_SIZE, sorted(os.sched_getaffinity(0)))
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    servers = {
        "ours": Server(model, TP_SIZE, *FLAGS, log=tmp_path / "ours.log", env=places),
        "stock": Server(
            model,
            TP_SIZE,
            *FLAGS,
            *as_arguments(defaults.flags),
            log=tmp_path / "stock.log",
            module="stock_server",
            env=defaults.env | {"PYTHONPATH": path},
        ),
    }
    seconds, nbytes = {}, {}
    for name, server in servers.items():
        seconds[name], nbytes[name] = measure(server, run_base if name == "ours" else None)
        print(f"{name}: {seconds[name]:.1f} s to the first token, {nbytes[name] >> 20} MiB")
    assert nbytes["ours"] <= MOST * nbytes["stock"]
    assert seconds["ours"] < seconds["stock"]
