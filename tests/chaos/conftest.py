"""Servers for chaos: real processes on loopback ports, each with a place of its own for what it leaves behind."""

import contextlib
import os

import pytest
from histories import Unbroken
from remains import Place

from anchortp_sglang.testing.server import Server
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

ARGUMENTS = ("--dtype", "float32", "--device", "cpu", "--max-total-tokens", "8192", "--anchor-allow-injection")
HANG_TIMEOUT_S = 4
LAUNCHER = "anchortp_sglang.launch_server"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("chaos") / "qwen3", "qwen3")


@pytest.fixture(scope="session")
def launch(checkpoint, tmp_path_factory):
    """launch(tp_size, *more_arguments): a context with a started Server; ``server.place`` is its Place. ``prefix``:
    a command that runs it."""

    @contextlib.contextmanager
    def launch(tp_size, *arguments, model=checkpoint, env=None, module=LAUNCHER, prefix=()):
        place = Place(tmp_path_factory.mktemp("server") / "log")
        env = place.env | (env or {})
        server = Server(model, tp_size, *ARGUMENTS, *arguments, log=place.log, module=module, env=env)
        server.place = place
        server._command = [*prefix, *server._command]
        try:
            with server:
                yield server
        finally:
            place.remove()

    return launch


@pytest.fixture(scope="session")
def shared(launch):
    """One TP=4 server for all faults that leave it as it was."""
    arguments = ("--chunked-prefill-size", "128", "--anchor-hang-timeout", str(HANG_TIMEOUT_S))
    with launch(4, *arguments) as server:
        yield server


@pytest.fixture(scope="session")
def unbroken_shared(shared):
    return Unbroken(shared)


@pytest.fixture
def server(shared):
    """The shared server, serving with all devices before the test and after it."""
    assert shared.wait_serving(0)["tp_size"] == 4
    yield shared
    assert shared.wait_serving(0)["tp_size"] == 4


@pytest.fixture
def unbroken(server, unbroken_shared):
    return unbroken_shared


@pytest.fixture
def seeds():
    """How many kills, and of what seed, a fault burst makes (ANCHORTP_KILLS, ANCHORTP_SEED)."""
    return int(os.environ.get("ANCHORTP_KILLS", "4")), int(os.environ.get("ANCHORTP_SEED", "0"))
