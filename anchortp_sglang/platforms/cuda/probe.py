"""Asks the GPUs in a process of its own: main must not load a CUDA driver before it forks, nor hang with one.

``python -m anchortp_sglang.platforms.cuda.probe``           all visible GPUs as JSON
``python -m anchortp_sglang.platforms.cuda.probe GPU-…``     touches one of them: exit code 0 if it answers
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable

import msgspec

from anchortp_sglang.memory import cuda_vmm
from anchortp_sglang.memory.arena import ArenaError
from anchortp_sglang.memory.cuda_driver import UNSUPPORTED, CudaError, bindings, call, device_by_uuid
from anchortp_sglang.memory.gpu import Sharing

__all__ = ["GpuFacts", "ProbeError", "touch_all", "visible_gpus"]

_INVENTORY_TIMEOUT_S = 60.0  # a cold driver takes seconds per GPU to initialise
_PAGE_BYTES = 1  # rounded up to the driver's page size


class ProbeError(RuntimeError):
    """The GPUs of this machine cannot be listed."""


class GpuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A visible GPU. ``peers``: UUIDs of the GPUs whose memory it can map. ``capability``: (major, minor)."""

    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    sharing: Sharing
    peers: list[str]
    capability: tuple[int, int] = (0, 0)
    multiprocessors: int = 0
    l2_bytes: int = 0


def visible_gpus() -> list[GpuFacts]:
    """Return the GPUs in CUDA_VISIBLE_DEVICES, in its order. Raises ProbeError."""
    try:
        # The order in which SGLang will count them (platforms/cuda/environment.py), as CUDA_VISIBLE_DEVICES does.
        env = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} | os.environ
        done = subprocess.run(_command(), env=env, capture_output=True, timeout=_INVENTORY_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ProbeError(f"the GPUs did not answer within {_INVENTORY_TIMEOUT_S:g} s: see nvidia-smi") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ProbeError(f"the GPUs cannot be listed: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return msgspec.json.decode(done.stdout, type=list[GpuFacts])


def touch_all(uuids: Iterable[str], timeout_s: float) -> dict[str, str]:
    """Return why a GPU does not answer, by UUID, for those that do not. A process that sees no other GPU asks each."""
    probes = {
        uuid: subprocess.Popen(
            _command(uuid),
            env=os.environ | {"CUDA_VISIBLE_DEVICES": uuid},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for uuid in set(uuids)
    }
    failures = {uuid: _failure(probe, timeout_s) for uuid, probe in probes.items()}
    return {uuid: failure for uuid, failure in failures.items() if failure}


def _failure(probe: subprocess.Popen[bytes], timeout_s: float) -> str:
    try:
        _, stderr = probe.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        probe.kill()  # a process stuck in a dead GPU's driver may not even die: do not wait for it
        return f"does not answer within {timeout_s:g} s"
    lines = stderr.decode(errors="replace").strip().splitlines()
    return (lines[-1] if lines else f"exit code {probe.returncode}") if probe.returncode else ""


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "anchortp_sglang.platforms.cuda.probe", *arguments]


def _inventory() -> list[GpuFacts]:
    import pynvml

    call("cuInit", 0)
    pynvml.nvmlInit()
    handles = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        handles[_text(pynvml.nvmlDeviceGetUUID(handle))] = handle
    ordinals: dict[str, int] = {}
    for uuid in handles:
        try:
            ordinals[uuid] = device_by_uuid(uuid)
        except ArenaError:
            continue  # not visible
    facts = []
    for uuid, ordinal in sorted(ordinals.items(), key=lambda item: item[1]):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handles[uuid])
        facts.append(
            GpuFacts(
                uuid=uuid,
                name=_text(pynvml.nvmlDeviceGetName(handles[uuid])),
                total_bytes=int(memory.total),
                free_bytes=int(memory.free),
                sharing=_sharing(ordinal),
                peers=[other for other, peer in ordinals.items() if _reaches(ordinal, peer)],
                capability=(
                    _attribute(ordinal, "COMPUTE_CAPABILITY_MAJOR"),
                    _attribute(ordinal, "COMPUTE_CAPABILITY_MINOR"),
                ),
                multiprocessors=_attribute(ordinal, "MULTIPROCESSOR_COUNT"),
                l2_bytes=_attribute(ordinal, "L2_CACHE_SIZE"),
            )
        )
    return facts


def _attribute(device: int, name: str) -> int:
    attribute = getattr(bindings().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(call("cuDeviceGetAttribute", attribute, device))


def _sharing(device: int) -> Sharing:
    """Find out whether the driver, and the container, export VMM memory as a descriptor and import it."""
    try:
        fd = cuda_vmm.create(device, _PAGE_BYTES)
        try:
            cuda_vmm.map_fd(fd, _PAGE_BYTES, device, writable=True).unmap()
        finally:
            os.close(fd)
    except CudaError as error:
        if error.name not in UNSUPPORTED:
            raise
        return "ipc"
    return "vmm"


def _touch(uuid: str) -> None:
    """Have the GPU do something. A full one answers, too."""
    try:
        os.close(cuda_vmm.create(device_by_uuid(uuid), _PAGE_BYTES))
    except CudaError as error:
        if error.name != "CUDA_ERROR_OUT_OF_MEMORY":
            raise


def _reaches(device: int, peer: int) -> bool:
    return device == peer or bool(call("cuDeviceCanAccessPeer", device, peer))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _main(arguments: list[str]) -> None:
    try:
        if arguments:
            _touch(arguments[0])
        else:
            sys.stdout.buffer.write(msgspec.json.encode(_inventory()))
    except ArenaError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    _main(sys.argv[1:])
