"""Plans a reconfiguration: the new ownership, and all that must move to reach it from the old one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from anchortp_sglang.planning.intervals import Intervals, normalize, subtract
from anchortp_sglang.planning.model.plan_model import PlanModel
from anchortp_sglang.planning.ownership.layer_ownership import (
    LayerOwnership,
    check_layer_ownership,
    kv_bytes_per_token,
    weight_bytes,
)
from anchortp_sglang.planning.placement.migration_types import (
    DeviceTotals,
    InfeasiblePlan,
    MigrationPlan,
    Strategy,
    Transfer,
)
from anchortp_sglang.planning.placement.place import place
from anchortp_sglang.planning.placement.targets import target_weights
from anchortp_sglang.planning.placement.transfers import find_transfers

STRATEGIES: tuple[Strategy, ...] = ("contiguous", "adopt")


def plan_migration(
    model: PlanModel,
    old: LayerOwnership,
    targets: Sequence[int],
    strategy: Strategy | Literal["auto"] = "contiguous",
    *,
    weights: Mapping[int, int] | None = None,
    capacities: Mapping[int, int] | None = None,
    host_copies: Mapping[str, Intervals] | None = None,
    makespan: Callable[[MigrationPlan], float] | None = None,
) -> MigrationPlan:
    """Plan the migration of ``old`` to the devices ``targets``, in this rank order.

    Devices of ``old`` that are no targets are lost: nothing is read from them. Targets that are not in ``old`` join.
    ``weights`` (relative) and ``capacities`` (bytes of weights, a hard limit) are by device id; ``host_copies`` are
    units by group that lie in host memory. "auto" takes the strategy with the shorter ``makespan``, then fewer reloaded
    bytes, fewer P2P bytes, less imbalance. Raises InfeasiblePlan, with what is short and where; InvalidOwnership if
    ``old`` does not fit the model.
    """
    check_layer_ownership(model, old)
    shares = target_weights(model, targets, weights, capacities)

    def plan(chosen: Strategy) -> MigrationPlan:
        made = migration_between(model, old, place(model, old, targets, chosen, shares), chosen, host_copies or {})
        _check_capacities(made, capacities)
        return made

    if strategy != "auto":
        return plan(strategy)
    if makespan is None:
        raise ValueError('strategy "auto" compares predicted times: pass a makespan function')
    plans, reasons = [], []
    for each in STRATEGIES:
        try:
            plans.append(plan(each))
        except InfeasiblePlan as reason:
            reasons.append(reason)
    if not plans:
        raise reasons[0]
    return min(plans, key=lambda one: (makespan(one), one.reload_bytes, one.p2p_bytes, one.imbalance))


def migration_between(
    model: PlanModel,
    old: LayerOwnership,
    new: LayerOwnership,
    strategy: Strategy,
    host_copies: Mapping[str, Intervals] | None = None,
) -> MigrationPlan:
    """Plan the migration to a given ownership. Raises InvalidOwnership if ``new`` does not fit the model."""
    check_layer_ownership(model, new)
    transfers = find_transfers(model, old, new, host_copies or {})
    return MigrationPlan(
        strategy,
        old,
        new,
        transfers,
        _totals(model, old, new, transfers),
        _lost_bytes(model, old, new),
        model.sharded_bytes,
        model.replicated_bytes,
    )  # fmt: skip


def _totals(
    model: PlanModel, old: LayerOwnership, new: LayerOwnership, transfers: Sequence[Transfer]
) -> tuple[DeviceTotals, ...]:
    received = {kind: dict.fromkeys(new.devices, 0) for kind in ("p2p", "copy", "reload")}
    sent = dict.fromkeys(new.devices, 0)
    for transfer in transfers:
        received[transfer.kind][transfer.device] += transfer.nbytes
        if transfer.source is not None:
            sent[transfer.source] += transfer.nbytes
    after = dict(zip(new.devices, weight_bytes(model, new), strict=True))
    before = dict(zip(old.devices, weight_bytes(model, old), strict=True))
    kv_after = dict(zip(new.devices, kv_bytes_per_token(model, new), strict=True))
    kv_before = dict(zip(old.devices, kv_bytes_per_token(model, old), strict=True))
    return tuple(
        DeviceTotals(
            id=device,
            kept_bytes=after[device] - sum(received[kind][device] for kind in received),
            p2p_in_bytes=received["p2p"][device],
            p2p_out_bytes=sent[device],
            reload_bytes=received["reload"][device] + received["copy"][device],
            copy_bytes=received["copy"][device],
            weight_bytes=after[device],
            weight_bytes_before=before.get(device, 0),
            kv_bytes_per_token=kv_after[device],
            kv_bytes_per_token_before=kv_before.get(device, 0),
        )
        for device in new.devices
    )


def _lost_bytes(model: PlanModel, old: LayerOwnership, new: LayerOwnership) -> int:
    """Return the bytes of the model that no device of ``new`` held before."""
    survivors = [rank for rank, device in enumerate(old.devices) if device in new.ranks]
    gone: dict[tuple[int, int], Intervals] = {}
    index = dict(old.shares)
    lost = 0 if survivors else model.replicated_bytes
    for group in model.sharded:
        key = (index[group.name], group.units)
        if key not in gone:
            layout = old.layout(group.name)
            left = normalize(run for rank in survivors for run in layout[rank])
            gone[key] = subtract(((0, group.units),), left)
        lost += group.nbytes(gone[key])
    return lost


def _check_capacities(plan: MigrationPlan, capacities: Mapping[int, int] | None) -> None:
    over = [
        (device.weight_bytes - capacities[device.id], device)
        for device in plan.devices
        if capacities is not None and device.weight_bytes > capacities[device.id]
    ]
    if over:
        short, device = max(over, key=lambda each: (each[0], -each[1].id))
        raise InfeasiblePlan(
            f"device {device.id} would hold {device.weight_bytes} bytes of weights ({plan.strategy}): "
            f"it is {short} bytes short"
        )
