"""Sizes of the KV pool and its mirror, from flags, the model and the memory that is available.

Pure: available memory is an argument. It is counted before anything of this server is allocated, less what its
processes will take (``MemoryRoom.less``, ``process_bytes``).
"""

from typing import Any

from anchortp_sglang.admission.checks import KV_DTYPE_BYTES
from anchortp_sglang.memory.cgroups import MemoryRoom
from anchortp_sglang.options import AnchorOptions, StandbyMode
from anchortp_sglang.planning.layout.kv_layout import KVPlan, MirrorPlan, fit_slots, kv_layout, mirror_moves
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import Ownership

_MOST_OF_MEMORY = 0.9
"""Share of the available memory that weights, KV and mirror may take together; beyond it the mirror is left out."""

_SERVER_BYTES = 1024 << 20
_RANK_BYTES = 128 << 20
"""Memory that zygotes, detokenizer and anchors, and each rank with its spare, add to a main that has imported SGLang:
measured 0.6 GiB with four ranks of a tiny model, 0.2 GiB with one. The rest is for activations, and for a zygote in
reserve that had to import SGLang anew (0.75 GiB of its own)."""


_STANDBY_RANK_BYTES = 128 << 20
_STANDBY_SHARE_OF_WEIGHTS = 256
"""Memory of each rank of a standby beside what it shares with others: measured 45 MiB with a tiny model. What grows
with the model is the page tables of its weights, 1/512 of them, and tensors derived from weights (DeepSeek's)."""


def process_bytes(tp_size: int) -> int:
    """Return the memory that a server's processes take beside weights, KV and mirror."""
    return _SERVER_BYTES + tp_size * _RANK_BYTES


def plan_kv(
    model: ModelAxes,
    ownership: Ownership,
    view: Any,
    device_bytes: int | None,
    available: MemoryRoom,
    standby: bool = True,
) -> KVPlan:
    """Plan the most slots of any generation, which the first one has: as the operator says, else as memory allows.

    On CPU all virtual devices share the host's memory: unless each has a limit (``device_bytes``), fewer devices hold
    just as many slots. If the operator did not choose the number, there is also room for the second copy of the KV that
    the loss of a device makes, and for a standby (``standby``: unless the operator wants none) if that costs at most a
    tenth of the KV. ``view``: resolved ServerArgs. Raises ValueError if there is too little memory.
    """
    page_size = view.page_size or 1
    weights = _weight_bytes(model, ownership)
    dtype_bytes = KV_DTYPE_BYTES.get(view.kv_cache_dtype, model.dtype_bytes)
    slot_bytes = _kv_bytes(model, ownership, KVPlan(1, 0, dtype_bytes))
    free = int(available.nbytes * (view.mem_fraction_static or 0.8)) - weights
    reserved = standby_bytes(model, ownership) + 2 * page_size * slot_bytes if standby else 0  # and padding
    if reserved > free // 10:
        reserved = 0
    copies = 2 if ownership.tp_size > 1 else 1
    free = min(free, (available.nbytes - weights - reserved) // copies)
    slots = view.max_total_tokens or max(0, free) // slot_bytes
    slots = slots // page_size * page_size
    plan = fit_slots(model, KVPlan(slots, page_size, dtype_bytes), ownership, device_bytes)
    if view.max_total_tokens and plan.slots < slots:
        raise ValueError(
            f"--anchor-device-gib has room for {plan.slots} of {slots} KV slots; raise it, or lower --max-total-tokens"
        )
    needed = weights + _kv_bytes(model, ownership, plan)
    if slots < 1 or needed > available.nbytes:
        raise ValueError(
            f"weights ({weights >> 20} MiB) and {slots} KV slots take {needed >> 20} MiB, {available}; "
            "lower --max-total-tokens, use a smaller model, or allow more memory"
        )
    return plan


def plan_mirror(
    model: ModelAxes, ownership: Ownership, kv: KVPlan, options: AnchorOptions, available: MemoryRoom
) -> tuple[MirrorPlan | None, str]:
    """Plan the KV mirror; also return a short text: what was decided, and why.

    Raises ValueError for a mirror that was asked for but is not possible.
    """
    if options.kv_mirror == "off":
        return None, "off, as --anchor-kv-mirror says"
    if not any(mirror_moves(model, ownership, rank) for rank in range(1, ownership.tp_size)):
        return None, "off, as every device holds all KV heads"
    # The loss of a device, for which the mirror is made, needs a second copy of the KV (plan_kv).
    spare = (
        int(_MOST_OF_MEMORY * available.nbytes) - _weight_bytes(model, ownership) - 2 * _kv_bytes(model, ownership, kv)
    )
    row_bytes = kv.slot_bytes(model)
    rows = kv.rows if options.kv_mirror_gib is None else min(kv.rows, int(options.kv_mirror_gib * 2**30) // row_bytes)
    size = f"{rows * row_bytes / 2**30:.2f} GiB for {rows} of {kv.rows} slots"
    if rows < kv.page_size or rows * row_bytes > spare:
        if options.kv_mirror is None and options.kv_mirror_gib is None:
            return None, f"off: it would take {size}, and only {max(0, spare) / 2**30:.2f} GiB are free for it"
        raise ValueError(
            f"the KV mirror would take {size}, {max(0, spare) / 2**30:.2f} GiB are free for it, and one slot takes "
            f"{row_bytes} bytes; change --anchor-kv-mirror-gib, lower --max-total-tokens, or use --anchor-kv-mirror off"
        )
    plan = MirrorPlan(rows, options.kv_mirror_gbps * 1e9)
    return plan, f"at most {size} of host memory, written at up to {options.kv_mirror_gbps:g} GB/s"


def standby_bytes(model: ModelAxes, ownership: Ownership) -> int:
    """Return the memory that a standby takes beside the weights and KV that it shares with the serving generation."""
    return ownership.tp_size * _STANDBY_RANK_BYTES + _weight_bytes(model, ownership) // _STANDBY_SHARE_OF_WEIGHTS


def plan_standby(
    model: ModelAxes,
    ownership: Ownership,
    kv: KVPlan,
    mirror: MirrorPlan | None,
    options: AnchorOptions,
    view: Any,
    available: MemoryRoom,
) -> tuple[StandbyMode, str]:
    """Choose what waits for the next fault; also return it for the log, with the reason.

    Raises ValueError for a standby that was asked for but is not possible.
    """
    if view.enable_forward_pass_metrics and options.standby in (None, "warm"):
        why = "schedulers bind a socket for --enable-forward-pass-metrics, so two generations cannot be there at once"
        if options.standby == "warm":
            raise ValueError(f"--anchor-standby warm is not possible: {why}; use cold")
        return "cold", f"cold: {why}"
    if options.standby is not None:
        return options.standby, f"{options.standby}, as --anchor-standby says"
    mirrored = 0 if mirror is None else mirror.rows * kv.slot_bytes(model)
    copies = 2 if ownership.tp_size > 1 else 1
    held = _weight_bytes(model, ownership) + copies * _kv_bytes(model, ownership, kv) + mirrored
    free, needed = max(0, available.nbytes - held), standby_bytes(model, ownership)
    sizes = f"it takes {needed >> 20} MiB, {free >> 20} MiB are free"
    return ("warm", f"warm: {sizes}") if needed <= free else ("cold", f"cold, not warm: {sizes}")


def _weight_bytes(model: ModelAxes, ownership: Ownership) -> int:
    """Sum the bytes of weights over all ranks."""
    return sum(shard_layout(model, ownership, rank).total_bytes for rank in range(ownership.tp_size))


def _kv_bytes(model: ModelAxes, ownership: Ownership, plan: KVPlan) -> int:
    """Sum the bytes of KV over all ranks; heads that several of them hold count several times."""
    return sum(kv_layout(model, plan, ownership, rank).total_bytes for rank in range(ownership.tp_size))
