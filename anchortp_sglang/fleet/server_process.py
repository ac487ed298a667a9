"""The server of a replica: a child process that ends with the process that started it, however that ends."""

import ctypes
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

from anchortp_sglang.fleet.config import FleetConfig

log = logging.getLogger(__name__)

STOP_S = 20.0
_PORTS = range(20000, 32768)
"""Below those that the kernel gives to connections."""
_PR_SET_PDEATHSIG = 1
_STARTS = 3
_libc = ctypes.CDLL(None, use_errno=True)
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerFailed(RuntimeError):
    """The server did not start, or has ended."""


class ServerProcess:
    """``python -m anchortp_sglang.launch_server`` on a free port of ``host``."""

    def __init__(self, config: FleetConfig, host: str) -> None:
        self._config = config
        self._host = host
        self.url = ""
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it serves. Raises ServerFailed."""
        for attempt in range(_STARTS):
            port = _free_port(self._host)
            self.url = f"http://{self._host}:{port}"
            self._spawn(port)
            if self._comes_up():
                return
            if not _is_taken(self._host, port) or attempt == _STARTS - 1:
                break
        code = None if self.process is None else self.process.poll()
        self.kill()
        why = "is not healthy in time" if code is None else f"ended with code {code}: its log says why"
        raise ServerFailed(f"the server of this replica {why}")

    def _spawn(self, port: int) -> None:
        """Start the process from a thread that waits for it: it gets SIGKILL when that thread ends."""
        command = [sys.executable, "-m", "anchortp_sglang.launch_server", "--model-path", self._config.model_path]
        command += ["--tp-size", str(self._config.tp_size), "--host", self._host, "--port", str(port)]
        command += ["--anchor-allow-journals", *self._config.flags]
        environment = {**os.environ, **self._config.environment}
        parent, started = os.getpid(), threading.Event()

        def tie() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        def run() -> None:
            self.process = subprocess.Popen(
                command, env=environment, preexec_fn=tie, stdin=subprocess.DEVNULL, start_new_session=True
            )
            started.set()
            self.process.wait()

        threading.Thread(target=run, name="server", daemon=True).start()
        started.wait()

    def _comes_up(self) -> bool:
        deadline = time.monotonic() + self._config.start_timeout_s
        while time.monotonic() < deadline and self.alive:
            if self.get("/health")[0] == 200:
                return True
            time.sleep(0.2)
        return False

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def get(self, path: str, timeout_s: float = 3.0) -> tuple[int, Any]:
        """Return the status and JSON of a GET; status 0 if there is no answer."""
        request = urllib.request.Request(self.url + path, headers=self._authorization())
        try:
            with _opener.open(request, timeout=timeout_s) as answer:
                body = answer.read()
                return answer.status, json.loads(body) if body else None
        except urllib.error.HTTPError as error:
            return error.code, None
        except (OSError, ValueError):
            return 0, None

    def _authorization(self) -> dict[str, str]:
        key = self._config.flag("--api-key")  # GET takes no admin key
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    def drain(self, timeout_s: float) -> bool:
        """Wait until no request is open; return whether that came about in time."""
        deadline = time.monotonic() + timeout_s
        while self.alive:
            code, status = self.get("/anchortp/status")
            if code == 200 and not status["open_requests"]:
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        return False

    def stop(self, drain_s: float) -> None:
        """Let open requests end for ``drain_s`` seconds, then end the server. What is open then goes on elsewhere."""
        drained = self.drain(drain_s)
        if self.process is None:
            return
        if drained and self.alive:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                log.warning("anchortp fleet: the server does not end on SIGTERM, so it is killed")
        self.kill()

    def kill(self) -> None:
        """End the server at once; its own processes end with it."""
        if self.alive:
            assert self.process is not None
            self.process.kill()
            self.process.wait(STOP_S)


def _free_port(host: str) -> int:
    while True:
        port = random.choice(_PORTS)
        if not _is_taken(host, port):
            return port


def _is_taken(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False
