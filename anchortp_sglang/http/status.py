"""The coordinator's state as the JSON of ``GET /anchortp/status``."""

from dataclasses import asdict
from typing import Any

from anchortp_sglang.recovery.coordinator import Coordinator
from anchortp_sglang.recovery.state_machine import Phase

ENDED = ("unservable", "fruitless", "given_up")
"""Reasons for which the server ends open requests (``Culprits.ended``)."""


def status(coordinator: Coordinator) -> dict[str, Any]:
    generation = coordinator.generation
    ownership = generation.ownership if generation is not None else coordinator.configured
    return {
        "state": state_name(coordinator),
        "generation": generation.number if generation is not None else 0,
        "tp_size": ownership.tp_size,
        "devices": [_device(coordinator, device) for device in coordinator.configured.devices],
        "kv": None if coordinator.kv_usage is None else coordinator.kv_usage.to_json(),
        "kv_capacity": asdict(coordinator.processes.kv_capacity(ownership)),
        "run_dir": _run_dir(coordinator),
        "paused": coordinator.paused,
        "standby": coordinator.processes.standbys.state,
        "recoveries": coordinator.recoveries.to_json(),
        "fruitless_faults": coordinator.state.fruitless,
        "suspects": 0 if coordinator.inflight is None else coordinator.inflight.isolation.suspects,
        "open_requests": 0 if coordinator.inflight is None else coordinator.inflight.open_requests,
        "requests_ended": {how: coordinator.culprits.ended[how] for how in ENDED},
    }


def state_name(coordinator: Coordinator) -> str:
    """Return starting, serving, degraded (fewer devices than configured), recovering or down."""
    phase = coordinator.state.phase
    if phase in (Phase.DOWN, Phase.STOPPED) or coordinator.state.given_up:
        return "down"
    if phase is not Phase.SERVING:
        return "recovering"
    generation = coordinator.generation
    if generation is None or coordinator.inflight is None:
        return "starting"
    fewer = generation.ownership.tp_size < coordinator.configured.tp_size
    return "degraded" if fewer else "serving"


def _run_dir(coordinator: Coordinator) -> dict[str, Any]:
    """Describe the run directory. ``lost``: why it is gone for good, so that no fault can be survived; else None."""
    keeper = coordinator.processes.keeper
    lost, made_again = (None, 0) if keeper is None else (keeper.lost, keeper.made_again)
    return {"path": str(coordinator.processes.plan.run_dir), "lost": lost, "made_again": made_again}


def _loss_of(coordinator: Coordinator, device: int) -> str:
    return coordinator.recoveries.loss_of(device) or coordinator.not_started.get(device, "")


def _device(coordinator: Coordinator, device: int) -> dict[str, Any]:
    processes, generation = coordinator.processes, coordinator.generation
    anchor = processes.anchors.processes.get(device)
    alive, change = processes.anchors.alive(device), coordinator.reconfiguration
    state = "drained" if device in change.drained else "idle" if alive else "lost"
    entry: dict[str, Any] = {
        "id": device,
        "state": state,
        "reason": "not in use on request" if state == "drained" else _loss_of(coordinator, device),
        "rank": None,
        "rank_pid": None,
        "anchor_pid": anchor.pid if anchor is not None and alive else None,
        "weight_bytes": 0,
        "kv_bytes": 0,
    }
    if device in change.joining:
        entry |= {"state": "joining", "reason": "a generation with it is being built"}
    if generation is None or device not in generation.ownership.devices or not alive:
        return entry
    ownership, plan = generation.ownership, processes.plan
    rank = ownership.devices.index(device)
    return entry | {
        "state": "leaving" if device in change.leaving else "serving",
        "reason": "a generation without it is being built" if device in change.leaving else "",
        "rank": rank,
        "rank_pid": generation.ranks[rank].pid,
        "weight_bytes": sum(generation.weights.shards[rank].sizes.values()),
        "kv_bytes": plan.kv_layout(ownership, rank).total_bytes,
    }
