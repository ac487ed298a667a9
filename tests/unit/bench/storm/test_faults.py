"""A storm's signals reach real processes, and its clients read, leave and abort real streams."""

import json
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from anchortp_sglang.bench.storm.clients import Exchange, send, send_all
from anchortp_sglang.bench.storm.faults import release, strike
from anchortp_sglang.bench.storm.judge import RIGHT, judge
from anchortp_sglang.bench.storm.requests import Request
from anchortp_sglang.bench.storm.schedule import Blow
from anchortp_sglang.testing.process_tree import is_gone, is_stopped

TIMEOUT_S = 10.0


class Herd:
    """Stands in for a server's Tree: three ranks that sleep, and no spare."""

    def __init__(self):
        self.processes = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
        self.server = self

    def status(self):
        return {"generation": 5, "state": "serving"}

    def roles(self):
        return {"rank": [p.pid for p in self.processes if not is_gone(p.pid)], "spare": []}

    def devices(self):
        return [{"rank": self.processes[0].pid, "anchor": self.processes[1].pid}]


@pytest.fixture
def herd():
    herd = Herd()
    yield herd
    for process in herd.processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("kind", "draw", "struck"),
    [
        ("rank:kill", 0.0, [0]),
        ("rank:crash", 0.99, [2]),
        ("two-ranks:kill", 0.99, [2, 0]),
        ("all-ranks:kill", 0.5, [0, 1, 2]),
        ("device:kill", 0.5, [0, 1]),
    ],
)
def test_who_is_drawn_is_dead_and_nobody_else(herd, kind, draw, struck):
    done = strike(herd, Blow(kind, 0, draw))
    pids = [process.pid for process in herd.processes]
    assert sorted(done.pids) == sorted(pids[number] for number in struck) and done.effect
    assert [is_gone(pid) for pid in pids] == [number in struck for number in range(3)]


def test_who_is_stopped_stays_so_until_released(herd):
    done = strike(herd, Blow("rank:stop", 0, 0.4))
    assert done.effect and done.pids == [herd.processes[1].pid] and is_stopped(done.pids[0])
    assert release(done.pids) == done.pids and release(done.pids) == []
    assert not is_stopped(done.pids[0])


def test_who_is_paused_goes_on_by_itself(herd):
    done = strike(herd, Blow("rank:pause", 0, 0.0, pause_s=0.3))
    assert done.effect and is_stopped(done.pids[0])
    time.sleep(0.6)
    assert not is_stopped(done.pids[0]) and not is_gone(done.pids[0])


def test_where_there_is_nobody_nothing_takes_effect(herd):
    done = strike(herd, Blow("spare:kill", 0, 0.0))
    assert done.pids == [] and not done.effect


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    aborted: list = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/abort_request":
            self.aborted.append(body["rid"])
        if body.get("bad"):
            self.send_error(400, "no")
            return
        self.send_response(200)
        self.end_headers()
        if self.path == "/generate":
            self.generate(body)

    def generate(self, body):
        if not body.get("stream"):
            self.wfile.write(json.dumps([self.message(3), self.message(3)]).encode())
            return
        for count in (1, 2, 3):
            self.wfile.write(f"data: {json.dumps(self.message(count))}\n\n".encode())
            self.wfile.flush()
        if not body.get("breaks"):
            self.wfile.write(b"data: [DONE]\n\n")

    def message(self, count):
        meta = {"finish_reason": {"type": "length"} if count == 3 else None, "completion_tokens": count}
        return {"text": "x" * count, "output_ids": list(range(count)), "meta_info": meta}

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


STREAM = Request("stream", "/generate", {"stream": True})


def answer(url, request, messages=2):
    exchange = Exchange(0, time.monotonic())
    send(url, request, exchange, "a rid", messages, TIMEOUT_S)
    assert exchange.ended_at is not None
    return exchange.answer


def test_whole_answers_and_streams_are_read_to_their_end(url):
    (one, two) = send_all(url, [STREAM, Request("batch", "/generate", {})], TIMEOUT_S)
    assert one.ended and one.choices[0]["output_ids"] == [0, 1, 2]
    assert two.ended and two.choices.keys() == {0, 1}
    assert judge(STREAM, one, answer(url, STREAM)) == RIGHT


def test_a_stream_that_breaks_off_is_noticed(url):
    (expected,) = send_all(url, [STREAM], TIMEOUT_S)
    breaking = Request("stream", "/generate", {"stream": True, "breaks": True})
    assert judge(breaking, expected, answer(url, breaking)).ruling == "failed"


def test_who_leaves_has_read_as_many_messages_as_drawn(url):
    left = answer(url, Request("disconnect", "/generate", {"stream": True}, "leave"), 2)
    assert left.choices[0]["output_ids"] == [0, 1] and not left.ended


def test_who_aborts_names_its_own_request_and_reads_on(url):
    aborted = answer(url, Request("abort", "/generate", {"stream": True}, "abort"), 1)
    assert Handler.aborted == ["a rid"] and aborted.ended


def test_a_refusal_and_a_server_that_is_gone_are_told_apart(url):
    bad = Request("bad input", "/generate", {"bad": True}, "refused")
    assert judge(bad, None, answer(url, bad)) == RIGHT
    assert judge(bad, None, answer("http://127.0.0.1:1", bad)).ruling == "failed"
