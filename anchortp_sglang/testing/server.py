"""A server for tests and benchmarks: a real process on a loopback port, with its log in a file."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_STOP_TIMEOUT_S = 60.0
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback is never behind a proxy


class ServerFailed(RuntimeError):
    """The server did not start or answer; the text ends with its log's last lines."""


def free_port() -> int:
    """Return a free loopback port below the kernel's ephemeral ones (from 32768 on), so that no connection takes it."""
    while True:
        port = random.randrange(20000, 32768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


class Server:
    """A process of ``python -m MODULE --model-path …``, stopped (SIGTERM, then SIGKILL) at the end of the block.

    ``module``: anchortp_sglang.launch_server, or sglang.launch_server for comparison.
    """

    def __init__(
        self,
        model: Path,
        tp_size: int,
        *arguments: str,
        log: Path,
        module: str = "anchortp_sglang.launch_server",
        env: dict[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._command = [sys.executable, "-m", module, "--model-path", str(model), "--tp-size", str(tp_size)]
        self._command += ["--host", "127.0.0.1", "--port", str(self.port), *arguments]
        self._env = os.environ | (env or {})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, timeout_s: float = 240.0) -> float:
        """Start, wait until /health answers 200, and return the seconds it took.

        Raises ServerFailed, with no process left, if it ends or is not healthy in time.
        """
        began = time.monotonic()
        self._process = self._spawn()
        try:
            self._wait_healthy(began + timeout_s)
        except BaseException:
            self.kill_all()
            raise
        return time.monotonic() - began

    def _spawn(self) -> "subprocess.Popen[bytes]":
        """Start the process as the leader of a new session; what it prints is appended to its log."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=self._env, start_new_session=True
            )

    def _wait_healthy(self, deadline: float) -> None:
        assert self._process is not None
        while self.health() != 200:
            if self._process.poll() is not None:
                raise ServerFailed(f"the server ended with code {self._process.returncode}\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"the server was not healthy in time\n{self.tail()}")
            time.sleep(0.1)

    def kill(self) -> None:
        """Send SIGKILL to the main process; all others end by themselves."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def kill_all(self) -> None:
        """Send SIGKILL to the main process and its process group: stock's ranks would outlive it while they import."""
        self.kill()
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)  # it leads its session
            except ProcessLookupError:
                pass

    def wait(self, timeout_s: float = _STOP_TIMEOUT_S) -> int:
        assert self._process is not None
        return self._process.wait(timeout_s)

    def stop(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def health(self) -> int:
        """Return the HTTP status of /health, or 0 without an answer."""
        try:
            with _opener.open(f"{self.url}/health", timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def status(self) -> dict[str, Any]:
        return self.get("/anchortp/status")

    def get(self, path: str) -> dict[str, Any]:
        with _opener.open(self.url + path, timeout=60) as answer:
            return dict(json.load(answer))

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 300.0) -> Any:
        """Return the JSON answer to a POST. Raises urllib.error.HTTPError for codes from 400 on."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with _opener.open(request, timeout=timeout_s) as answer:
            return json.load(answer)

    def flush_cache(self) -> None:
        """Empty the prefix cache as soon as no request is running."""
        with _opener.open(f"{self.url}/flush_cache?timeout=60", timeout=90):
            pass

    def inject(self, device: int, kind: str) -> dict[str, Any]:
        """Inject a fault and return its observed effect."""
        return dict(self.post("/anchortp/inject", {"device": device, "kind": kind}))

    def wait_serving(self, generation: int, timeout_s: float = 60.0) -> dict[str, Any]:
        """Wait until generation ``generation`` or a later one serves, and return the status. Raises ServerFailed."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status = self.status()
            if status["state"] in ("serving", "degraded") and status["generation"] >= generation:
                return status
            time.sleep(0.02)
        raise ServerFailed(f"generation {generation} did not serve within {timeout_s:g} s: {status}\n{self.tail()}")

    def tail(self, lines: int = 40) -> str:
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
