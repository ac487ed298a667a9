"""A process that uses an anchor's memory, told what to do line by line: the rank's part in the arena contract.

In a process of its own, so that it can be killed, and so that no test process ever touches a GPU.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anchortp_sglang.anchor.client import AnchorClient, HandleGrant
from anchortp_sglang.anchor.launch import RunDir
from anchortp_sglang.memory.gpu import GpuShare


class ArenaUser:
    """Starts the process; its methods are those of ``_Memory`` below."""

    def __init__(self, run: RunDir, gpu: GpuShare | None) -> None:
        where = [str(run.path), run.run_id]
        what = [] if gpu is None else [gpu.uuid, str(gpu.budget_bytes), gpu.sharing]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *where, *what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), str(Path(__file__).parent)])},
        )

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args: self._ask(name, *args)

    def _ask(self, name: str, *args: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([name, *args]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise BrokenPipeError(f"the user of the memory died: {self.process.wait()}")
        result, error = json.loads(answer)
        if error:
            raise RuntimeError(error)
        return result

    def kill(self) -> None:
        """SIGKILL; returns when it is dead and its memory torn down."""
        self.process.kill()
        self.process.wait()


class _Memory:
    """One segment, open and mapped. ``read`` and ``write`` take text; the other processes see it at once."""

    def __init__(self, run_dir: str, run_id: str, gpu: GpuShare | None) -> None:
        self._client = AnchorClient(run_dir, run_id, 0)
        self._gpu = gpu
        self._grant: HandleGrant | None = None

    def open(self, name: str, generation: int, writable: bool) -> bool:
        """Whether it is sealed."""
        self._grant = self._client.open_handle(generation, name)
        self._map(self._grant.fd, self._grant.nbytes, writable)
        return self._grant.sealed

    def give_back(self, name: str, generation: int) -> None:
        """To a new anchor."""
        assert self._grant is not None
        self._client.adopt_handle(generation, name, *self._grant)

    def _map(self, fd: int, nbytes: int, writable: bool) -> None:
        from anchortp_sglang.memory.arena import map_fd

        self._bytes = map_fd(fd, nbytes, writable)

    def read(self, start: int, length: int) -> str:
        return self._bytes[start : start + length].decode("latin-1")

    def write(self, start: int, text: str) -> None:
        self._bytes[start : start + len(text)] = text.encode("latin-1")


class _GpuMemory(_Memory):
    def _map(self, fd: int, nbytes: int, writable: bool) -> None:
        from anchortp_sglang.memory import cuda_ipc, cuda_vmm
        from anchortp_sglang.memory.cuda_driver import call, device_by_uuid

        assert self._gpu is not None
        device = device_by_uuid(self._gpu.uuid)
        call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", device))  # of this process: copies need one
        sharing = cuda_ipc if self._gpu.sharing == "ipc" else cuda_vmm
        self._address = sharing.map_fd(fd, nbytes, device, writable).address

    def read(self, start: int, length: int) -> str:
        from anchortp_sglang.memory.cuda_driver import call

        buffer = bytearray(length)
        call("cuMemcpyDtoH", buffer, self._address + start, length)
        return buffer.decode("latin-1")

    def write(self, start: int, text: str) -> None:
        from anchortp_sglang.memory.cuda_driver import call

        call("cuMemcpyHtoD", self._address + start, text.encode("latin-1"), len(text))


def _main(run_dir: str, run_id: str, *gpu: str) -> None:
    share = GpuShare(gpu[0], int(gpu[1]), gpu[2]) if gpu else None  # type: ignore[arg-type]
    memory = _GpuMemory(run_dir, run_id, share) if share else _Memory(run_dir, run_id, None)
    for line in sys.stdin:
        name, *args = json.loads(line)
        try:
            answer = [getattr(memory, name)(*args), None]
        except Exception as error:
            answer = [None, f"{type(error).__name__}: {error}"]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: a test that fails leaves nobody behind
    _main(*sys.argv[1:])
