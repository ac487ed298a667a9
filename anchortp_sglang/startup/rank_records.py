"""The ServerArgs that ranks get: those of the operator, resolved, and alike in all generations of a server."""

from collections.abc import Callable, Mapping
from typing import Any

from anchortp_sglang.planning.layout.kv_layout import KVPlan
from anchortp_sglang.recovery.requests.adapter_copies import AdapterCopies
from anchortp_sglang.startup.adapters import read_copies, uses_adapters

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

_FIXED = {
    # Sliding-window layers keep KV like the others: one pool, one set of slots, one slot table.
    "disable_hybrid_swa_memory": True,
    # Shared experts are an axis of their own.
    "disable_shared_experts_fusion": True,
}
"""Values of every generation, whatever the flags say."""


def rank_records(
    raw: dict[str, Any], view: Any, kv: KVPlan, changed: Mapping[str, Any], copies: AdapterCopies
) -> Callable[[int], Any]:
    """Return a function from tp_size to the resolved ServerArgs of ranks that are made now.

    They equal the first generation's in all that must not change between generations, except for ``changed`` on ranks.
    ``raw``: the operator's, unresolved; ``view``: resolved.
    Adapters of ``--lora-paths`` are read from their copies, which are shown again should their links be gone.
    """
    from sglang.srt.server_args import ServerArgs

    pins = {name: getattr(view, name) for name in _PINNED} | _FIXED | {"max_total_tokens": kv.slots} | dict(changed)
    made: dict[int, Any] = {}

    def record(tp_size: int) -> Any:
        if tp_size not in made:
            ep_size = tp_size if (view.ep_size or 1) > 1 else 1
            new = ServerArgs(**(raw | pins | {"tp_size": tp_size, "ep_size": ep_size}))
            new.resolve_once()
            if uses_adapters(view):
                read_copies(new, copies)
            made[tp_size] = new
        copies.show()
        return made[tp_size]

    return record
