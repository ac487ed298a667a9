"""Tests that need a GPU. One is enough; everything here is skipped, with the reason, where there is none.

ANCHORTP_GPU_FLAGS holds more flags for every server here, ours and stock (docs/cuda.md says when they are needed).
"""

import contextlib
import os
import shlex

import pytest
from arena_platforms import gpu_uuid
from remains import Place

from anchortp_sglang.testing.server import Server
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

MODEL_FLAGS = (
    "--dtype",
    "float32",
    "--attention-backend",
    "triton",
    "--max-total-tokens",
    "8192",
    "--random-seed",
    "1",
)
START_TIMEOUT_S = 900.0  # kernels are compiled at first use


def why_not() -> str | None:
    """Why nothing here can run."""
    if not os.path.exists("/dev/nvidiactl"):
        return "no CUDA device: there is no /dev/nvidiactl"
    return None if gpu_uuid() else "no CUDA device: NVML lists none"


def pytest_collection_modifyitems(items):
    reason = why_not()
    for item in items:
        if "tests/gpu" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("gpu") / "qwen3", "qwen3")


@pytest.fixture(scope="session")
def launch(checkpoint, tmp_path_factory):
    """launch(tp_size, *more_arguments): a context with a started server on GPUs; several devices share one."""

    @contextlib.contextmanager
    def launch(tp_size, *arguments):
        place = Place(tmp_path_factory.mktemp("server") / "log")
        ours = ("--anchor-share-gpus", "--anchor-allow-injection")
        ours += ("--anchor-hang-timeout", str(START_TIMEOUT_S))
        server = Server(
            checkpoint,
            tp_size,
            *flags(),
            *ours,
            *arguments,
            log=place.log,
            env=place.env | {"CUDA_VISIBLE_DEVICES": "0"},
        )
        try:
            server.start(START_TIMEOUT_S)
            yield server
        finally:
            server.stop()
            place.remove()

    return launch


@pytest.fixture(scope="session")
def stock(checkpoint, tmp_path_factory):
    """A context with stock SGLang at TP=1 on the same GPU."""

    @contextlib.contextmanager
    def stock():
        log = tmp_path_factory.mktemp("stock") / "log"
        module = "anchortp_sglang.testing.stock_server"
        server = Server(checkpoint, 1, *flags(), "--disable-cuda-graph", module=module, log=log)
        try:
            server.start(START_TIMEOUT_S)
            yield server
        finally:
            server.stop()

    return stock


def flags():
    return ("--device", "cuda", *MODEL_FLAGS, *shlex.split(os.environ.get("ANCHORTP_GPU_FLAGS", "")))
