"""Topologies: ready-made ones make sense, files read back equal, and bad ones are refused by field."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT
from topology_json import topology_to_json

from anchortp_sglang.planning.prediction.presets import MACHINES, machine
from anchortp_sglang.planning.prediction.topology import InvalidTopology, Topology
from anchortp_sglang.planning.prediction.topology_file import topology_from_json

H100 = MACHINES["8xH100-NVLink"]


def as_file(**changes):
    return json.dumps(json.loads(topology_to_json(machine("8xA100-PCIe", 3))) | changes)


def all_links(devices, bandwidth=1e9):
    return {f"{a}-{b}": bandwidth for a in range(devices) for b in range(a + 1, devices)}


def test_the_promised_machines_are_there():
    assert set(MACHINES) == {"8xH100-NVLink", "8xH20-NVLink", "8xA100-PCIe", "4xL40S-PCIe", "cpu"}
    assert all(name == topology.name for name, topology in MACHINES.items())
    assert [MACHINES[name].devices for name in ("8xH100-NVLink", "8xH20-NVLink", "8xA100-PCIe", "4xL40S-PCIe")] == [
        8,
        8,
        8,
        4,
    ]


def test_nvlink_is_faster_than_the_host_link_and_pcie_is_not():
    for name, topology in MACHINES.items():
        faster = topology.p2p_bytes_per_s(0, 1) > topology.host_link_bytes_per_s[0]
        assert faster == ("NVLink" in name) == (not topology.p2p_through_host)
        assert topology.storage_bytes_per_s < sum(topology.host_link_bytes_per_s)


@pytest.mark.parametrize("devices", [1, 2, 3, 8, 64, 512])
@pytest.mark.parametrize("name", sorted(MACHINES))
def test_a_ready_made_machine_comes_in_any_size(name, devices):
    topology = machine(name.upper(), devices)
    assert topology.devices == devices
    assert len(topology.device_memory_bytes) == devices
    assert topology.host_link_bytes_per_s[-1] == MACHINES[name].host_link_bytes_per_s[0]


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_a_file_reads_back_equal(name):
    assert topology_from_json(topology_to_json(MACHINES[name])) == MACHINES[name]


@given(st.integers(2, 6), st.data())
def test_unequal_devices_and_links_read_back_equal(devices, data):
    bandwidths = st.floats(1.0, 1e12)
    per_device = data.draw(st.lists(bandwidths, min_size=devices, max_size=devices))
    links = {pair: data.draw(bandwidths) for pair in all_links(devices)}
    read = topology_from_json(
        json.dumps(
            json.loads(topology_to_json(machine("cpu", devices)))
            | {"host_link_bytes_per_s": per_device, "p2p_link_bytes_per_s": links}
        )
    )
    assert read.host_link_bytes_per_s == tuple(per_device)
    for pair, bandwidth in links.items():
        a, b = map(int, pair.split("-"))
        assert read.p2p_bytes_per_s(a, b) == read.p2p_bytes_per_s(b, a) == bandwidth
    assert topology_from_json(topology_to_json(read)) == read


def test_a_pair_may_be_named_either_way_round():
    links = {"1-0": 1e9, "0-2": 2e9, "2-1": 3e9}
    read = topology_from_json(as_file(p2p_link_bytes_per_s=links))
    assert [read.p2p_bytes_per_s(*pair) for pair in ((0, 1), (2, 0), (1, 2))] == [1e9, 2e9, 3e9]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"devices": 0}, "devices: a whole number of at least 1 is needed, not 0"),
        ({"devices": 2.0}, "devices"),
        ({"devices": True}, "devices"),
        ({"name": ""}, "name"),
        ({"p2p_through_host": "no"}, "p2p_through_host"),
        ({"host_link_bytes_per_s": -1}, "host_link_bytes_per_s[0]: must be greater than zero, not -1"),
        ({"host_link_bytes_per_s": [1e9, 0, 1e9]}, "host_link_bytes_per_s[1]"),
        ({"host_link_bytes_per_s": [1e9, 1e9]}, "host_link_bytes_per_s: 2 values for 3 devices"),
        ({"p2p_port_bytes_per_s": "fast"}, "p2p_port_bytes_per_s[0]: a finite number is needed, not 'fast'"),
        ({"storage_bytes_per_s": float("inf")}, "storage_bytes_per_s"),
        ({"storage_bytes_per_s": None}, "storage_bytes_per_s"),
        ({"host_memory_bytes_per_s": float("nan")}, "host_memory_bytes_per_s"),
        ({"device_memory_bytes": False}, "device_memory_bytes[0]"),
        ({"transfer_latency_s": -1e-6}, "transfer_latency_s: must not be below 0"),
        ({"p2p_link_bytes_per_s": -4}, "p2p_link_bytes_per_s"),
        ({"p2p_link_bytes_per_s": [1, 2, 3]}, "p2p_link_bytes_per_s"),
        ({"p2p_link_bytes_per_s": {"0-1": 1e9}}, "p2p_link_bytes_per_s: no link between devices 0-2, 1-2"),
        ({"p2p_link_bytes_per_s": all_links(3) | {"1-2": -1}}, "p2p_link_bytes_per_s.1-2: must be greater than zero"),
        ({"p2p_link_bytes_per_s": all_links(3) | {"2-1": 1}}, "p2p_link_bytes_per_s.2-1"),
        ({"p2p_link_bytes_per_s": all_links(4)}, "p2p_link_bytes_per_s.0-3"),
        ({"p2p_link_bytes_per_s": {"1-1": 1}}, "p2p_link_bytes_per_s.1-1"),
        ({"p2p_link_bytes_per_s": {"one": 1}}, "p2p_link_bytes_per_s.one"),
        ({"nvlink": 4}, "nvlink: is not a field of a topology"),
        ({"times": {}}, "times.detect_s: is missing"),
        ({"times": 3}, "times: an object is needed"),
    ],
)
def test_a_bad_file_is_refused_by_the_name_of_the_field(changes, told):
    with pytest.raises(InvalidTopology) as refused:
        topology_from_json(as_file(**changes))
    assert str(refused.value).startswith(told)


@pytest.mark.parametrize("field", sorted(json.loads(as_file())))
def test_a_missing_field_is_named(field):
    value = json.loads(as_file())
    del value[field]
    with pytest.raises(InvalidTopology, match=f"^{field}: is missing"):
        topology_from_json(json.dumps(value))


@pytest.mark.parametrize("field", sorted(json.loads(as_file())["times"]))
def test_a_negative_time_is_named(field):
    times = json.loads(as_file())["times"] | {field: -0.5}
    with pytest.raises(InvalidTopology, match=rf"^times\.{field}: must not be below 0"):
        topology_from_json(as_file(times=times))


@pytest.mark.parametrize("text", ["", "{", "[]", "8"])
def test_what_is_no_topology_is_refused(text):
    with pytest.raises(InvalidTopology, match=r"^topology: "):
        topology_from_json(text)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InvalidTopology, match=r"16xB300.*8xH100-NVLink"):
        machine("16xB300")


@pytest.mark.parametrize("devices", [0, -1])
def test_no_devices_are_refused(devices):
    with pytest.raises(InvalidTopology, match=r"^devices"):
        machine("cpu", devices)


def test_unequal_devices_are_not_invented():
    uneven = replace(H100, host_link_bytes_per_s=(1e9,) * 7 + (2e9,))
    assert uneven.resized(3).host_link_bytes_per_s == (1e9,) * 3
    with pytest.raises(InvalidTopology, match="describes 8 devices one by one, 9 are wanted"):
        uneven.resized(9)
    listed = topology_from_json(as_file(p2p_link_bytes_per_s=all_links(3)))
    assert listed.resized(2).p2p_link_bytes_per_s == ((0.0, 1e9), (1e9, 0.0))
    with pytest.raises(InvalidTopology, match="4 are wanted"):
        listed.resized(4)


def test_a_matrix_of_links_must_be_square():
    with pytest.raises(InvalidTopology, match=r"^p2p_link_bytes_per_s: needs 8 rows of 8"):
        replace(H100, p2p_link_bytes_per_s=((0.0, 1.0), (1.0, 0.0)))


def test_links_may_be_of_two_speeds():
    two: Topology = replace(machine("cpu", 2), p2p_link_bytes_per_s=((0.0, 1.0), (2.0, 0.0)))
    assert (two.p2p_bytes_per_s(0, 1), two.p2p_bytes_per_s(1, 0)) == (1.0, 2.0)


def test_the_file_in_the_documentation_is_the_machine_that_it_says():
    text = (ROOT / "docs" / "planner.md").read_text()
    (block,) = re.findall(r"^```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    documented = json.loads(block)
    read = topology_from_json(block)
    assert read.times == H100.times
    assert (read.device_memory_bytes, read.devices) == (H100.device_memory_bytes, documented["devices"])
    for field in ("host_link_bytes_per_s", "p2p_port_bytes_per_s", "device_copy_bytes_per_s"):
        assert getattr(read, field) == pytest.approx(getattr(H100, field), rel=0.01)
    assert read.storage_bytes_per_s == H100.storage_bytes_per_s
