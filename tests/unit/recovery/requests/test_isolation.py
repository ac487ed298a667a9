"""Requests that ranks keep dying with are found and ended, and no other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchortp_sglang.recovery.requests.isolation import CONVICTIONS, PROOF_TOKENS, Evidence, Isolation

SIGNAL = Evidence("signal", "the process of rank 0 died")


def exception(*rids):
    return Evidence("exception", "RuntimeError: no", frozenset(rids))


class Server:
    """Generations that die ``died_after_s`` after a poisoned request is given to them; others get a token at once."""

    def __init__(self, good, poison=(), evidence=lambda rids: SIGNAL, died_after_s=0.1):
        self.isolation, self.now = Isolation(), 0.0
        self.open, self.poison = [*good, *poison], set(poison)
        self.evidence, self.died_after_s = evidence, died_after_s
        self.got = dict.fromkeys(self.open, 0)
        self.ended, self.generations = {}, 0
        for rid in self.open:
            assert self.isolation.admit(rid, self.now)

    def generation(self, killed_after_s=None, limit_s=60.0):
        """One generation, from its replay to its death; False if it survives. ``killed_after_s``: from outside."""
        self.generations += 1
        self.now += 0.3
        began = self.now
        self.isolation.replay([(rid, self.got[rid] > 0) for rid in self.open], self.now)
        running, dies_at = [], float("inf") if killed_after_s is None else began + killed_after_s
        evidence = SIGNAL
        while self.now < min(dies_at, began + limit_s):
            for rid in self.isolation.release(self.now):
                running.append(rid)
                if rid in self.poison and self.now + self.died_after_s < dies_at:
                    dies_at, evidence = self.now + self.died_after_s, self.evidence([rid])
            for rid in set(running) - self.poison:
                self.got[rid] += 1
                self.isolation.progressed(rid, 1, self.now)
            self.now += 0.05
        if self.now >= began + limit_s:
            return False
        for rid, reason in self.isolation.struck(evidence, self.now).items():
            self.ended[rid] = reason
            self.open.remove(rid)
            self.isolation.close(rid)
        return True

    def run(self, most=60):
        self.isolation.struck(self.evidence(list(self.poison)[:1]), self.now + 0.1)
        while self.generation():
            assert self.generations < most, f"it loops; ended so far: {self.ended}"


@pytest.mark.parametrize("count", [1, 2, 8, 50])
def test_a_request_that_kills_ranks_by_a_signal_is_ended_and_the_others_go_on(count):
    server = Server([f"good{n}" for n in range(count)], ["bad"])
    server.run(most=20)
    assert list(server.ended) == ["bad"] and "5 times" in server.ended["bad"]
    assert all(server.got[rid] >= PROOF_TOKENS for rid in server.open)


def test_an_exception_that_names_a_request_needs_fewer_generations():
    server = Server(["good0", "good1"], ["bad"], lambda rids: exception(*rids))
    server.run(most=5)
    assert list(server.ended) == ["bad"] and "RuntimeError: no" in server.ended["bad"]


def test_an_exception_that_names_the_wrong_request_ends_nobody_else():
    """As when a loop's variable still holds the last request of a batch."""
    server = Server(["good0", "good1", "good2"], ["bad"], lambda rids: exception("good2"))
    server.run(most=30)
    assert list(server.ended) == ["bad"]


def test_several_are_found_one_after_the_other():
    server = Server([f"good{n}" for n in range(10)], ["bad0", "bad1", "bad2"])
    server.run(most=60)
    assert sorted(server.ended) == ["bad0", "bad1", "bad2"]


def test_what_is_sent_while_ranks_hang_is_not_blamed_for_it():
    isolation = Isolation()
    isolation.admit("bad", 0.0)
    isolation.struck(Evidence("hang", "no progress", since=1.0), 5.0)
    isolation.replay([("bad", False)], 6.0)
    assert isolation.release(6.0) == ["bad"]
    assert isolation.admit("late", 8.0)
    isolation.struck(Evidence("hang", "no progress", since=7.0), 11.0)
    isolation.replay([("bad", False), ("late", False)], 12.0)
    assert isolation.release(12.0) == ["late"], "it waits as a suspect"
    assert isolation.waiting == ["bad"]


@given(st.lists(st.floats(0.01, 0.9), min_size=20, max_size=20), st.integers(1, 8))
def test_kills_by_hand_in_quick_succession_end_nobody(gaps, count):
    """Also before any token could come: prompts take longer than each generation lives."""
    server = Server([f"good{n}" for n in range(count)])
    server.isolation.struck(SIGNAL, 0.1)
    for gap in gaps:
        assert server.generation(killed_after_s=gap)
    assert not server.ended


@given(st.floats(0.5, 20.0), st.floats(0.2, 30.0))
def test_kills_at_regular_intervals_do_not_convict_a_long_prompt(period, prefill_s):
    """A request whose prefill takes about as long as ranks live is with them, without a token, at every kill."""
    server = Server([], ["slow"], died_after_s=prefill_s)  # "dies" stands for the prefill's end, after the kill
    server.isolation.struck(SIGNAL, 0.1)
    for _ in range(20):
        server.died_after_s = 1e9
        assert server.generation(killed_after_s=period)
    assert not server.ended


def test_a_suspect_is_found_beside_a_request_that_needs_long_for_its_first_token():
    """Which ranks cannot have proven, and which would share the blame for ever."""
    isolation, now = Isolation(), 0.0
    for rid in ("slow", "bad"):
        isolation.admit(rid, now)
    faults = 1
    while not (ended := isolation.struck(SIGNAL, now + 0.1)):
        faults += 1
        assert faults < 12, "it loops"
        now += 0.4
        isolation.replay([("slow", False), ("bad", False)], now)
        sent = {}
        while "bad" not in sent:
            sent |= dict.fromkeys(isolation.release(now), now)
            if now - sent.get("slow", now) > 20.0:
                isolation.progressed("slow", PROOF_TOKENS, now)
            now += 0.05
    assert list(ended) == ["bad"]


def test_a_rid_that_is_used_again_is_another_request():
    isolation = Isolation()
    isolation.admit("old", 0.0)
    isolation.admit("again", 0.0)
    isolation.progressed("old", 1, 0.1)
    isolation.struck(SIGNAL, 1.0)
    isolation.replay([("old", True), ("waits", False)], 1.3)
    assert isolation.release(1.3) == ["old"]
    assert isolation.admit("again", 1.4) is False
    isolation.close("again")
    assert isolation.waiting == ["waits"]


def test_requests_that_only_go_on_are_sent_before_what_must_be_prefilled():
    isolation = Isolation()
    isolation.replay([("new", False), ("old", True), ("other", True)], 0.0)
    assert isolation.release(0.0) == ["old", "other"]
    assert isolation.release(0.01) == []
    isolation.progressed("old", 1, 0.02)
    assert isolation.release(0.02) == []
    isolation.progressed("other", 1, 0.03)
    assert isolation.release(0.03) == ["new"]


def test_what_must_be_prefilled_waits_half_a_second_at_most():
    isolation = Isolation()
    isolation.replay([("new", False), ("stuck", True)], 0.0)
    assert isolation.release(0.0) == ["stuck"]
    assert isolation.wake_at(0.0) == pytest.approx(0.5)
    assert isolation.release(0.5) == ["new"]


def test_a_new_request_waits_while_a_suspect_is_tried_alone_and_then_goes():
    isolation = Isolation()
    isolation.admit("bad", 0.0)
    for generation in (1.0, 2.0):
        isolation.struck(SIGNAL, generation)
        isolation.replay([("bad", False)], generation + 0.3)
        assert isolation.release(generation + 0.3) == ["bad"]
    assert isolation.admit("new", 2.4) is False
    assert isolation.waiting == ["new"]
    isolation.progressed("bad", PROOF_TOKENS, 2.5)
    assert isolation.release(2.5) == ["new"]


def test_a_client_that_leaves_is_forgotten_wherever_its_request_waits():
    isolation = Isolation()
    for rid in ("old", "new", "bad"):
        isolation.admit(rid, 0.0)
    isolation.struck(exception("bad"), 1.0)
    isolation.replay([("old", True), ("new", False), ("bad", False)], 1.3)
    for rid in ("old", "new", "bad"):
        assert rid in isolation.waiting
        isolation.close(rid)
        assert rid not in isolation.waiting
    assert isolation.release(2.0) == [] and isolation.wake_at(2.0) is None


def test_signals_need_more_convictions_than_exceptions():
    assert CONVICTIONS["signal"] > CONVICTIONS["exception"] >= 2
