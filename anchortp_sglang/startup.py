"""From SGLang's arguments to a coordinator: checks, plan, hooks, zygote, anchors. Shared by all faces."""

import hashlib
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

from anchortp_sglang.anchor.client import AnchorError
from anchortp_sglang.anchor.launch import AnchorStartError, RunDir, RunDirError, prepare_run_dir, remove_run_dir
from anchortp_sglang.early import read_config, reserve_port
from anchortp_sglang.elastic.attachment import KVPlan
from anchortp_sglang.elastic.checkpoint import Checkpoint, CheckpointError
from anchortp_sglang.hooking import HookError
from anchortp_sglang.manifest import DriftError
from anchortp_sglang.options import AnchorOptions
from anchortp_sglang.planning.layout import check_coverage, check_sources, shard_layout
from anchortp_sglang.planning.model_axes import ModelAxes, read_model_axes
from anchortp_sglang.planning.ownership import Ownership, split, validate
from anchortp_sglang.recovery import wire
from anchortp_sglang.recovery.cluster import Cluster, ServerPlan
from anchortp_sglang.recovery.coordinator import Coordinator, Policy
from anchortp_sglang.recovery.generation import StartFailed
from anchortp_sglang.recovery.hooks import install_coordinator
from anchortp_sglang.recovery.zygote import Zygote, fork_zygote, spawn_zygote, unfit_to_fork
from anchortp_sglang.refusals import UnsupportedError, check_server_args

log = logging.getLogger(__name__)

_PINNED = (
    "attention_backend",
    "chunked_prefill_size",
    "context_length",
    "dtype",
    "kv_cache_dtype",
    "max_prefill_tokens",
    "mem_fraction_static",
    "page_size",
    "random_seed",
    "sampling_backend",
    "schedule_conservativeness",
)
"""Resolved values of the first generation that later ones keep; SGLang derives some of them from tp_size."""


REFUSALS = (ValueError, CheckpointError, RunDirError, DriftError, HookError)
"""What ``start`` raises for the operator to mend: wrong flags, models, files, directories, another SGLang."""

START_FAILURES = (StartFailed, AnchorError, AnchorStartError)
"""What SGLang's launch raises when our processes do not come up."""


@dataclass
class Runtime:
    """A prepared server, before SGLang's own launch."""

    coordinator: Coordinator
    run_dir: RunDir
    port: socket.socket | None
    """Keeps the port that SGLang binds at the end of its launch."""

    def close(self) -> None:
        """End ranks, zygote and anchors, free their memory, remove the run directory."""
        self.coordinator.shut_down()
        remove_run_dir(self.run_dir)
        if self.port is not None:
            self.port.close()


def start(server_args: Any, options: AnchorOptions, *, serves_http: bool) -> Runtime:
    """Check everything, then fork the zygote. ``server_args``: SGLang's record; gets resolved.

    A server is known by its port, so that it finds its anchors again after a crash; an Engine by its process.

    Raises ValueError subclasses with a text for the operator; nothing is left behind then.
    """
    from anchortp_sglang.plugin import install_all

    raw = msgspec.structs.asdict(server_args)
    _refuse(server_args)
    checkpoint = Path(server_args.model_path)
    config = read_config(checkpoint)
    server_args.resolve_once()
    view = _view(server_args)
    _refuse(view)
    options.check_tp_size(view.tp_size)
    _check_ep_size(view)
    port = reserve_port(view.host or "127.0.0.1", view.port) if serves_http else None
    model = read_model_axes(config, view.dtype, whole_experts=(view.ep_size or 1) > 1)
    ownership = split(model, tuple(range(view.tp_size)), options.widths)
    _check_plan(model, ownership, checkpoint)
    kv = _plan_kv(model, ownership, view)
    install_all(allow_drift=options.allow_drift)
    wire.register()
    zygote = _make_zygote(view)
    base = Path(options.run_dir) if options.run_dir else None
    key = f"run-{view.port}" if serves_http else f"engine-{os.getpid()}"
    try:
        run_dir = prepare_run_dir(base, key)
    except BaseException:
        zygote.kill()
        raise
    plan = ServerPlan(
        run_dir=run_dir.path,
        run_id=run_dir.run_id,
        identity=_identity(checkpoint, model, ownership, kv),
        checkpoint=checkpoint.resolve(),
        model=model,
        kv=kv,
        linger_s=options.linger_s,
        server_args=_records(raw, view, kv),
        controller_pid=os.getpid(),
        stale_anchors=run_dir.stale_anchors,
    )
    coordinator = Coordinator(Cluster(plan, zygote), ownership, _policy(options))
    install_coordinator(coordinator)
    return Runtime(coordinator, run_dir, port)


def _view(server_args: Any) -> Any:
    from sglang.srt.arg_groups.overrides import resolving_view

    return resolving_view(server_args)


def _refuse(view: Any) -> None:
    refusals = check_server_args(view)
    if refusals:
        raise UnsupportedError(refusals)


def _check_ep_size(view: Any) -> None:
    if view.ep_size not in (None, 1, view.tp_size):
        raise ValueError(
            f"--ep-size {view.ep_size} with --tp-size {view.tp_size} is not supported: experts are dealt to all "
            "devices (the same size) or cut over all of them (leave --ep-size out)"
        )


def _check_plan(model: ModelAxes, ownership: Ownership, checkpoint: Path) -> None:
    """Fail closed: every element of every shard comes from exactly one place, every tensor is used."""
    validate(model, ownership)
    layouts = [shard_layout(model, ownership, rank) for rank in range(ownership.tp_size)]
    for layout in layouts:
        check_coverage(layout)
    with Checkpoint(checkpoint) as opened:
        shapes = opened.shapes()
    unused = check_sources(model, layouts, shapes.keys(), shapes)
    if unused:
        log.info("anchortp: %d checkpoint tensors are not needed (%s, …)", len(unused), unused[0])


def _plan_kv(model: ModelAxes, ownership: Ownership, view: Any) -> KVPlan:
    """Slots for every generation: what the operator says, else what memory allows.

    On CPU all virtual devices share the host's memory, so fewer of them hold just as many slots.
    """
    page_size = view.page_size or 1
    heads = sum(ownership.units("kv_head", rank) for rank in range(ownership.tp_size))
    weights = sum(shard_layout(model, ownership, r).total_bytes for r in range(ownership.tp_size))
    available = psutil.virtual_memory().available
    slot_bytes = KVPlan(1, 0, model.dtype_bytes).nbytes(model, heads)
    free = int(available * (view.mem_fraction_static or 0.8)) - weights
    slots = view.max_total_tokens or max(0, free) // slot_bytes
    slots = slots // page_size * page_size
    plan = KVPlan(slots, page_size, model.dtype_bytes)
    needed = weights + plan.nbytes(model, heads)
    if slots < 1 or needed > available:
        raise ValueError(
            f"weights ({weights >> 20} MiB) and {slots} KV slots take {needed >> 20} MiB, "
            f"{available >> 20} MiB are available; lower --max-total-tokens or use a smaller model"
        )
    return plan


def _identity(checkpoint: Path, model: ModelAxes, ownership: Ownership, kv: KVPlan) -> str:
    """Of the memory that anchors hold: two servers of the same identity could take over each other's."""
    parts = [str(checkpoint.resolve()), model.dtype, ownership.digest(), str(kv)]
    for path in sorted([*checkpoint.glob("*.safetensors"), checkpoint / "config.json"]):
        stat = path.stat()
        parts += [path.name, str(stat.st_size), str(stat.st_mtime_ns)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _make_zygote(view: Any) -> Zygote:
    from anchortp_sglang import preload

    preload.preload(view)
    reason = unfit_to_fork()
    if reason is None:
        return fork_zygote()
    log.warning("anchortp: this process cannot fork a zygote (%s); starting one that imports SGLang anew", reason)
    return spawn_zygote()


def _policy(options: AnchorOptions) -> Policy:
    return Policy(
        min_devices=options.min_devices,
        hang_timeout_s=options.hang_timeout_s,
        deadline_s=options.recovery_deadline_s,
        spare_ranks=options.spare_ranks,
    )


def _records(raw: dict[str, Any], view: Any, kv: KVPlan) -> Any:
    """tp_size -> resolved ServerArgs; like the first one in all that must not change between generations."""
    from sglang.srt.server_args import ServerArgs

    pins = {name: getattr(view, name) for name in _PINNED} | {"max_total_tokens": kv.slots}
    made: dict[int, Any] = {}

    def record(tp_size: int) -> Any:
        if tp_size not in made:
            ep_size = tp_size if (view.ep_size or 1) > 1 else 1
            made[tp_size] = ServerArgs(**(raw | pins | {"tp_size": tp_size, "ep_size": ep_size}))
            made[tp_size].resolve_once()
        return made[tp_size]

    return record
