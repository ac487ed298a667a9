"""A migration plan: the transfers that turn one ownership into another, and their totals."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from anchortp_sglang.planning.intervals import Intervals
from anchortp_sglang.planning.ownership.layer_ownership import LayerOwnership

Strategy = Literal["contiguous", "adopt"]
TransferKind = Literal["p2p", "reload", "copy"]


class InfeasiblePlan(ValueError):
    """Demands that no plan meets; the text names the device or the axis, and what is short."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Units of one axis group that a device lacks, and where they come from.

    ``kind``: "p2p" from the memory of the device ``source``; "copy" from a copy in host memory; "reload" from the
    checkpoint. ``source`` is None for the latter two. Units that a device holds before and after are not transferred.
    ``stage`` is the place in the order of execution (0: before the layers, then ``layer + 1``, then after the layers);
    ``layer`` is None outside of the layers. ``runs`` are units of ``group``.
    """

    kind: TransferKind
    device: int
    source: int | None
    group: str
    layer: int | None
    stage: int
    runs: Intervals
    nbytes: int


@dataclass(frozen=True, slots=True)
class DeviceTotals:
    """One device of the new ownership. Bytes of weights, except for ``kv_bytes_per_token``.

    ``kept_bytes`` + ``p2p_in_bytes`` + ``reload_bytes`` = ``weight_bytes``. ``reload_bytes`` come through the host:
    ``copy_bytes`` of them from host memory, the others from the checkpoint. ``weight_bytes_before`` is 0 for a device
    that joins.
    """

    id: int
    kept_bytes: int
    p2p_in_bytes: int
    p2p_out_bytes: int
    reload_bytes: int
    copy_bytes: int
    weight_bytes: int
    weight_bytes_before: int
    kv_bytes_per_token: int
    kv_bytes_per_token_before: int


@dataclass(frozen=True)
class MigrationPlan:
    """A plan from ``old`` to ``new``.

    ``devices`` are in rank order. ``transfers`` are in the order of execution: by stage, then group, then rank of the
    receiver. ``reload_lower_bound_bytes`` are the bytes of the model that no surviving device holds: no plan can reload
    fewer. ``sharded_bytes`` are those of all split and shared axes, each unit counted once; ``replicated_bytes`` those
    that every device holds besides.
    """

    strategy: Strategy
    old: LayerOwnership
    new: LayerOwnership
    transfers: tuple[Transfer, ...]
    devices: tuple[DeviceTotals, ...]
    reload_lower_bound_bytes: int
    sharded_bytes: int
    replicated_bytes: int

    @property
    def reload_bytes(self) -> int:
        """Bytes that come through the host: from the checkpoint or from a copy in host memory."""
        return sum(device.reload_bytes for device in self.devices)

    @property
    def copy_bytes(self) -> int:
        """Part of ``reload_bytes`` that comes from host memory."""
        return sum(device.copy_bytes for device in self.devices)

    @property
    def p2p_bytes(self) -> int:
        """Bytes that move between devices."""
        return sum(device.p2p_in_bytes for device in self.devices)

    @property
    def kept_bytes(self) -> Mapping[int, int]:
        """Kept bytes by device id."""
        return {device.id: device.kept_bytes for device in self.devices}

    @property
    def weight_bytes(self) -> Mapping[int, int]:
        """Weight bytes by device id, replicated parts included."""
        return {device.id: device.weight_bytes for device in self.devices}

    @property
    def imbalance(self) -> float:
        """The fullest device's weight bytes over the mean, less one."""
        held = [device.weight_bytes for device in self.devices]
        return max(held) * len(held) / sum(held) - 1 if sum(held) else 0.0
