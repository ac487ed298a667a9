"""Captures decode graphs in ranks on main's command, some time after a generation has started; eager until then."""

import functools
import logging
from typing import Any

from anchortp_sglang.rank.attachment import current
from anchortp_sglang.rank.heartbeat import Counters
from anchortp_sglang.rank.messages import CaptureGraphs

log = logging.getLogger(__name__)

CAPTURE_LIMIT_S = 300.0
"""Limit of a capture; one that takes longer counts as a hang."""


def after_init_request_dispatcher(result: Any, scheduler: Any) -> Any:
    """AFTER Scheduler.init_request_dispatcher: all ranks handle the message in the same turn of their loops."""
    attachment = current()
    if attachment is not None:
        from sglang.utils import TypeBasedDispatcher

        capture = functools.partial(_capture, scheduler, attachment.counters)
        scheduler._request_dispatcher += TypeBasedDispatcher([(CaptureGraphs, capture)])
    return result


def _capture(scheduler: Any, counters: Counters, request: CaptureGraphs) -> None:
    """Capture graphs. A failure ends the rank: peers with and without graphs would not make the same collectives."""
    with counters.beating(CAPTURE_LIMIT_S):
        scheduler.tp_worker.ensure_decode_cuda_graphs(request.batch_sizes)
    counters.note_graphs()
    log.info("anchortp: decode graphs captured for batch sizes %s", request.batch_sizes)
