"""Our driver calls, through the real cuda-bindings, against a stand-in compiled from NVIDIA's header.

It shows that the calls are well-formed and that anchors on GPU memory keep the contract as far as that is up to our
code. It shows nothing of how a GPU behaves: for that there is tests/gpu.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import fake_cuda
import pytest
from arena_platforms import STAND_IN

pytestmark = pytest.mark.skipif(fake_cuda.why_not() is not None, reason=str(fake_cuda.why_not()))

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return fake_cuda.build(tmp_path_factory.mktemp("driver")) | {STAND_IN: "1"}


def run(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_anchors_on_gpu_memory_keep_the_contract(environment: dict[str, str]) -> None:
    out = run(environment, "-m", "pytest", "-k", "vmm or ipc", str(HERE / "test_arena_contract.py"))
    passed = re.search(r"(\d+) passed", out)
    assert passed and int(passed[1]) >= 18 and "skipped" not in out, out


@pytest.mark.parametrize("refused, expected", [("", "SIGSEGV"), ("read-only", "written")])
def test_read_only_is_asked_for_and_done_without_where_the_driver_refuses_it(
    environment: dict[str, str], refused: str, expected: str
) -> None:
    code = """
        import ctypes
        from anchortp_sglang.memory.cuda_vmm import create, map_fd
        from anchortp_sglang.memory.cuda_driver import call
        call("cuInit", 0)
        ctypes.memset(map_fd(create(0, 8), 8, 0, writable=False).address, 1, 8)
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", code], env=environment | {"FAKE_CUDA_REFUSES": refused}, timeout=60)
    assert done.returncode == (-11 if expected == "SIGSEGV" else 0)
