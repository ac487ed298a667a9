"""Whose process an anchor is, how long it lives, what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from anchor_rig import IDENTITY, TIMEOUT_S, AnchorRig, ended, eventually, kill

from anchortp_sglang.anchor.client import AnchorClient, AnchorGone, AnchorRefused, AnchorTimeout
from anchortp_sglang.anchor.files import HOST_DEVICE, AnchorFiles
from anchortp_sglang.anchor.launch import AnchorStartError, find_anchor, start_anchor

LINGER_S = 0.4


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[AnchorRig]:
    with AnchorRig(tmp_path) as rig:
        yield rig


def lingering(rig: AnchorRig, linger_s: float = 60.0, device: int = 0) -> None:
    """An anchor whose controller was killed."""
    controller = rig.controller()
    rig.start(device, linger_s, controller.pid)
    rig.client(device).allocate(0, "kv", 4096)
    controller.kill()
    controller.wait()
    assert eventually(lambda: rig.client(device).status().controller_pid is None)


def remains(rig: AnchorRig) -> set[str]:
    return {path.name for path in rig.run.path.iterdir()}


def test_it_is_no_descendant_of_its_starter(rig: AnchorRig) -> None:
    anchor = rig.start()
    assert anchor.pid not in {child.pid for child in psutil.Process().children(recursive=True)}
    assert os.getsid(anchor.pid) != os.getsid(0)


def test_it_is_small_and_imports_nothing_heavy(rig: AnchorRig) -> None:
    anchor = rig.start()
    maps = Path(f"/proc/{anchor.pid}/maps").read_text().splitlines()
    libraries = {os.path.basename(line) for line in maps if ".so" in line}
    assert any("zmq" in library for library in libraries), "these are not the maps of an anchor"
    for heavy in ("torch", "cuda", "c10", "multiarray", "blas", "sgl"):
        assert not any(heavy in library for library in libraries)
    assert psutil.Process(anchor.pid).memory_info().rss < 32 * 2**20


def test_it_does_not_take_over_preloaded_libraries(rig: AnchorRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("PYTHONSTARTUP", "/nowhere")
    environment = psutil.Process(rig.start().pid).environ()
    assert "LD_PRELOAD" not in environment and "PYTHONSTARTUP" not in environment


def test_it_can_be_told_by_name_and_by_status(rig: AnchorRig) -> None:
    anchor = rig.start(HOST_DEVICE, generation=3)
    status = rig.client(HOST_DEVICE).status()
    assert psutil.Process(anchor.pid).name() == "anchortp-anchor"
    assert (status.device, status.pid, status.run_id) == (-1, anchor.pid, rig.run.run_id)
    assert (status.identity, status.controller_pid, status.generation) == (IDENTITY, os.getpid(), 3)
    assert rig.files(HOST_DEVICE).record.endswith("anchor-host.json")
    found = find_anchor(rig.run.path, HOST_DEVICE)
    assert found is not None and found.pid == anchor.pid
    os.close(found.pidfd)


def test_a_terminal_cannot_end_it(rig: AnchorRig) -> None:
    anchor = rig.start()
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        os.kill(anchor.pid, number)
    assert rig.client().status().pid == anchor.pid


def test_it_ends_by_sigterm_and_leaves_only_its_log(rig: AnchorRig) -> None:
    before = remains(rig)
    anchor = rig.start()
    os.kill(anchor.pid, signal.SIGTERM)
    assert ended(anchor)
    assert remains(rig) == before | {"anchor-0.log"}
    assert find_anchor(rig.run.path, 0) is None


class TestLinger:
    def test_without_linger_it_ends_with_its_controller(self, rig: AnchorRig) -> None:
        controller = rig.controller()
        anchor = rig.start(linger_s=0.0, controller_pid=controller.pid)
        assert not ended(anchor, 0.1)
        controller.kill()
        assert ended(anchor)

    def test_it_stays_for_that_long_and_then_cleans_up(self, rig: AnchorRig) -> None:
        controller = rig.controller()
        anchor = rig.start(linger_s=LINGER_S, controller_pid=controller.pid)
        rig.client().allocate(0, "kv", 4096)
        died = time.monotonic()
        controller.kill()
        assert eventually(lambda: rig.client().status().controller_pid is None)
        assert [info.name for info in rig.client().status().segments] == ["kv"]
        assert ended(anchor)
        assert time.monotonic() - died >= LINGER_S
        assert "anchor-0.json" not in remains(rig)

    def test_a_controller_that_was_dead_from_the_start_counts(self, rig: AnchorRig) -> None:
        controller = rig.controller()
        controller.kill()
        controller.wait()
        assert ended(rig.start(linger_s=LINGER_S, controller_pid=controller.pid))

    def test_nothing_but_attaching_is_allowed(self, rig: AnchorRig) -> None:
        lingering(rig)
        for call in (lambda: rig.client().release(0, "kv"), lambda: rig.client().open_handle(0, "kv")):
            with pytest.raises(AnchorRefused) as error:
                call()
            assert error.value.code == "not_controller"

    def test_it_can_be_shut_down(self, rig: AnchorRig) -> None:
        lingering(rig)
        rig.client().shutdown()
        assert find_anchor(rig.run.path, 0) is None


class TestAttach:
    def test_a_new_server_takes_over_the_memory(self, rig: AnchorRig) -> None:
        lingering(rig)
        server = rig.controller()
        client = rig.client()
        client.attach(1, server.pid, IDENTITY, linger_s=LINGER_S)
        assert client.status().controller_pid == server.pid
        assert not client.allocate(1, "kv", 4096).created
        with pytest.raises(AnchorRefused, match="superseded"):
            client.release(0, "kv")

        anchor = find_anchor(rig.run.path, 0)
        assert anchor is not None
        server.kill()
        assert ended(anchor)
        os.close(anchor.pidfd)

    def test_is_refused_while_the_controller_lives(self, rig: AnchorRig) -> None:
        rig.start()
        with pytest.raises(AnchorRefused, match="stop that server") as error:
            rig.client().attach(1, rig.controller().pid, IDENTITY)
        assert error.value.code == "controller_alive"
        assert rig.client().status().controller_pid == os.getpid()

    def test_is_refused_for_another_model(self, rig: AnchorRig) -> None:
        lingering(rig)
        with pytest.raises(AnchorRefused) as error:
            rig.client().attach(1, os.getpid(), "another model")
        assert error.value.code == "wrong_identity"

    def test_is_refused_for_a_dead_process_and_the_linger_goes_on(self, rig: AnchorRig) -> None:
        lingering(rig, linger_s=0.6)
        dead = rig.controller()
        dead.kill()
        dead.wait()
        with pytest.raises(AnchorRefused) as error:
            rig.client().attach(1, dead.pid, IDENTITY)
        assert error.value.code == "no_such_process"
        assert rig.client().status().controller_pid is None
        assert eventually(lambda: find_anchor(rig.run.path, 0) is None)


class TestStart:
    def test_a_device_has_one_anchor(self, rig: AnchorRig) -> None:
        anchor = rig.start()
        with pytest.raises(AnchorStartError, match=f"already: process {anchor.pid}"):
            rig.start()
        assert rig.client().status().pid == anchor.pid

    def test_a_killed_anchor_is_replaced(self, rig: AnchorRig) -> None:
        first = rig.start()
        kill(first)
        second = rig.start()
        assert rig.client().status().pid == second.pid

    def test_a_lock_guards_a_device_even_if_its_record_is_lost(self, rig: AnchorRig) -> None:
        anchor = rig.start()
        os.unlink(rig.files().record)
        with pytest.raises(AnchorStartError, match="already has an anchor"):
            rig.start()
        assert not ended(anchor, 0)

    def test_a_failure_shows_the_log(self, rig: AnchorRig) -> None:
        with pytest.raises(AnchorStartError, match="must not be negative"):
            rig.start(linger_s=-1.0)

    def test_a_run_directory_with_too_long_a_path_is_refused(self, tmp_path: Path) -> None:
        deep = tmp_path / ("d" * 100)
        deep.mkdir()
        with pytest.raises(ValueError, match="Unix socket path"):
            start_anchor(deep, "run", 0, IDENTITY, os.getpid(), 0.0)


class TestClientErrors:
    def test_no_anchor_is_told_at_once(self, rig: AnchorRig) -> None:
        started = time.monotonic()
        for call in (rig.client().status, lambda: rig.client().open_handle(0, "kv")):
            with pytest.raises(AnchorGone, match="device 0"):
                call()
        assert time.monotonic() - started < TIMEOUT_S / 2

    def test_a_stopped_anchor_times_out(self, rig: AnchorRig) -> None:
        anchor = rig.start()
        os.kill(anchor.pid, signal.SIGSTOP)
        hasty = rig.client(timeout_s=0.2)
        for call in (hasty.status, lambda: hasty.open_handle(0, "kv")):
            with pytest.raises(AnchorTimeout):
                call()
        os.kill(anchor.pid, signal.SIGCONT)
        assert rig.client().status().pid == anchor.pid

    def test_another_run_is_refused(self, rig: AnchorRig) -> None:
        rig.start()
        with pytest.raises(AnchorRefused) as error:
            AnchorClient(rig.run.path, "another", 0).status()
        assert error.value.code == "wrong_run"


def test_a_starter_that_gave_up_leaves_no_anchor(rig: AnchorRig) -> None:
    with pytest.raises(AnchorStartError, match="not ready in time"):
        start_anchor(rig.run.path, rig.run.run_id, 0, IDENTITY, os.getpid(), 0.0, timeout_s=0.0)
    time.sleep(0.3)
    assert eventually(lambda: find_anchor(rig.run.path, 0) is None)
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert AnchorFiles(str(rig.run.path), 0).run_dir not in processes
