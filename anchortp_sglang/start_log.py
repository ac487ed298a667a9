"""Log of a start: a line for each step, with the seconds since the process began."""

import logging
import time

import psutil

log = logging.getLogger(__name__)


def step(text: str) -> None:
    """Log that the step ``text`` is done."""
    log.info("anchortp start: %s after %.1f s", text, time.time() - psutil.Process().create_time())
