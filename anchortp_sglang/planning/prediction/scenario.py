"""A model on a machine, and what each of several successive changes of its devices would mean."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from anchortp_sglang.planning.model.plan_model import PlanModel
from anchortp_sglang.planning.placement.migration import plan_migration
from anchortp_sglang.planning.placement.migration_types import MigrationPlan
from anchortp_sglang.planning.placement.place import equal_split
from anchortp_sglang.planning.prediction.changes import Change, devices_after
from anchortp_sglang.planning.prediction.schedule import schedule
from anchortp_sglang.planning.prediction.topology import Topology
from anchortp_sglang.planning.prediction.what_if import WhatIf, what_if

StrategyChoice = Literal["auto", "contiguous", "adopt"]


@dataclass(frozen=True)
class Scenario:
    """A model shared equally by ``devices`` devices (ids 0, 1, …) at the start.

    ``mem_fraction`` of a device's memory is for weights and KV cache.
    """

    model: PlanModel
    topology: Topology
    devices: int
    strategy: StrategyChoice = "auto"
    mem_fraction: float = 1.0


def answer_all(scenario: Scenario, changes: Sequence[Change]) -> tuple[WhatIf, ...]:
    """Answer each change, starting from the state after the previous one.

    Raises InvalidChange for an impossible change, InfeasiblePlan if there is no plan for one.
    """
    model, topology = scenario.model, scenario.topology
    steps = devices_after(range(scenario.devices), changes)
    capacities = {
        device: int(nbytes * scenario.mem_fraction) for device, nbytes in enumerate(topology.device_memory_bytes)
    }
    ownership = equal_split(model, range(scenario.devices))
    answers = []
    for devices in steps:
        plan = plan_migration(
            model, ownership, devices, scenario.strategy, capacities=capacities, makespan=predicted_makespan(topology)
        )
        answers.append(what_if(model, topology, plan, capacities))
        ownership = plan.new
    return tuple(answers)


def predicted_makespan(topology: Topology) -> Callable[[MigrationPlan], float]:
    """Return what "auto" compares: seconds until all bytes have moved, rounded to the microsecond."""
    return lambda plan: round(schedule(topology, plan.transfers).makespan_s, 6)
