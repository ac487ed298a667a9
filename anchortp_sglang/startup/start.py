"""Makes a coordinator from SGLang's arguments: checks, plan, hooks, zygote, anchors. All entry points share it."""

import hashlib
import logging
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from anchortp_sglang import start_log
from anchortp_sglang.admission.checks import UnsupportedError, check_server_args
from anchortp_sglang.anchor.client import AnchorError
from anchortp_sglang.anchor.keeper import RunDirKeeper
from anchortp_sglang.anchor.launch import AnchorStartError, RunDirError, prepare_run_dir, remove_run_dir
from anchortp_sglang.hooks.install import HookError
from anchortp_sglang.hooks.manifest import DriftError
from anchortp_sglang.http import metrics
from anchortp_sglang.options import AnchorOptions
from anchortp_sglang.planning.layout.coverage import check_coverage, check_sources, foreign_sources
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.model.axes import ModelAxes, caveats, read_model_axes, refuse_layout_only
from anchortp_sglang.planning.ownership.ownership import Ownership, split, validate
from anchortp_sglang.planning.placement.expert_load import ExpertCounts, imbalance, spread_hot_experts
from anchortp_sglang.planning.placement.reconfiguration import rotating_split
from anchortp_sglang.platforms.base import MemoryPlan, Platform
from anchortp_sglang.rank import messages
from anchortp_sglang.rank.warmup import read_ahead
from anchortp_sglang.rank.weights.checkpoint import Checkpoint, CheckpointError
from anchortp_sglang.rank.weights.random_checkpoint import RandomCheckpoint
from anchortp_sglang.recovery import ending
from anchortp_sglang.recovery.coordinator import Coordinator
from anchortp_sglang.recovery.hooks import install_coordinator
from anchortp_sglang.recovery.policy import Policy
from anchortp_sglang.recovery.processes.generation import StartFailed
from anchortp_sglang.recovery.processes.server_plan import ServerPlan
from anchortp_sglang.recovery.processes.server_processes import ServerProcesses
from anchortp_sglang.recovery.processes.zygote import Zygote, fork_zygote, spawn_zygote, tile_folder
from anchortp_sglang.recovery.report import tracing
from anchortp_sglang.recovery.requests.adapter_copies import copy_adapter
from anchortp_sglang.startup import text_model
from anchortp_sglang.startup.adapters import (
    adapter_bytes,
    adapter_identity,
    check_adapters,
    find_adapters,
    keep_copies,
    shapes_of,
    uses_adapters,
)
from anchortp_sglang.startup.expert_counts import FLAG, NONE, read_expert_counts
from anchortp_sglang.startup.fork_guard import unfit_to_fork
from anchortp_sglang.startup.preflight import read_config, reserve_port
from anchortp_sglang.startup.rank_records import rank_records

log = logging.getLogger(__name__)

REFUSALS = (ValueError, CheckpointError, RunDirError, DriftError, HookError)
"""Errors of ``start`` for the operator to fix: wrong flags, models, files, directories, another SGLang."""

START_FAILURES = (StartFailed, AnchorError, AnchorStartError)
"""Errors of SGLang's launch when our processes do not come up."""


@dataclass
class Runtime:
    """A prepared server, before SGLang's own launch."""

    coordinator: Coordinator
    keeper: RunDirKeeper
    port: socket.socket | None
    """Socket that holds the port which SGLang binds at the end of its launch."""
    text_folder: Path | None
    """Folder of links that was made for this server, if its checkpoint is a multimodal one."""

    def close(self) -> None:
        """End ranks, zygote and anchors, free their memory, and remove the run directory."""
        self.coordinator.shut_down()
        if self.text_folder is not None:
            text_model.remove(self.text_folder)
        self.keeper.stop()
        remove_run_dir(self.keeper.run_dir)
        if self.port is not None:
            self.port.close()


def start(server_args: Any, options: AnchorOptions, platform: Platform, *, serves_http: bool) -> Runtime:
    """Check everything, then fork the zygote. ``server_args``: SGLang's record, which gets resolved.

    A server's run directory is named by its port, so that it finds its anchors after a crash; an Engine's by its
    process. ``platform``: the one that the process was prepared for.

    Raises subclasses of ValueError with a text for the operator, and leaves nothing behind then.
    """
    from anchortp_sglang.hooks.install import load_plugins, refuse_unknown_model, register_models
    from anchortp_sglang.hooks.table import install_all

    _refuse(server_args, platform)
    checkpoint, overrides = Path(server_args.model_path), server_args.json_model_override_args
    config = read_config(checkpoint, overrides)
    register_models()
    folder = text_model.show_language_model(server_args)
    raw = msgspec.structs.asdict(server_args)
    expert_counts = server_args.init_expert_location
    # We deal the experts: SGLang's own tables have the same number on each rank.
    server_args.init_expert_location = raw["init_expert_location"] = NONE
    server_args.resolve_once()
    view = _view(server_args)
    _refuse(view, platform)
    options.check_tp_size(view.tp_size)
    _check_ep_size(view)
    port = reserve_port(view.host or "127.0.0.1", view.port) if serves_http else None
    model = read_model_axes(config, view.dtype, whole_experts=(view.ep_size or 1) > 1)
    refuse_layout_only(model)
    refuse_unknown_model(model.architecture)
    if options.rotate_heads and None in model.kv:
        raise ValueError(
            f"--anchor-rotate-heads is not supported for this {model.architecture}: its last layers read the KV of "
            "earlier ones, whose heads must lie on the same devices; leave it out"
        )
    adapters: Sequence[Any] = ()
    if uses_adapters(view):
        check_adapters(model, options.rotate_heads)
        adapters = find_adapters(raw)
        raw |= shapes_of(view, adapters)
    for caveat in caveats(config):
        log.warning("anchortp: %s", caveat)
    devices = tuple(range(view.tp_size))
    ownership = rotating_split(model, devices) if options.rotate_heads else split(model, devices, options.widths)
    counts = None if expert_counts == NONE else read_expert_counts(expert_counts, model)
    if counts is not None:
        ownership = _spread(model, ownership, counts)
    random_weights = view.load_format == "dummy"
    if random_weights and model.quantization is not None:
        raise ValueError(f"--load-format dummy is not supported for {model.quantization} weights: leave it out")
    if random_weights:
        shapes = RandomCheckpoint(model).shapes()
    else:
        with Checkpoint(checkpoint) as opened:
            shapes = opened.shapes()
    _check_plan(model, ownership, shapes)
    generations = 1 if options.standby in ("off", "cold") else 2
    of_adapters = adapter_bytes(model, ownership, raw, adapters, generations) if uses_adapters(view) else 0
    memory = platform.plan_memory(model, ownership, view, options, counts is not None, of_adapters)
    log.info("anchortp: KV mirror: %s", memory.mirror_text)
    log.info("anchortp: standby: %s", memory.standby_text)
    start_log.step("flags, model and plan are checked")
    install_all(allow_drift=options.allow_drift)
    load_plugins()  # the operator's plugins, for all processes: SGLang loads them in each, after the fork
    messages.register()
    start_log.step("hooks are installed")
    metrics_folder = metrics.prepare_folder() if view.enable_metrics else None
    zygote, reserve = _make_zygotes(view)
    start_log.step("the zygote is forked")
    base = Path(options.run_dir) if options.run_dir else None
    key = f"run-{view.port}" if serves_http else f"engine-{os.getpid()}"
    try:
        identity = _identity(checkpoint, overrides, model, ownership, memory, view, adapters)
        files = [copy_adapter(adapter.lora_path, view.tp_size) for adapter in adapters]
        run_dir = prepare_run_dir(base, key)
        copies = keep_copies(run_dir, adapters, files, view.tp_size)
    except BaseException:
        zygote.kill()
        if reserve is not None:
            reserve.kill()
        raise
    ending.on_end(lambda: remove_run_dir(run_dir) if run_dir.path.exists() else None)
    plan = ServerPlan(
        run_dir=run_dir.path,
        run_id=run_dir.run_id,
        identity=identity,
        checkpoint=checkpoint.resolve(),
        model=model,
        kv=memory.kv,
        device_bytes=options.device_bytes,
        rotate_heads=options.rotate_heads,
        expert_counts=counts,
        mirror=memory.mirror,
        linger_s=options.linger_s,
        server_args=rank_records(raw, view, memory.kv, memory.platform.rank_overrides, copies),
        controller_pid=os.getpid(),
        platform=memory.platform,
        stale_anchors=run_dir.stale_anchors,
        graph_batch_sizes=memory.platform.graph_batch_sizes(view),
        random_weights=random_weights,
        change_bytes_per_s=options.change_gbps * 1e9,
    )
    keeper = RunDirKeeper(run_dir)
    keeper.note_outside([str(each) for each in (metrics_folder, tile_folder(), folder) if each is not None])
    keeper.start()
    processes = ServerProcesses(plan, zygote, reserve, keeper)
    log.info("anchortp: %s", processes.kv_capacity(ownership))
    coordinator = Coordinator(processes, ownership, _policy(options, memory), copies)
    if view.enable_trace:
        coordinator.recoveries.on_finished.append(tracing.export)
    install_coordinator(coordinator)
    return Runtime(coordinator, keeper, port, folder)


def _view(server_args: Any) -> Any:
    from sglang.srt.arg_groups.overrides import resolving_view

    return resolving_view(server_args)


def _refuse(view: Any, platform: Platform) -> None:
    refusals = check_server_args(view, platform.rules)
    if refusals:
        raise UnsupportedError(refusals)


def _check_ep_size(view: Any) -> None:
    if view.ep_size not in (None, 1, view.tp_size):
        raise ValueError(
            f"--ep-size {view.ep_size} with --tp-size {view.tp_size} is not supported: experts are dealt to all "
            "devices (the same size) or cut over all of them (leave --ep-size out)"
        )


def _spread(model: ModelAxes, ownership: Ownership, counts: ExpertCounts) -> Ownership:
    spread = spread_hot_experts(model, ownership, counts)
    log.info(
        "anchortp: with %s the busiest device has %.2f times the mean expert load, without it %.2f times",
        FLAG,
        imbalance(spread, counts),
        imbalance(ownership, counts),
    )
    return spread


def _check_plan(model: ModelAxes, ownership: Ownership, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check the plan: every element of every shard has exactly one source, and every tensor is used."""
    validate(model, ownership)
    layouts = [shard_layout(model, ownership, rank) for rank in range(ownership.tp_size)]
    for layout in layouts:
        check_coverage(layout)
    unused = check_sources(model, layouts, shapes.keys(), shapes)
    if unused:
        log.info("anchortp: %d checkpoint tensors are not needed (%s, …)", len(unused), unused[0])
    if foreign := foreign_sources(model, unused):
        log.warning("anchortp: the model has no place for %s: not loaded, as in SGLang", ", ".join(foreign[:8]))


def _identity(
    checkpoint: Path,
    overrides: str,
    model: ModelAxes,
    ownership: Ownership,
    memory: MemoryPlan,
    view: Any,
    adapters: Iterable[Any],
) -> str:
    """Identify the memory that anchors hold: servers of the same identity could take over each other's."""
    of_weights = [(checkpoint / "config.json").read_text(), model.dtype, ownership.digest()]
    of_kv = [str(memory.kv), view.kv_cache_dtype, overrides]
    parts = [*of_weights, *of_kv, *memory.platform.identity, str(view.load_format == "dummy")]
    parts += adapter_identity(adapters)
    for path in sorted(checkpoint.glob("*.safetensors")):
        stat = path.stat()
        parts += [str(path.resolve()), str(stat.st_size), str(stat.st_mtime_ns)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _make_zygotes(view: Any) -> tuple[Zygote, Zygote | None]:
    """Make the zygote, and one in reserve for its death: it is idle and shares nearly all of its memory."""
    from anchortp_sglang.hooks import preload

    preload.preload(view)
    read_ahead()
    reason = unfit_to_fork()
    if reason is None:
        return fork_zygote(), fork_zygote()
    log.warning("anchortp: this process cannot fork a zygote (%s); starting one that imports SGLang anew", reason)
    return spawn_zygote(), None


def _policy(options: AnchorOptions, memory: MemoryPlan) -> Policy:
    return Policy(
        min_devices=memory.min_devices,
        hang_timeout_s=options.hang_timeout_s,
        deadline_s=options.recovery_deadline_s,
        standby=memory.standby,
        rejoin=options.rejoin,
        widths=options.widths,
        start_devices=options.start_devices,
    )
