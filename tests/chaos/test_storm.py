"""A short storm over the shared server: seeded faults of many kinds under every kind of request, all of it judged."""

from collections import deque

import pytest

from anchortp_sglang.bench.storm import log as storm_log
from anchortp_sglang.bench.storm.run import Storm
from anchortp_sglang.bench.storm.view import summary
from anchortp_sglang.testing.process_tree import Tree

SEED, FAULTS, CLIENTS = 11, 16, 6
KINDS = "rank:kill,rank:crash,two-ranks:kill,all-ranks:kill,anchor:kill,host-anchor:kill,detokenizer:kill,spare:kill"
VOCAB_SIZE = 512  # of the tiny checkpoint


@pytest.mark.overlap
@pytest.mark.timeout(600)  # a minute on a machine that has nothing else to do
def test_a_storm_costs_no_client_a_token_and_leaves_nothing_behind(server):
    schedule = storm_log.draw(SEED, FAULTS, KINDS, "all", 4, CLIENTS)
    log = storm_log.Writer(None)
    storm = Storm(schedule.make_requests(VOCAB_SIZE), schedule.seed, schedule.clients, log.write, print)
    left = deque(schedule.bursts)
    storm.run_on(Tree(server, server.place.folder), left)
    figures = summary(storm.report)
    assert figures["ok"], f"{figures}\n{log.text()}"
    assert not left and figures["servers"] == 1
    for kind, counts in figures["faults"].items():
        assert counts.get("effect"), f"{kind} struck nobody: {counts}"
    assert figures["recoveries"] >= FAULTS // 3
    assert figures["good_requests"] >= 8 and figures["bad_requests"]
