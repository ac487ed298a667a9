"""Where KV heads lie in memory, and what moves when a device is lost."""

from anchortp_sglang.planning.kv_layout import (
    KVPlan,
)

PLAN = KVPlan(slots=64, page_size=1, dtype_bytes=2)
