"""A server's processes by role, named as a storm's targets are."""

from pathlib import Path

import psutil

from anchortp_sglang.testing.server import Server


def is_gone(pid: int) -> bool:
    """Return whether the process is dead, reaped or not."""
    return _status(pid) in (None, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def is_zombie(pid: int) -> bool:
    """Return whether the process is dead, but not reaped."""
    return _status(pid) == psutil.STATUS_ZOMBIE


def is_stopped(pid: int) -> bool:
    """Return whether a signal has stopped the process."""
    return _status(pid) in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


def _status(pid: int) -> str | None:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return None


class Tree:
    """The processes of ``server``, whose run directory is below ``folder``."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.folder = folder

    def devices(self) -> list[dict[str, int]]:
        """Return {"rank": pid, "anchor": pid} of each device where both are alive."""
        found = []
        for device in self.server.status()["devices"]:
            rank, anchor = device["rank_pid"], device["anchor_pid"]
            if rank and anchor and not is_gone(rank) and not is_gone(anchor):
                found.append({"rank": rank, "anchor": anchor})
        return found

    def roles(self) -> dict[str, list[int]]:
        """Return live pids by role: rank and anchor (by device), and the helpers by their names."""
        status = self.server.status()["devices"]
        ranks = [device["rank_pid"] for device in status if device["rank_pid"]]
        anchors = [device["anchor_pid"] for device in status if device["anchor_pid"]]
        roles: dict[str, list[int]] = {"rank": ranks, "anchor": anchors, "host-anchor": [], "detokenizer": []}
        roles |= {"zygote": [], "reserve": [], "spare": [], "standby": []}
        for process in psutil.Process(self.server.pid).children(recursive=True):
            if (role := self._role(process)) is not None and process.pid not in ranks:
                roles[role].append(process.pid)
        roles["host-anchor"] = [p.pid for p in psutil.process_iter() if self._is_anchor(p, "--device=-1")]
        return {role: [pid for pid in pids if not is_gone(pid)] for role, pids in roles.items()}

    def _role(self, process: psutil.Process) -> str | None:
        try:
            title = " ".join(process.cmdline())
            of_main = process.ppid() == self.server.pid
        except psutil.NoSuchProcess:
            return None
        if "sglang::detokenizer" in title:
            return "detokenizer"
        if "anchortp::standby" in title:
            return "standby"
        if "anchortp::zygote" in title:  # a spare keeps the title that it was forked with
            return "zygote" if of_main else "spare"
        if "anchortp::reserve" in title or "zygote_main" in title:
            return "reserve" if of_main else "spare"
        return None

    def _is_anchor(self, process: psutil.Process, *arguments: str) -> bool:
        try:
            given = process.cmdline()
        except psutil.Error:
            return False
        return any(each.startswith(f"--run-dir={self.folder}/") for each in given) and {*arguments} <= {*given}

    def all(self) -> list[psutil.Process]:
        """Return all processes of the server, with its anchors and zombies."""
        main = psutil.Process(self.server.pid)
        anchors = [process for process in psutil.process_iter() if self._is_anchor(process)]
        return [main, *main.children(recursive=True), *anchors]
