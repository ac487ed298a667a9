"""Clients of the benchmark, against a small real HTTP server that streams as SGLang does."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from anchortp_sglang.bench.open_loop import OpenLoop
from anchortp_sglang.bench.recovery import Recorded, _judge

TOKEN_S = 0.01


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        wanted = body["sampling_params"]["max_new_tokens"]
        self.send_response(200)
        self.end_headers()
        for count in range(1, wanted + 1):
            time.sleep(TOKEN_S)
            (prompt,) = body["input_ids"]
            finish = {"type": "abort" if prompt == 14 else "length"} if count == wanted else None
            meta = {"finish_reason": finish, "completion_tokens": count}
            told = [count, *range(1, count)] if prompt == 15 else list(range(count))
            message = {"output_ids": told, "text": "x" * count, "meta_info": meta}
            self.wfile.write(f"data: {json.dumps(message)}\n\n".encode())
            if prompt == 13 and count == 2:
                return  # dies in mid-stream

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def requests(*prompts, tokens=5):
    return [{"input_ids": [prompt], "sampling_params": {"max_new_tokens": tokens}} for prompt in prompts]


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_clients_come_when_they_should_however_busy_the_server_is(url):
    arrivals = [(0.05 * n, n % 2) for n in range(12)]
    with OpenLoop(url, requests(1, 2, tokens=30), iter(arrivals)) as clients:
        wait_for(lambda: len(clients.histories) == len(arrivals))
    late = [
        history.sent_at - clients.began - at for (_, history), (at, _) in zip(clients.histories, arrivals, strict=True)
    ]
    assert min(late) >= 0
    assert max(late) < len(arrivals) * 30 * TOKEN_S / 3, "who waits for answers is this late at the third"
    assert [number for number, _ in clients.histories] == [number for _, number in arrivals]
    assert all(len(history.output_ids) == 30 and history.error is None for _, history in clients.histories)


def test_the_first_token_after_a_moment_is_that_of_any_client(url):
    with OpenLoop(url, requests(1), iter([(0.0, 0), (1.5, 0)])) as clients:
        wait_for(lambda: clients.histories and clients.histories[0][1].done)
        moment = time.monotonic()
        assert clients.first_token_after(moment) is None
        wait_for(lambda: clients.first_token_after(moment) is not None)
        assert clients.first_token_after(moment) >= clients.began + 1.5


def test_a_client_is_being_served_from_a_quarter_of_its_tokens_until_few_are_left(url):
    seen = []
    with OpenLoop(url, requests(1, tokens=40), iter([(0.2, 0)])) as clients:
        while not (clients.histories and clients.histories[0][1].done):
            seen.append(clients.being_served())
            time.sleep(0.005)
    assert seen[0] is False and seen[-1] is False
    first, last = seen.index(True), len(seen) - 1 - seen[::-1].index(True)
    assert all(seen[first : last + 1])
    assert 0.15 < (last - first) / len(seen) < 0.5


def test_a_broken_stream_is_a_failed_request_and_what_came_is_judged(url):
    with OpenLoop(url, requests(1, 13), iter([(0.0, 0), (0.0, 1), (0.1, 0)])) as clients:
        time.sleep(0.3)
    recorded = Recorded(clients.began, clients.began + 0.02, clients.began + 0.3, tuple(clients.histories))
    found = _judge(recorded, {0: (0, 1, 2, 3, 4), 1: (0, 1, 2, 3, 4)})
    assert (found.requests, found.failed, found.undelivered, found.damage.wrong) == (3, 1, 3, 0)
    assert len(found.pauses_s) == 2
    changed = _judge(recorded, {0: (0, 1, 9, 3, 4), 1: (0, 1, 2, 3, 4)})
    assert changed.damage.changed == 2


@pytest.mark.parametrize("prompt, error", [(13, "the connection ended"), (14, "aborted"), (15, "were taken back")])
def test_an_answer_that_is_none_is_an_error(url, prompt, error):
    with OpenLoop(url, requests(prompt), iter([(0.0, 0), (9.0, 0)])) as clients:
        wait_for(lambda: clients.histories and clients.histories[0][1].done)
    ((_, history),) = clients.histories
    assert error in history.error
    assert history.sent_at < history.ended_at <= time.monotonic()
