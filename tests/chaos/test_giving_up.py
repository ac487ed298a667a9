"""When no recovery is possible, every client is told why, and the server stays up to say so."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
from faults import assert_memory_is_gone, lose_device, memfds_of
from histories import prompt, request, until
from remains import Remains

from anchortp_sglang.bench.streams import Streams

REQUESTS = [request(prompt(1300 + seed, 40), 2000) for seed in range(4)]
BODIES = {
    "/generate": REQUESTS[0],
    "/v1/completions": {"model": "default", "prompt": "hello", "max_tokens": 4},
    "/v1/chat/completions": {"model": "default", "messages": [{"role": "user", "content": "hello"}]},
}


def refusal(server, path, body):
    """(HTTP status, error message) of a POST."""
    post = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(post, timeout=30)
    return raised.value.code, json.load(raised.value)["error"]["message"]


def test_below_the_least_devices_clients_get_a_reason_and_the_server_says_503(launch):
    with launch(2, "--anchor-min-devices", "2") as server:
        remains = Remains(server)
        with Streams(server.url, REQUESTS) as streams:
            streams.wait_tokens(10)
            memory = memfds_of(server.status()["devices"][1]["anchor_pid"])
            lost_at = time.monotonic()
            fault = lose_device(server, 1)
            until(lambda: server.status()["state"] == "down", "the server did not give up")
            streams.wait(10)
            assert all(history.done for history in streams.histories), "a request hangs"
        assert time.monotonic() - lost_at < 15
        for history in streams.histories:
            said = f"{history.error} {history.finish_reason}"
            assert "1 of 2 devices are left" in said and "--anchor-min-devices is 2" in said
            assert 10 <= len(history.output_ids) < 2000
        assert_memory_is_gone(memory)
        status = server.status()
        assert status["generation"] == fault.generation
        assert "--anchor-min-devices is 2" in status["recoveries"][-1]["failed"]
        assert server.health() == 503
        for path, body in BODIES.items():
            code, message = refusal(server, path, body)
            assert code == 503 and "--anchor-min-devices is 2" in message
        assert server.health() == 503 and server.status()["state"] == "down"
        threading.Thread(target=ask_ranks, args=(server,), daemon=True).start()
        with socket.create_connection(("127.0.0.1", server.port)) as half:
            half.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
            time.sleep(1)
            os.kill(server.pid, signal.SIGTERM)
            assert server.wait(10) == 0
        remains.assert_gone()


def ask_ranks(server):
    """A call that only ranks could answer."""
    with contextlib.suppress(OSError):
        urllib.request.urlopen(f"{server.url}/flush_cache?timeout=90", timeout=90)
