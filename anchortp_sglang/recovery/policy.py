"""The policy of recoveries: the part of AnchorOptions that the coordinator reads."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """How recoveries are decided.

    ``min_devices``: with fewer the server gives up. ``hang_timeout_s``: ranks without progress for this long hang.
    ``deadline_s``: of one recovery, from its fault on. ``spare_ranks``: whether ranks are forked ahead of the next
    fault.
    """

    min_devices: int
    hang_timeout_s: float
    deadline_s: float
    spare_ranks: bool
