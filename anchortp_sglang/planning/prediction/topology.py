"""A machine as the planner sees it: how fast bytes reach a device, and how long the rest of a recovery takes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from numbers import Real


class InvalidTopology(ValueError):
    """A topology with impossible values; the text names the field and what is wrong with it."""


@dataclass(frozen=True)
class RecoveryTimes:
    """Seconds that the stages of a recovery take besides moving bytes.

    ``detect_s``: from the fault to its discovery. ``fence_s``: until the old ranks are dead. ``plan_s``: the planner.
    ``fork_s``: until the new ranks can move bytes (device contexts made). ``groups_s``: process groups, while bytes
    move. ``bind_layer_s``: taking over one layer whose bytes are there. ``first_token_s``: prefix tree, replay and the
    first step. ``graphs_s``: graph capture. ``process_start_s``: what a restart adds (processes, imports, device
    contexts).
    """

    detect_s: float
    fence_s: float
    plan_s: float
    fork_s: float
    groups_s: float
    bind_layer_s: float
    first_token_s: float
    graphs_s: float
    process_start_s: float

    def __post_init__(self) -> None:
        for field in fields(self):
            check_number(f"times.{field.name}", getattr(self, field.name), least=0.0)


@dataclass(frozen=True)
class Topology:
    """Bandwidths in bytes per second and per direction. Per-device fields have one entry per device id 0, 1, …

    ``host_link``: host memory to device. ``p2p_port``: all that a device sends to its peers, and all that it receives.
    ``p2p_link``: one number for every pair, or a matrix ``[source][destination]`` whose diagonal is not read.
    ``p2p_through_host``: peer transfers are staged in host memory, so they share each receiver's host link with
    reloads. ``storage``: reading the checkpoint, shared by all. ``host_memory``: all transfers from or through host
    memory together. ``device_copy``: copies within a device. ``transfer_latency_s`` passes before each transfer's first
    byte.
    """

    name: str
    host_link_bytes_per_s: tuple[float, ...]
    p2p_port_bytes_per_s: tuple[float, ...]
    p2p_link_bytes_per_s: float | tuple[tuple[float, ...], ...]
    p2p_through_host: bool
    storage_bytes_per_s: float
    host_memory_bytes_per_s: float
    device_copy_bytes_per_s: tuple[float, ...]
    device_memory_bytes: tuple[int, ...]
    transfer_latency_s: float
    times: RecoveryTimes

    def __post_init__(self) -> None:
        if not self.host_link_bytes_per_s:
            raise InvalidTopology("devices: a topology needs at least one device, this one has 0")
        for field in PER_DEVICE:
            values = getattr(self, field)
            if len(values) != self.devices:
                raise InvalidTopology(
                    f"{field}: {len(values)} values for {self.devices} devices (as many as host_link_bytes_per_s has)"
                )
            for device, value in enumerate(values):
                check_number(f"{field}[{device}]", value)
        check_number("storage_bytes_per_s", self.storage_bytes_per_s)
        check_number("host_memory_bytes_per_s", self.host_memory_bytes_per_s)
        check_number("transfer_latency_s", self.transfer_latency_s, least=0.0)
        self._check_p2p_links()

    @property
    def devices(self) -> int:
        """Number of devices."""
        return len(self.host_link_bytes_per_s)

    def p2p_bytes_per_s(self, source: int, destination: int) -> float:
        """Return the bandwidth of the link from one device to another, regardless of their ports."""
        link = self.p2p_link_bytes_per_s
        return link[source][destination] if isinstance(link, tuple) else link

    def resized(self, devices: int) -> "Topology":
        """Return the same machine with another number of devices: the first ones, or more of the same kind.

        Raises InvalidTopology for less than one, and for more when the devices or their links differ.
        """
        if devices < 1:
            raise InvalidTopology(f"devices: a topology needs at least one device, not {devices}")
        alike = all(len(set(getattr(self, field))) == 1 for field in PER_DEVICE)
        if devices > self.devices and not (alike and not isinstance(self.p2p_link_bytes_per_s, tuple)):
            raise InvalidTopology(
                f"devices: {self.name} describes {self.devices} devices one by one, {devices} are wanted; "
                "add the others to it"
            )
        link = self.p2p_link_bytes_per_s
        if isinstance(link, tuple):
            link = tuple(row[:devices] for row in link[:devices])
        sized = {field: (getattr(self, field) + getattr(self, field)[-1:] * devices)[:devices] for field in PER_DEVICE}
        return replace(self, p2p_link_bytes_per_s=link, **sized)

    def _check_p2p_links(self) -> None:
        link = self.p2p_link_bytes_per_s
        if not isinstance(link, tuple):
            return check_number("p2p_link_bytes_per_s", link)
        if len(link) != self.devices or any(len(row) != self.devices for row in link):
            raise InvalidTopology(f"p2p_link_bytes_per_s: needs {self.devices} rows of {self.devices} values")
        for source, destination in pairs(range(self.devices)):
            check_number(f"p2p_link_bytes_per_s[{source}][{destination}]", link[source][destination])


PER_DEVICE = ("host_link_bytes_per_s", "p2p_port_bytes_per_s", "device_copy_bytes_per_s", "device_memory_bytes")
"""Fields of a topology with one entry per device."""


def pairs(devices: Iterable[int]) -> list[tuple[int, int]]:
    """List all ordered pairs of different devices."""
    known = list(devices)
    return [(a, b) for a in known for b in known if a != b]


def check_number(field: str, value: object, least: float | None = None) -> None:
    """Raise InvalidTopology, naming the field, unless the value is finite and at least ``least``.

    With ``least`` None it must be above zero.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InvalidTopology(f"{field}: a finite number is needed, not {value!r}")
    if least is None and value <= 0:
        raise InvalidTopology(f"{field}: must be greater than zero, not {value!r}")
    if least is not None and value < least:
        raise InvalidTopology(f"{field}: must not be below {least:g}, but is {value!r}")
