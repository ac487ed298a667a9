"""What a server has on the machine while it runs, and must not leave behind."""

import os
import shutil
import tempfile
from pathlib import Path

import psutil
from faults import holders, is_gone, memfds_of
from histories import until

from anchortp_sglang.testing.server import Server

ROOT = Path(__file__).parents[2]


class Remains:
    """A running server's processes, memory and files, noted so that they can be looked for when it has ended."""

    def __init__(self, server: Server) -> None:
        self._place = server.place
        self.pids: set[int] = set()
        self.memory: dict[tuple[int, int], str] = {}
        self.note(server)
        names = {" ".join(psutil.Process(pid).cmdline()) for pid in self.pids}
        for expected in ("sglang::scheduler", "sglang::detokenizer", "anchortp::zygote", "anchor.server"):
            assert any(expected in name for name in names), f"no {expected} among {names}"

    def note(self, server: Server) -> None:
        """Add what there is now."""
        tree = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        anchors = [p.pid for p in psutil.process_iter() if self._is_anchor(p)]
        self.pids |= {process.pid for process in tree} | set(anchors)
        for pid in anchors:
            self.memory |= memfds_of(pid)

    def _is_anchor(self, process: psutil.Process) -> bool:
        try:
            arguments = process.cmdline()
        except psutil.Error:
            return False
        return any(a.startswith(f"--run-dir={self._place.folder}") for a in arguments)

    def assert_gone(self, timeout_s: float = 5.0) -> None:
        """No process, memory, socket, run directory or shared-memory file is left."""
        until(lambda: not self.alive(), lambda: f"processes live on: {self.alive()}", timeout_s)
        assert self.memory and not holders(self.memory)
        assert self._place.leftovers() == []
        assert shm() <= self._place.shm_before

    def alive(self) -> list[str]:
        return [f"{pid} {_title(pid)}" for pid in sorted(self.pids) if not is_gone(pid)]


class Place:
    """A short folder with a server's sockets and run directory, and its log; short, as names of sockets must be."""

    def __init__(self, log: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="atp"))
        self.log = log
        self.shm_before = shm()

    @property
    def env(self) -> dict[str, str]:
        """Environment of a server that keeps to this place."""
        folder = str(self.folder)
        return {"TMPDIR": folder, "XDG_RUNTIME_DIR": folder, "PYTHONPATH": str(ROOT)}

    def leftovers(self) -> list[str]:
        """Sockets, run directories and folders for temporary files."""
        left = [path for path in self.folder.rglob("*") if path.is_socket()]
        return [str(path) for path in (*left, *self.folder.glob("anchortp/*"), *self.folder.glob("tmp*"))]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def shm() -> frozenset[str]:
    """The names in /dev/shm."""
    return frozenset(os.listdir("/dev/shm"))


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
