"""InflightRequests with nothing open, and what it sends."""

import pytest
from open_requests import Manager

from anchortp_sglang.recovery.requests.adapter_copies import AdapterCopies
from anchortp_sglang.recovery.requests.inflight import InflightRequests
from anchortp_sglang.recovery.requests.records import decode


@pytest.fixture
def manager():
    return Manager()


@pytest.fixture
def sent():
    return []


@pytest.fixture
def inflight(manager, sent, tmp_path):
    made = InflightRequests(manager, lambda data: sent.append(decode(data)), AdapterCopies(tmp_path))
    made.replay(0)
    sent.clear()
    return made
