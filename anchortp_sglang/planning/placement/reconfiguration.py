"""Makes the ownerships that servers run, by the planner's rules.

They differ from the planner's own in two ways: the vocabulary is cut equally, and shares are alike in all layers,
except for heads and whole experts that rotate. For the planner an axis is then one group of all layers, or a group in
each.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from anchortp_sglang.planning.model.axes import ModelAxes, equal_vocab_cut
from anchortp_sglang.planning.model.plan_model import PlanModel, served_plan_model
from anchortp_sglang.planning.ownership.layer_ownership import LayerOwnership, Layout, followed, layer_ownership
from anchortp_sglang.planning.ownership.ownership import InvalidOwnership, Ownership, ownership_by_layer, validate
from anchortp_sglang.planning.placement.migration_types import InfeasiblePlan
from anchortp_sglang.planning.placement.place import equal_split, place

_ROTATING = ("q_head", "kv_head", "expert")


def rotating_axes(model: ModelAxes) -> tuple[str, ...]:
    """Return the axes of few units, which may rotate: of columns one more in every layer does not matter.

    Heads may not where layers read the KV of others, which must lie on the same device.
    """
    return ("expert",) if None in model.kv else _ROTATING


def rotating_split(model: ModelAxes, devices: Sequence[int]) -> Ownership:
    """Split each layer contiguously, in device order; heads and whole experts that do not divide rotate.

    Over all layers each device then has its due to within one of them. Raises InvalidOwnership if there are too few
    units for so many devices.
    """
    planned = served_plan_model(model, rotating_axes(model))
    try:
        return _as_it_runs(model, planned, equal_split(planned, devices))
    except InfeasiblePlan as error:
        raise InvalidOwnership(str(error)) from error


def reconfigure(
    model: ModelAxes,
    previous: Ownership,
    devices: Sequence[int],
    rotate: bool = False,
    weights: Mapping[int, int] | None = None,
) -> Ownership:
    """Return the ownership of ``devices``: those of ``previous`` that stay, and any that join.

    Without newcomers devices keep their order and all that they have, and share out what is missing ("adopt"): nothing
    moves between them except rows of the vocabulary whose cut shifts, and heads where all devices with some KV head
    left. With newcomers, or with ``weights`` (by device, relative), shares are exactly as due, and every device keeps
    as much as that allows; newcomers stand in the order of ids. Axes that differ by layer, and with ``rotate`` those
    that may, are shared out layer by layer. Raises InvalidOwnership if no previous device stays, or if there are too
    few units for all.
    """
    stay = tuple(device for device in previous.devices if device in set(devices))
    if not stay or min(devices) < 0:
        raise InvalidOwnership(f"devices {list(devices)} must include some of {list(previous.devices)}")
    joining = set(devices).difference(stay)
    order = tuple(sorted({*stay, *joining})) if joining else stay
    if order == previous.devices and weights is None:
        return previous
    due = tuple(1 if weights is None else weights[device] for device in order)
    planned = served_plan_model(model, previous.by_layer.union(rotating_axes(model) if rotate else ()))
    held = {group.name: previous.ranks(group.axis, group.layer) for group in planned.sharded}
    try:
        old = layer_ownership(previous.devices, held)
        new = place(planned, old, order, "adopt", due, give_back=weights is not None)
    except InfeasiblePlan as error:
        raise InvalidOwnership(str(error)) from error
    return _as_it_runs(model, planned, new)


def fewest_units(model: ModelAxes, devices: int) -> int:
    """Return the number of units of the coarsest axis that is cut over so many devices: heads, as a rule."""
    return min((axis.units for axis in served_plan_model(model).sharded if axis.units >= devices), default=devices)


def _as_it_runs(model: ModelAxes, planned: PlanModel, made: LayerOwnership) -> Ownership:
    alike: dict[str, Layout] = {"vocab": equal_vocab_cut(model.vocab_size, len(made.devices))}
    if model.latent_kv:
        alike["kv_head"] = (((0, 1),),) * len(made.devices)
    by_layer: defaultdict[int, dict[str, Layout]] = defaultdict(dict)
    for group in planned.sharded:
        layout = made.layout(group.name)
        # A layer that lacks an axis takes the shares of the first one that has it, so that layouts are few.
        alike.setdefault(group.axis, layout)
        if group.layer is not None:
            by_layer[group.layer][group.axis] = layout
    for shares in by_layer.values():
        if "q_head" in shares and not model.latent_kv:  # also where a layer has no KV heads of its own
            shares["kv_head"] = followed(shares["q_head"], model.group_size)
    ownership = ownership_by_layer(made.devices, [alike | by_layer[layer] for layer in range(model.num_layers)])
    validate(model, ownership)
    return ownership
