"""A run directory belongs to one user and one running server, and is found again by the next one."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from anchor_rig import IDENTITY, AnchorRig, eventually, exit_status, fork, kill

from anchortp_sglang.anchor import daemon, run_base, rundir
from anchortp_sglang.anchor.client import AnchorClient, AnchorGone
from anchortp_sglang.anchor.files import ServerRecord
from anchortp_sglang.anchor.keeper import RunDirKeeper
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
    def only_tmp_can_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR", "TMPDIR"):
            monkeypatch.delenv(name, raising=False)
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr(run_base, "_SHARED", ("/nowhere", str(tmp_path / "tmp")))

    def test_is_in_the_users_runtime_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        assert prepare_run_dir(None, "key").path == tmp_path / "anchortp" / "key"

    def test_is_the_services_own_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "service").mkdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path}/service:/elsewhere")
        assert run_base.default_base() == tmp_path / "service" / "anchortp"

    @pytest.mark.parametrize("runtime", ["", "/nowhere/at/all", "relative"])
    def test_is_the_users_own_under_tmp_otherwise(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str
    ) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        assert run_base.default_base() == tmp_path / "tmp" / f"anchortp-{os.geteuid()}"

    def test_is_never_a_logins_that_ends_with_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run_base, "_writable", lambda folder, own: True)
        monkeypatch.setattr(run_base, "make_private", lambda path: None)
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
        assert run_base.default_base() == Path(f"/nowhere/anchortp-{os.geteuid()}")

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")
    def test_is_not_in_another_users_runtime_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", 12345, 12345)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "theirs"))
        assert run_base.default_base().parent == tmp_path / "tmp"

    def test_must_be_private_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        (tmp_path / "anchortp").mkdir(mode=0o755)
        with pytest.raises(RunDirError, match="chmod 700"):
            prepare_run_dir(None, "key")

    def test_without_any_place_the_refusal_names_what_was_tried(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "tmp").rmdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
        with pytest.raises(RunDirError, match=f"{tmp_path}/missing, /nowhere, {tmp_path}/tmp .*--anchor-run-dir"):
            prepare_run_dir(None, "key")


class TestOtherPidNamespaces:
    """Two containers share a folder. The pids of one say nothing in the other, or name somebody else there."""

    def test_a_server_there_keeps_its_directory(self, tmp_path: Path) -> None:
        with other_container(tmp_path, anchor=False), pytest.raises(RunDirInUse, match="another container"):
            prepare_run_dir(tmp_path, "key")
        prepare_run_dir(tmp_path, "key")

    def test_an_anchor_that_lingers_there_keeps_it_too(self, tmp_path: Path) -> None:
        with other_container(tmp_path, anchor=True), pytest.raises(RunDirInUse, match=r"linger in .* \(anchor-0\)"):
            prepare_run_dir(tmp_path, "key")
        prepare_run_dir(tmp_path, "key")

    def test_children_do_not_hold_a_dead_servers_directory(self, tmp_path: Path) -> None:
        """The lock is the server's alone: a child that it has forked, and that lives on, does not have it."""
        reader, writer = os.pipe()

        def server() -> None:
            prepare_run_dir(tmp_path, "key")
            if os.fork() == 0:
                os.close(writer)
                os.read(reader, 1)
                os._exit(0)

        assert exit_status(fork(server)) == 0
        prepare_run_dir(tmp_path, "key")
        os.close(writer)
        os.close(reader)


@contextlib.contextmanager
def other_container(base: Path, anchor: bool) -> Iterator[None]:
    """A server, or an anchor whose server is dead, as seen from a container where its pid is nobody's."""
    lives, living = os.pipe()
    end, ending = os.pipe()

    def server() -> None:
        os.close(ending)
        run = prepare_run_dir(base, "key")
        record = ServerRecord(pid=2**22 + 1, start_ticks=1, run_id=run.run_id)
        record.write(str(run.path / "server.json"))
        if anchor:
            rundir._let_go(run.path)  # the server is dead
            daemon.use_log(str(run.path / "anchor-0.log"), 0.0)
        os.write(living, b"1")
        os.read(end, 1)

    pid = fork(server)
    os.close(end)
    assert os.read(lives, 1)
    try:
        yield
    finally:
        os.close(ending)
        os.close(lives)
        os.close(living)
        assert exit_status(pid) == 0


class TestVanished:
    """Somebody removes the directory of a live server: a login ends, /tmp is cleaned."""

    def test_anchors_and_server_make_it_again_and_memory_is_kept(self, tmp_path: Path) -> None:
        with AnchorRig(tmp_path) as rig:
            client = rig.client()
            rig.start()
            client.allocate(0, "weights", 4096)
            keeper = RunDirKeeper(rig.run)
            for times in (1, 2):
                shutil.rmtree(rig.run.path)
                keeper.look()
                assert (keeper.lost, keeper.made_again) == (None, times)
                assert eventually(rig.files().complete)
                assert [segment.name for segment in client.status().segments] == ["weights"]
                os.close(client.open_handle(0, "weights").fd)
                assert rig.run.path.stat().st_mode & 0o777 == 0o700
            client.shutdown()
            assert not any(rig.run.path.glob("anchor-*.[cfj]*"))

    def test_a_call_in_that_moment_waits_for_the_anchor(self, tmp_path: Path) -> None:
        with AnchorRig(tmp_path) as rig:
            rig.start()
            client = rig.client()
            client.fence(1)
            shutil.rmtree(rig.run.path)
            assert client.status().generation == 1

    def test_an_anchor_that_died_with_it_is_gone(self, tmp_path: Path) -> None:
        with AnchorRig(tmp_path) as rig:
            anchor, client = rig.start(), rig.client()
            client.fence(1)
            kill(anchor)
            shutil.rmtree(rig.run.path)
            began = time.monotonic()
            with pytest.raises(AnchorGone):
                client.status()
            assert time.monotonic() - began < 1

    def test_another_users_directory_in_its_place_is_told_and_not_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        keeper = RunDirKeeper(prepare_run_dir(tmp_path, "key"))
        shutil.rmtree(tmp_path / "key")
        (tmp_path / "key").mkdir(mode=0o755)
        keeper.look()
        keeper.look()
        assert keeper.lost is not None and "others may enter" in keeper.lost
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        (tmp_path / "key").rmdir()
        keeper.look()
        assert (keeper.lost, keeper.made_again) == (None, 1)

    def test_it_is_still_this_servers_and_goes_with_it(self, tmp_path: Path) -> None:
        run = prepare_run_dir(tmp_path, "key")
        shutil.rmtree(run.path)
        RunDirKeeper(run).look()

        def other() -> None:
            with pytest.raises(RunDirInUse):
                prepare_run_dir(tmp_path, "key")

        assert exit_status(fork(other)) == 0
        remove_run_dir(run)
        assert not run.path.exists()
        remove_run_dir(run)


class TestOutside:
    """Files of a killed server that lie elsewhere, as in /dev/shm."""

    def left_by(self, tmp_path: Path, key: str) -> list[Path]:
        """What a server with that key had, which has been killed."""
        file, folder = tmp_path / f"{key}.shm", tmp_path / f"{key}-metrics"

        def server() -> None:
            run = prepare_run_dir(tmp_path / "base", key)
            file.touch()
            (folder / "below").mkdir(parents=True)
            RunDirKeeper(run).note_outside([str(file), str(folder)])

        assert exit_status(fork(server)) == 0
        return [file, folder]

    @pytest.mark.parametrize(("key", "next_key"), [("run-1", "run-1"), ("run-1", "run-2"), ("engine-1", "run-2")])
    def test_the_next_server_removes_them(self, tmp_path: Path, key: str, next_key: str) -> None:
        left = self.left_by(tmp_path, key)
        assert all(path.exists() for path in left)
        prepare_run_dir(tmp_path / "base", next_key)
        assert not any(path.exists() for path in left)
        assert (tmp_path / "base" / key).exists() == (key == "run-1")

    def test_those_of_a_live_server_stay(self, tmp_path: Path) -> None:
        run = prepare_run_dir(tmp_path / "base", "run-1")
        (tmp_path / "mine").touch()
        RunDirKeeper(run).note_outside([str(tmp_path / "mine")])
        prepare_run_dir(tmp_path / "base", "run-2")
        assert exit_status(fork(lambda: prepare_run_dir(tmp_path / "base", "run-3") and None)) == 0
        assert (tmp_path / "mine").exists()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
    def test_those_of_another_user_stay(self, tmp_path: Path) -> None:
        file, _ = self.left_by(tmp_path, "run-1")
        os.chown(file, 12345, 12345)
        prepare_run_dir(tmp_path / "base", "run-1")
        assert file.exists()


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
