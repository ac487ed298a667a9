"""Target shares of devices: in proportion to their speed, as far as their memory allows."""

from collections.abc import Mapping, Sequence

from anchortp_sglang.planning.model.plan_model import PlanModel
from anchortp_sglang.planning.placement.migration_types import InfeasiblePlan


def target_weights(
    model: PlanModel,
    devices: Sequence[int],
    weights: Mapping[int, int] | None = None,
    capacities: Mapping[int, int] | None = None,
) -> tuple[int, ...]:
    """Return relative widths by rank.

    ``weights`` are relative speeds, or free bytes; without them all devices are equal. ``capacities`` are bytes for
    weights, replicated parts included: a device that would hold more gets what fits, the others share the rest. Raises
    InfeasiblePlan if all together cannot hold the model.
    """
    if len(set(devices)) != len(devices) or not devices:
        raise InfeasiblePlan(f"devices {list(devices)} must be distinct, and at least one")
    wanted = [1 if weights is None else weights.get(device, 0) for device in devices]
    for device, weight in zip(devices, wanted, strict=True):
        if not isinstance(weight, int) or weight <= 0:
            raise InfeasiblePlan(f"weights: device {device} needs a positive whole number, but has {weight!r}")
    if capacities is None:
        return tuple(wanted)
    room = [_room(model, device, capacities) for device in devices]
    _check_room(model, devices, wanted, room)
    # A unit is held whole: with one unit of each axis to spare, rounding cannot overfill. Where that much is not to
    # spare, shares are as full as they can be and are checked once they are made.
    slack = sum({group.shape_key: group.unit_bytes for group in model.sharded}.values())
    roomy = [bytes_ - slack for bytes_ in room]
    return _capped(model.sharded_bytes, wanted, roomy if sum(roomy) >= model.sharded_bytes and min(roomy) > 0 else room)


def _room(model: PlanModel, device: int, capacities: Mapping[int, int]) -> int:
    if device not in capacities:
        raise InfeasiblePlan(f"capacities: there is no entry for device {device}")
    room = capacities[device] - model.replicated_bytes
    if room <= 0:
        raise InfeasiblePlan(
            f"device {device} has room for {capacities[device]} bytes of weights; the parts that every device holds "
            f"take {model.replicated_bytes}: it is {1 - room} bytes short"
        )
    return room


def _check_room(model: PlanModel, devices: Sequence[int], wanted: Sequence[int], room: Sequence[int]) -> None:
    short = model.sharded_bytes - sum(room)
    if short > 0:
        lacks = [
            model.sharded_bytes * weight // sum(wanted) - bytes_ for weight, bytes_ in zip(wanted, room, strict=True)
        ]
        worst = max(range(len(devices)), key=lambda rank: (lacks[rank], -rank))
        raise InfeasiblePlan(
            f"{len(devices)} devices have room for {sum(room)} of {model.sharded_bytes} bytes of sharded weights: they "
            f"are {short} bytes short; device {devices[worst]} lacks most, {lacks[worst]} bytes of its share"
        )


def _capped(units: int, wanted: Sequence[int], room: Sequence[int]) -> tuple[int, ...]:
    """Share ``units`` in proportion to ``wanted``, none above its room; only the ratio of the result counts."""
    share, full = [0] * len(wanted), [False] * len(wanted)
    left = units
    while True:
        open_weight = sum(weight for weight, done in zip(wanted, full, strict=True) if not done)
        over = [
            rank for rank, weight in enumerate(wanted) if not full[rank] and left * weight > room[rank] * open_weight
        ]
        if not over:
            break
        for rank in over:
            share[rank], full[rank] = room[rank], True
        left = units - sum(share[rank] for rank in range(len(wanted)) if full[rank])
    if not any(full):
        return tuple(wanted)
    return (
        tuple(share[rank] * open_weight if full[rank] else left * weight for rank, weight in enumerate(wanted))
        if open_weight
        else tuple(share)
    )
