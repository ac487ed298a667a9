"""Ends open requests that cannot be served: ranks fail with them, or recoveries no longer get any client a token."""

import logging
from collections import Counter
from collections.abc import Callable

from anchortp_sglang.recovery.requests.inflight import InflightRequests
from anchortp_sglang.recovery.requests.isolation import Evidence
from anchortp_sglang.recovery.state_machine import State, budget_is_spent

log = logging.getLogger(__name__)


class Culprits:
    """Judges which running requests a fault ends.

    ``ended``: how many open requests the server has ended, by reason: unservable (ranks fail with them), fruitless (no
    recovery got any client a token), given_up. ``on_failed_start``: called with the reason when ranks fail with the
    request that SGLang sends itself at its start; or None.
    """

    def __init__(self, deadline_s: float) -> None:
        self.ended: Counter[str] = Counter()
        self.on_failed_start: Callable[[str], None] | None = None
        self._deadline_s = deadline_s

    def judge(self, found: Evidence, inflight: InflightRequests, state: State, now: float, starting: bool) -> bool:
        """End the requests that a fault convicts; return whether all open requests were ended.

        ``state``: after the fault. ``starting``: whether SGLang still waits for the answer to its own first request.
        """
        if found.kind == "exception":
            log.error("anchortp: ranks failed with %s", found.text)
        for rid, why in inflight.struck(found).items():
            log.error("anchortp: request %s: %s", rid, why)
            self.ended["unservable"] += 1
            if starting and self.on_failed_start is not None:
                self.on_failed_start(why)
        if not budget_is_spent(state, now, self._deadline_s):
            return False
        why = f"no client got a token in {state.fruitless} recoveries in a row; the last fault: {found.text}"
        ended = inflight.end_open(why)
        self.ended["fruitless"] += ended
        log.error("anchortp: %s; %d open requests ended with an error", why, ended)
        return True
