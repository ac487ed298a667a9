"""The tests of test_plain.py while ranks are killed every few seconds, and after the loss of a device."""

import importlib
import os
import time

import kit_list
import pytest
from kit_tests import test_every_request_of_the_benchmark_succeeds, test_kit, test_program  # noqa: F401
from openai_calls import ask_all
from rank_kills import RankKills

pytestmark = pytest.mark.skipif(kit_list.STOCK, reason="stock SGLang ends when a rank dies")
CALL_FAULTS = 2
"""Faults that must strike while the OpenAI client's calls run."""


@pytest.fixture(scope="module", autouse=True)
def kills(server, answers):
    """Begin when the unbroken answers are known; verify each fault when all is over."""
    importlib.import_module("kit_cases")  # takes seconds, in which faults would find no request
    with RankKills(server, int(os.environ.get("ANCHORTP_SEED", "0"))) as kills:
        yield kills


@pytest.fixture(autouse=True)
def kills_go_on(kills):
    yield
    kills.check()


def test_answers_to_the_openai_client_are_those_of_an_unbroken_run(server, kills, answers):
    before = len(kills.records)
    while len(kills.records) < before + CALL_FAULTS:
        kills.check()
        for name, answer in ask_all(server.url).items():
            assert answer.same_as(answers[name]), name


def test_faults_struck_open_requests_and_a_device_was_lost(kills):
    deadline = time.monotonic() + 30
    while "device" not in kills.kinds and time.monotonic() < deadline:
        kills.check()
        time.sleep(0.1)
    assert kills.kinds.count("device") == 1
    assert kills.kinds.count("process") >= 2
    assert any(record["requests_replayed"] for record in kills.records)
