"""Which servers there are, as Serve tells this process; kept apart from the class that Serve tells it."""

import threading
from collections.abc import Callable

from anchortp_sglang.fleet.members import Known

Listener = Callable[[list[Known]], None]

_lock = threading.Lock()
_known: list[Known] = []
_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Have ``listener`` called with all servers, now and whenever they change, on Serve's thread."""
    with _lock:
        _listeners.append(listener)
        known = list(_known)
    listener(known)


def publish(known: list[Known]) -> None:
    """Tell all listeners which servers there are."""
    with _lock:
        _known[:] = known
        listeners = list(_listeners)
    for listener in listeners:
        listener(known)
