"""Successive changes of devices: which are lost and which join at each, checked before anything is planned."""

from collections.abc import Sequence
from dataclasses import dataclass


class InvalidChange(ValueError):
    """A change of devices that is impossible; the text names the field and the device."""


@dataclass(frozen=True)
class Change:
    """Devices that are lost together, or join together. ``field`` is its name in error texts."""

    field: str
    lost: tuple[int, ...] = ()
    joined: tuple[int, ...] = ()

    def __str__(self) -> str:
        ids = ", ".join(map(str, self.lost or self.joined))
        plural = "s" if len(self.lost or self.joined) > 1 else ""
        return f"device{plural} {ids} {'lost' if self.lost else 'joined'}"


def devices_after(devices: Sequence[int], changes: Sequence[Change]) -> tuple[tuple[int, ...], ...]:
    """Return the devices after each change, ascending.

    Raises InvalidChange if there are no devices, if a lost device was never there or is lost already, if a joining one
    is there already, and if none is left.
    """
    if not devices:
        raise InvalidChange("devices: at least one device is needed, not 0")
    there, ever = set(devices), set(devices)
    steps = []
    for change in changes:
        for device in change.lost:
            if device not in there:
                why = "is lost already" if device in ever else f"is none of the devices {_ids(there)}"
                raise InvalidChange(f"{change.field}: device {device} {why}")
            there.remove(device)
        for device in change.joined:
            if device in there:
                raise InvalidChange(f"{change.field}: device {device} is there already")
            if device < 0:
                raise InvalidChange(f"{change.field}: {device} is no device id; ids start at 0")
            there.add(device)
            ever.add(device)
        if not there:
            raise InvalidChange(f"{change.field}: no device is left")
        steps.append(tuple(sorted(there)))
    return tuple(steps)


def _ids(devices: set[int]) -> str:
    ids = sorted(devices)
    if len(ids) > 2 and ids == list(range(ids[0], ids[-1] + 1)):
        return f"{ids[0]} to {ids[-1]}"
    return ", ".join(map(str, ids))
