"""Notes which GPUs are lost: by the reports of the health process, and by a probe when ranks have died."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable, Sequence

import msgspec

from anchortp_sglang.memory.gpu import GpuShare
from anchortp_sglang.platforms.cuda import health, probe
from anchortp_sglang.threads import in_thread

log = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 10.0
_RECHECKS, _RECHECK_AFTER_S = 3, 2.0
_RESTART_AFTER_S = 10.0


class GpuDetection:
    """Notes lost GPUs. ``errors``: device -> why its GPU is lost. Without GPUs it does nothing."""

    def __init__(self, gpus: Sequence[GpuShare], on_fault: Callable[[str], None]) -> None:
        self.errors: dict[int, str] = {}
        self._gpus = gpus
        self._on_fault = on_fault
        self._process: asyncio.subprocess.Process | None = None
        self._restarts = False

    async def watch(self) -> None:
        """Follow the reports of the health process, as long as the server runs."""
        uuids = tuple(dict.fromkeys(gpu.uuid for gpu in self._gpus))
        while self._gpus:
            process = self._process = await asyncio.create_subprocess_exec(
                *health.command(uuids), stdout=asyncio.subprocess.PIPE, stderr=sys.stderr
            )
            assert process.stdout is not None
            async for line in process.stdout:
                self.lost(msgspec.json.decode(line, type=health.GpuLost))
            code = await process.wait()
            if self._restarts:
                self._restarts = False
                continue
            log.warning(
                "anchortp: the process that watches the GPUs ended (exit code %s); it is started again in %g s",
                code,
                _RESTART_AFTER_S,
            )
            await asyncio.sleep(_RESTART_AFTER_S)

    async def recheck(self, device: int) -> str:
        """Ask a lost GPU, which may have been reset, several times. Return why it is still lost; empty if it is not."""
        uuid = self._gpus[device].uuid
        for attempt in range(_RECHECKS):
            if attempt:
                await asyncio.sleep(_RECHECK_AFTER_S)
            try:
                failures = await in_thread(probe.touch_all, {uuid}, _PROBE_TIMEOUT_S)
            except OSError as error:
                return f"it could not be probed: {error}"
            if uuid in failures:
                return failures[uuid]
        self.errors.pop(device, None)
        if self._process is not None:
            self._restarts = True  # it reports each GPU once; the next one reports this GPU again
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        return ""

    async def probe(self) -> None:
        """Ask whether the GPUs answer at all. Reports no fault, as one is being handled."""
        if self._gpus:
            uuids = {gpu.uuid for device, gpu in enumerate(self._gpus) if device not in self.errors}
            failures = await in_thread(probe.touch_all, uuids, _PROBE_TIMEOUT_S)
            for uuid, reason in failures.items():
                self._note(health.GpuLost(uuid, reason))

    def lost(self, gpu: health.GpuLost) -> None:
        """Note a lost GPU while others serve, and report the fault."""
        devices = self._note(gpu)
        if devices:
            self._on_fault(f"device {devices[0]}: {gpu.reason}")

    def _note(self, gpu: health.GpuLost) -> list[int]:
        devices = [device for device, share in enumerate(self._gpus) if share.uuid == gpu.uuid]
        new = [device for device in devices if device not in self.errors]
        for device in new:
            log.error("anchortp: the GPU of device %d (%s) is lost: %s", device, gpu.uuid, gpu.reason)
            self.errors[device] = gpu.reason
        return new
