"""Plans GPU ranks before they start: KV slots within the GPUs' budgets, and decode graphs."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from anchortp_sglang.memory.gpu import GpuShare
from anchortp_sglang.options import AnchorOptions
from anchortp_sglang.planning.layout.kv_layout import KVPlan, kv_layout
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.model.axes import ModelAxes, has_unlike_layers
from anchortp_sglang.planning.ownership.ownership import InvalidOwnership, Ownership
from anchortp_sglang.planning.placement.reconfiguration import reconfigure

EAGER_START: dict[str, Any] = {
    "disable_cuda_graph": True,
    "cuda_graph_config": None,
    "cuda_graph_backend_decode": None,
    "cuda_graph_backend_prefill": None,
}
"""ServerArgs of ranks: no graph at start (parse_cuda_graph_config), whatever the operator wants later."""

_ROUNDING_BYTES = 32 << 20
"""Part of each budget left for rounding segments up to the driver's granularity, which is not known here."""


def graph_batch_sizes(view: Any, gpus: Sequence[GpuShare]) -> tuple[int, ...]:
    """Return the batch sizes of decode graphs. None with gloo, whose collectives cannot be captured.

    ``view``: SGLang's resolved arguments, of the first generation's TP size.
    """
    if not gpus or (len(gpus) > 1 and not all(gpu.alone for gpu in gpus)):
        return ()
    decode = view.cuda_graph_config.decode
    return () if decode.backend == "disabled" else tuple(decode.bs or ())


def check_gpu_plan(model: ModelAxes, view: Any, options: AnchorOptions, spreads: bool) -> None:
    """Raise ValueError for features that only the CPU platform has. ``spreads``: experts are dealt by counts."""
    wrong = {
        "latent KV (DeepSeek) has no pool on GPUs; use --device cpu": model.latent_kv,
        "layers of several shapes (Gemma-4) are not supported on GPUs; use --device cpu": has_unlike_layers(model),
        f"--page-size {view.page_size} is not supported on GPUs; use 1": (view.page_size or 1) != 1,
        f"--kv-cache-dtype {view.kv_cache_dtype} is not supported on GPUs, whose KV has the model's dtype; "
        "leave it out": view.kv_cache_dtype not in (None, "auto"),
        "--anchor-kv-mirror host is not supported on GPUs yet; leave --anchor-kv-mirror and --anchor-kv-mirror-gib "
        "out": options.kv_mirror == "host" or options.kv_mirror_gib is not None,
        "--anchor-device-gib is not supported on GPUs; use --mem-fraction-static": options.device_gib is not None,
        "--anchor-rotate-heads is not supported on GPUs, where a rank's attention is planned for one number of heads; "
        "leave it out": options.rotate_heads,
        "--init-expert-location is not supported on GPUs, whose slots are planned without it; leave it out": spreads,
    }
    for reason, applies in wrong.items():
        if applies:
            raise ValueError(reason)


def plan_gpu_kv(
    model: ModelAxes,
    ownership: Ownership,
    gpus: Sequence[GpuShare],
    min_devices: int | None,
    view: Any,
    starting: int | None = None,
) -> tuple[KVPlan, int]:
    """Plan as many slots as fit all generations down to ``min_devices``, or those the operator asks for, if they fit.

    Also return the fewest devices: ``min_devices``, or if that is None the fewest that have room for a third of what
    all have room for (where each holds one KV head, the next loss costs half already), or for what the operator asks
    for; at most ``starting``, if the server starts with fewer than all. Assumes that devices are lost from the last to
    the first. A survivor must hold, for a moment, its old and its new weights besides the new KV. Raises ValueError for
    the operator.
    """
    page_size, asked = view.page_size or 1, view.max_total_tokens
    fits = _slots_by_width(model, ownership, gpus, page_size)
    if min_devices is None:
        enough = asked or max(fits[ownership.tp_size] // 3, 1)
        min_devices = min((width for width, slots in fits.items() if slots >= enough), default=ownership.tp_size)
        min_devices = min(min_devices, starting or min_devices)
    most = min(slots for width, slots in fits.items() if width >= min_devices)
    slots = min(asked or most, most) // page_size * page_size
    if slots < 1 or slots < (asked or 0):
        raise ValueError(
            f"the GPUs have room for {most} KV slots besides weights, down to {min_devices} of {len(gpus)} devices: "
            "lower --max-total-tokens, raise --anchor-min-devices or --mem-fraction-static, or use a smaller model"
        )
    return KVPlan(slots, page_size, model.dtype_bytes), min_devices


def describe_losses(devices: int, min_devices: int, kv: KVPlan, chosen_here: bool) -> str:
    """Describe how many losses of devices can be survived, with how many KV slots, and how to change that."""
    losses = devices - min_devices
    survives = f"the loss of {losses} of {devices} GPUs" if losses else f"no loss of a GPU: all {devices} are needed"
    way_out = "; --anchor-min-devices trades losses for slots" if chosen_here and devices > 1 else ""
    return f"{kv.slots} KV slots fit, and the server survives {survives}{way_out}"


def _slots_by_width(model: ModelAxes, ownership: Ownership, gpus: Sequence[GpuShare], page_size: int) -> dict[int, int]:
    """Return TP size -> the slots that all generations down to it have room for."""
    fits: dict[int, int] = {}
    least: float = math.inf
    for old, new in _down_to_one(model, ownership):
        least = min(least, _slots_that_fit(model, old, new, gpus))
        fits[new.tp_size] = max(0, int(least) - page_size) // page_size * page_size
    return fits


def _down_to_one(model: ModelAxes, ownership: Ownership) -> Iterator[tuple[Ownership | None, Ownership]]:
    """Yield (old, new) of the first generation, and of those that follow the loss of one device after the other."""
    old: Ownership | None = None
    new = ownership
    while True:
        yield old, new
        if new.tp_size == 1:
            return
        try:
            old, new = new, reconfigure(model, new, list(new.devices[:-1]))
        except InvalidOwnership:
            return  # too few devices for this model: the server has given up by then


def _slots_that_fit(model: ModelAxes, old: Ownership | None, new: Ownership, gpus: Sequence[GpuShare]) -> int:
    return min(
        (gpus[device].budget_bytes - _ROUNDING_BYTES - _weights(model, new, device) - _weights(model, old, device))
        // kv_layout(model, KVPlan(1, 0, model.dtype_bytes), new, rank).total_bytes
        for rank, device in enumerate(new.devices)
    )


def _weights(model: ModelAxes, ownership: Ownership | None, device: int) -> int:
    if ownership is None:
        return 0
    return shard_layout(model, ownership, ownership.devices.index(device)).total_bytes
