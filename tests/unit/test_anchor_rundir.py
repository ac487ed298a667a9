"""A run directory belongs to one user and one running server, and is found again by the next one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from anchor_rig import IDENTITY, AnchorRig, exit_status, fork

from anchortp_sglang.anchor import rundir
from anchortp_sglang.anchor.client import AnchorClient
from anchortp_sglang.anchor.files import ServerRecord
from anchortp_sglang.anchor.launch import (
    RunDir,
    RunDirError,
    RunDirInUse,
    live_anchors,
    prepare_run_dir,
    remove_run_dir,
    start_anchor,
)
from anchortp_sglang.anchor.pids import is_alive, start_ticks


@pytest.fixture
def dead_server(tmp_path: Path) -> RunDir:
    """The run directory ``tmp_path/key`` of a server that has died."""
    assert exit_status(fork(lambda: prepare_run_dir(tmp_path, "key") and None)) == 0
    record = ServerRecord.read(str(tmp_path / "key" / "server.json"))
    assert record is not None and not record.alive()
    return RunDir(tmp_path / "key", record.run_id)


def test_it_is_private_and_names_its_owner(tmp_path: Path) -> None:
    run = prepare_run_dir(tmp_path, "key")
    assert run.path == tmp_path / "key" and run.stale_anchors == ()
    assert run.path.stat().st_mode & 0o777 == 0o700
    record = ServerRecord.read(str(run.path / "server.json"))
    assert record is not None
    assert (record.pid, record.run_id, record.alive()) == (os.getpid(), run.run_id, True)


def test_a_running_server_keeps_its_directory(tmp_path: Path) -> None:
    run = prepare_run_dir(tmp_path, "key")

    def other_server() -> None:
        with pytest.raises(RunDirInUse, match=f"process {os.getppid()}"):
            prepare_run_dir(tmp_path, "key")
        with pytest.raises(RunDirInUse):
            remove_run_dir(run)
        assert prepare_run_dir(tmp_path, "other-key").run_id != run.run_id

    assert exit_status(fork(other_server)) == 0
    with pytest.raises(RunDirInUse):
        prepare_run_dir(tmp_path, "key")


def test_a_dead_server_leaves_its_directory_to_the_next(tmp_path: Path, dead_server: RunDir) -> None:
    run = prepare_run_dir(tmp_path, "key")
    assert run.stale_anchors == ()
    assert run.run_id != dead_server.run_id


def test_a_process_with_the_dead_servers_pid_is_not_that_server(tmp_path: Path, dead_server: RunDir) -> None:
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    record = ServerRecord(pid=os.getpid(), start_ticks=ticks - 1, run_id="old")
    record.write(str(dead_server.path / "server.json"))
    assert prepare_run_dir(tmp_path, "key").run_id != "old"


@pytest.mark.parametrize("garbage", [b"", b"{", b'{"pid": "x"}', b"\xff\xfe"])
def test_an_unreadable_record_is_no_server(tmp_path: Path, dead_server: RunDir, garbage: bytes) -> None:
    (dead_server.path / "server.json").write_bytes(garbage)
    prepare_run_dir(tmp_path, "key")


def test_anchors_of_a_dead_server_are_found_and_taken_over(tmp_path: Path) -> None:
    def server() -> None:
        run = prepare_run_dir(tmp_path, "key")
        for device in (1, 0, -1):
            start_anchor(run.path, run.run_id, device, IDENTITY, os.getpid(), linger_s=20.0)
        AnchorClient(run.path, run.run_id, 1).shutdown()

    assert exit_status(fork(server)) == 0
    run = prepare_run_dir(tmp_path, "key")
    assert run.stale_anchors == (-1, 0)
    for device in run.stale_anchors:
        client = AnchorClient(run.path, run.run_id, device)
        client.attach(client.status().generation + 1, os.getpid(), IDENTITY)
    with pytest.raises(RunDirInUse, match="shut them down"):
        remove_run_dir(run)
    for device in run.stale_anchors:
        AnchorClient(run.path, run.run_id, device).shutdown()
    remove_run_dir(run)
    assert not run.path.exists()


def test_anchors_of_two_runs_in_one_directory_are_refused(tmp_path: Path, dead_server: RunDir) -> None:
    path = dead_server.path
    anchors = [start_anchor(path, f"run-{n}", n, IDENTITY, os.getpid(), 0.0) for n in range(2)]
    with pytest.raises(RunDirError, match=f"processes {anchors[0].pid}, {anchors[1].pid}"):
        prepare_run_dir(tmp_path, "key")
    for anchor in anchors:
        AnchorClient(path, f"run-{anchor.device}", anchor.device).shutdown()
        os.close(anchor.pidfd)


def test_only_live_anchors_are_listed(tmp_path: Path) -> None:
    with AnchorRig(tmp_path) as rig:
        path = rig.run.path
        rig.start(3)
        (path / "anchor-9.json").write_bytes(b'{"pid": 1, "start_ticks": 1, "run_id": "r", "device": 9}')
        (path / "anchor-8.json").write_bytes(b"garbage")
        assert [anchor.device for anchor in live_anchors(path)] == [3]


class TestRefusals:
    @pytest.mark.parametrize("key", ["", ".", "..", "../up", "a/b", "-rf", "a b", "k" * 65, "ключ"])
    def test_keys_that_are_no_file_names(self, tmp_path: Path, key: str) -> None:
        with pytest.raises(RunDirError, match="run key"):
            prepare_run_dir(tmp_path, key)

    def test_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        (tmp_path / "key").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(RunDirError, match="link"):
            prepare_run_dir(tmp_path, "key")

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "key").touch(mode=0o700)
        with pytest.raises(RunDirError, match="not a directory"):
            prepare_run_dir(tmp_path, "key")

    def test_a_directory_others_may_enter(self, tmp_path: Path) -> None:
        (tmp_path / "key").mkdir(mode=0o755)
        with pytest.raises(RunDirError, match="chmod 700"):
            prepare_run_dir(tmp_path, "key")

    def test_another_users_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        prepare_run_dir(tmp_path, "key")
        mine = os.geteuid()
        monkeypatch.setattr(rundir.os, "geteuid", lambda: mine + 1)
        with pytest.raises(RunDirError, match=f"belongs to user {mine}"):
            prepare_run_dir(tmp_path, "key")

    def test_a_path_too_long_for_sockets(self, tmp_path: Path) -> None:
        with pytest.raises(RunDirError, match="Unix socket path"):
            prepare_run_dir(tmp_path / ("d" * 60), "k" * 60)


class TestDefaultBase:
    @pytest.fixture(autouse=True)
    def no_runtime_dir(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        yield

    def test_is_in_the_users_runtime_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        assert prepare_run_dir(None, "key").path == tmp_path / "anchortp" / "key"

    @pytest.mark.parametrize("runtime", ["", "/nowhere/at/all"])
    def test_is_the_users_own_under_tmp_otherwise(self, monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        assert rundir._default_base() == Path(f"/tmp/anchortp-{os.geteuid()}")

    def test_must_be_private_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        (tmp_path / "anchortp").mkdir(mode=0o755)
        with pytest.raises(RunDirError, match="chmod 700"):
            prepare_run_dir(None, "key")


def test_a_zombie_is_not_alive() -> None:
    pid = fork(lambda: None)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert start_ticks(pid) is None
    assert exit_status(pid) == 0


def test_this_process_is_alive_and_a_later_one_with_its_pid_is_another() -> None:
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    assert is_alive(os.getpid(), ticks)
    assert not is_alive(os.getpid(), ticks + 1)
