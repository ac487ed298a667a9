"""What dead processes leave on /metrics: their counts stay, their gauges go.

prometheus_client's multiprocess mode has files ``counter_PID.db``, ``histogram_PID.db``, ``gauge_MODE_PID.db``. It adds
up all of them, of dead processes, too; mark_process_dead would only take gauges of the modes "live…", and SGLang's are
"mostrecent", with a label tp_rank: those of ranks that are no more would stay for ever.
"""

import os
from pathlib import Path
from typing import Any

from anchortp_sglang.recovery.processes.pidfd import process_state

_NOBODY = 0
"""In place of a pid: the file with the counts of all the dead, so that there are not more files with each fault."""


def forget_dead(folder: Path) -> None:
    """Add up what dead processes have counted, and drop their gauges. Not while somebody reads ``folder``."""
    for path in folder.glob("*_*.db"):
        kind, pid = path.stem.rsplit("_", 1)
        if not pid.isdigit() or int(pid) == _NOBODY or process_state(int(pid)) not in (None, "Z", "X"):
            continue
        if not kind.startswith("gauge"):
            _add(path, folder / f"{kind}_{_NOBODY}.db")
        os.remove(path)


def _add(counts: Path, to: Path) -> None:
    from prometheus_client import mmap_dict  # looks for the folder when it is imported

    mapped: Any = mmap_dict.MmapedDict
    sums = mapped(str(to))
    for key, value, _, _ in mapped.read_all_values_from_file(str(counts)):
        before, _ = sums.read_value(key)
        sums.write_value(key, before + value, 0.0)
    sums.close()
