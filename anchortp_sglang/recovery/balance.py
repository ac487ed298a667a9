"""Finds what devices can bear, so that their shares can follow it: how fast each is, or how much memory it has."""

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from anchortp_sglang.planning.layout.extents import WeightPlacement
from anchortp_sglang.rank.messages import Measure
from anchortp_sglang.recovery.processes.generation import Generation

Aim = Literal["speed", "memory"]

FINE_UNITS = 1000
"""Units of shares that axes of many units can follow, such as columns; heads are rounded then."""

LEAST_GAIN = 0.05
"""Share by which the most loaded device must be relieved; less is noise of the measurement."""

_TIMEOUT_S = 10.0
_POLL_S = 0.005
_numbers = itertools.count(1)


async def measure(
    generation: Generation,
    aim: Aim,
    held: Sequence[int],
    send: Callable[[Any], None],
    serves: Callable[[], bool],
) -> dict[int, int] | None:
    """Have all ranks measure their devices between two steps; return bytes per second, or of memory, by device.

    Memory is what is free, and ``held``: the bytes of weights and KV by rank, which can be moved. Devices that share
    one memory all have the same. Returns None if the generation ``serves`` no more. Raises TimeoutError.
    """
    number = next(_numbers)
    send(Measure(number=number))
    deadline = time.monotonic() + _TIMEOUT_S
    while (found := generation.measured(number)) is None:
        if not serves():
            return None
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks did not measure their devices within {_TIMEOUT_S:g} s")
        await asyncio.sleep(_POLL_S)
    speeds, free = found
    devices = generation.ownership.devices
    if aim == "speed":
        return dict(zip(devices, speeds, strict=True))
    if not any(free):
        return dict.fromkeys(devices, 1)
    return {device: free[rank] + held[rank] for rank, device in enumerate(devices)}


def shares(found: Mapping[int, int], units: int) -> dict[int, int]:
    """Deal out units, at least one to each device, so that the device that bears most for its power bears least."""
    dealt = dict.fromkeys(found, 1)
    for _ in range(units - len(found)):
        dealt[min(found, key=lambda device: ((dealt[device] + 1) / found[device], device))] += 1
    return dealt


def is_worth_it(before: WeightPlacement, after: WeightPlacement, found: Mapping[int, int]) -> bool:
    """Return whether the device that bears most, for what was measured of it, has to bear clearly less."""
    return load(after, found) < (1 - LEAST_GAIN) * load(before, found)


def load(weights: WeightPlacement, found: Mapping[int, int]) -> float:
    """Return what the device bears that bears most for what was measured of it."""
    pairs = zip(weights.ownership.devices, weights.shards, strict=True)
    return max(sum(shard.sizes.values()) / found[device] for device, shard in pairs)
