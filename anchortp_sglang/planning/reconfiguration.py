"""The planner's answer in the terms of what runs today: shares alike in all layers, the vocabulary cut equally.

For the planner each axis is then one group that takes in all layers; the rest of its rules hold as they are.
"""

from collections import defaultdict
from collections.abc import Sequence

from anchortp_sglang.planning.layer_ownership import layer_ownership
from anchortp_sglang.planning.migration import plan_migration
from anchortp_sglang.planning.migration_types import InfeasiblePlan
from anchortp_sglang.planning.model_axes import ModelAxes, equal_vocab_cut
from anchortp_sglang.planning.ownership import InvalidOwnership, Ownership, validate
from anchortp_sglang.planning.plan_model import PlanModel, TensorPart, axis_group
from anchortp_sglang.planning.shards import block_extent


def reconfigure(model: ModelAxes, previous: Ownership, survivors: Sequence[int]) -> Ownership:
    """Who holds what once only ``survivors`` are left, in the order of ``previous``.

    They keep all that they have and share out what is lost ("adopt"): nothing moves between them but the rows of the
    vocabulary whose cut shifts, and heads where all devices with some KV head died. Raises InvalidOwnership if a
    survivor is none of the previous devices, or if there are too few units for all of them.
    """
    if not survivors or set(survivors) - set(previous.devices):
        raise InvalidOwnership(f"survivors {list(survivors)} must be some of {list(previous.devices)}")
    devices = tuple(device for device in previous.devices if device in set(survivors))
    if devices == previous.devices:
        return previous
    planned = planned_axes(model)
    shares = dict(previous.shares)
    old = layer_ownership(previous.devices, {group.name: shares[group.name] for group in planned.sharded})
    try:
        new = plan_migration(planned, old, devices, "adopt").new
    except InfeasiblePlan as error:
        raise InvalidOwnership(str(error)) from error
    vocab = equal_vocab_cut(model.vocab_size, len(devices))
    ownership = Ownership(
        devices, tuple((axis, vocab if axis == "vocab" else new.layout(axis)) for axis in model.axes)
    )  # fmt: skip
    validate(model, ownership)
    return ownership


def planned_axes(model: ModelAxes) -> PlanModel:
    """The model with one group per axis that the planner is free to cut, all layers together."""
    parts: defaultdict[str, list[TensorPart]] = defaultdict(list)
    for spec in model.params:
        for block in spec.blocks:
            shape = (*spec.rest[: spec.dim], block_extent(model, block), *spec.rest[spec.dim :])
            if spec.expert is not None:
                if spec.expert == 0:  # the others are as large
                    parts["expert"].append(TensorPart(f"{spec.name}{{unit}}", shape, model.dtype_bytes))
            elif block.axis not in (None, "vocab"):
                parts[block.axis].append(
                    TensorPart(block.source, shape, model.dtype_bytes, spec.dim, block.elements_per_unit)
                )
    groups = (
        axis_group("q_head", "q_head", model.num_q_heads, tuple(parts["q_head"]), grain=model.group_size),
        axis_group(
            "kv_head",
            "kv_head",
            model.num_kv_heads,
            tuple(parts["kv_head"]),
            kind="shared",
            grain=model.group_size,
            follows="q_head",
        ),
        *(axis_group(each.axis, each.axis, each.units, tuple(parts[each.axis])) for each in model.columns),
    )
    return PlanModel(model.architecture, model.num_layers, model.dtype, "", None, groups)
