"""The JSON form of a topology, read with every error naming its field.

A per-device field is a number (all devices alike) or a list. ``p2p_link_bytes_per_s`` is a number or an object
``{"0-1": …, "0-2": …}`` with each pair of devices, either way round, once.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from itertools import combinations
from typing import Any

from anchortp_sglang.planning.prediction.topology import (
    PER_DEVICE,
    InvalidTopology,
    RecoveryTimes,
    Topology,
    check_number,
)

_FIELDS = ("devices", *(field.name for field in fields(Topology)))
_TIMES = tuple(field.name for field in fields(RecoveryTimes))


def topology_from_json(text: str) -> Topology:
    """Read a topology. Raises InvalidTopology that names what is missing, unknown or impossible."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidTopology(f"topology: not JSON: {error}") from error
    found = _object("topology", value, _FIELDS)
    devices = found["devices"]
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise InvalidTopology(f"devices: a whole number of at least 1 is needed, not {devices!r}")
    if not isinstance(found["name"], str) or not found["name"]:
        raise InvalidTopology(f"name: a text is needed, not {found['name']!r}")
    if not isinstance(found["p2p_through_host"], bool):
        raise InvalidTopology(f"p2p_through_host: true or false is needed, not {found['p2p_through_host']!r}")
    return Topology(
        name=found["name"],
        p2p_link_bytes_per_s=_links(found["p2p_link_bytes_per_s"], devices),
        p2p_through_host=found["p2p_through_host"],
        storage_bytes_per_s=found["storage_bytes_per_s"],
        host_memory_bytes_per_s=found["host_memory_bytes_per_s"],
        transfer_latency_s=found["transfer_latency_s"],
        times=RecoveryTimes(**_object("times", found["times"], _TIMES)),
        **{field: _per_device(field, found[field], devices) for field in PER_DEVICE},
    )


def _object(field: str, value: Any, names: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidTopology(f"{field}: an object is needed, not {type(value).__name__}")
    prefix = "" if field == "topology" else f"{field}."
    for name in names:
        if name not in value:
            raise InvalidTopology(f"{prefix}{name}: is missing")
    for name in value:
        if name not in names:
            raise InvalidTopology(f"{prefix}{name}: is not a field of a topology; those are {', '.join(names)}")
    return value


def _per_device(field: str, value: Any, devices: int) -> tuple[Any, ...]:
    if isinstance(value, list):
        if len(value) != devices:
            raise InvalidTopology(f"{field}: {len(value)} values for {devices} devices")
        return tuple(value)
    return (value,) * devices


def _links(value: Any, devices: int) -> Any:
    if not isinstance(value, dict):
        return value  # a number, or else refused by Topology
    known: dict[tuple[int, int], Any] = {}
    for key, bandwidth in value.items():
        a, b = _pair(key, devices)
        if (a, b) in known:
            raise InvalidTopology(f"p2p_link_bytes_per_s.{key}: the link of devices {a} and {b} is named twice")
        check_number(f"p2p_link_bytes_per_s.{key}", bandwidth)
        known[a, b] = known[b, a] = bandwidth
    missing = [f"{a}-{b}" for a, b in combinations(range(devices), 2) if (a, b) not in known]
    if missing:
        raise InvalidTopology(f"p2p_link_bytes_per_s: no link between devices {', '.join(missing)}")
    return tuple(tuple(known.get((a, b), 0.0) for b in range(devices)) for a in range(devices))


def _pair(key: str, devices: int) -> tuple[int, int]:
    a, _, b = key.partition("-")
    if not (a.isdecimal() and b.isdecimal()) or a == b or max(int(a), int(b)) >= devices:
        raise InvalidTopology(f"p2p_link_bytes_per_s.{key}: not two different devices below {devices}, as in 0-1")
    return int(a), int(b)
