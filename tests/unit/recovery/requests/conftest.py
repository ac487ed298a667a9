"""InflightRequests with nothing open, and what it sends."""

import pytest
from open_requests import Manager

from anchortp_sglang.recovery.requests.inflight import InflightRequests
from anchortp_sglang.recovery.requests.records import decode


@pytest.fixture
def manager():
    return Manager()


@pytest.fixture
def sent():
    return []


@pytest.fixture
def inflight(manager, sent):
    made = InflightRequests(manager, lambda data: sent.append(decode(data)))
    made.replay(0)
    sent.clear()
    return made
