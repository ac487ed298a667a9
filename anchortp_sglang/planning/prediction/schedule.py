"""Schedules the bytes of a migration: all links busy at once, each device's layers in the order of execution.

Transfers between the same two ends are a flow; a flow runs at a constant rate. Rates are raised together, in proportion
to the flows' bytes, and a flow stops rising when a link on its way is full (weighted max-min fairness, Bertsekas and
Gallager, Data Networks, 6.5.2).

Why that is optimal: flows over one full link, and over no fuller one, end at the same time, when that link has carried
its bytes. So the last to end are those over the busiest link, at its load, and no schedule can end before. And no flow
could have been helped by one that ended before it: its full link carries only flows that end with it or later.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from anchortp_sglang.planning.placement.migration_types import Transfer
from anchortp_sglang.planning.prediction.links import Link, bandwidth, link_lower_bound_s, route
from anchortp_sglang.planning.prediction.topology import Topology

Flow = tuple[str, int, int | None]
"""Kind, device, source device: the two ends of successive transfers."""


@dataclass(frozen=True)
class Entry:
    """Bytes of one stage of execution on one flow.

    ``stage`` and ``layer`` as in ``Transfer``; ``source`` None is host memory or the checkpoint.
    """

    kind: str
    device: int
    source: int | None
    layer: int | None
    stage: int
    start_s: float
    end_s: float
    nbytes: int


@dataclass(frozen=True)
class Timeline:
    """Entries by start, then device, kind and source. No schedule can beat ``link_lower_bound_s``."""

    entries: tuple[Entry, ...]
    link_lower_bound_s: float

    @cached_property
    def makespan_s(self) -> float:
        """Time when the last byte has arrived; 0 if nothing moves."""
        return max((entry.end_s for entry in self.entries), default=0.0)

    @cached_property
    def ready_s(self) -> Mapping[int, float]:
        """Time when all bytes of a stage have arrived everywhere, for each stage with transfers, in order."""
        ready: dict[int, float] = {}
        for entry in self.entries:
            ready[entry.stage] = max(entry.end_s, ready.get(entry.stage, 0.0))
        return dict(sorted(ready.items()))

    @cached_property
    def layer_ready_s(self) -> Mapping[int, float]:
        """Time when all bytes of a layer have arrived everywhere, for each layer with transfers."""
        layers = {entry.stage: entry.layer for entry in self.entries if entry.layer is not None}
        return {layers[stage]: at_s for stage, at_s in self.ready_s.items() if stage in layers}


def schedule(topology: Topology, transfers: Sequence[Transfer]) -> Timeline:
    """Schedule transfers that are given in the order of execution, as those of a ``MigrationPlan`` are.

    The makespan is the busiest link's load, plus latencies: at most ``transfer_latency_s`` for each stage.
    """
    flows = _flows(transfers)
    rates = _rates(topology, {flow: sum(nbytes for _, _, nbytes in parts) for flow, parts in flows.items()})
    entries = []
    for flow, parts in flows.items():
        start_s, moved = 0.0, 0
        for count, (stage, layer, nbytes) in enumerate(parts, start=1):
            moved += nbytes
            end_s = count * topology.transfer_latency_s + moved / rates[flow]
            entries.append(Entry(*flow, layer, stage, start_s, end_s, nbytes))
            start_s = end_s
    entries.sort(
        key=lambda entry: (entry.start_s, entry.device, entry.kind, -1 if entry.source is None else entry.source)
    )
    return Timeline(tuple(entries), link_lower_bound_s(topology, transfers))


def _flows(transfers: Iterable[Transfer]) -> dict[Flow, list[tuple[int, int | None, int]]]:
    """Sum the bytes of each flow by stage: (stage, layer, bytes). Transfers without bytes are left out."""
    flows: defaultdict[Flow, list[tuple[int, int | None, int]]] = defaultdict(list)
    for transfer in transfers:
        if not transfer.nbytes:
            continue
        parts = flows[transfer.kind, transfer.device, transfer.source]
        before = parts.pop() if parts and parts[-1][0] == transfer.stage else (transfer.stage, transfer.layer, 0)
        parts.append((transfer.stage, transfer.layer, before[2] + transfer.nbytes))
    return flows


def _rates(topology: Topology, flow_bytes: Mapping[Flow, int]) -> dict[Flow, float]:
    """Return the bytes per second of each flow. The link with the least left per byte of its open flows fills first."""
    routes = {flow: route(topology, *flow) for flow in flow_bytes}
    users: defaultdict[Link, list[Flow]] = defaultdict(list)
    for flow, links in routes.items():
        for link in links:
            users[link].append(flow)
    free = {link: bandwidth(topology, link) for link in users}
    waiting = {link: sum(flow_bytes[flow] for flow in flows) for link, flows in users.items()}
    queue = [(free[link] / waiting[link], order, link) for order, link in enumerate(users)]
    order_of = {link: order for _, order, link in queue}
    heapq.heapify(queue)
    rates: dict[Flow, float] = {}
    last_pace = 0.0
    while len(rates) < len(flow_bytes):
        pace, _, link = heapq.heappop(queue)
        if not waiting[link] or pace != free[link] / waiting[link]:
            continue  # all its flows have their rate, or a newer entry of this link is in the queue
        last_pace = max(pace, last_pace)  # paces only rise, except for rounding errors
        touched = set()
        for flow in users[link]:
            if flow in rates:
                continue
            rates[flow] = last_pace * flow_bytes[flow]
            for other in routes[flow]:
                free[other] -= rates[flow]
                waiting[other] -= flow_bytes[flow]
                touched.add(other)
        for other in sorted(touched, key=order_of.__getitem__):
            if waiting[other]:
                heapq.heappush(queue, (free[other] / waiting[other], order_of[other], other))
    return rates
