"""The two sides of a benchmark, as real servers: ours, and stock SGLang with a supervisor that restarts it at once."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import psutil

from anchortp_sglang.platforms.base import Defaults
from anchortp_sglang.platforms.cpu.environment import cpu_defaults
from anchortp_sglang.recovery.state_machine import Cause
from anchortp_sglang.startup.device import as_arguments
from anchortp_sglang.testing.memory import total_bytes
from anchortp_sglang.testing.process_tree import Tree
from anchortp_sglang.testing.server import Server, ServerFailed

SideName = Literal["ours", "stock"]
_START_TIMEOUT_S = 900.0
_STAND_IN = "from anchortp_sglang.platforms.cpu import sgl_kernel_stub\n\nsgl_kernel_stub.install()\n"


class Side(Protocol):
    """A server that a benchmark starts and breaks."""

    name: SideName
    server: Server

    def start(self) -> float:
        """Start it and return the seconds until it serves."""
        ...

    def ready_for(self, fault: Cause) -> None:
        """Make it serve at full width, as before any fault."""
        ...

    def aim(self, fault: Cause, device: int) -> Callable[[], None]:
        """Return a function that causes the fault at once."""
        ...

    def comebacks(self) -> int:
        """Return a number that grows each time it serves again after a fault."""
        ...

    def processes(self) -> list[psutil.Process]: ...

    def stop(self) -> None: ...


DEVICES: dict[str, tuple[tuple[str, ...], bool]] = {
    "cpu": (("--device", "cpu", "--dtype", "float32"), True),
    # Both servers are on the same GPUs.
    "cuda": (("--device", "cuda", "--dtype", "bfloat16", "--mem-fraction-static", "0.3"), False),
}
"""Flags of both sides by the device that they run on, and whether stock needs our launcher's defaults as well."""


class Ours:
    """A server of this package."""

    name: SideName = "ours"

    def __init__(self, model: Path, tp_size: int, flags: Sequence[str], hang_timeout_s: float, folder: Path) -> None:
        self._tp_size = tp_size
        self._folder = folder
        own = ("--anchor-hang-timeout", f"{hang_timeout_s:g}")
        env = {"TMPDIR": str(folder), "XDG_RUNTIME_DIR": str(folder)}
        self._make = lambda: Server(model, tp_size, *flags, *own, log=folder / "ours.log", env=env)
        self.server: Server = self._make()

    def start(self) -> float:
        return self.server.start(_START_TIMEOUT_S)

    def ready_for(self, fault: Cause) -> None:
        if self.server.status()["tp_size"] < self._tp_size:  # a lost device does not come back
            self.server.stop()
            self.server = self._make()
            self.start()
        time.sleep(2.0)  # spare ranks are forked a second after a recovery

    def aim(self, fault: Cause, device: int) -> Callable[[], None]:
        victim = self.server.status()["devices"][device]
        pids = [victim["anchor_pid"], victim["rank_pid"]] if fault == "device" else [victim["rank_pid"]]
        return lambda: _signal_all(pids, signal.SIGSTOP if fault == "hang" else signal.SIGKILL)

    def comebacks(self) -> int:
        recoveries = self.server.status()["recoveries"]  # the last few only
        served = [each["generation"] for each in recoveries if "replayed" in {s["name"] for s in each["stages"]}]
        return max(served, default=0)

    def processes(self) -> list[psutil.Process]:
        """Return the server's process tree and its anchors, which are not its children."""
        return Tree(self.server, self._folder).all()

    def stop(self) -> None:
        self.server.stop()


class Stock:
    """A released ``sglang.launch_server``, started again as soon as its main process has ended.

    Faults end in the death of the main process, by SGLang's own watchdog. The supervisor kills a hung server after the
    time in which ours detects a hang. A lost device is back at once, as stock could serve most models at no other
    width.
    """

    name: SideName = "stock"
    _module = "sglang.launch_server"

    def __init__(
        self,
        model: Path,
        tp_size: int,
        flags: Sequence[str],
        hang_timeout_s: float,
        folder: Path,
        overlap: bool = False,
        our_defaults: bool = True,
    ) -> None:
        """Make a side.

        ``our_defaults``: with what SGLang needs on CPUs, which our launcher sets by itself. ``overlap``: with the
        overlap schedule, SGLang's default, which our CPU defaults leave out.
        """
        defaults = Defaults({}, {}, "")
        if our_defaults:
            defaults = cpu_defaults({}, os.environ, tp_size, sorted(os.sched_getaffinity(0)))
        (folder / "stand-in").mkdir(exist_ok=True)
        # Every process that stock spawns needs the stand-in for sgl_kernel where the real one cannot load.
        (folder / "stand-in" / "sitecustomize.py").write_text(_STAND_IN)
        paths = [str(folder / "stand-in"), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        env = defaults.env | {"PYTHONPATH": ":".join(filter(None, paths)), "TMPDIR": str(folder)}
        added = defaults.flags.keys() - {"device", *(["disable_overlap_schedule"] if overlap else [])}
        arguments = (*flags, *as_arguments({k: v for k, v in defaults.flags.items() if k in added}))
        self.server: Server = Server(model, tp_size, *arguments, log=folder / "stock.log", module=self._module, env=env)
        self._tp_size = tp_size
        self._hang_timeout_s = hang_timeout_s
        self._stopping = threading.Event()
        self._serving = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._end_of_hang: threading.Timer | None = None
        self._restarts = 0
        self.failed: str | None = None

    def start(self) -> float:
        took_s = self.server.start(_START_TIMEOUT_S)
        self._serving.set()
        self._supervisor.start()
        return took_s

    def ready_for(self, fault: Cause) -> None:
        if not self._serving.wait(_START_TIMEOUT_S):
            raise ServerFailed(f"stock was not restarted: {self.failed}\n{self.server.tail()}")

    def aim(self, fault: Cause, device: int) -> Callable[[], None]:
        rank = self._rank(device)
        return rank.kill if fault != "hang" else lambda: self._hang(rank)

    def _hang(self, rank: psutil.Process) -> None:
        rank.suspend()
        self._end_of_hang = threading.Timer(self._hang_timeout_s, self.server.kill)
        self._end_of_hang.daemon = True
        self._end_of_hang.start()

    def comebacks(self) -> int:
        if self.failed is not None:
            raise ServerFailed(self.failed)
        return self._restarts

    def processes(self) -> list[psutil.Process]:
        return _tree(self.server.pid)

    def stop(self) -> None:
        self._stopping.set()
        if self._end_of_hang is not None:
            self._end_of_hang.cancel()
        while self._supervisor.is_alive():
            self.server.kill_all()  # the supervisor may just be starting another
            self._supervisor.join(0.5)
        self.server.kill_all()

    def _supervise(self) -> None:
        try:
            while True:
                left = _tree(self.server.pid)
                self.server.wait(timeout_s=threading.TIMEOUT_MAX)
                self._serving.clear()
                for process in left:  # a stopped rank does not notice that its parent is gone
                    _kill(process)
                if self._stopping.is_set():
                    return
                self.server.start(_START_TIMEOUT_S)
                self._restarts += 1
                self._serving.set()
        except (ServerFailed, OSError) as error:
            self.failed = str(error)

    def _rank(self, number: int) -> psutil.Process:
        title = f"sglang::scheduler_TP{number}" if self._tp_size > 1 else "sglang::scheduler"
        found = [process for process in _tree(self.server.pid) if title in " ".join(process.cmdline())]
        if len(found) != 1:
            raise ServerFailed(f"{len(found)} processes of stock are called {title}")
        return found[0]


def memory_bytes(side: Side) -> int:
    """Return the memory of all processes of a side, with shared pages counted once."""
    return total_bytes([process.pid for process in side.processes()])


def _tree(pid: int) -> list[psutil.Process]:
    try:
        main = psutil.Process(pid)
        return [main, *main.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()  # psutil refuses if the pid has been reused
    except psutil.NoSuchProcess:
        pass
