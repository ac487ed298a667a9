"""The planner's bytes beside those of the shards that a server would lay out."""

from anchortp_sglang.planning.intervals import Intervals, intersect, total
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.model.plan_model import PlanModel, plan_model
from anchortp_sglang.planning.ownership.layer_ownership import (
    LayerOwnership,
    check_layer_ownership,
    layer_ownership,
    weight_bytes,
)
from anchortp_sglang.planning.ownership.ownership import Ownership


def check_bytes(model: ModelAxes, ownership: Ownership) -> None:
    """Every device holds what the planner says it does.

    The planner has the rows of the vocabulary that a single rank pads to; what more ranks add is left out.
    """
    planned = plan_model(model)
    as_planned = planned_ownership(model, planned, ownership)
    check_layer_ownership(planned, as_planned)
    assert weight_bytes(planned, as_planned) == tuple(
        shard_bytes(model, ownership, rank) for rank in range(ownership.tp_size)
    )


def planned_ownership(model: ModelAxes, planned: PlanModel, ownership: Ownership) -> LayerOwnership:
    """The planner's ownership that says the same."""
    shares = {}
    for group in planned.sharded:
        layout = ownership.ranks(group.axis, group.layer)
        if group.axis == "vocab":
            rows = model.axes["vocab"] // group.units
            layout = tuple(_units(_rows(model, runs), rows) for runs in layout)
        shares[group.name] = layout
    return layer_ownership(ownership.devices, shares)


def shard_bytes(model: ModelAxes, ownership: Ownership, rank: int) -> int:
    """Bytes of a rank's parameters, without the gaps between them."""
    vocab = {spec.name for spec in model.params if spec.blocks[0].axis == "vocab"}
    rows = total(_rows(model, ownership.of("vocab", rank)))
    layout = shard_layout(model, ownership, rank)
    assert layout.total_bytes < sum(placed.nbytes for placed in layout.params) + 4096 * (len(layout.params) + 1)
    return sum(
        placed.nbytes // placed.shape[0] * rows if placed.name in vocab else placed.nbytes for placed in layout.params
    )


def _rows(model: ModelAxes, runs: Intervals) -> Intervals:
    return intersect(runs, ((0, model.axes["vocab"]),))


def _units(runs: Intervals, rows: int) -> Intervals:
    assert all(start % rows == stop % rows == 0 for start, stop in runs)
    return tuple((start // rows, stop // rows) for start, stop in runs)
