"""However a server ends, it leaves nothing behind."""

import os
import signal
import time
from pathlib import Path

from faults import holders, kill_rank
from histories import prompt, request, until
from remains import Remains

from anchortp_sglang.anchor.rundir import prepare_run_dir, remove_run_dir
from anchortp_sglang.bench.streams import Streams

ENDLESS = [request(prompt(1400 + seed, 40), 3000) for seed in range(2)]
SHORT = [request(prompt(1410 + seed, 40), 60) for seed in range(2)]


def test_sigterm_in_a_recovery_lets_requests_finish_and_leaves_nothing_behind(launch):
    with launch(2) as server:
        with Streams(server.url, SHORT) as streams:
            streams.wait_tokens(5)
            remains = Remains(server)
            kill_rank(server, 1)
            until(lambda: server.status()["state"] == "recovering", "no recovery began", poll_s=0)
            os.kill(server.pid, signal.SIGTERM)
            streams.wait(40)
            assert all(history.done for history in streams.histories), "a request hangs"
        for history in streams.histories:
            assert history.error is None and len(history.output_ids) == 60
        server.wait(40)
        remains.assert_gone()


def test_sigkill_of_the_server_ends_its_processes_and_the_next_one_removes_its_files(launch):
    with launch(2, "--enable-metrics") as server:
        with Streams(server.url, ENDLESS) as streams:
            streams.wait_tokens(5)
            remains = Remains(server)
            os.kill(server.pid, signal.SIGKILL)
            killed_at = time.monotonic()
            until(lambda: not remains.alive(), lambda: f"processes live on: {remains.alive()}", timeout_s=10)
            assert time.monotonic() - killed_at < 10
            streams.wait(10)
        assert all(history.error for history in streams.histories)
        assert remains.memory and not holders(remains.memory)
        server.wait(5)
        base, key = server.place.folder / "anchortp", f"run-{server.port}"
        noted = [Path(line) for line in (base / key / "outside.txt").read_text().splitlines()]
        left = [path for path in noted if path.exists()]
        for expected in ("anchortp-metrics-", "sglang_loads_", "tmp"):
            assert any(path.name.startswith(expected) for path in left), f"no {expected}… among {left}"
        remove_run_dir(prepare_run_dir(base, key))  # as the next server does
        assert [path for path in noted if path.exists()] == server.place.leftovers() == []
