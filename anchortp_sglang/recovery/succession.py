"""Who comes next after a fault: the verdict on each device, the next ownership, what its ranks should keep first."""

from collections.abc import Collection, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from anchortp_sglang.memory.chain_hash import RunHasher, root_hash
from anchortp_sglang.memory.namespaces import Key, namespace_seed
from anchortp_sglang.planning.expert_load import spread_hot_experts
from anchortp_sglang.planning.ownership import InvalidOwnership, Ownership
from anchortp_sglang.planning.reconfiguration import reconfigure
from anchortp_sglang.recovery.cluster import Cluster, ServerPlan
from anchortp_sglang.recovery.detection import Detection
from anchortp_sglang.recovery.machine import DeviceEvidence


class Unrecoverable(RuntimeError):
    """No new generation is possible; the text says why."""


def evidence(
    cluster: Cluster, detection: Detection, gpu_errors: Mapping[int, str], held: Ownership, serving: Ownership
) -> list[DeviceEvidence]:
    """What is known of each device that holds weights. ``serving``: of the ranks that ``detection`` watched."""
    died = {serving.devices[rank] for rank in detection.died}
    hung = {serving.devices[rank] for rank in detection.hung}
    return [
        DeviceEvidence(
            device=device,
            anchor_alive=cluster.anchor_alive(device),
            rank_died=device in died,
            rank_hung=device in hung,
            device_error=gpu_errors.get(device, ""),
        )
        for device in held.devices
    ]


def next_ownership(
    plan: ServerPlan, configured: Ownership, held: Ownership, lost: Collection[int], min_devices: int
) -> Ownership:
    """Of what is left of ``held``. ``configured``: what the server started with. Raises Unrecoverable."""
    survivors = [device for device in held.devices if device not in lost]
    if len(survivors) < min_devices:
        raise Unrecoverable(
            f"{len(survivors)} of {configured.tp_size} devices are left, --anchor-min-devices is {min_devices}"
        )
    if not lost:
        return held
    try:
        ownership = reconfigure(plan.model, held, survivors, plan.rotate_heads)
        if plan.expert_counts is not None:
            ownership = spread_hot_experts(plan.model, ownership, plan.expert_counts, held)
        plan.kv_of(ownership)
        return ownership
    except InvalidOwnership as error:
        raise Unrecoverable(str(error)) from error


def kept_first(
    plan: ServerPlan, held: Ownership, ownership: Ownership, open_tokens: Iterable[tuple[Key, NDArray[np.int64]]]
) -> bytes:
    """Chain hashes (uint64) of what open requests have, where there is less room for KV than before.

    ``open_tokens``: of each request, int64[n], after its extra key and cache salt; not asked for where all fits.
    """
    if plan.kv_of(ownership).slots >= plan.kv_of(held).slots:
        return b""
    hasher, root = RunHasher(), root_hash(plan.namespace)
    return b"".join(hasher.run_hashes(namespace_seed(root, key), tokens).tobytes() for key, tokens in open_tokens)
