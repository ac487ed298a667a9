"""What the server says of itself: probes in time, in a recovery and under load, and SGLang's own information."""

import http.client
import json
import threading
import time

import pytest
from faults import kill_rank, kill_standby, recovered
from histories import assert_identical, outcomes, prompt, request

from anchortp_sglang.testing.streams import Streams

REQUESTS = [request(prompt(4500 + seed, 30), 120) for seed in range(4)]
PROBES = ("/health", "/health_generate", "/ready", "/ping")
JSON = {"Content-Type": "application/json"}
TIMEOUT_S = 1.0
"""Of a Kubernetes probe, by default. SGLang's own /health never answers sooner."""


def ask(server, method, path, body=None, headers=None, timeout_s=30.0):
    """(HTTP status, body, headers)"""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout_s)
    try:
        connection.request(method, path, body, headers or {}, encode_chunked="Transfer-Encoding" in (headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


class Prober:
    """Asks one probe again and again: (HTTP status, what it says, seconds)."""

    def __init__(self, server, path):
        self.answers = []
        self._server, self._path, self._stop = server, path, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()

    def _run(self):
        while not self._stop.wait(0.02):
            began = time.monotonic()
            code, body, _ = ask(self._server, "GET", self._path)
            said = json.loads(body)["status"] if body else ""
            self.answers.append((code, said, time.monotonic() - began))


def test_liveness_is_200_in_time_all_through_a_recovery(server, unbroken):
    expected = unbroken(REQUESTS)
    with Prober(server, "/health") as probe, Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(20)
        recovered(server, kill_rank(server, 3), "process")
    assert_identical(expected, outcomes(streams.histories))
    assert {code for code, _, _ in probe.answers} == {200}, probe.answers
    assert {"serving", "recovering"} == {said for _, said, _ in probe.answers}
    assert max(took_s for _, _, took_s in probe.answers) < TIMEOUT_S


def test_readiness_is_503_in_a_recovery_and_the_others_are_not(server):
    with Prober(server, "/ready") as ready, Prober(server, "/ping") as ping, Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(20)
        kill_standby(server)
        fault = kill_rank(server, 2)
        while server.status()["state"] != "recovering":
            pass
        began = time.monotonic()
        code, body, _ = ask(server, "GET", "/health_generate")
        took_s = time.monotonic() - began
        recovered(server, fault, "process")
    assert (code, json.loads(body)) == (200, {"status": "recovering"}), "the recovery was over before it was asked"
    assert took_s < TIMEOUT_S
    assert {(code, said) for code, said, _ in ready.answers} == {(200, ""), (503, "recovering")}
    assert {code for code, _, _ in ping.answers} == {200}
    assert ask(server, "GET", "/ready")[0] == 200
    slowest_s = max(took_s for _, _, took_s in ready.answers + ping.answers)
    assert slowest_s < TIMEOUT_S


def test_liveness_does_not_wait_behind_a_long_prefill(server):
    with Streams(server.url, [request(prompt(4600, 3000), 2)]) as streams:
        for _ in range(5):
            began = time.monotonic()
            assert ask(server, "GET", "/health")[0] == 200
            assert time.monotonic() - began < TIMEOUT_S
        assert not streams.histories[0].output_ids, "it was no long prefill"


def test_liveness_and_streams_do_not_wait_for_a_long_text(server, unbroken):
    expected = unbroken(REQUESTS)
    text = "the anchor holds " * 300_000
    with Prober(server, "/health") as probe, Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(10)
        began = time.monotonic()
        code, body, _ = ask(server, "POST", "/generate", json.dumps({"text": text}), JSON)
        assert code == 400 and b"longer than" in body
        code, body, _ = ask(server, "POST", "/tokenize", json.dumps({"prompt": text}), JSON)
        assert code == 200 and json.loads(body)["count"] > 100_000
        took_s = time.monotonic() - began
    assert_identical(expected, outcomes(streams.histories))
    assert took_s > 2 * TIMEOUT_S, "the texts were read too soon to tell"
    assert max(took_s for _, _, took_s in probe.answers) < TIMEOUT_S


@pytest.mark.parametrize("path", PROBES)
def test_a_load_balancer_may_ask_with_head(server, path):
    code, body, _ = ask(server, "HEAD", path)
    assert (code, body) == (200, b"")


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info_is_sglangs_own(server, path):
    """As bench_serving asks for it."""
    info = server.get(path)
    assert info["tp_size"] == 4 and info["version"].startswith("0.5.")
    assert info["max_total_num_tokens"] == 8192 and info["status"] == "ready"
    assert info["internal_states"][0]["last_gen_throughput"] >= 0
    assert info.keys().isdisjoint({"fds", "stamps", "rebuilt", "moved_bytes", "device_bytes", "scheduler"})


LONG = 65 << 20
GENERATING = ["/generate", "/v1/completions", "/v1/chat/completions", "/v1/messages"]


@pytest.mark.parametrize("path", GENERATING)
def test_a_body_beyond_the_limit_is_a_413_before_it_is_sent(server, path):
    headers = JSON | {"Content-Length": str(10**12)}
    code, body, _ = ask(server, "POST", path, b"{", headers, timeout_s=5)
    assert code == 413 and b"--anchor-max-body-mib" in body


def test_a_body_beyond_the_limit_is_a_413_in_chunks_as_well(server):
    piece = b"x" * (1 << 20)
    headers = JSON | {"Transfer-Encoding": "chunked"}
    code, body, _ = ask(server, "POST", "/generate", (piece for _ in range(LONG >> 20)), headers)
    assert code == 413 and b"--anchor-max-body-mib" in body


@pytest.mark.parametrize(
    ("method", "path", "wanted"),
    [
        ("HEAD", "/anchortp/status", 200),
        ("HEAD", "/anchortp/timeline", 200),
        ("GET", "/anchortp/status/", 200),
        ("POST", "/anchortp/status", 405),
        ("GET", "/anchortp/inject", 405),
        ("OPTIONS", "/anchortp/inject", 405),
        ("GET", "/anchortp/other", 404),
    ],
)
def test_our_routes_answer_by_method(server, method, path, wanted):
    code, body, headers = ask(server, method, path)
    assert code == wanted
    assert (body == b"") == (method == "HEAD")
    assert int(headers["content-length"]) > 0


def test_a_page_of_somebody_else_cannot_inject(server):
    body = json.dumps({"device": 0, "kind": "process"})
    before = server.status()["generation"]
    code, answer, _ = ask(server, "POST", "/anchortp/inject", body, {"Content-Type": "text/plain"})
    assert (code, json.loads(answer)["ok"]) == (415, False)
    code, _, _ = ask(
        server, "POST", "/anchortp/inject", '{"device": 9, "kind": "process"}', {"Content-Type": "application/json"}
    )
    assert code == 409
    assert server.status()["generation"] == before
