"""Streams through one fault."""

from faults import recovered
from histories import assert_exactly_once, assert_identical, outcomes

from anchortp_sglang.testing.streams import Streams


def survive(server, requests, expected, fault, cause, tokens=15):
    """``fault()`` once every stream has ``tokens`` tokens; each ends as in the unbroken run. The recovery's record."""
    with Streams(server.url, requests) as streams:
        streams.wait_tokens(tokens)
        recovered(server, fault(), cause)
    assert_identical(expected, outcomes(streams.histories))
    for history in streams.histories:
        assert_exactly_once(history)
    return server.status()["recoveries"][-1]  # now that all its requests have been taken up
