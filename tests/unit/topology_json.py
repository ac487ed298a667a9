"""Topologies as the file that ``anchortp plan --topology`` reads."""

import json
from dataclasses import fields
from itertools import combinations
from typing import Any

from anchortp_sglang.planning.prediction.topology import PER_DEVICE, RecoveryTimes, Topology


def topology_to_json(topology: Topology) -> str:
    """Write what ``topology_from_json`` reads back as an equal topology; its links are the same both ways."""
    value: dict[str, Any] = {"devices": topology.devices}
    value |= {field.name: getattr(topology, field.name) for field in fields(Topology)}
    for name in PER_DEVICE:
        values = value[name]
        value[name] = values[0] if len(set(values)) == 1 else list(values)
    if isinstance(topology.p2p_link_bytes_per_s, tuple):
        pairs = combinations(range(topology.devices), 2)
        value["p2p_link_bytes_per_s"] = {f"{a}-{b}": topology.p2p_bytes_per_s(a, b) for a, b in pairs}
    value["times"] = {field.name: getattr(topology.times, field.name) for field in fields(RecoveryTimes)}
    return json.dumps(value, indent=2)
