"""Assigns GPUs, or shares of them, to devices. Pure."""

from collections.abc import Sequence

from anchortp_sglang.memory.gpu import GpuShare
from anchortp_sglang.platforms.cuda.probe import GpuFacts


def share_out(gpus: Sequence[GpuFacts], devices: int, fraction: float, may_share: bool) -> tuple[GpuShare, ...]:
    """Make a share for each of ``devices``; those on a GPU get ``fraction`` of it in all (--mem-fraction-static).

    One GPU each, in order; with ``may_share`` several devices on one GPU where there are more of them than GPUs. Raises
    ValueError for the operator.
    """
    if not gpus:
        raise ValueError("no GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu")
    if devices > len(gpus) and not may_share:
        raise ValueError(
            f"--tp-size {devices} with {len(gpus)} visible GPUs: use a smaller one, or --anchor-share-gpus for tests"
        )
    used = gpus[:devices]
    _check_peers(used)
    tenants = [len(range(index, devices, len(used))) for index in range(len(used))]
    return tuple(
        GpuShare(
            uuid=used[device % len(used)].uuid,
            budget_bytes=int(used[device % len(used)].total_bytes * fraction) // tenants[device % len(used)],
            sharing=used[device % len(used)].sharing,
            alone=tenants[device % len(used)] == 1,
        )
        for device in range(devices)
    )


def _check_peers(gpus: Sequence[GpuFacts]) -> None:
    for gpu in gpus:
        apart = [other.uuid for other in gpus if other.uuid not in gpu.peers]
        if apart:
            raise ValueError(
                f"{gpu.uuid} cannot map the memory of {', '.join(apart)}: after a loss shares could not be moved "
                "between them; use GPUs with peer access (nvidia-smi topo -p2p r)"
            )
