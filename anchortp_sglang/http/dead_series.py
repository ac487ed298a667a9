"""Series of dead processes on /metrics: their counts stay, their gauges go.

prometheus_client's multiprocess mode reads ``counter_PID.db``, ``histogram_PID.db`` and ``gauge_MODE_PID.db`` of all
processes, dead ones included. Its mark_process_dead removes only gauges of the modes "live…". SGLang's have the mode
"mostrecent" and a label tp_rank, so those of former ranks would never go away.
"""

import os
from pathlib import Path
from typing import Any

from anchortp_sglang.recovery.processes.pidfd import process_state

_NOBODY = 0
"""Stands for the pid in the files with the counts of all dead processes, so that faults do not add files."""


def forget_dead(folder: Path) -> None:
    """Add up the counts of dead processes and remove their gauges. No other code may read ``folder`` meanwhile."""
    for path in folder.glob("*_*.db"):
        kind, pid = path.stem.rsplit("_", 1)
        if not pid.isdigit() or int(pid) == _NOBODY or process_state(int(pid)) not in (None, "Z", "X"):
            continue
        if not kind.startswith("gauge"):
            _add(path, folder / f"{kind}_{_NOBODY}.db")
        os.remove(path)


def _add(counts: Path, to: Path) -> None:
    from prometheus_client import mmap_dict  # here, as its import reads PROMETHEUS_MULTIPROC_DIR

    mapped: Any = mmap_dict.MmapedDict
    sums = mapped(str(to))
    for key, value, _, _ in mapped.read_all_values_from_file(str(counts)):
        before, _ = sums.read_value(key)
        sums.write_value(key, before + value, 0.0)
    sums.close()
