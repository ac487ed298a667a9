"""The policy of recoveries: the part of AnchorOptions that the coordinator reads."""

from dataclasses import dataclass

from anchortp_sglang.option_values import StartDevices
from anchortp_sglang.options import RejoinMode, StandbyMode


@dataclass(frozen=True)
class Policy:
    """How recoveries are decided.

    ``min_devices``: with fewer the server gives up. ``hang_timeout_s``: ranks without progress for this long hang.
    ``deadline_s``: of one recovery, from its fault on. ``standby``: what is prepared for the next fault. ``rejoin``:
    whether lost devices are taken back unasked. ``widths``: KV heads of each device, if they were given.
    ``start_devices``: those of the first generation, or AVAILABLE for those that can be started; None for all.
    """

    min_devices: int
    hang_timeout_s: float
    deadline_s: float
    standby: StandbyMode
    rejoin: RejoinMode = "manual"
    widths: tuple[int, ...] | None = None
    start_devices: StartDevices = None
