"""Time stamps of a process's steps, on the machine-wide monotonic clock."""

import time


class Stamps:
    """Time stamps of steps. ``taken``: step name -> time.monotonic() when it was done. ``began``: when it was made."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.taken: dict[str, float] = {}

    def take(self, name: str) -> None:
        self.taken[name] = time.monotonic()
