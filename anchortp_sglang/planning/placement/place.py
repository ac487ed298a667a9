"""Makes new ownerships: the equal split, and what each strategy makes of the previous one."""

from collections import defaultdict
from collections.abc import Callable, Sequence

from anchortp_sglang.planning.model.plan_model import AxisGroup, PlanModel
from anchortp_sglang.planning.ownership.layer_ownership import LayerOwnership, Layout, followed, layer_ownership
from anchortp_sglang.planning.placement.adoption import adopted_layouts
from anchortp_sglang.planning.placement.contiguous import contiguous_layouts
from anchortp_sglang.planning.placement.head_shares import adopted_heads, contiguous_heads
from anchortp_sglang.planning.placement.migration_types import InfeasiblePlan, Strategy

Cut = Callable[[AxisGroup, bool, Sequence[Layout], Sequence[int]], tuple[Layout, ...]]
"""Function from a group, whether KV heads follow it, what was held in the layers built like it, and the devices'
weights, to the layouts of those layers."""


def equal_split(model: PlanModel, devices: Sequence[int], weights: Sequence[int] | None = None) -> LayerOwnership:
    """Split into intervals in the order of the devices, in proportion to ``weights``, all alike by default.

    Units that do not divide rotate over the layers. Raises InfeasiblePlan if an axis has too few units.
    """
    return _place(
        model, tuple(devices), tuple(weights or (1,) * len(devices)), _held_by_nobody(model, devices), _contiguous
    )


def split_without_rotation(model: PlanModel, devices: Sequence[int]) -> LayerOwnership:
    """Split into equal shares that are the same in all layers that are built alike. Raises InfeasiblePlan."""

    def alike(group: AxisGroup, leads: bool, held: Sequence[Layout], weights: Sequence[int]) -> tuple[Layout, ...]:
        return _contiguous(group, leads, held[:1], (1,) * len(devices)) * len(held)

    return _place(model, tuple(devices), (1,) * len(devices), _held_by_nobody(model, devices), alike)


def _held_by_nobody(model: PlanModel, devices: Sequence[int]) -> dict[str, Layout]:
    return {group.name: ((),) * len(devices) for group in model.sharded}


def place(
    model: PlanModel,
    old: LayerOwnership,
    devices: Sequence[int],
    strategy: Strategy,
    weights: Sequence[int],
    give_back: bool = False,
) -> LayerOwnership:
    """Make the new ownership over ``devices``, in this order. Raises InfeasiblePlan.

    ``give_back``: devices that hold more than they are due give up the difference, as always when others join.
    """
    devices = tuple(devices)
    ranks = [old.ranks.get(device) for device in devices]
    known: dict[int, Layout] = {}

    def held(index: int) -> Layout:
        layout = old.layouts[index]
        return known.setdefault(index, tuple(() if rank is None else layout[rank] for rank in ranks))

    before = {name: held(index) for name, index in old.shares}
    cut = _contiguous if strategy == "contiguous" else _adopting(give_back=give_back or None in ranks)
    return _place(model, devices, tuple(weights), before, cut)


def _place(
    model: PlanModel, devices: tuple[int, ...], weights: tuple[int, ...], before: dict[str, Layout], cut: Cut
) -> LayerOwnership:
    leaders = {group.follows for group in model.sharded if group.follows}
    classes: defaultdict[tuple[object, ...], list[AxisGroup]] = defaultdict(list)
    for group in model.sharded:
        if not group.follows:
            classes[group.shape_key].append(group)
    shares: dict[str, Layout] = {}

    def place_class(groups: Sequence[AxisGroup], leads: bool, due: Sequence[int]) -> None:
        _check_enough(groups[0], leads, devices, due)
        layouts = cut(groups[0], leads, [before[group.name] for group in groups], due)
        shares.update(zip((group.name for group in groups), layouts, strict=True))

    leading = [groups for groups in classes.values() if groups[0].name in leaders]
    others = [groups for groups in classes.values() if groups[0].name not in leaders]
    for groups in leading:
        place_class(groups, True, weights)
    heaviest = max(others, key=lambda groups: groups[0].total_bytes * len(groups), default=None)
    for groups in others:
        place_class(groups, False, _made_up_for(leading, shares, groups, weights) if groups is heaviest else weights)
    behind: dict[tuple[int, int], Layout] = {}
    for group in model.sharded:
        if group.follows:
            leader = shares[group.follows]
            key = (id(leader), group.grain)
            shares[group.name] = behind.setdefault(key, followed(leader, group.grain))
    return layer_ownership(devices, {group.name: shares[group.name] for group in model.sharded})


def _made_up_for(
    leading: Sequence[Sequence[AxisGroup]],
    shares: dict[str, Layout],
    groups: Sequence[AxisGroup],
    weights: tuple[int, ...],
) -> tuple[int, ...]:
    """Return weights for the heaviest axis that make up for query heads.

    Query heads go to a device that holds their KV head, which can then be units above its due; it gets as many bytes
    less of this axis.
    """
    whole, ranks = sum(weights), range(len(weights))
    heads = [group for each in leading for group in each]
    held = [sum(group.nbytes(shares[group.name][rank]) for group in heads) for rank in ranks]
    over = [whole * held[rank] - sum(held) * weights[rank] for rank in ranks]
    due = [sum(group.total_bytes for group in groups) * weights[rank] - over[rank] for rank in ranks]
    # Whole KV heads rotate over the layers: then no device is further above its due than one of them with its queries.
    rounding = max((group.grain * group.unit_bytes for group in heads), default=0)
    enough = min(due) * groups[0].units >= sum(due)  # for a unit on each device
    return tuple(due) if max(over) > whole * rounding and enough else weights


def _contiguous(group: AxisGroup, leads: bool, held: Sequence[Layout], weights: Sequence[int]) -> tuple[Layout, ...]:
    if leads:
        return contiguous_heads(group.units, group.grain, weights, held)
    return contiguous_layouts(group.units, weights, held)


def _adopting(*, give_back: bool) -> Cut:
    def cut(group: AxisGroup, leads: bool, held: Sequence[Layout], weights: Sequence[int]) -> tuple[Layout, ...]:
        if leads:
            return adopted_heads(group.units, group.grain, weights, held, give_back)
        return adopted_layouts(group.units, weights, held, give_back)

    return cut


def _check_enough(group: AxisGroup, leads: bool, devices: Sequence[int], weights: Sequence[int]) -> None:
    """Check that every device gets units of an axis, as SGLang requires. Raises InfeasiblePlan."""
    units = group.units // group.grain if leads and len(devices) <= group.units // group.grain else group.units
    for device, weight in zip(devices, weights, strict=True):
        if units * weight < sum(weights):
            raise InfeasiblePlan(
                f"device {device} would hold no units of {group.axis}: there are {units} for {len(devices)} devices; "
                "use fewer devices or more equal shares"
            )
