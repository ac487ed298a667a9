"""Commands that change a running server: what they send, what they say, and how they end."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from typer.testing import CliRunner

from anchortp_sglang.cli.app import app
from anchortp_sglang.testing.server import free_port

PLAN = {
    "moved_bytes": 3 << 20,
    "least_bytes": 2 << 20,
    "kv_slots": [100, 90],
    "least_s": 0.25,
    "devices": [
        {"id": 0, "weight_bytes": 9 << 20, "stay_bytes": 6 << 20, "local_bytes": 0, "p2p_bytes": 3 << 20}
        | {"reload_bytes": 0}
    ],
}
SERVING = {"ok": True, "changed": True, "generation": 5, "devices": [0, 1], "seconds": 2.5}


@pytest.fixture
def server():
    """An HTTP server that notes what it is asked and answers with ``server.answer``: a code and a body."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body, self.headers["Authorization"]))
            code, answer = self.server.answer
            data = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *about):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked = asked
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(server, *arguments):
    return CliRunner().invoke(app, [*arguments, "--url", f"http://127.0.0.1:{server.server_port}"])


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        (("drain", "--device", "2"), {"drain": [2]}),
        (("rejoin", "--device", "2", "--device", "3"), {"rejoin": [2, 3]}),
        (("resize", "--devices", "0,1", "--widths", "3,1"), {"devices": [0, 1], "widths": [3, 1]}),
        (("rebalance", "--by", "speed"), {"rebalance": "speed"}),
    ],
)
def test_each_command_asks_for_its_change_and_says_what_it_moved(server, arguments, body):
    server.answer = 200, SERVING | {"plan": PLAN}
    done = run(server, *arguments, "--generation", "4", "--api-key", "key")
    assert done.exit_code == 0, done.output
    assert server.asked == [("/anchortp/reconfigure", body | {"dry_run": False, "generation": 4}, "Bearer key")]
    assert "devices 0, 1 serve, as generation 5, after 2.5 s" in done.output
    assert "3.0 MiB from others" in done.output and "KV slots: 100 before, 90 after" in done.output


def test_what_was_measured_is_shown_even_if_nothing_is_to_do(server):
    measured = [
        {"id": 0, "bytes_per_s": 2_500_000_000},
        {"id": 1, "memory_bytes": None},
        {"id": 2, "memory_bytes": 1 << 20},
    ]
    server.answer = 200, {"changed": False, "generation": 4, "devices": [0, 1], "measured": measured}
    done = run(server, "rebalance", "--by", "speed")
    assert "nothing to do: devices 0, 1 serve, as generation 4" in done.output
    assert "device 0: reads 2.50 GB/s" in done.output and "device 1: shares the host's memory" in done.output
    assert "device 2: 1.0 MiB for weights and KV" in done.output


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"ok": False, "detail": "a change of devices is under way"}, "a change of devices is under way (HTTP 409)"),
        (
            {"type": "error", "error": {"type": "overloaded_error", "message": "all is lost", "code": 409}},
            "all is lost",
        ),
        ({"error": "Unauthorized"}, "Unauthorized (HTTP 409)"),
    ],
)
@pytest.mark.parametrize("command", [("drain", "--device", "1"), ("pause",), ("continue",)])
def test_a_refusal_is_the_servers_own_words_and_exit_code_1(server, command, answer, said):
    server.answer = 409, answer
    done = run(server, *command)
    assert done.exit_code == 1 and said in done.output and "{" not in done.output


def test_pause_and_continue_are_sglangs_own_routes(server):
    server.answer = 200, {"status": "ok"}
    assert "anchortp continue" in run(server, "pause").output
    assert run(server, "continue").exit_code == 0
    assert [asked[:2] for asked in server.asked] == [
        ("/pause_generation", {"mode": "in_place"}),
        ("/continue_generation", {}),
    ]


@pytest.mark.parametrize("command", [("rejoin", "--device", "1"), ("pause",)])
def test_without_a_server_the_exit_code_is_2(command):
    done = CliRunner().invoke(app, [*command, "--url", f"http://127.0.0.1:{free_port()}"])
    assert done.exit_code == 2 and "no server at" in done.output


@pytest.mark.parametrize("arguments", [("resize",), ("resize", "--devices", "0,x"), ("rebalance",), ("drain",)])
def test_a_wrong_command_line_asks_nobody(server, arguments):
    assert run(server, *arguments).exit_code == 2 and server.asked == []
