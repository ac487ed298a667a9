"""Derives evidence from the last reports of dead ranks: which requests may have caused a fault."""

from collections.abc import Sequence

from anchortp_sglang.rank.crash import Crash
from anchortp_sglang.recovery.requests.isolation import Evidence


def evidence(crashes: Sequence[Crash | None], hung_since: float | None, reason: str) -> Evidence:
    """Derive the evidence of a fault. ``crashes``: each dead rank's Crash, None if it reported none.

    ``hung_since``: when the ranks last made progress, None if they did not hang. ``reason``: the fault's, for the log.
    """
    if hung_since is not None:
        return Evidence("hang", reason, since=hung_since)
    own = [crash for crash in crashes if crash is not None and not crash.peer_lost]
    if (
        not own or None in crashes
    ):  # a rank that died without a report may have been killed, and the others died of that
        return Evidence("signal", reason)
    return Evidence("exception", own[0].text, frozenset().union(*(crash.rids for crash in own)))
