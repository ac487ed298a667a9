"""The supervisor of the benchmark's stock side, over real processes that stand in for SGLang's."""

import threading
import time

import psutil
import pytest
from anchor_rig import eventually
from places import UNIT

from anchortp_sglang.bench.sides import Stock
from anchortp_sglang.testing.server import ServerFailed


class Supervised(Stock):
    _module = "supervised_server"


@pytest.fixture
def side(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(UNIT))
    made = Supervised(tmp_path, 2, (), 0.3, tmp_path)
    yield made
    made.stop()
    assert eventually(lambda: not ranks()), "processes of the side are left"


def ranks():
    """Of any side: those of a main process that is gone, too."""
    found = [(p, p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    return [process for process, command in found if command and command[-1].startswith("sglang::scheduler_TP")]


@pytest.mark.parametrize("fault", ["process", "device", "hang"])
def test_a_side_that_broke_is_started_again_and_nothing_of_it_is_left(side, fault):
    side.start()
    before = side.server.pid, {process.pid for process in ranks()}
    began, strike = time.monotonic(), side.aim(fault, 1)
    assert side.comebacks() == 0
    strike()
    assert eventually(lambda: side.comebacks() == 1)
    assert fault != "hang" or time.monotonic() - began > 0.3
    side.ready_for(fault)
    assert side.server.pid != before[0] and side.server.health() == 200
    assert len(ranks()) == 2 and not {process.pid for process in ranks()} & before[1]


def test_a_side_can_be_stopped_while_it_starts_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(UNIT))
    side = Supervised(tmp_path, 2, ("--slow", "2"), 0.3, tmp_path)
    side.start()
    side.aim("process", 0)()
    assert eventually(lambda: len(ranks()) == 2 and side.server.health() == 0)
    began = time.monotonic()
    side.stop()
    assert time.monotonic() - began < 1.5
    assert eventually(lambda: not ranks())


def test_a_first_start_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(UNIT))
    side = Supervised(tmp_path, 2, ("--slow", "60"), 0.3, tmp_path)
    threading.Timer(1.0, lambda: side.server.kill()).start()
    with pytest.raises(ServerFailed, match="ended with code -9"):
        side.start()
    side.stop()
    assert eventually(lambda: not ranks())
