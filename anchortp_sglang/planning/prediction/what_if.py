"""A change of devices, answered in full: the plan, when its bytes move, and how long clients wait."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anchortp_sglang.planning.model.plan_model import PlanModel
from anchortp_sglang.planning.ownership.layer_ownership import kv_bytes_per_token, weight_bytes
from anchortp_sglang.planning.placement.migration_types import MigrationPlan
from anchortp_sglang.planning.placement.place import split_without_rotation
from anchortp_sglang.planning.prediction.schedule import Timeline, schedule
from anchortp_sglang.planning.prediction.simulation import Prediction, predict_recovery, predict_restart
from anchortp_sglang.planning.prediction.topology import Topology

_DEVICE_KEYS = (
    "id",
    "kept_bytes",
    "p2p_in_bytes",
    "p2p_out_bytes",
    "reload_bytes",
    "weight_bytes",
    "kv_bytes_per_token",
)


@dataclass(frozen=True)
class WhatIf:
    """The answer to one change of devices.

    ``kv_tokens``: tokens of KV cache that fit on each device beside its weights, by id. ``kv_tokens_alike``: tokens
    that would fit on every device if each had the same heads and experts in all layers. ``restart`` is that of the
    server on the same devices with the same shares.
    """

    plan: MigrationPlan
    timeline: Timeline
    recovery: Prediction
    restart: Prediction
    kv_tokens: Mapping[int, int]
    kv_tokens_alike: int

    @property
    def kv_capacity(self) -> int:
        """Tokens that fit on every device."""
        return min(self.kv_tokens.values())

    def as_json(self) -> dict[str, object]:
        """Return the answer as JSON types; times in the timeline count from the first transfer."""
        plan = self.plan
        return {
            "strategy": plan.strategy,
            "reload_bytes": plan.reload_bytes,
            "reload_lower_bound_bytes": plan.reload_lower_bound_bytes,
            "p2p_bytes": plan.p2p_bytes,
            "makespan_s": self.timeline.makespan_s,
            "link_lower_bound_s": self.timeline.link_lower_bound_s,
            "sharded_bytes": plan.sharded_bytes,
            "devices": [{key: getattr(device, key) for key in _DEVICE_KEYS} for device in plan.devices],
            "timeline": [
                {
                    "device": entry.device,
                    "kind": entry.kind,
                    "layer": entry.layer,
                    "start_s": entry.start_s,
                    "end_s": entry.end_s,
                    "bytes": entry.nbytes,
                }
                for entry in self.timeline.entries
            ],
            "kv_tokens": self.kv_capacity,
            "kv_tokens_alike": self.kv_tokens_alike,
            "predicted_tfs_s": self.recovery.tfs_s,
            "restart_tfs_s": self.restart.tfs_s,
        }


def what_if(model: PlanModel, topology: Topology, plan: MigrationPlan, capacity_bytes: Mapping[int, int]) -> WhatIf:
    """Schedule and simulate a plan. ``capacity_bytes`` of each device are for weights and KV cache."""
    timeline = schedule(topology, plan.transfers)
    return WhatIf(
        plan=plan,
        timeline=timeline,
        recovery=predict_recovery(topology, timeline, model.num_layers, plan.kept_bytes),
        restart=predict_restart(topology, plan.weight_bytes, model.total_bytes),
        kv_tokens={
            device.id: _tokens(capacity_bytes[device.id], device.weight_bytes, device.kv_bytes_per_token)
            for device in plan.devices
        },
        kv_tokens_alike=_tokens_without_rotation(model, plan.new.devices, capacity_bytes),
    )


def _tokens(capacity_bytes: int, weight_bytes: int, token_bytes: int) -> int:
    return max(0, capacity_bytes - weight_bytes) // max(1, token_bytes)


def _tokens_without_rotation(model: PlanModel, devices: Sequence[int], capacity_bytes: Mapping[int, int]) -> int:
    ownership = split_without_rotation(model, devices)
    held = zip(devices, weight_bytes(model, ownership), kv_bytes_per_token(model, ownership), strict=True)
    return min(_tokens(capacity_bytes[device], nbytes, token_bytes) for device, nbytes, token_bytes in held)
