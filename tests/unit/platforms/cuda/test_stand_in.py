"""Our driver calls, through the real cuda-bindings, against a stand-in compiled from NVIDIA's header.

It shows that the calls are well-formed and that anchors on GPU memory keep the contract as far as that is up to our
code. It shows nothing of how a GPU behaves: for that there is tests/gpu.
"""

from __future__ import annotations

import inspect
import re
import signal
import subprocess
import sys
import textwrap
import time

import fake_cuda
import msgspec
import pytest
from arena_platforms import STAND_IN
from fake_cuda import UUIDS
from places import UNIT

from anchortp_sglang.memory import cuda_driver, cuda_vmm
from anchortp_sglang.platforms.cuda import health
from anchortp_sglang.platforms.cuda.probe import GpuFacts

pytestmark = pytest.mark.skipif(fake_cuda.why_not() is not None, reason=str(fake_cuda.why_not()))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return fake_cuda.build(tmp_path_factory.mktemp("driver")) | {STAND_IN: "1"}


def run(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def code(text: str) -> tuple[str, str]:
    return "-c", textwrap.dedent(text)


def test_anchors_on_gpu_memory_keep_the_contract(environment: dict[str, str]) -> None:
    out = run(environment, "-m", "pytest", "-k", "vmm or ipc", str(UNIT / "memory" / "test_arena_contract.py"))
    passed = re.search(r"(\d+) passed", out)
    assert passed and int(passed[1]) >= 18 and "skipped" not in out, out


@pytest.mark.parametrize("refused, exit_code", [("", -signal.SIGSEGV), ("read-only", 0)])
def test_read_only_is_asked_for_and_done_without_where_the_driver_refuses_it(
    environment: dict[str, str], refused: str, exit_code: int
) -> None:
    writes = code("""
        import ctypes
        from anchortp_sglang.memory.cuda_vmm import create, map_fd
        from anchortp_sglang.memory.cuda_driver import call
        call("cuInit", 0)
        ctypes.memset(map_fd(create(0, 8), 8, 0, writable=False).address, 1, 8)
    """)
    done = subprocess.run([sys.executable, *writes], env=environment | {"FAKE_CUDA_REFUSES": refused}, timeout=60)
    assert done.returncode == exit_code


@pytest.mark.parametrize("refused, sharing, peers", [("", "vmm", 2), ("export", "ipc", 2), ("peers", "vmm", 1)])
def test_the_inventory_says_how_memory_can_be_shared(
    environment: dict[str, str], refused: str, sharing: str, peers: int
) -> None:
    out = run(environment | {"FAKE_CUDA_REFUSES": refused}, "-m", "anchortp_sglang.platforms.cuda.probe")
    gpus = msgspec.json.decode(out, type=list[GpuFacts])
    assert [(gpu.uuid, gpu.sharing, len(gpu.peers)) for gpu in gpus] == [(uuid, sharing, peers) for uuid in UUIDS]
    assert {(gpu.name, gpu.total_bytes) for gpu in gpus} == {("Fake GPU", 1 << 30)}


@pytest.mark.parametrize("refused, level", [("", "PASS"), ("export", "WARN"), ("peers", "WARN")])
def test_the_doctor_says_what_the_gpus_lack(environment: dict[str, str], refused: str, level: str) -> None:
    script = code("""
        import os
        from anchortp_sglang.cli import doctor
        exists = os.path.exists
        os.path.exists = lambda path: path == "/dev/nvidiactl" or exists(path)
        print(doctor.check_gpus().level)
    """)
    assert run(environment | {"FAKE_CUDA_REFUSES": refused}, *script).strip() == level


def test_the_platform_is_chosen_with_the_gpus_that_are_visible(environment: dict[str, str]) -> None:
    script = code("""
        from anchortp_sglang.startup.device import choose_platform
        platform = choose_platform({"device": "cuda"})
        print(*[gpu.uuid for gpu in platform.gpus], platform.defaults({}, {}, 2).flags["device"])
    """)
    assert run(environment, *script).split() == [*UUIDS, "cuda"]


def test_a_gpu_that_is_not_there_is_named_by_the_probe(environment: dict[str, str]) -> None:
    out = run(
        environment,
        *code(f"""
        from anchortp_sglang.platforms.cuda.probe import touch_all
        print(touch_all(["{UUIDS[0]}", "GPU-none"], 30))
    """),
    )
    assert out.startswith("{'GPU-none': 'GPU-none is not among the visible GPUs") and UUIDS[0] in out


def test_the_tensor_of_a_mapping_is_its_memory(environment: dict[str, str]) -> None:
    out = run(
        environment,
        *code("""
        import ctypes, torch
        from anchortp_sglang.platforms.cuda.device_memory import tensor_at
        from anchortp_sglang.memory.cuda_driver import call
        from anchortp_sglang.memory.cuda_vmm import create, map_fd
        call("cuInit", 0)
        mapping = map_fd(create(1, 100), 100, 1, writable=True)
        tensor = tensor_at(mapping.address, 100, torch.device("cpu"))  # the stand-in's memory is the host's
        tensor.view(torch.float32).fill_(1.0)
        print(len(tensor), ctypes.string_at(mapping.address, 4).hex(), tensor.data_ptr() == mapping.address)
    """),
    )
    assert out.split() == ["100", "0000803f", "True"]


def test_the_header_lists_no_memory_call_of_an_anchor_as_one_that_needs_a_context() -> None:
    header = fake_cuda.header().read_text()
    source = "".join(inspect.getsource(module) for module in (cuda_driver, cuda_vmm))
    calls = set(re.findall(r'call\("(cuMem\w+)"', source))
    assert {"cuMemRelease", "cuMemCreate", "cuMemExportToShareableHandle", "cuMemMap"} < calls
    for name in sorted(calls):
        prototype = re.search(rf"CUresult CUDAAPI {name}\(", header)
        assert prototype, f"{name} is not in the header"
        end = prototype.start()
        text = header[header.rindex("/**", 0, end) : end]
        assert "CUDA_SUCCESS" in text and "INVALID_CONTEXT" not in text, name


class TestHealth:
    def test_an_xid_that_costs_a_gpu_is_told_once_and_others_not(self, environment: dict[str, str]) -> None:
        assert self.watch(environment | {"FAKE_CUDA_XIDS": "13 79 79 31"}) == [(UUIDS[0], "Xid 79: fallen off the bus")]

    def test_a_gpu_that_does_not_answer_is_lost(self, environment: dict[str, str]) -> None:
        ((uuid, reason),) = self.watch(environment | {"FAKE_CUDA_REFUSES": "second"})
        assert uuid == UUIDS[1] and reason.startswith("NVML: ")

    @staticmethod
    def watch(environment: dict[str, str]) -> list[tuple[str, str]]:
        done = subprocess.Popen(
            health.command(tuple(UUIDS)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert done.stdout is not None
        try:
            first = done.stdout.readline()
            time.sleep(0.5)  # it goes on at once: the stand-in does not wait
        finally:
            done.kill()
        rest = done.stdout.read().splitlines()
        done.wait()
        lines = [msgspec.json.decode(line, type=health.GpuLost) for line in (first, *rest)]
        return [(line.uuid, line.reason) for line in lines]


@pytest.mark.parametrize(
    "before, reason",
    [
        ("pass", "None"),
        ("ctypes.CDLL('libcuda.so.1')", "None"),  # sgl_kernel's stand-in looks whether it loads
        ("ctypes.CDLL('libcuda.so.1').cuInit(0)", "CUDA is initialised"),
    ],
)
def test_a_process_that_has_initialised_the_driver_is_unfit_to_fork(
    environment: dict[str, str], before: str, reason: str
) -> None:
    out = run(
        environment,
        *code(f"""
        import ctypes
        from anchortp_sglang.startup.fork_guard import unfit_to_fork
        {before}
        print(unfit_to_fork())
    """),
    )
    assert out.strip() == reason
