"""What the processes of a server have open that others might reach: sockets, files they write, shared memory."""

import fnmatch
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from remains import Remains

from anchortp_sglang.testing.server import Server

_TITLES = {
    "sglang::scheduler": "rank",
    "sglang::detokenizer": "detokenizer",
    "anchortp::standby": "standby",
    "anchortp::": "zygote",
    "anchor.server": "anchor",
}
_NO_FILE = re.compile(r"(pipe|anon_inode):|/dev/(null|pts|tty|nvidia)")
_SOCKET = re.compile(r"socket:\[(\d+)\]")


@dataclass(frozen=True)
class Opening:
    """``what``: as the table in docs/operations.md names it. ``path``: what can be asked for its mode, if anything."""

    what: str
    role: str
    path: str = ""


@dataclass(frozen=True)
class Row:
    """Of the table: what is open, as patterns, which roles have it open, and who can reach it."""

    patterns: tuple[str, ...]
    roles: frozenset[str]
    reach: str

    def covers(self, opening: Opening) -> bool:
        return opening.role in self.roles and any(fnmatch.fnmatch(opening.what, each) for each in self.patterns)


def documented(page: Path) -> list[Row]:
    """The rows of the section "What a server opens"."""
    section = page.read_text().partition("\n## What a server opens\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")] for line in section.splitlines() if line.startswith("| `")]
    return [Row(tuple(re.findall("`(.+?)`", what)), frozenset(by.split(", ")), who) for _, what, by, who, *_ in rows]


def disagreements(rows: list[Row], found: set[Opening]) -> list[str]:
    """What is open and not in the table, in the table and not open, or open to others than the table says."""
    wrong = [f"not in the table: {opening}" for opening in found if not any(row.covers(opening) for row in rows)]
    for row in rows:
        covered = {opening for opening in found if row.covers(opening)}
        names = {opening.what for opening in covered}
        wrong += [f"nobody opens {pattern}" for pattern in row.patterns if not fnmatch.filter(names, pattern)]
        wrong += [f"no {role} opens {row.patterns}" for role in row.roles - {opening.role for opening in covered}]
        if row.reach.startswith("this user"):
            wrong += [f"others can reach {opening}" for opening in covered if opening.path and not _is_private(opening)]
    return sorted(wrong)


def openings(server: Server) -> set[Opening]:
    """What all processes of a server have open now."""
    folders = {str(path.parent): "RUN" for path in server.place.folder.glob("**/server.json")}
    folders |= {str(path): "ZMQ" for path in server.place.folder.glob("anchortp-zmq-*")}
    folders |= {str(path): "METRICS" for path in server.place.folder.glob("anchortp-metrics-*")}
    folders[str(Path.home())] = "~"
    log = os.path.realpath(server.log)  # standard output of all
    found: set[Opening] = set()
    for pid in sorted(Remains(server).pids):
        try:
            role = _role(pid, server.pid)
            found |= {Opening(what, role) for what in _listeners(pid, server.port)}
            for kind, path in {*_descriptors(pid), *_shared_maps(pid)}:
                if path != log:
                    what = f"{kind} {_shortened(path, folders)}"
                    found.add(Opening(what, role, path if path.startswith("/") else ""))
        except (psutil.NoSuchProcess, FileNotFoundError):
            continue  # it has ended meanwhile
    return found


def _shortened(path: str, folders: dict[str, str]) -> str:
    for folder, name in folders.items():
        if path.startswith(folder + "/"):
            return name + path.removeprefix(folder)
    return path


def _is_private(opening: Opening) -> bool:
    """Whether only this user gets at a file or socket: by its own mode, or by that of a folder above it."""
    facts = [os.lstat(part) for part in (Path(opening.path), *Path(opening.path).parents)]
    return any(fact.st_uid == os.geteuid() and not stat.S_IMODE(fact.st_mode) & 0o077 for fact in facts)


def _role(pid: int, main: int) -> str:
    if pid == main:
        return "main"
    process = psutil.Process(pid)
    title = " ".join(process.cmdline())
    role = next((role for name, role in _TITLES.items() if name in title), title)
    return "spare" if role == "zygote" and process.ppid() != main else role


def _listeners(pid: int, http_port: int) -> Iterator[str]:
    for connection in psutil.Process(pid).net_connections("inet"):
        if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE):
            host, port = connection.laddr or ("", 0)
            kind = "tcp" if connection.status == psutil.CONN_LISTEN else "udp"
            yield f"{kind} HOST:PORT" if port == http_port else f"{kind} {host}:{port}"


def _descriptors(pid: int) -> Iterator[tuple[str, str]]:
    """(kind, path) of Unix sockets, memfds, and files that are open for writing."""
    names = _unix_sockets()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
            flags = re.search(r"flags:\s+(\d+)", Path(f"/proc/{pid}/fdinfo/{link.name}").read_text())
        except FileNotFoundError:
            continue  # closed meanwhile
        if number := _SOCKET.match(target):
            if number[1] in names:
                yield "unix", names[number[1]]
        elif target.startswith("/memfd:"):
            yield "memfd", target.removeprefix("/memfd:").removesuffix(" (deleted)")
        elif not _NO_FILE.match(target) and flags and int(flags[1], 8) & os.O_ACCMODE:
            yield "file", target


def _unix_sockets() -> dict[str, str]:
    """inode -> path, ``PAIR`` where there is none."""
    rows = (line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return {row[6]: row[7] if len(row) > 7 else "PAIR" for row in rows}


def _shared_maps(pid: int) -> Iterator[tuple[str, str]]:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if "w" in fields[1] and "s" in fields[1]:
            path = fields[5]
            if path.startswith("/memfd:"):
                yield "memfd", path.removeprefix("/memfd:").removesuffix(" (deleted)")
            elif path.startswith("/"):  # else it is shared with the kernel alone
                yield "file", path
