"""The schedule: no link is ever overfull, no bound is beaten, and the busiest link's load is reached."""

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp_sglang.planning.placement.migration_types import Transfer
from anchortp_sglang.planning.prediction.links import bandwidth, link_loads, link_lower_bound_s, route
from anchortp_sglang.planning.prediction.presets import MACHINES, machine
from anchortp_sglang.planning.prediction.schedule import schedule

LAYER_SHARE = 50 * 10**6


def transfer(kind, device, source=None, layer=0, nbytes=LAYER_SHARE):
    return Transfer(kind, device, source, "mlp", layer, layer + 1, ((0, 1),), nbytes)


def layered(layers, *ends, nbytes=LAYER_SHARE):
    """The same transfers in each layer, in the order of execution."""
    return [transfer(kind, device, source, layer, nbytes) for layer in range(layers) for kind, device, source in ends]


def contiguous_like(devices, lost, layers=32):
    """What the loss of a middle device causes: neighbours shift, those beside the lost one reload."""
    ends = [("reload", device, None) for device in (lost - 1, lost + 1)]
    ends += [("p2p", device - 1, device) for device in range(1, lost)]
    ends += [("p2p", device + 1, device) for device in range(lost + 1, devices - 1)]
    return layered(layers, *ends)


def adopt_like(devices, lost, layers=32):
    return layered(layers, *(("reload", device, None) for device in range(devices) if device != lost))


@st.composite
def topologies(draw):
    devices = draw(st.integers(2, 6))
    speed = st.integers(1, 50).map(lambda gigabytes: gigabytes * 1e9)
    each = st.lists(speed, min_size=devices, max_size=devices).map(tuple)
    links = draw(st.lists(each, min_size=devices, max_size=devices).map(tuple)) if draw(st.booleans()) else draw(speed)
    return replace(
        machine("cpu", devices),
        host_link_bytes_per_s=draw(each),
        p2p_port_bytes_per_s=draw(each),
        p2p_link_bytes_per_s=links,
        p2p_through_host=draw(st.booleans()),
        storage_bytes_per_s=draw(speed),
        host_memory_bytes_per_s=draw(speed),
        transfer_latency_s=draw(st.sampled_from([0.0, 1e-5])),
    )


@st.composite
def migrations(draw):
    """A topology and transfers in the order of execution."""
    topology = draw(topologies())
    device = st.integers(0, topology.devices - 1)
    peers = st.tuples(device, device).filter(lambda pair: pair[0] != pair[1])
    ends = st.one_of(
        st.tuples(st.sampled_from(["reload", "copy"]), device, st.none()),
        peers.map(lambda pair: ("p2p", *pair)),
    )
    moves = st.tuples(ends, st.integers(0, 5), st.integers(0, 10**9))
    drawn = sorted(draw(st.lists(moves, max_size=40)), key=lambda move: move[1])
    return topology, [transfer(*end, layer, nbytes) for end, layer, nbytes in drawn]


def assert_no_link_is_overfull(topology, timeline):
    """At every instant, what the running entries put on a link is no more than it carries."""
    events = []
    for entry in timeline.entries:
        moving_s = entry.end_s - entry.start_s - topology.transfer_latency_s
        for link in route(topology, entry.kind, entry.device, entry.source):
            rate = entry.nbytes / moving_s
            events += [(entry.end_s, 0, link, -rate), (entry.start_s + topology.transfer_latency_s, 1, link, rate)]
    busy = defaultdict(float)
    # Rounding can put the end of an entry a hair after the start of the next: those are taken together.
    for _, _, link, change in sorted(events, key=lambda event: (round(event[0], 9), event[1])):
        busy[link] += change
        assert busy[link] <= bandwidth(topology, link) * (1 + 1e-6), link


def assert_every_byte_is_scheduled_in_order(transfers, timeline):
    moved, flows = defaultdict(int), defaultdict(list)
    for entry in timeline.entries:
        moved[entry.kind, entry.device, entry.source, entry.stage, entry.layer] += entry.nbytes
        flows[entry.kind, entry.device, entry.source].append(entry)
    wanted = defaultdict(int)
    for one in transfers:
        if one.nbytes:
            wanted[one.kind, one.device, one.source, one.stage, one.layer] += one.nbytes
    assert moved == wanted
    for entries in flows.values():
        assert [entry.stage for entry in entries] == sorted({entry.stage for entry in entries})
        assert all(one.end_s <= later.start_s for one, later in pairwise(entries))
        assert all(entry.start_s < entry.end_s for entry in entries)


def latencies_s(topology, timeline):
    """The most that latencies can add: one for each stage of the longest flow."""
    stages = defaultdict(int)
    for entry in timeline.entries:
        stages[entry.kind, entry.device, entry.source] += 1
    return topology.transfer_latency_s * max(stages.values(), default=0)


@settings(max_examples=300, deadline=None)
@given(migrations())
def test_any_schedule_is_feasible_complete_and_optimal(migration):
    topology, transfers = migration
    timeline = schedule(topology, transfers)
    assert_every_byte_is_scheduled_in_order(transfers, timeline)
    assert_no_link_is_overfull(topology, timeline)
    bound = max(link_loads(topology, transfers).values(), default=0.0)
    assert timeline.link_lower_bound_s == pytest.approx(bound)
    assert bound * (1 - 1e-9) <= timeline.makespan_s <= bound * (1 + 1e-9) + latencies_s(topology, timeline)


@pytest.mark.parametrize("name", sorted(MACHINES))
@pytest.mark.parametrize("shape", [contiguous_like, adopt_like])
def test_the_makespan_is_within_five_percent_of_the_bound(name, shape):
    topology = machine(name, 8)
    timeline = schedule(topology, shape(8, 3))
    assert timeline.link_lower_bound_s <= timeline.makespan_s <= 1.05 * timeline.link_lower_bound_s


@pytest.mark.parametrize(
    ("ends", "bound_s"),
    [
        ([("reload", 0, None)], 1 / 6),  # storage: 6 GB/s, the host link has more
        ([("reload", 0, None), ("reload", 1, None)], 2 / 6),
        ([("copy", 0, None)], 1 / 10),  # the host link
        ([("copy", device, None) for device in range(4)], 4 / 25),  # host memory
        ([("p2p", 0, 1)], 1 / 10),
        ([("p2p", 0, 1), ("p2p", 2, 3)], 1 / 10),  # different ports
        ([("p2p", 0, 1), ("p2p", 0, 2)], 2 / 10),  # one receiver
        ([("p2p", 0, 1), ("p2p", 2, 1)], 2 / 10),  # one sender
        ([("p2p", 0, 1), ("p2p", 1, 0)], 1 / 10),  # both ways at once
        ([("p2p", 0, 1), ("copy", 0, None)], 2 / 10),  # a peer's bytes come over the host link too
    ],
)
def test_the_bound_is_the_load_of_the_busiest_link(ends, bound_s):
    topology = replace(
        machine("cpu", 4),
        host_link_bytes_per_s=(10e9,) * 4,
        p2p_port_bytes_per_s=(10e9,) * 4,
        p2p_link_bytes_per_s=10e9,
        storage_bytes_per_s=6e9,
        host_memory_bytes_per_s=25e9,
        transfer_latency_s=0.0,
    )
    transfers = layered(1, *ends, nbytes=10**9)
    assert link_lower_bound_s(topology, transfers) == pytest.approx(bound_s)
    assert schedule(topology, transfers).makespan_s == pytest.approx(bound_s)


def test_with_nvlink_peers_do_not_slow_reloads():
    topology = machine("8xH100-NVLink")
    reloads = layered(4, ("reload", 0, None))
    both = layered(4, ("reload", 0, None), ("p2p", 0, 1))
    assert schedule(topology, both).makespan_s == schedule(topology, reloads).makespan_s


def test_a_flow_that_is_not_on_the_busiest_link_ends_as_early_as_its_own_allows():
    topology = replace(machine("8xH100-NVLink"), transfer_latency_s=0.0)
    transfers = layered(8, ("reload", 0, None), ("p2p", 2, 3))
    ends = {entry.kind: entry.end_s for entry in schedule(topology, transfers).entries}
    assert ends["p2p"] == pytest.approx(8 * LAYER_SHARE / topology.p2p_bytes_per_s(3, 2))


def test_layers_become_ready_in_order_and_evenly():
    timeline = schedule(machine("8xH100-NVLink"), contiguous_like(8, 3))
    ready = list(timeline.layer_ready_s.values())
    assert list(timeline.layer_ready_s) == list(range(32))
    assert ready == sorted(ready)
    assert ready[-1] == timeline.makespan_s
    assert ready[0] == pytest.approx(timeline.makespan_s / 32, rel=0.05)


def test_what_lies_outside_of_the_layers_is_ready_in_its_stage():
    vocabulary = replace(transfer("reload", 0), layer=None, stage=0)
    head = replace(transfer("reload", 0), layer=None, stage=3)
    timeline = schedule(machine("cpu"), [vocabulary, *layered(2, ("reload", 0, None)), head])
    assert list(timeline.ready_s) == [0, 1, 2, 3]
    assert list(timeline.layer_ready_s) == [0, 1]
    assert timeline.ready_s[0] < timeline.ready_s[1] < timeline.ready_s[3] == timeline.makespan_s


def test_the_same_transfers_give_the_same_timeline():
    topology = machine("8xA100-PCIe")
    transfers = contiguous_like(8, 3)
    assert schedule(topology, transfers) == schedule(topology, list(transfers))


def test_nothing_to_move_takes_no_time():
    timeline = schedule(machine("cpu"), [transfer("reload", 0, nbytes=0)])
    assert (timeline.entries, timeline.makespan_s, timeline.link_lower_bound_s) == ((), 0.0, 0.0)
    assert timeline.ready_s == {}


@pytest.mark.parametrize("ends", [("p2p", 0, None), ("p2p", 1, 1), ("teleport", 0, None)])
def test_a_transfer_without_a_way_is_refused(ends):
    with pytest.raises(ValueError, match="has no route"):
        schedule(machine("cpu"), [transfer(*ends)])
