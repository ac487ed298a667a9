"""A fleet of two servers on three Ray nodes of this machine: streams outlive a node, a server, an upgrade.

One cluster for all tests; ``tools/fleet_storm.py`` does the same many times, and more.
"""

import http.client
import json
import threading
import urllib.error

import pytest

pytest.importorskip("ray", reason="the fleet needs Ray: pip install .[fleet]")

from fleet_rig import LocalFleet, main_of, until
from histories import assert_exactly_once, assert_identical, outcomes, prompt, request

from anchortp_sglang.testing.streams import Streams
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

TOKENS = 120
FLAGS = "--dtype float32 --device cpu --max-total-tokens 8192 --anchor-standby off --anchor-allow-injection"
REQUESTS = [request(prompt(seed, 30), TOKENS) for seed in range(8)]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    model = write_checkpoint(tmp_path_factory.mktemp("fleet") / "qwen3", "qwen3")
    with LocalFleet(2, model_path=str(model), arguments=FLAGS, replicas=2, ingresses=2, drain_s=1) as made:
        made.deploy()
        made.wait_servers(2)
        yield made


@pytest.fixture(scope="module")
def unbroken(fleet):
    with Streams(fleet.url, REQUESTS) as streams:
        pass
    assert not [history.error for history in streams.histories if history.error]
    return outcomes(streams.histories)


def check(unbroken, streams):
    assert_identical(unbroken, outcomes(streams.histories))
    for history in streams.histories:
        assert_exactly_once(history)


def busiest(fleet):
    return max(fleet.servers(), key=lambda server: server["status"]["open_requests"])


def test_streams_outlive_the_node_of_their_server(fleet, unbroken):
    with Streams(fleet.url, REQUESTS) as streams:
        streams.wait_tokens(TOKENS // 4)
        lost = busiest(fleet)
        assert lost["status"]["open_requests"], "the node had no stream"
        main = main_of(lost)
        fleet.lose_node(lost["node"])
    check(unbroken, streams)
    until(lambda: not main.is_running(), "the server ends with its node", 10)
    fleet.add_node()
    assert lost["name"] not in {server["name"] for server in fleet.wait_servers(2)}


def test_streams_outlive_the_main_process_of_their_server_which_serve_replaces(fleet, unbroken):
    lost = busiest(fleet)
    with Streams(fleet.url, REQUESTS) as streams:
        streams.wait_tokens(TOKENS // 4)
        lost = busiest(fleet)
        fleet.signal_main(lost)
    check(unbroken, streams)
    until(lambda: lost["name"] not in {one["name"] for one in fleet.servers()}, "it is taken out", 60)
    fleet.wait_servers(2)


def test_an_ingress_that_is_killed_costs_its_own_streams_only(fleet, unbroken):
    with Streams(fleet.url, REQUESTS) as streams:
        streams.wait_tokens(TOKENS // 4)
        fleet.ingresses()[0].kill()
    broken = {number for number, history in enumerate(streams.histories) if history.error}
    assert len(broken) < len(REQUESTS), "both ingresses had streams"
    got = outcomes(streams.histories)
    assert [one for n, one in enumerate(got) if n not in broken] == [
        one for n, one in enumerate(unbroken) if n not in broken
    ]
    with Streams(fleet.url, REQUESTS) as streams:  # the other one serves at once
        pass
    check(unbroken, streams)
    until(lambda: all(not one["status"]["open_requests"] for one in fleet.servers()), "their requests end", 30)


class Clients:
    """Clients that ask one after the other, until told to stop."""

    def __init__(self, url, count):
        self.url, self.histories, self._stop = url, [], False
        self._threads = [threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(count)]

    def _ask(self, number):
        while not self._stop:
            with Streams(self.url, [REQUESTS[number]]) as streams:
                pass
            self.histories.append((number, streams.histories[0]))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self._stop = True
        for thread in self._threads:
            thread.join(120)


def test_all_servers_are_replaced_and_no_request_fails(fleet, unbroken):
    before = {server["name"] for server in fleet.wait_servers(2)}
    with Clients(fleet.url, 4) as clients:
        fleet.deploy(environment={"ANCHORTP_UPGRADED": "1"})
        until(lambda: not before & {one["name"] for one in fleet.servers()}, "all are replaced", 120)
        fleet.wait_servers(2)
    assert len(clients.histories) > 4
    for number, history in clients.histories:
        assert history.error is None, f"stream {number}: {history.error}"
        assert outcomes([history]) == [unbroken[number]]


def is_idle(fleet):
    return all(not server["status"]["open_requests"] for server in fleet.servers())


def test_aborts_and_disconnects_reach_the_servers(fleet):
    long = request(prompt(20, 30), 1500) | {"rid": "of-mine"}
    with Streams(fleet.url, [long]) as streams:
        streams.wait_tokens(5)
        assert fleet.post("/abort_request", {"rid": "of-mine"}) == {"success": True, "servers": 2}
        until(lambda: streams.histories[0].done, "the aborted stream ends", 30)
    assert streams.histories[0].finish_reason["type"] == "abort"
    until(lambda: is_idle(fleet), "the abort reaches the server", 30)
    leaving = http.client.HTTPConnection(fleet.url.removeprefix("http://"), timeout=60)
    body = json.dumps(long | {"rid": "of-one-who-leaves", "stream": True})
    leaving.request("POST", "/generate", body, {"Content-Type": "application/json"})
    assert leaving.getresponse().readline().startswith(b"data:")
    assert not is_idle(fleet)
    leaving.close()
    until(lambda: is_idle(fleet), "the disconnect reaches the server", 30)


def test_what_the_fleet_cannot_do_is_said(fleet):
    with pytest.raises(urllib.error.HTTPError) as refused:
        fleet.get("/anchortp/timeline")
    assert refused.value.code == 404 and b"a route of one server" in refused.value.read()
