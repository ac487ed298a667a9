"""Reads how a generation uses its KV slots, and how far the mirror is."""

import mmap
from typing import Any

from anchortp_sglang.kv.mirror import KVMirror, MirrorMismatch, MirrorShape
from anchortp_sglang.kv.mirror_schedule import mirror_facts
from anchortp_sglang.kv.slot_table import SlotTable
from anchortp_sglang.planning.layout.kv_layout import KVPlan


class KVUsage:
    """A generation's slot table, and the mirror if there is one, mapped read-only."""

    def __init__(
        self, plan: KVPlan, namespace: bytes, table: mmap.mmap, shape: MirrorShape | None, mirror: mmap.mmap | None
    ) -> None:
        self._plan, self._shape, self._mirror = plan, shape, mirror
        self._table = SlotTable.attach(table, plan.rows, namespace)

    def to_json(self) -> dict[str, Any]:
        """Return it as in the status. ``lag_slots``: used slots that fit in the mirror and are not yet in it."""
        return {"slots": self._plan.slots, "used": self._table.used(), "mirror": self._mirror_json()}

    def _mirror_json(self) -> dict[str, Any] | None:
        if self._shape is None or self._mirror is None:
            return None
        try:
            facts = mirror_facts(self._table, KVMirror.attach(self._mirror, self._shape))
        except MirrorMismatch:
            return None  # it has not been written to so far
        return {
            "rows": facts.rows,
            "mirrored": facts.mirrored,
            "lag_slots": facts.lag_slots,
            "coverage": round(facts.coverage, 4),
            "bytes": facts.mirrored * self._shape.row_bytes,
        }
