"""Lets a generation end between two steps, so that another can take over at once.

After its last step a rank copies no KV to the mirror and has no socket any more, but lives on: to tear its memory down
would take the processor from its successor. Main kills it later, or at once if it does not report in time.
"""

import logging
import signal
from dataclasses import fields
from multiprocessing.connection import Connection
from typing import Any

from anchortp_sglang.rank.messages import Leave

log = logging.getLogger(__name__)

LEFT = "left"
"""A rank's report to main, with None: it writes and sends nothing from now on."""

_LINGER_MS = 1000
"""Longest time to send the last outputs; main replays what it has not got."""


def listen(scheduler: Any, attachment: Any) -> None:
    """Let a scheduler's loop end at the message ``Leave``; all ranks do so in the same turn."""
    from sglang.utils import TypeBasedDispatcher

    def leave(message: Leave) -> None:
        attachment.leaving = scheduler.gracefully_exit = True  # as Scheduler.handle_shutdown does

    scheduler._request_dispatcher += TypeBasedDispatcher([(Leave, leave)])


def leave(scheduler: Any, attachment: Any, pipe: Connection) -> None:
    """Finish what the loop has begun, let go of all that a successor uses, report, and wait to be killed."""
    for batch, result in getattr(scheduler, "result_queue", ()):  # of the overlap schedule: launched before the end
        scheduler.process_batch_result(batch, result)
    attachment.prefixes.stop()
    _close(scheduler.ipc_channels)
    pipe.send((LEFT, None))
    log.info("anchortp: this rank has left")
    while True:
        signal.pause()


def _close(channels: Any) -> None:
    """Close the scheduler's sockets, and send before what is in them.

    Tokenizer and detokenizer must not give a message to two ranks 0.
    """
    contexts = set()
    for field in fields(channels):
        channel = getattr(channels, field.name)
        socket = getattr(channel, "socket", channel)
        if socket is not None:
            contexts.add(socket.context)
    for context in contexts:
        context.destroy(linger=_LINGER_MS)
