"""Checks of ``anchortp doctor``: can this machine and environment run the server, and if not, what is to do?

Imports neither SGLang nor torch, so it answers at once, even if they cannot be imported.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anchortp_sglang.hooks import fork, manifest
from anchortp_sglang.memory.cgroups import memory_room

GIB = 1 << 30
OLDEST_PYTHON = (3, 11)
# A process that has imported SGLang and all its models has 1.1 GiB, which forked ranks share.
MEMORY_NEEDED_BYTES = 2 * GIB
SHM_NEEDED_BYTES = 64 << 20


@dataclass(frozen=True)
class Check:
    """One finding. With a FAIL the server cannot start. ``way_out``: what to do, empty on PASS."""

    name: str
    level: Literal["PASS", "WARN", "FAIL"]
    detail: str
    way_out: str = ""


def run_checks(run_dir: str | None = None) -> Iterator[Check]:
    """Run all checks in turn; one that raises is a FAIL. ``run_dir``: the value of ``--anchor-run-dir``."""
    checks: tuple[tuple[str, Callable[[], Check]], ...] = (
        ("Python", check_python),
        ("SGLang", check_sglang),
        ("hooks", check_hooks),
        ("memfd", check_memfd),
        ("pidfd", check_pidfd),
        ("handle passing", check_handle_passing),
        ("ZeroMQ", check_zeromq),
        ("/dev/shm", check_shm),
        ("run directory", lambda: check_run_dir(Path(run_dir) if run_dir else None)),
        ("memory", check_memory),
        ("GPUs", check_gpus),
    )
    for name, check in checks:
        try:
            yield check()
        except Exception as error:
            yield Check(
                name,
                "FAIL",
                f"{type(error).__name__}: {error}",
                "use Linux 5.6 or newer, and reinstall anchortp-sglang",
            )


def judge_tree(path: Path) -> Iterator[Check]:
    """Judge the source of a fork of SGLang without starting or importing it. Raises ValueError if it is none."""
    tree = fork.package_in(path)
    version = fork.version_of(tree)
    release = manifest.SGLANG_VERSION
    if version == release:
        yield Check("version", "PASS", version)
    else:
        detail = f"{version or 'no version in its files'}, the hooks are for {release}"
        yield Check("version", "WARN", detail, f"install it and write a manifest, or {_allow(manifest.VERSION)}")
    try:
        drifts = fork.drift_of(tree)
        lost = fork.lost_imports(tree)
        unseamed = fork.without_seam(tree)
    except (SyntaxError, OSError) as error:
        yield Check("source", "FAIL", f"{error} ({error.filename})", "use a tree that Python can read")
        return
    for drift in drifts:
        if drift.breaks:
            yield Check(drift.symbol, "FAIL", drift.problem, "adapt the hook (CONTRIBUTING.md), or this symbol")
        else:
            way_out = f"compare both sources; if the hook holds, write a manifest, or {_allow(drift.symbol)}"
            yield Check(drift.symbol, "WARN", drift.problem, way_out)
    if not drifts:
        yield Check("hooks", "PASS", f"all hooked symbols are as in {release}")
    if unseamed:
        detail = f"there is no plugin system, and no seam at {len(unseamed)} symbols ({unseamed[0]}, …)"
        yield Check("plugins", "FAIL", detail, "apply the patch of docs/forks.md")
    for name in lost:
        yield Check(name, "FAIL", "anchortp-sglang imports it, and it is not there", "adapt the import")
    if not lost:
        yield Check("imports", "PASS", "all that anchortp-sglang imports is there")


def _allow(symbol: str) -> str:
    return f"start with --anchor-allow-drift {symbol}"


def check_python() -> Check:
    """Check Python's version, which pip does but a PYTHONPATH does not."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Check("Python", "FAIL", version, "use Python 3.11 or newer")
    return Check("Python", "PASS", version)


def check_sglang() -> Check:
    version = manifest.installed_version()
    if version != manifest.known_version():
        return Check("SGLang", "FAIL", version, f"pip install sglang=={manifest.SGLANG_VERSION}")
    return Check("SGLang", "PASS", version)


def check_hooks() -> Check:
    """Compare the hooked symbols with the source that the hooks were written for."""
    drifts = manifest.installed_drift()
    if not drifts:
        return Check("hooks", "PASS", f"SGLang's source is the one in {manifest.manifest_path().name}")
    symbols = ",".join(dict.fromkeys(drift.symbol for drift in drifts))
    way_out = (
        f"install sglang=={manifest.SGLANG_VERSION} unchanged; for a fork, read docs/forks.md, or {_allow(symbols)}"
    )
    return Check("hooks", "FAIL", "\n".join(map(str, drifts)), way_out)


def check_memfd() -> Check:
    """Check memfds and seals, by which no process can shrink an anchor's memory under a rank."""
    fd = os.memfd_create("anchortp-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        try:
            os.ftruncate(fd, 0)
        except PermissionError:
            return Check("memfd", "PASS", "created and sealed")
    finally:
        os.close(fd)
    return Check("memfd", "FAIL", "a sealed memfd could be shrunk", "run outside of a sandbox that emulates memfd")


def check_pidfd() -> Check:
    """Check pidfd_getfd on a child: seccomp profiles may forbid it for all processes, yama for all other processes."""
    from anchortp_sglang.recovery.processes.pidfd import fetch_descriptor

    own = os.pidfd_open(os.getpid())
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        signal.pause()
    pidfd = os.pidfd_open(child)
    try:
        os.close(fetch_descriptor(pidfd, own))
    except OSError as error:
        return _without_pidfd_getfd(str(error.strerror))
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(pidfd)
        os.close(own)
    return Check("pidfd", "PASS", "main can wait for a process's death and take over its descriptors")


def _without_pidfd_getfd(refusal: str) -> Check:
    way_out = "docker: --cap-add SYS_PTRACE; else kernel.yama.ptrace_scope below 2"
    if check_handle_passing().level != "PASS":
        return Check(
            "pidfd",
            "FAIL",
            f"{refusal}, and descriptors cannot be sent to another process: a dead anchor's memory is lost",
            way_out,
        )
    detail = f"{refusal}: a dead anchor's memory is handed over by its rank instead, and lost if the rank hangs"
    return Check("pidfd", "WARN", detail, way_out)


def check_handle_passing() -> Check:
    """Check SCM_RIGHTS, by which the descriptors of memory reach the ranks."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right:
        socket.send_fds(left, [b"x"], [left.fileno()])
        _, fds, _, _ = socket.recv_fds(right, 1, 1)
    for fd in fds:
        os.close(fd)
    if not fds:
        return Check("handle passing", "FAIL", "SCM_RIGHTS lost a descriptor", "run outside of the sandbox")
    return Check("handle passing", "PASS", "SCM_RIGHTS works")


def check_zeromq() -> Check:
    import zmq

    if not zmq.has("ipc"):
        return Check("ZeroMQ", "FAIL", f"{zmq.zmq_version()} without ipc://", "pip install --force-reinstall pyzmq")
    return Check("ZeroMQ", "PASS", zmq.zmq_version())


def check_shm() -> Check:
    free = shutil.disk_usage("/dev/shm").free
    detail = f"{free / GIB:.2f} GiB free"
    if not os.access("/dev/shm", os.W_OK):
        return Check("/dev/shm", "FAIL", "not writable", "mount a tmpfs there, mode 1777")
    if free < SHM_NEEDED_BYTES:
        return Check("/dev/shm", "WARN", detail, "docker: --shm-size 1g; else remove leftovers from /dev/shm")
    return Check("/dev/shm", "PASS", detail)


def check_run_dir(base: Path | None) -> Check:
    """Claim a run directory as a server does, and remove it. ``base`` None: the default of servers."""
    from anchortp_sglang.anchor.rundir import RunDirError, prepare_run_dir, remove_run_dir

    try:
        run_dir = prepare_run_dir(base, f"doctor-{os.getpid()}")
        remove_run_dir(run_dir)
    except (RunDirError, OSError) as error:
        return Check("run directory", "FAIL", str(error), "repair it, or choose another with --anchor-run-dir")
    return Check("run directory", "PASS", f"{run_dir.path.parent} can be used")


def check_memory() -> Check:
    import psutil

    room = memory_room(psutil.virtual_memory().available)
    detail = f"{room.nbytes / GIB:.1f} GiB available ({room.bound})"
    if room.nbytes < MEMORY_NEEDED_BYTES:
        return Check(
            "memory",
            "WARN",
            detail,
            f"free memory: the ranks need {MEMORY_NEEDED_BYTES / GIB:.0f} GiB beside weights and KV",
        )
    return Check("memory", "PASS", detail)


def check_gpus() -> Check:
    """Check the GPUs for anchors, from another process."""
    from anchortp_sglang.platforms.cuda.report import report

    return Check("GPUs", *report())
