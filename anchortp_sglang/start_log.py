"""Where a starting server is: a line for each step, with the seconds since the process began."""

import logging
import time

import psutil

log = logging.getLogger(__name__)


def step(text: str) -> None:
    """``text``: what has been done."""
    log.info("anchortp start: %s after %.1f s", text, time.time() - psutil.Process().create_time())
