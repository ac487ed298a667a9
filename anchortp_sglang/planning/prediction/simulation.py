"""Predicts a whole recovery stage by stage, and what restarting the server on the same devices would take."""

from collections.abc import Mapping
from dataclasses import dataclass

from anchortp_sglang.planning.prediction.schedule import Timeline
from anchortp_sglang.planning.prediction.topology import Topology


@dataclass(frozen=True)
class Stage:
    """A stage, in seconds since the fault. Stages may overlap."""

    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Prediction:
    """``tfs_s``: from the fault to the first new token. ``full_speed_s``: from the fault to the captured graphs.

    ``moving_from_s`` is when the first transfer starts: a timeline's seconds count from there.
    """

    stages: tuple[Stage, ...]
    tfs_s: float
    full_speed_s: float
    moving_from_s: float


def predict_recovery(
    topology: Topology, timeline: Timeline, num_layers: int, kept_bytes: Mapping[int, int]
) -> Prediction:
    """Predict a recovery, from the fault to full speed, when a plan with this timeline is carried out.

    From the fork on, bytes move while the process groups form, and each device copies what it keeps (``kept_bytes``, by
    device) to its new place. Layers are bound in order, each when its bytes are there; graphs are captured after the
    first token.
    """
    times = topology.times
    detected = times.detect_s
    fenced = detected + times.fence_s
    planned = fenced + times.plan_s
    forked = planned + times.fork_s
    grouped = forked + times.groups_s
    repack_s = max((nbytes / topology.device_copy_bytes_per_s[d] for d, nbytes in kept_bytes.items()), default=0.0)
    moved = forked + max(timeline.makespan_s, repack_s)
    bound = max(moved, _bound(grouped, forked, timeline, num_layers, times.bind_layer_s))
    first_token = bound + times.first_token_s
    return _prediction(
        (
            Stage("detected", 0.0, detected),
            Stage("fenced", detected, fenced),
            Stage("planned", fenced, planned),
            Stage("forked", planned, forked),
            Stage("groups ready", forked, grouped),
            Stage("bytes moved", forked, moved),
            Stage("bound", grouped, bound),
            Stage("first token", bound, first_token),
            Stage("graphs", first_token, first_token + times.graphs_s),
        ),
        tfs_s=first_token,
        moving_from_s=forked,
    )


def predict_restart(topology: Topology, weight_bytes: Mapping[int, int], checkpoint_bytes: int) -> Prediction:
    """Predict a restart on the devices of ``weight_bytes``, from the fault to the first token.

    Every byte of the checkpoint is read once from storage, and each device's weights pass host memory and its host
    link, all at full speed: the best case of a restart. Graphs are captured before the first token.
    """
    times = topology.times
    detected = times.detect_s
    stopped = detected + times.fence_s
    started = stopped + times.process_start_s
    grouped = started + times.groups_s
    load_s = max(
        checkpoint_bytes / topology.storage_bytes_per_s,
        sum(weight_bytes.values()) / topology.host_memory_bytes_per_s,
        max(nbytes / topology.host_link_bytes_per_s[device] for device, nbytes in weight_bytes.items()),
    )
    loaded = grouped + load_s
    captured = loaded + times.graphs_s
    first_token = captured + times.first_token_s
    return _prediction(
        (
            Stage("detected", 0.0, detected),
            Stage("stopped", detected, stopped),
            Stage("processes started", stopped, started),
            Stage("groups ready", started, grouped),
            Stage("weights loaded", grouped, loaded),
            Stage("graphs", loaded, captured),
            Stage("first token", captured, first_token),
        ),
        tfs_s=first_token,
        moving_from_s=grouped,
    )


def _bound(grouped: float, forked: float, timeline: Timeline, num_layers: int, bind_layer_s: float) -> float:
    ready = timeline.layer_ready_s
    now = grouped
    for layer in range(num_layers):
        now = max(now, forked + ready.get(layer, 0.0)) + bind_layer_s
    return now


def _prediction(stages: tuple[Stage, ...], tfs_s: float, moving_from_s: float) -> Prediction:
    return Prediction(stages, tfs_s, max(stage.end_s for stage in stages), moving_from_s)
