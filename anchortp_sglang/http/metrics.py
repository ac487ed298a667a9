"""Prometheus series ``anchortp_*`` on SGLang's own ``/metrics``.

SGLang serves ``/metrics`` from the files of prometheus_client's multiprocess mode, to which every process adds. Only
main writes our series: gauges and counters when they are read (``refresh``), durations when a recovery is over
(``observe``).
"""

import asyncio
import atexit
import os
import shutil
import struct
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from anchortp_sglang.http.dead_series import forget_dead
from anchortp_sglang.recovery import ending
from anchortp_sglang.recovery.report.record import Recovery, Totals
from anchortp_sglang.recovery.report.stages import durations

_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_CAUSES = ("process", "device", "hang", "planned")
_DEVICE_STATES = ("serving", "leaving", "joining", "idle", "drained", "lost")
_SERVER_STATES = ("starting", "serving", "degraded", "recovering", "down")
_MOVED = ("reload", "p2p", "copy", "kv_copy", "kv_restore")
_STAGE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TFS_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0, 80.0, 120.0)

_SCRAPE_POLL_S = 0.01
_SCRAPE_TIMEOUT_S = 1.0


async def scrape(answer: Callable[[], Awaitable[None]]) -> None:
    """Call ``answer``, which has prometheus_client's app answer a scrape, again as long as a file is still empty.

    A process that begins to count makes a file and then its contents. prometheus_client raises struct.error for what
    comes in between, before it has sent anything; so does this function after a second of that.
    """
    ends = asyncio.get_running_loop().time() + _SCRAPE_TIMEOUT_S
    while True:
        try:
            return await answer()
        except struct.error:
            if asyncio.get_running_loop().time() > ends:
                raise
        await asyncio.sleep(_SCRAPE_POLL_S)


def prepare_folder() -> str | None:
    """Set the folder of the multiprocess mode before the zygote is forked, so that ranks write there too.

    SGLang sets the variable only in main, after the fork, unless it is set (utils.common.set_prometheus_multiproc_dir).
    Returns the folder if it was made here; it is removed when main ends.
    """
    if _FOLDER_VARIABLE in os.environ:
        return None
    folder = os.environ[_FOLDER_VARIABLE] = tempfile.mkdtemp(prefix="anchortp-metrics-")
    ending.on_end(lambda: shutil.rmtree(folder, ignore_errors=True))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # not run by children, which end with os._exit
    return folder


class Metrics:
    """The server's series, in main. Make them after ``prepare_folder``: prometheus_client reads it when imported."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        def gauge(name: str, about: str, *labels: str) -> Any:
            return Gauge(name, about, labels, multiprocess_mode="mostrecent")

        self._recoveries = Counter(
            "anchortp_recoveries",
            "Recoveries that are over, by cause; planned: a change of devices.",
            ["cause"],
        )
        self._failed = Counter("anchortp_recoveries_failed", "Recoveries that were given up.")
        self._moved = Counter(
            "anchortp_bytes_moved",
            "Bytes moved by recoveries. Weights: reload from the checkpoint, p2p between devices, copy within one; "
            "KV cache: kv_copy from devices' old segments, kv_restore from the mirror.",
            ["kind"],
        )
        self._replayed = Counter("anchortp_requests_replayed", "Open requests that went on after a fault.")
        self._reused = Counter("anchortp_tokens_reused", "Tokens of replayed requests found in kept KV cache.")
        self._recomputed = Counter("anchortp_tokens_recomputed", "Tokens of replayed requests computed again.")
        self._stage = Histogram(
            "anchortp_recovery_stage_seconds",
            "Duration of a stage of a recovery; of stages that each new rank has, that of the slowest.",
            ["stage"],
            buckets=_STAGE_BUCKETS,
        )
        self._tfs = Histogram(
            "anchortp_tfs_seconds", "Time from a fault's detection to the first new token.", buckets=_TFS_BUCKETS
        )
        self._generation = gauge("anchortp_generation", "Number of the current set of ranks, counted from 0.")
        self._paused = gauge("anchortp_paused", "1 while an operator has paused the server.")
        self._devices = gauge("anchortp_devices", "Devices by state.", "state")
        self._state = gauge("anchortp_server_state", "1 for the state that the server is in.", "state")
        self._mirror_lag = gauge("anchortp_mirror_lag_tokens", "KV cache tokens that have no copy in host memory yet.")
        self._run_dir_lost = gauge("anchortp_run_dir_lost", "1 if the run directory has vanished for good.")
        self._ended = Counter(
            "anchortp_requests_ended",
            "Open requests that the server ended: unservable (ranks fail with them), fruitless (no recovery led to a "
            "token), given_up.",
            ["reason"],
        )
        self._suspects = gauge("anchortp_suspect_requests", "Open requests that may be why ranks fail.")
        self._fruitless = gauge("anchortp_fruitless_faults", "Faults since a client last received a token.")
        self._standby = gauge("anchortp_standby_ready", "1 if a whole generation waits to go on after a kill.")
        self._reported: dict[Any, float] = {}

    def observe(self, recovery: Recovery) -> None:
        """Record the durations of a recovery that is over."""
        for stage, took_s in durations(recovery.to_json()):
            self._stage.labels(stage).observe(took_s)
        if recovery.tfs_s is not None:
            self._tfs.observe(recovery.tfs_s)

    def refresh(self, status: Mapping[str, Any], totals: Totals) -> None:
        """Update counters and gauges before they are read. ``status``: as in ``GET /anchortp/status``."""
        forget_dead(Path(os.environ[_FOLDER_VARIABLE]))
        for cause in _CAUSES:
            self._raise_to(self._recoveries.labels(cause), totals.causes[cause])
        for kind in _MOVED:
            self._raise_to(self._moved.labels(kind), totals.bytes_moved[kind])
        for reason, count in status["requests_ended"].items():
            self._raise_to(self._ended.labels(reason), count)
        self._suspects.set(status["suspects"])
        self._fruitless.set(status["fruitless_faults"])
        self._paused.set(status["paused"])
        self._standby.set(status["standby"] == "ready")
        self._raise_to(self._failed, totals.failed)
        self._raise_to(self._replayed, totals.requests_replayed)
        self._raise_to(self._reused, totals.tokens_reused)
        self._raise_to(self._recomputed, totals.tokens_recomputed)
        self._generation.set(status["generation"])
        states = [device["state"] for device in status["devices"]]
        for state in _DEVICE_STATES:
            self._devices.labels(state).set(states.count(state))
        for state in _SERVER_STATES:
            self._state.labels(state).set(state == status["state"])
        mirror = (status.get("kv") or {}).get("mirror") or {}
        self._mirror_lag.set(mirror.get("lag_slots", 0))  # a slot holds a token
        self._run_dir_lost.set((status.get("run_dir") or {}).get("lost") is not None)

    def _raise_to(self, counter: Any, total: float) -> None:
        """Raise a counter to ``total``, if it is lower: counters cannot fall."""
        counter.inc(max(0.0, total - self._reported.get(counter, 0.0)))
        self._reported[counter] = max(total, self._reported.get(counter, 0.0))
