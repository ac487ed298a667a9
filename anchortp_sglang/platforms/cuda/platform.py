"""The CUDA platform: a device is a GPU, or a share of one. Calls a driver only in ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from anchortp_sglang.admission.devices import DeviceRules
from anchortp_sglang.memory.arena import Part
from anchortp_sglang.memory.arena_kinds import ArenaSpec
from anchortp_sglang.memory.cuda_driver import device_by_uuid
from anchortp_sglang.memory.gpu import GpuShare
from anchortp_sglang.options import AnchorOptions
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import Ownership
from anchortp_sglang.platforms.base import Defaults, MemoryPlan
from anchortp_sglang.platforms.cuda import plan
from anchortp_sglang.platforms.cuda.answers import environment
from anchortp_sglang.platforms.cuda.environment import cuda_defaults
from anchortp_sglang.platforms.cuda.probe import GpuFacts, visible_gpus
from anchortp_sglang.platforms.cuda.shares import share_out

if TYPE_CHECKING:
    import torch

    from anchortp_sglang.platforms.cuda.detection import GpuDetection
    from anchortp_sglang.platforms.mover import Mover, Write

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CudaPlatform:
    """The CUDA platform. ``gpus``: the visible ones, until memory is planned. ``shares``: by device, from then on."""

    gpus: tuple[GpuFacts, ...] = ()
    shares: tuple[GpuShare, ...] = ()

    rules: ClassVar[DeviceRules] = DeviceRules(device="cuda", attention_backends=("flashinfer", "triton", "fa3"))
    rank_overrides: ClassVar[Mapping[str, Any]] = plan.EAGER_START
    maps_parts: ClassVar[bool] = False
    lazy_memory: ClassVar[bool] = False
    new_memory_is_zero: ClassVar[bool] = False
    moves_kv: ClassVar[bool] = False
    spares_join_early: ClassVar[bool] = False

    @classmethod
    def of_this_machine(cls) -> CudaPlatform:
        """Find the visible GPUs, in another process. Raises ProbeError if they cannot be listed."""
        return cls(gpus=tuple(visible_gpus()))

    def defaults(self, given: Mapping[str, object], environ: Mapping[str, str], tp_size: int) -> Defaults:
        """Work out settings for replaceable ranks. Raises ValueError if no GPU is visible."""
        if not self.gpus:
            raise ValueError("no GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu")
        defaults = cuda_defaults(given, environ, shared=tp_size > len(self.gpus))
        answers = {name: value for name, value in environment(self.gpus).items() if name not in environ}
        return replace(defaults, env=defaults.env | answers)

    def plan_memory(
        self,
        model: ModelAxes,
        ownership: Ownership,
        view: Any,
        options: AnchorOptions,
        spreads_experts: bool,
        adapter_bytes: int,
    ) -> MemoryPlan:
        """Plan shares of GPUs, and slots within them; there is no mirror."""
        plan.check_gpu_plan(model, view, options, spreads_experts)
        shares = share_out(self.gpus, ownership.tp_size, view.mem_fraction_static or 0.8, options.share_gpus)
        _log_shares(shares)
        starting = len(options.start_devices) if isinstance(options.start_devices, tuple) else None
        kv, min_devices = plan.plan_gpu_kv(model, ownership, shares, options.min_devices, view, starting)
        log.info("anchortp: %s", plan.describe_losses(len(shares), min_devices, kv, options.min_devices is None))
        mirror_text = "off: KV in a GPU's memory is not mirrored yet, and is lost with its device"
        if options.standby == "warm":
            raise ValueError(
                "--anchor-standby warm is not supported on GPUs yet: a second generation beside the serving one has"
                " not been seen to fit and run on one; use cold"
            )
        standby = options.standby or "cold"
        standby_text = f"{standby}: spare ranks only"
        return MemoryPlan(CudaPlatform(shares=shares), kv, None, mirror_text, standby, standby_text, min_devices)

    @property
    def identity(self) -> tuple[str, ...]:
        """The shares of GPUs."""
        return tuple(map(str, self.shares))

    def graph_batch_sizes(self, view: Any) -> tuple[int, ...]:
        """Return the batch sizes that SGLang would capture at start; none where ranks share a GPU."""
        return plan.graph_batch_sizes(view, self.shares)

    def arena(self, device: int) -> ArenaSpec:
        """Choose memory of the device's GPU, within its budget."""
        share = self.shares[device]
        return ArenaSpec(share.sharing, share.uuid, share.budget_bytes)

    def byte_tensor(self, device: int, parts: Sequence[Part]) -> tuple[torch.Tensor, Callable[[], None]]:
        """Map a whole segment; the caller must end the mapping, as nothing tracks its tensors."""
        from anchortp_sglang.platforms.cuda.device_memory import map_whole

        (part,) = parts
        return map_whole(part, self.shares[device])

    def mover(self, device: int, open_writer: Callable[[], Write]) -> Mover:
        """Make a mover that copies through the mapping, on streams of its own."""
        import torch

        from anchortp_sglang.platforms.cuda.mover import CudaMover

        return CudaMover(torch.device("cuda", device_by_uuid(self.shares[device].uuid)))

    def gpu_id(self, device: int, rank: int) -> int:
        """Return the GPU's ordinal in this process.

        Makes torch initialise CUDA first: ranks that called cuda-bindings first ended with a segmentation fault in
        torch.
        """
        import torch

        torch.cuda.init()
        return device_by_uuid(self.shares[device].uuid)

    def make_collectives(self, buffer: object, rank: int, world_size: int, on_progress: Callable[[], None]) -> Any:
        """Share requests and tensors in host memory like the CPU platform; SGLang reduces those on GPUs."""
        from anchortp_sglang.platforms.cpu import hooks

        return hooks.share(buffer, rank, world_size, on_progress)

    def collectives_bytes(self, world_size: int) -> int:
        """Return the bytes of the region that all ranks map."""
        from anchortp_sglang.platforms.cpu.collectives import region_bytes

        return region_bytes(world_size)

    def wait_for_forward(self) -> None:
        """Wait for this thread's stream, where a call that returns has only launched its work."""
        import torch

        torch.cuda.current_stream().synchronize()

    def free_bytes(self, device: int) -> int:
        """Return the device's part of its GPU's free memory."""
        import torch

        uuids = [share.uuid for share in self.shares]
        return int(torch.cuda.mem_get_info()[0]) // uuids.count(uuids[device])

    def watch(self, on_fault: Callable[[str], None]) -> GpuDetection:
        """Watch the GPUs by NVML, in another process."""
        from anchortp_sglang.platforms.cuda.detection import GpuDetection

        return GpuDetection(self.shares, on_fault)


def _log_shares(shares: Sequence[GpuShare]) -> None:
    log.warning("anchortp: no recovery has come through with --device cuda yet; see docs/cuda.md")
    for device, gpu in enumerate(shares):
        log.info("anchortp: device %d is %s, %.1f GiB", device, gpu.uuid, gpu.budget_bytes / 2**30)
    if any(gpu.sharing == "ipc" for gpu in shares):
        log.warning("anchortp: the driver cannot export memory, so CUDA IPC is used: memory is lost with its anchor")
