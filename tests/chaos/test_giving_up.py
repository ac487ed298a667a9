"""When no recovery is possible, every client is told why, and the server stays up to say so."""

import http.client
import json
import os
import signal
import socket
import threading
import time

import pytest
from faults import assert_memory_is_gone, lose_device, memfds_of
from histories import prompt, request, until
from remains import Remains

from anchortp_sglang.testing.streams import Streams

REQUESTS = [request(prompt(1300 + seed, 40), 2000) for seed in range(4)]
REASON = "--anchor-min-devices is 2"
MESSAGES = [{"role": "user", "content": "hello"}]
LONG = {"model": "default", "max_tokens": 2000, "stream": True, "ignore_eos": True}
OPEN = {
    "/v1/completions": LONG | {"prompt": "hello"},
    "/v1/chat/completions": LONG | {"messages": MESSAGES},
    "/v1/messages": LONG | {"messages": MESSAGES},
    "/api/generate": {"model": "default", "prompt": "hello", "stream": False, "options": {"num_predict": 2000}},
    "/api/chat": {"model": "default", "messages": MESSAGES, "stream": True, "options": {"num_predict": 2000}},
    "/invocations": LONG | {"messages": MESSAGES, "stream": False},
    "/vertex_generate": {"instances": [{"text": "hello"}], "parameters": {"sampling_params": {"max_new_tokens": 2000}}},
    "/flush_cache?timeout=100": {},  # waits in the ranks until nothing runs
}
"""What is open when the server goes down, besides the streams of REQUESTS."""

ANYTHING = OPEN["/v1/messages"] | {"text": "hello", "prompt": "hello", "input": "hello", "timeout": 0}
KNOWN_WITHOUT_RANKS = {"/", "/model_info", "/get_model_info", "/v1/models", "/v1/models/{model}"}
PAUSES = ("/pause_generation", "/continue_generation")
UNLISTED = ["/tokenize", "/detokenize", "/docs", "/redoc", "/openapi.json", "/no/such/route", "/generate/"]
AT_ONCE_S = 2.0


def ask(server, method, path, body=None):
    """(HTTP status, text, seconds) of a request; the status is 0 if the connection broke."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), time.monotonic() - began
    except (OSError, http.client.HTTPException) as error:
        return 0, repr(error), time.monotonic() - began
    finally:
        connection.close()


class Asked:
    """Each of OPEN, in a thread of its own."""

    def __init__(self, server):
        self.answers = {}
        self._threads = {path: threading.Thread(target=self._ask, args=(server, path)) for path in OPEN}

    def __enter__(self):
        for thread in self._threads.values():
            thread.start()
        return self

    def __exit__(self, *error):
        for thread in self._threads.values():
            thread.join()

    def _ask(self, server, path):
        self.answers[path] = ask(server, "POST", path, OPEN[path])


@pytest.fixture(scope="module")
def down(launch):
    """A server that has lost a device it cannot do without, and what its clients were told meanwhile."""
    with launch(2, "--anchor-min-devices", "2", "--enable-metrics", "--max-total-tokens", "32768") as server:
        server.remains = Remains(server)
        server.routes = server.get("/openapi.json")["paths"]
        with Asked(server) as asked, Streams(server.url, REQUESTS) as streams:
            streams.wait_tokens(10)
            memory = memfds_of(server.status()["devices"][1]["anchor_pid"])
            assert asked.answers == {}, "they were to be open when the device is lost"
            lost_at = time.monotonic()
            server.fault = lose_device(server, 1)
            until(lambda: server.status()["state"] == "down", "the server did not give up")
            streams.wait(10)
        server.ended_s = time.monotonic() - lost_at
        server.histories, server.asked = streams.histories, asked.answers
        assert_memory_is_gone(memory)
        yield server


def test_below_the_least_devices_open_streams_end_with_the_reason(down):
    assert all(history.done for history in down.histories), "a request hangs"
    assert down.ended_s < 15
    for history in down.histories:
        said = f"{history.error} {history.finish_reason}"
        assert "1 of 2 devices are left" in said and REASON in said
        assert 10 <= len(history.output_ids) < 2000
    status = down.status()
    assert status["generation"] == down.fault.generation
    assert REASON in status["recoveries"][-1]["failed"]


@pytest.mark.parametrize("path", OPEN)
def test_whatever_was_open_ends_with_the_reason(down, path):
    code, text, _ = down.asked[path]
    assert REASON in text
    assert code == (200 if OPEN[path].get("stream") else 503)


def test_every_route_says_503_and_why_at_once(down):
    """Those of SGLang's own list, so that a new one cannot escape."""
    assert len(down.routes) > 80
    for path, methods in [*down.routes.items(), *((path, ["get", "post"]) for path in UNLISTED)]:
        for method in methods:
            code, text, took_s = ask(down, method.upper(), path, None if method == "get" else ANYTHING)
            assert took_s < AT_ONCE_S, f"{method} {path} took {took_s:.1f} s"
            if path in KNOWN_WITHOUT_RANKS and method in ("get", "head"):
                assert code in (200, 404), f"{method} {path}: {code} {text}"
            elif path in PAUSES:
                assert code != 503, f"{method} {path}: {code} {text}"
            else:
                assert code == 503 and REASON in text, f"{method} {path}: {code} {text}"


def test_it_can_be_paused_and_continued_and_what_comes_does_not_wait(down):
    for path, paused in zip(PAUSES, (True, False), strict=True):
        code, text, _ = ask(down, "POST", path, {"mode": "in_place"} if paused else {})
        assert code == 200, text
        assert json.loads(ask(down, "GET", "/anchortp/status")[1])["paused"] is paused
        code, _, took_s = ask(down, "POST", "/generate", REQUESTS[0])
        assert took_s < AT_ONCE_S and code == 503


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/health", "/health_generate", "/ready", "/ping"])
def test_probes_say_503(down, path, method):
    code, _, took_s = ask(down, method, path)
    assert code == 503 and took_s < AT_ONCE_S


def test_a_websocket_is_refused(down):
    key = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    connection = http.client.HTTPConnection("127.0.0.1", down.port, timeout=30)
    connection.request("GET", "/v1/realtime", headers=key | {"Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="})
    assert connection.getresponse().status == 503
    connection.close()


def test_it_stays_up_to_tell_why_until_it_is_stopped(down):
    assert down.status()["state"] == "down"
    code, page, _ = ask(down, "GET", "/anchortp/timeline")
    assert code == 200 and REASON in page
    code, series, _ = ask(down, "GET", "/metrics")
    assert code == 200 and 'anchortp_server_state{state="down"} 1.0' in series
    assert "# TYPE sglang:num_running_reqs gauge" not in series, "gauges of ranks that are dead"
    with socket.create_connection(("127.0.0.1", down.port)) as half:
        half.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        os.kill(down.pid, signal.SIGTERM)
        assert down.wait(10) == 0
    down.remains.assert_gone()
