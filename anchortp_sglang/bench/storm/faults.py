"""A storm's faults: real signals to the processes of a live server, and proof that each took effect."""

import os
import random
import signal
import threading
import time
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

from anchortp_sglang.bench.storm.schedule import Blow
from anchortp_sglang.testing.process_tree import Tree, is_gone, is_stopped

_ATTEMPTS = 3
_VICTIM_TIMEOUT_S = 3.0
_DEATH_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 1.0
_CHANGE_TIMEOUT_S = 60.0
_POLL_S = 0.005
_SIGNALS = {
    "kill": signal.SIGKILL,
    "crash": signal.SIGSEGV,
    "stop": signal.SIGSTOP,
    "pause": signal.SIGSTOP,
}


@dataclass
class Struck:
    """Effect of a blow. ``pids``: the processes struck, if any. ``effect``: each of them was seen dead or stopped.

    Of a change of devices: it was made, or refused with a reason. ``under_way``: not answered yet.
    """

    blow: Blow
    generation: int
    state: str
    pids: list[int] = field(default_factory=list)
    effect: bool = False
    under_way: bool = False
    answer: str = ""

    @property
    def failed(self) -> bool:
        """Whether the blow had a victim, but not its effect."""
        return not self.effect and (bool(self.pids) or self.blow.manner == "change")

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.blow.kind,
            "pids": self.pids,
            "effect": self.effect,
            "generation": self.generation,
            "state": self.state,
            "answer": self.answer,
        }


def strike(tree: Tree, blow: Blow) -> Struck:
    """Send the blow's signals and observe their effect. Waits for a victim if there is none, as between generations.

    They are sent again if the effect is not seen: a server continues a stopped helper, perhaps before one looks. A
    change of devices is only begun.
    """
    if blow.manner == "change":
        return _begin_change(tree, blow)
    deadline = time.monotonic() + _VICTIM_TIMEOUT_S
    while not (victims := _victims(tree, blow)) and time.monotonic() < deadline:
        time.sleep(0.01)
    status = tree.server.status()
    struck = Struck(blow, status["generation"], status["state"])
    dies = blow.manner in ("kill", "crash")
    reached, limit_s = (is_gone, _DEATH_TIMEOUT_S) if dies else (_is_still, _STOP_TIMEOUT_S)
    for _ in range(_ATTEMPTS):
        struck.pids = _signal(victims, _SIGNALS[blow.manner])
        struck.effect = bool(struck.pids) and _all_within(struck.pids, reached, limit_s)
        if struck.effect or not struck.pids:
            break
    if blow.manner == "pause":
        timer = threading.Timer(blow.pause_s, release, [struck.pids])
        timer.daemon = True
        timer.start()
    return struck


def _begin_change(tree: Tree, blow: Blow) -> Struck:
    """Ask for two or more of the server's devices; another thread waits for the answer."""
    status = tree.server.status()
    ids, rng = [device["id"] for device in status["devices"]], random.Random(blow.draw)
    serving = [device["id"] for device in status["devices"] if device["rank"] is not None] or ids
    devices = sorted({rng.choice(serving), *rng.sample(ids, rng.randint(min(2, len(ids)), len(ids)))})
    struck = Struck(blow, status["generation"], status["state"], under_way=True)

    def ask() -> None:
        try:
            answer = tree.server.post("/anchortp/reconfigure", {"devices": devices}, _CHANGE_TIMEOUT_S)
            struck.effect, struck.answer = True, f"devices {answer['devices']}, changed: {answer['changed']}"
        except urllib.error.HTTPError as error:
            struck.effect, struck.answer = error.code in (409, 503), error.read().decode(errors="replace")
        except (OSError, HTTPException, ValueError) as error:
            struck.answer = repr(error)
        finally:
            struck.under_way = False

    threading.Thread(target=ask, name="storm-change", daemon=True).start()
    return struck


def _signal(pids: list[int], number: int) -> list[int]:
    """Send a signal, and return the processes that were there to get it."""
    there = []
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
        there.append(pid)
    return there


def release(pids: list[int]) -> list[int]:
    """Send SIGCONT to the stopped ones among ``pids``, and return these."""
    stopped = [pid for pid in pids if is_stopped(pid)]
    for pid in stopped:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass
    return stopped


def _victims(tree: Tree, blow: Blow) -> list[int]:
    if blow.target == "device":
        devices = tree.devices()
        return list(devices[int(blow.draw * len(devices))].values()) if devices else []
    several = {"two-ranks": 2, "all-ranks": None}
    pids = tree.roles()["rank" if blow.target in several else blow.target]
    first = int(blow.draw * len(pids))
    return (pids[first:] + pids[:first])[: several.get(blow.target, 1)]


def _is_still(pid: int) -> bool:
    return is_stopped(pid) or is_gone(pid)  # a superseded rank may be killed before we look


def _all_within(pids: list[int], reached: Callable[[int], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not all(reached(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
