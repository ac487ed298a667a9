"""Counts of dead processes stay on /metrics, their gauges go: with prometheus_client's own files and collector."""

import os
import subprocess
import sys

import pytest
from places import ROOT
from prometheus_rules import value

RANK = """
import sys
from prometheus_client import Counter, Gauge, Histogram
rank, tokens = sys.argv[1], int(sys.argv[2])
Counter("tokens", "Tokens.", ["tp_rank"]).labels(rank).inc(tokens)
Histogram("took_seconds", "Time.", ["tp_rank"], buckets=(1, 5)).labels(rank).observe(tokens)
Gauge("running", "Requests.", ["tp_rank"], multiprocess_mode="mostrecent").labels(rank).set(tokens)
Gauge("held", "Requests.", ["tp_rank"], multiprocess_mode="livesum").labels(rank).set(tokens)
print("set", flush=True)
sys.stdin.read()
"""
SCRAPE = """
import os, sys
from pathlib import Path
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from anchortp_sglang.http.dead_series import forget_dead
if sys.argv[1] == "forget":
    forget_dead(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]))
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
sys.stdout.write(generate_latest(registry).decode())
"""


class Ranks:
    """Processes that have counted something, and a scraper."""

    def __init__(self, folder):
        self.folder = folder
        self._env = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder), "PYTHONPATH": str(ROOT)}
        self._running = []

    def start(self, rank, tokens):
        command = [sys.executable, "-c", RANK, str(rank), str(tokens)]
        process = subprocess.Popen(command, env=self._env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"set\n"
        self._running.append(process)
        return process

    def kill(self, process):
        process.kill()  # no longer running, but not reaped: a zombie
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    def scrape(self, what="forget"):
        done = subprocess.run(
            [sys.executable, "-c", SCRAPE, what], env=self._env, capture_output=True, text=True, check=True
        )
        return done.stdout

    def close(self):
        for process in self._running:
            process.kill()
            process.communicate()


@pytest.fixture
def ranks(tmp_path):
    made = Ranks(tmp_path)
    yield made
    made.close()


def test_a_lost_ranks_gauges_go_and_its_counts_stay(ranks):
    ranks.start(0, 3)
    lost = ranks.start(1, 4)
    assert value(ranks.scrape(), "running", tp_rank="1") == 4, "it lives"
    ranks.kill(lost)
    assert 'running{tp_rank="1"}' in ranks.scrape("nothing"), "the fault is not there to be mended"
    for _ in range(2):
        text = ranks.scrape()
        assert 'running{tp_rank="1"}' not in text and 'held{tp_rank="1"}' not in text
        assert value(text, "running", tp_rank="0") == 3
        assert value(text, "tokens_total", tp_rank="1") == 4
        assert value(text, "took_seconds_sum", tp_rank="1") == 4
        assert value(text, "took_seconds_bucket", tp_rank="1", le="1.0") == 0
        assert value(text, "took_seconds_bucket", tp_rank="1", le="5.0") == 1
        assert value(text, "took_seconds_count", tp_rank="1") == 1


def test_counts_never_fall_and_files_do_not_pile_up_over_many_deaths(ranks):
    for deaths in (1, 2):
        process = ranks.start(0, 2)
        assert value(ranks.scrape(), "tokens_total", tp_rank="0") == 2 * deaths
        ranks.kill(process)
        assert value(ranks.scrape(), "tokens_total", tp_rank="0") == 2 * deaths
    assert value(ranks.scrape(), "took_seconds_count", tp_rank="0") == 2
    assert sorted(path.name for path in ranks.folder.glob("*.db")) == ["counter_0.db", "histogram_0.db"]
