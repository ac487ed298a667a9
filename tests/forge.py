"""Jobs and servers in processes of their own, forked from one that has imported SGLang already (forge_main.py).

What is under test runs as it would from a command line; only the import has been done before.
"""

import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from anchortp_sglang.testing.server import Server

LAUNCHER = "anchortp_sglang.launch_server"
HERE = Path(__file__).parent
MODULES = (HERE, HERE / "engine", HERE / "unit")


@dataclass(frozen=True)
class Outcome:
    """How a job ended: exit code as a shell has it (negative: killed), its value, all that it printed."""

    code: int
    value: object
    output: str
    seconds: float


class Job:
    """A running job; ``pid`` leads its process group."""

    def __init__(self, forge: "Forge", pid: int, folder: Path) -> None:
        self._forge = forge
        self.pid = pid
        self.folder = folder
        self._started = time.monotonic()

    @property
    def output(self) -> str:
        path = self.folder / "output"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, timeout_s: float = 90) -> Outcome:
        code = self._forge.ask(wait=self.pid, timeout_s=timeout_s)["code"]
        assert code is not None, f"the job was not done within {timeout_s:g} s\n{self.output[-4000:]}"
        result = self.folder / "result"
        value = json.loads(result.read_text()) if result.exists() else None
        return Outcome(code, value, self.output, time.monotonic() - self._started)


class Forge:
    """Start jobs with ``start("module:function", argument=…)``; modules are those of MODULES."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._lock = threading.Lock()
        path = os.pathsep.join([*map(str, MODULES), *filter(None, [os.environ.get("PYTHONPATH")])])
        with open(folder / "forge.log", "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "forge_main.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": path},
            )
        assert self._answer()["threads"] == 1

    def ask(self, **command):
        with self._lock:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            return self._answer()

    def _answer(self):
        line = self._process.stdout.readline()
        assert line, (self._folder / "forge.log").read_text()[-4000:]
        return json.loads(line)

    def start(self, call: str, *, env: dict[str, str] | None = None, output: Path | None = None, **arguments) -> Job:
        """``output``: a file that what it prints is appended to."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        files = {"output": str(output or folder / "output"), "result": str(folder / "result")}
        answer = self.ask(call=call, arguments=arguments, env=env or {}, **files)
        return Job(self, answer["pid"], folder)

    def run(self, call: str, *, timeout_s: float = 90, env: dict[str, str] | None = None, **arguments) -> Outcome:
        return self.start(call, env=env, **arguments).wait(timeout_s)

    def value(self, call: str, **arguments):
        """What the job returns; fails with its output unless it ends well."""
        done = self.run(call, **arguments)
        assert done.code == 0, done.output[-6000:]
        return done.value

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        shutil.rmtree(self._folder)


@functools.cache
def shared() -> Forge:
    """The one of this test run."""
    made = Forge(Path(tempfile.mkdtemp(prefix="forge-")))
    atexit.register(made.close)
    return made


class ForkedProcess:
    """A job with what a Server asks of subprocess.Popen."""

    def __init__(self, forge: Forge, pid: int) -> None:
        self._forge = forge
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._forge.ask(poll=self.pid)["code"]
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or float("inf"))
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked server", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkedServer(Server):
    """Ours, as from a command line but for the import of SGLang, which has been done: half of a start."""

    def __init__(self, forge: Forge, *arguments, env: dict[str, str], **more) -> None:
        super().__init__(*arguments, env=env, **more)
        self._forge, self._changed = forge, env

    def _spawn(self):
        argv = self._command[3:]  # without python -m module
        job = self._forge.start("engine_jobs:launch", env=self._changed, output=self.log, argv=argv)
        return ForkedProcess(self._forge, job.pid)
