"""However a server ends, it leaves nothing behind."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from faults import child_named, holders, kill, kill_rank
from forge import LAUNCHER
from histories import prompt, request, until
from remains import Place, Remains, shm

from anchortp_sglang.anchor.rundir import prepare_run_dir, remove_run_dir
from anchortp_sglang.testing.process_tree import is_zombie
from anchortp_sglang.testing.server import Server
from anchortp_sglang.testing.streams import Streams

ENDLESS = [request(prompt(1400 + seed, 40), 3000) for seed in range(2)]
SHORT = [request(prompt(1410 + seed, 40), 150) for seed in range(2)]
UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc")


def test_sigterm_in_a_recovery_lets_requests_finish_and_leaves_nothing_behind(launch):
    """And so does another fault, while SGLang waits for them."""
    with launch(2, module=LAUNCHER) as server:
        with Streams(server.url, SHORT) as streams:
            streams.wait_tokens(5)
            remains = Remains(server)
            first = kill_rank(server, 1)
            until(lambda: server.status()["state"] == "recovering", "no recovery began", poll_s=0)
            os.kill(server.pid, signal.SIGTERM)
            server.wait_serving(first.generation + 1)
            remains.note(server)
            kill_rank(server, 0)
            assert not any(history.done for history in streams.histories), "the drain was over too soon"
            streams.wait(40)
            assert all(history.done for history in streams.histories), "a request hangs"
        for history in streams.histories:
            assert history.error is None and len(history.output_ids) == 150
        assert server.wait(40) == 0
        remains.assert_gone()


@pytest.mark.parametrize("moment", ["importing SGLang", "anchors hold their memory"])
def test_sigterm_in_the_start_ends_it_at_once_and_leaves_nothing_behind(checkpoint, tmp_path, moment):
    place = Place(tmp_path / "log")
    server = Server(checkpoint, 2, "--device", "cpu", "--max-total-tokens", "4096", log=place.log, env=place.env)
    try:
        with place.log.open("wb") as log:
            process = subprocess.Popen(server._command, stdout=log, stderr=log, env=server._env)
        until(lambda: moment in server.tail(), f"it did not come to {moment}", timeout_s=120)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM
        until(lambda: not processes_of(place), lambda: f"processes live on: {processes_of(place)}", timeout_s=10)
        assert place.leftovers() == [] and shm() <= place.shm_before
    finally:
        for child in processes_of(place):
            child.kill()
        place.remove()


def processes_of(place):
    """Those that were started with this place's environment, anchors included."""
    mine = f"TMPDIR={place.folder}\0".encode()
    found = []
    for child in psutil.process_iter():
        try:
            with open(f"/proc/{child.pid}/environ", "rb") as environ:
                if mine in environ.read() and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
        except (OSError, psutil.Error):
            continue
    return found


@pytest.mark.skipif(subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0, reason="no namespaces")
def test_as_pid_1_it_reaps_orphans_drains_on_sigterm_and_ends_on_the_second(launch):
    with launch(2, prefix=UNSHARE) as server:
        [main] = psutil.Process(server.pid).children()
        remains = Remains(server)
        with Streams(server.url, ENDLESS) as streams:
            streams.wait_tokens(5)
            generation = server.status()["generation"]
            kill(next(p.pid for p in main.children() if "--device=1" in p.cmdline()))
            until(lambda: server.status()["devices"][1]["anchor_pid"], "no new anchor")
            kill(child_named(server, "sglang::detokenizer"))
            server.wait_serving(generation + 1)
            remains.note(server)
            until(lambda: not zombies(main), lambda: f"zombies: {zombies(main)}", timeout_s=30)
            os.kill(main.pid, signal.SIGTERM)
            tokens = min(len(history.output_ids) for history in streams.histories)
            streams.wait_tokens(tokens + 20)
            os.kill(main.pid, signal.SIGTERM)
            assert server.wait(10) == 128 + signal.SIGTERM
            streams.wait(10)
        remains.assert_gone()


def zombies(process):
    return [child for child in process.children(recursive=True) if is_zombie(child.pid)]


def test_sigkill_of_the_server_ends_its_processes_and_the_next_one_removes_its_files(launch):
    with launch(2, "--enable-metrics", module=LAUNCHER) as server:
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
        for expected in ("anchortp-metrics-", "sglang_loads_", "anchortp-zmq-"):
            assert any(path.name.startswith(expected) for path in left), f"no {expected}… among {left}"
        remove_run_dir(prepare_run_dir(base, key))  # as the next server does
        assert [path for path in noted if path.exists()] == server.place.leftovers() == []
