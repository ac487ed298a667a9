"""Bounds the rate at which weights are moved beside a generation that serves."""

import time


class Pace:
    """Bounds an average rate in bytes per second. 0: no bound."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._moved = 0
        self._began = time.monotonic()

    def moved(self, nbytes: int) -> None:
        """Note that bytes have been moved, and sleep if they came too early."""
        if self._bytes_per_s:
            self._moved += nbytes
            early = self._began + self._moved / self._bytes_per_s - time.monotonic()
            time.sleep(max(0.0, early))
