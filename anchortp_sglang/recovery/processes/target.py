"""Where a planned change of devices leads."""

from dataclasses import dataclass

from anchortp_sglang.planning.layout.extents import WeightPlacement
from anchortp_sglang.planning.ownership.ownership import Ownership


@dataclass(frozen=True)
class Target:
    """The weights of the generation to come, as placed from those of the one that serves.

    ``joining``: devices that it has and the serving one has not. ``leaving``: the reverse; what they hold is copied
    from them, and their anchors end once the new generation serves.
    """

    weights: WeightPlacement
    joining: tuple[int, ...]
    leaving: tuple[int, ...]

    @property
    def ownership(self) -> Ownership:
        return self.weights.ownership


def target_of(before: Ownership, weights: WeightPlacement) -> Target:
    """Return the target with ``weights``, for a generation that serves with ``before``."""
    old, new = before.devices, weights.ownership.devices
    joining, leaving = tuple(d for d in new if d not in old), tuple(d for d in old if d not in new)
    return Target(weights, joining, leaving)
