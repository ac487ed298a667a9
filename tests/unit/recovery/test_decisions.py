"""Ten thousand seeded schedules of faults against the coordinator's decisions (more: ``anchortp bench decisions``)."""

import pytest

from anchortp_sglang.bench import decisions
from anchortp_sglang.bench.decisions import Violation, World
from anchortp_sglang.recovery.requests import isolation


@pytest.mark.parametrize("first", range(0, 10_000, 2_500))
def test_every_schedule_ends_well(first):
    unservable = finished = 0
    for seed in range(first, first + 2_500):
        outcome = World(seed).run()
        unservable += outcome.unservable
        finished += outcome.finished
    assert unservable > 500 and finished > 5_000, "the schedules prove nothing"


def test_a_schedule_repeats_itself():
    assert World(42).run() == World(42).run()


def broken(monkeypatch, seeds=400):
    """The first violation among some schedules."""
    for seed in range(seeds):
        try:
            World(seed).run()
        except Violation as violation:
            return str(violation)
    raise AssertionError("nothing was found")


def test_it_is_found_when_the_first_fault_convicts(monkeypatch):
    monkeypatch.setattr(isolation, "CONVICTIONS", {"exception": 1, "hang": 1, "signal": 1})
    assert "can be served" in broken(monkeypatch)


def test_it_is_found_when_nobody_is_convicted(monkeypatch):
    monkeypatch.setattr(isolation, "CONVICTIONS", dict.fromkeys(isolation.CONVICTIONS, 10**9))
    monkeypatch.setattr(decisions, "budget_is_spent", lambda *about: False)
    assert "never ended" in broken(monkeypatch, seeds=60)


def test_it_is_found_when_a_waiting_request_is_forgotten(monkeypatch):
    original = isolation.Isolation.replay

    def forgetful(self, requests, now):
        original(self, list(requests)[1:], now)

    monkeypatch.setattr(isolation.Isolation, "replay", forgetful)
    assert "waiting" in broken(monkeypatch)
