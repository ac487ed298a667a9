"""Servers for chaos: real processes on loopback ports, each with a place of its own for what it leaves behind."""

import contextlib
import os

import launch_file
import pytest
from forge import LAUNCHER, ForkedServer
from histories import Unbroken
from remains import Place

from anchortp_sglang.testing.server import Server
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

ARGUMENTS = ("--dtype", "float32", "--device", "cpu", "--max-total-tokens", "8192")
ARGUMENTS += ("--anchor-allow-injection", "--anchor-allow-journals")
OVERLAP = ("--anchor-overlap", os.environ.get("ANCHORTP_OVERLAP", "auto"))
"""For all servers but those of tests that say it themselves."""
HANG_TIMEOUT_S = 4


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("chaos") / "qwen3", "qwen3")


@pytest.fixture(scope="session")
def launch(checkpoint, forge, tmp_path_factory):
    """launch(tp_size, *more_arguments): a context with a started Server; ``server.place`` is its Place.

    It is forked from a process that has imported SGLang, unless ``module`` says what a new interpreter runs, or
    ``prefix``, what runs that. ``before_start`` is called with the server.
    """

    @contextlib.contextmanager
    def launch(tp_size, *arguments, model=checkpoint, env=None, module=None, prefix=(), before_start=None):
        place = Place(tmp_path_factory.mktemp("server") / "log")
        arguments = (model, tp_size, *ARGUMENTS, *OVERLAP, *arguments)
        options = {"log": place.log, "env": place.env | (env or {})}
        if module is None and not prefix:
            server = ForkedServer(forge, *arguments, **options)
        else:
            server = Server(*arguments, module=module or LAUNCHER, **options)
            server._command = [*prefix, *server._command]
        server.place = place
        if before_start is not None:
            before_start(server)
        try:
            with server:
                yield server
        finally:
            place.remove()

    return launch


SHARED = ("--chunked-prefill-size", "128", "--anchor-hang-timeout", str(HANG_TIMEOUT_S))


@pytest.fixture(scope="session")
def shared(launch):
    """One TP=4 server for all faults that leave it as it was; with the Unbroken answers it has given."""
    with launch(4, *SHARED) as server:
        yield server, Unbroken(server)


@pytest.fixture(scope="session")
def shared_with_overlap(launch, checkpoint, tmp_path_factory):
    """Another one, with SGLang's overlap schedule, for tests marked ``overlap``; started as launch files do it."""
    cache = launch_file.cache(tmp_path_factory.mktemp("hub"), checkpoint)
    env = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    flags = ("--anchor-hang-timeout", str(HANG_TIMEOUT_S), "--anchor-overlap", "on")
    with launch(4, *launch_file.ARGUMENTS, *flags, model=launch_file.REPOSITORY, env=env, module=LAUNCHER) as server:
        yield server, Unbroken(server)


@pytest.fixture
def of_test(request):
    overlap = request.node.get_closest_marker("overlap") is not None
    return request.getfixturevalue("shared_with_overlap" if overlap else "shared")


@pytest.fixture
def server(of_test):
    """The shared server, serving with all devices before the test and after it."""
    server, _ = of_test
    assert server.wait_serving(0)["tp_size"] == 4
    yield server
    assert server.wait_serving(0)["tp_size"] == 4


@pytest.fixture
def unbroken(server, of_test):
    _, unbroken = of_test
    return unbroken


@pytest.fixture
def seeds():
    """How many kills, and of what seed, a fault burst makes (ANCHORTP_KILLS, ANCHORTP_SEED)."""
    return int(os.environ.get("ANCHORTP_KILLS", "2")), int(os.environ.get("ANCHORTP_SEED", "0"))
