"""The links of a machine that a transfer occupies, how fast each is, and how long it is busy at least."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from anchortp_sglang.planning.placement.migration_types import Transfer
from anchortp_sglang.planning.prediction.topology import Topology

Link = tuple[str | int, ...]
"""``("storage",)``, ``("host memory",)``, ``("host link", device)``, ``("p2p out", device)``,
``("p2p in", device)`` or ``("p2p link", source, destination)``."""


def route(topology: Topology, kind: str, device: int, source: int | None) -> tuple[Link, ...]:
    """Return the links that a transfer passes, each at the transfer's full rate.

    Raises ValueError for an unknown kind, or a P2P transfer without another device as its source.
    """
    host: tuple[Link, ...] = (("host memory",), ("host link", device))
    if kind == "reload":
        return (("storage",), *host)
    if kind == "copy":
        return host
    if kind != "p2p" or source is None or source == device:
        raise ValueError(f"a {kind} transfer from {source} to device {device} has no route")
    receiving: tuple[Link, ...] = host if topology.p2p_through_host else (("p2p in", device),)
    return (("p2p out", source), ("p2p link", source, device), *receiving)


def bandwidth(topology: Topology, link: Link) -> float:
    """Return the bytes per second that a link carries."""
    match link:
        case ("storage",):
            return topology.storage_bytes_per_s
        case ("host memory",):
            return topology.host_memory_bytes_per_s
        case ("host link", int(device)):
            return topology.host_link_bytes_per_s[device]
        case ("p2p out" | "p2p in", int(device)):
            return topology.p2p_port_bytes_per_s[device]
        case ("p2p link", int(source), int(device)):
            return topology.p2p_bytes_per_s(source, device)
    raise ValueError(f"{link} is not a link")


def link_loads(topology: Topology, transfers: Iterable[Transfer]) -> Mapping[Link, float]:
    """Return the seconds that each link is busy at least, with all that the transfers send over it."""
    flows: defaultdict[tuple[str, int, int | None], int] = defaultdict(int)
    for transfer in transfers:
        flows[transfer.kind, transfer.device, transfer.source] += transfer.nbytes
    carried: defaultdict[Link, int] = defaultdict(int)
    for (kind, device, source), nbytes in flows.items():
        for link in route(topology, kind, device, source):
            carried[link] += nbytes
    return {link: nbytes / bandwidth(topology, link) for link, nbytes in carried.items()}


def link_lower_bound_s(topology: Topology, transfers: Iterable[Transfer]) -> float:
    """Return the load of the busiest link: no schedule ends before it has carried its bytes."""
    return max(link_loads(topology, transfers).values(), default=0.0)
