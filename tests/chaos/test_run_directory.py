"""The run directory of a live server is removed, as when a login ends or /tmp is cleaned; then a fault comes."""

import shutil
from pathlib import Path

import pytest
from faults import kill_rank, recovered
from histories import assert_identical, outcomes, prompt, request, until

from anchortp_sglang.testing.streams import Streams

REQUESTS = [request(prompt(1500 + seed, 30), 80) for seed in range(2)]
NOTICED_S = 5.0


@pytest.mark.parametrize("moment", ["seconds before the fault", "with the fault"])
def test_a_fault_after_the_run_directory_has_vanished_costs_no_token(server, unbroken, moment):
    expected = unbroken(REQUESTS)
    before = server.status()["run_dir"]
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(10)
        shutil.rmtree(before["path"])
        if moment != "with the fault":
            until(lambda: made_again(server) > before["made_again"], "nobody noticed", timeout_s=NOTICED_S)
        recovered(server, kill_rank(server, 1), "process")
    assert_identical(expected, outcomes(streams.histories))
    until(lambda: made_again(server) > before["made_again"], "nobody noticed", timeout_s=NOTICED_S)
    assert server.status()["run_dir"]["lost"] is None
    assert {path.stem for path in Path(before["path"]).glob("anchor-*.ctl")} == {
        f"anchor-{device}" for device in ("host", 0, 1, 2, 3)
    }


def made_again(server):
    return server.status()["run_dir"]["made_again"]
