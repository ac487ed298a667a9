"""Ready-made topologies. A comment at each says which figures are from a data sheet and which are assumed.

Nominal: bandwidths and memory sizes of NVIDIA's data sheets, per direction. Assumed, as no figure of your machine is
known: that a link reaches ``LINK_EFFICIENCY`` of its nominal bandwidth; storage and host memory; every time of
``RecoveryTimes``. Measure and write a topology file where the answer matters.
"""

from anchortp_sglang.planning.prediction.topology import InvalidTopology, RecoveryTimes, Topology

LINK_EFFICIENCY = 0.85
"""Assumed: the share of a link's nominal bandwidth that large transfers reach."""

PCIE4_X16, PCIE5_X16 = 31.5e9, 63.0e9
"""Nominal, per direction: 16 lanes of 16 and 32 GT/s with 128b/130b coding."""

NVLINK4 = 450e9
"""Nominal, per direction: 18 links of 25 GB/s through NVSwitch (data sheets: 900 GB/s both ways)."""

GB, GIB = 10**9, 1 << 30

GPU_TIMES = RecoveryTimes(
    detect_s=0.1,
    fence_s=0.2,
    plan_s=0.05,
    fork_s=0.6,
    groups_s=1.0,
    bind_layer_s=0.001,
    first_token_s=0.5,
    graphs_s=8.0,
    process_start_s=20.0,
)
"""Assumed throughout: CUDA contexts in new ranks, NCCL communicators, capture of the usual graph sizes, and for a
restart the import of SGLang and the start of its processes."""

CPU_TIMES = RecoveryTimes(
    detect_s=0.01,
    fence_s=0.08,
    plan_s=0.01,
    fork_s=0.03,
    groups_s=0.1,
    bind_layer_s=0.02,
    first_token_s=0.3,
    graphs_s=0.0,
    process_start_s=15.0,
)
"""Rounded from the recorded run of ``make demo`` (a small model, two cores); the process start is assumed."""


def machine(name: str, devices: int | None = None) -> Topology:
    """Look up a ready-made topology by name (in any case), resized to ``devices``.

    Raises InvalidTopology for an unknown name or no devices.
    """
    known = {known.lower(): known for known in MACHINES}
    if name.lower() not in known:
        raise InvalidTopology(f"topology: {name!r} is none of {', '.join(MACHINES)}, and no file of that name exists")
    topology = MACHINES[known[name.lower()]]
    return topology if devices is None else topology.resized(devices)


def _gpus(
    name: str,
    devices: int,
    memory_bytes: int,
    memory_bandwidth: float,
    pcie: float,
    nvlink: float | None,
    storage: float,
    host_memory: float,
) -> Topology:
    link = (pcie if nvlink is None else nvlink) * LINK_EFFICIENCY
    return Topology(
        name=name,
        host_link_bytes_per_s=(pcie * LINK_EFFICIENCY,) * devices,
        p2p_port_bytes_per_s=(link,) * devices,
        p2p_link_bytes_per_s=link,
        p2p_through_host=nvlink is None,
        storage_bytes_per_s=storage,
        host_memory_bytes_per_s=host_memory,
        # A copied byte is read and written.
        device_copy_bytes_per_s=(memory_bandwidth * LINK_EFFICIENCY / 2,) * devices,
        device_memory_bytes=(memory_bytes,) * devices,
        transfer_latency_s=10e-6,
        times=GPU_TIMES,
    )


MACHINES: dict[str, Topology] = {
    # Nominal: 80 GB at 3.35 TB/s, PCIe 5.0 x16, NVLink 4 (H100 SXM). Assumed: storage, host memory.
    "8xH100-NVLink": _gpus("8xH100-NVLink", 8, 80 * GB, 3.35e12, PCIE5_X16, NVLINK4, 12e9, 200e9),
    # Nominal: 96 GB at 4.0 TB/s, PCIe 5.0 x16, NVLink 4. Assumed: storage, host memory.
    "8xH20-NVLink": _gpus("8xH20-NVLink", 8, 96 * GB, 4.0e12, PCIE5_X16, NVLINK4, 12e9, 200e9),
    # Nominal: 80 GB at 1.935 TB/s, PCIe 4.0 x16. Assumed: no NVLink bridges, storage, host memory.
    "8xA100-PCIe": _gpus("8xA100-PCIe", 8, 80 * GB, 1.935e12, PCIE4_X16, None, 6e9, 120e9),
    # Nominal: 48 GB at 864 GB/s, PCIe 4.0 x16, no NVLink. Assumed: storage, host memory.
    "4xL40S-PCIe": _gpus("4xL40S-PCIe", 4, 48 * GB, 864e9, PCIE4_X16, None, 6e9, 120e9),
    # All assumed: virtual devices in one host's memory; every transfer is a memcpy by a core of its own.
    "cpu": Topology(
        name="cpu",
        host_link_bytes_per_s=(4e9,) * 4,
        p2p_port_bytes_per_s=(4e9,) * 4,
        p2p_link_bytes_per_s=4e9,
        p2p_through_host=True,
        storage_bytes_per_s=1e9,
        host_memory_bytes_per_s=10e9,
        device_copy_bytes_per_s=(4e9,) * 4,
        device_memory_bytes=(16 * GIB,) * 4,
        transfer_latency_s=20e-6,
        times=CPU_TIMES,
    ),
}
