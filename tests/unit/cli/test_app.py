"""The command ``anchortp``, against a small real HTTP server."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import interpreter
import pytest
from timeline_cases import LOSS
from typer.testing import CliRunner

from anchortp_sglang.cli import doctor
from anchortp_sglang.cli.app import app
from anchortp_sglang.views import status

LOST = {"state": "lost", "rank": None, "rank_pid": None, "anchor_pid": None, "weight_bytes": 0, "kv_bytes": 0}
HELD = {
    "state": "serving",
    "rank": 0,
    "rank_pid": 11,
    "anchor_pid": 21,
    "weight_bytes": 3 << 19,
    "kv_bytes": 0,
}
STATUS = {
    "state": "degraded",
    "generation": 3,
    "tp_size": 3,
    "kv_capacity": {"slots": 900, "rotating": True, "device_bytes": 3 << 20, "slots_alike": 600, "slots_rotating": 900},
    "devices": [{"id": 0} | HELD, {"id": 1} | LOST],
    "kv": {
        "slots": 8192,
        "used": 4000,
        "mirror": {"rows": 8193, "mirrored": 3990, "lag_slots": 10, "coverage": 0.9975, "bytes": 3 << 20},
    },
    "recoveries": [
        {
            "generation": 2,
            "cause": "process",
            "device": 0,
            "reason": "rank died",
            "stages": [],
            "tfs_s": None,
        },
        {
            "generation": 3,
            "cause": "device",
            "device": 1,
            "reason": "anchor 1 and rank 1 died",
            "stages": [
                {"name": "detected", "at_s": 0.05},
                {"name": "fenced", "at_s": 0.1},
                {"name": "first token", "at_s": 1.1},
            ],
            "tfs_s": 1.1,
            "reload_bytes": 2048,
            "p2p_bytes": 0,
            "copied_bytes": 0,
            "kv": {"slots_kept": 3990, "slots_restored": 3990, "slots_dropped": 10},
            "requests_replayed": 8,
            "tokens_reused": 4000,
            "tokens_recomputed": 120,
        },
    ],
}


@pytest.fixture
def server():
    """Answers as ``answers`` says (path -> (code, body)); records what it was sent in ``seen``."""
    state = SimpleNamespace(answers={"/anchortp/status": (200, STATUS)}, seen=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            length = int(self.headers.get("Content-Length") or 0)
            state.seen.append((self.path, self.rfile.read(length), self.headers.get("Authorization")))
            code, body = state.answers.get(self.path, (404, {"detail": "Not Found"}))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        do_POST = do_GET

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    state.url = f"http://127.0.0.1:{http.server_port}"
    yield state
    http.shutdown()
    http.server_close()


def run(*arguments, **env):
    return CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1", **env}).invoke(app, list(arguments))


def test_status_shows_devices_and_recoveries(server):
    done = run("status", "--url", server.url)
    assert done.exit_code == 0
    for told in (
        "degraded",
        "generation 3",
        "KV 900 slots, heads rotate over the layers; in the 3.0 MiB of the fullest device 600 if they did not",
        "lost",
        "1.5 MiB",
        "1.10 s",
        "2.0 KiB read",
        "4000/120",
        "3990 kept, 3990 restored, 10 dropped",
        "4000 of 8192 slots used",
        "3990 slots (99.8% of what is used), 10 behind, 3.0 MiB",
        "fenced 0.10",
    ):
        assert told in done.output


def test_status_as_json_is_the_servers_own(server):
    done = run("status", "--json", "--url", server.url + "/")
    assert json.loads(done.stdout) == STATUS


def test_the_api_key_is_sent_from_option_or_environment(server):
    run("status", "--url", server.url, "--api-key", "one")
    run("status", "--url", server.url, ANCHORTP_API_KEY="two")
    assert [key for _, _, key in server.seen] == ["Bearer one", "Bearer two"]


def test_a_proxy_in_the_environment_is_not_asked_about_the_server(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert run("status", "--url", server.url).exit_code == 0


def test_timeline_draws_the_last_recovery_in_order(server):
    done = run("timeline", "--url", server.url)
    bars = [line for line in done.output.splitlines() if "█" in line]
    assert [line.split()[0] for line in bars] == ["detected", "fenced", "first"]
    assert bars[2].count("█") > 10 * bars[0].count("█")
    starts = [line.index("█") for line in bars]
    assert starts == sorted(starts)
    assert "1.000 s" in bars[2]
    assert "1.100 s" in bars[2]


def test_timeline_has_the_stages_of_each_device_and_what_moved(server):
    server.answers["/anchortp/status"] = (200, {"recoveries": [LOSS]})
    lines = [line.split() for line in run("timeline", "--url", server.url).output.splitlines()]
    devices = [line[:2] + line[-1:] for line in lines if line[:1] == ["device"]]
    assert devices == [["device", "0", "0"], ["device", "1", "1"], ["device", "2", "lost"], ["device", "3", "2"]]
    assert sum(line[0] == "bytes_moved" for line in lines if line) == 3
    assert "weights: 11.0 MiB read, 3.0 MiB copied" in run("timeline", "--url", server.url).output


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("--plot", "curve.gif"), "pictures are .png or .svg, not .gif"),
        (("--record", "/nowhere/at/all.json"), "there is no folder /nowhere/at"),
    ],
)
def test_a_bench_whose_figures_have_nowhere_to_go_does_not_begin(arguments, told):
    done = run("bench", "recovery", *arguments)
    assert done.exit_code == 2 and told in done.stderr
    assert "checkpoint" not in done.stderr


def test_timeline_without_a_recovery_says_so(server):
    server.answers["/anchortp/status"] = (200, STATUS | {"recoveries": []})
    assert "no recoveries so far" in run("timeline", "--url", server.url).output
    assert json.loads(run("timeline", "--json", "--url", server.url).stdout) is None


@pytest.mark.parametrize(
    ("answer", "exit_code"),
    [
        ((200, {"ok": True, "verified": True, "detail": "pid 12 is gone"}), 0),
        ((200, {"ok": True, "verified": False, "detail": "pid 12 still runs"}), 1),
        (
            (
                403,
                {"ok": False, "verified": False, "detail": "start the server with --anchor-allow-injection"},
            ),
            1,
        ),
        ((409, {"detail": "device 2 is lost already"}), 1),
    ],
)
def test_inject_succeeds_only_if_the_fault_is_seen_to_take_effect(server, answer, exit_code):
    server.answers["/anchortp/inject"] = answer
    done = run("inject", "--device", "2", "--kind", "hang", "--url", server.url)
    assert done.exit_code == exit_code
    assert answer[1]["detail"] in done.output
    assert json.loads(server.seen[0][1]) == {"device": 2, "kind": "hang"}
    as_json = run("inject", "--device", "2", "--kind", "hang", "--json", "--url", server.url)
    assert as_json.exit_code == exit_code
    assert answer[1]["detail"] in json.loads(as_json.stdout)["detail"]


@pytest.mark.parametrize("arguments", [["--device", "-1", "--kind", "hang"], ["--device", "1", "--kind", "fire"]])
def test_inject_refuses_what_is_no_fault(arguments):
    assert run("inject", *arguments).exit_code == 2


@pytest.mark.parametrize("command", [["status"], ["timeline"], ["inject", "--device", "0", "--kind", "process"]])
def test_no_server_is_exit_code_two_and_says_where(command):
    done = run(*command, "--url", "http://127.0.0.1:1")
    assert done.exit_code == 2
    assert "no server at http://127.0.0.1:1" in done.output


def test_a_server_that_is_not_ours_is_told_apart(server):
    server.answers.clear()
    done = run("status", "--url", server.url)
    assert (done.exit_code, "is not an anchortp server" in done.output) == (2, True)
    server.answers["/anchortp/status"] = (200, b"<html>")
    assert run("status", "--url", server.url).exit_code == 2
    server.answers["/anchortp/status"] = (200, [1])
    assert run("status", "--url", server.url).exit_code == 2
    assert run("status", "--url", "nonsense").exit_code == 2
    server.answers["/anchortp/status"] = (401, {"error": "Unauthorized"})
    done = run("status", "--url", server.url)
    assert (done.exit_code, "Unauthorized (HTTP 401)" in done.output) == (1, True)


def test_a_status_with_holes_is_still_drawn(server):
    server.answers["/anchortp/status"] = (
        200,
        {"state": "starting", "devices": [{"id": 0}], "recoveries": [{}]},
    )
    assert run("status", "--url", server.url).exit_code == 0
    assert run("timeline", "--url", server.url).exit_code == 0


def test_sizes_are_told_in_binary_units():
    sizes = [0, 1023, 1024, 5 << 20, 3 << 30, 2048 << 40]
    assert [status.byte_size(size) for size in sizes] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 MiB",
        "3.0 GiB",
        "2048.0 TiB",
    ]


def test_doctor_passes_here_and_fails_on_a_broken_check(monkeypatch):
    done = run("doctor", "--json")
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.exit_code == int(any(check["level"] == "FAIL" for check in found.values()))
    assert all(found[name]["level"] == "PASS" for name in ("Python", "SGLang", "memfd", "pidfd", "ZeroMQ"))

    def breaks():
        raise OSError("Function not implemented")

    monkeypatch.setattr(doctor, "check_pidfd", breaks)
    done = run("doctor")
    assert done.exit_code == 1
    assert "Function not implemented" in done.output


def test_doctor_says_what_it_means_that_descriptors_cannot_be_taken():
    out = interpreter.run(
        """
        from anchortp_sglang.cli import doctor
        from no_pidfd_getfd import forbid
        """,
        """
        forbid()
        print(doctor.check_pidfd())
        doctor.check_handle_passing = lambda: doctor.Check("handle passing", "FAIL", "")
        print(doctor.check_pidfd())
        """,
    )
    second_way, none = out.splitlines()
    assert "level='WARN'" in second_way and "is handed over by its rank instead" in second_way
    assert "level='FAIL'" in none and "pidfd_getfd: Operation not permitted" in none


def test_doctor_tries_the_run_directory_and_leaves_nothing_in_it(tmp_path):
    assert doctor.check_run_dir(tmp_path / "new").level == "PASS"
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    refused = doctor.check_run_dir(tmp_path / "file")
    assert refused.level == "FAIL"
    assert str(tmp_path / "file") in refused.detail


def test_doctor_names_drift_and_another_version(monkeypatch):
    monkeypatch.setattr(doctor.manifest, "installed_drift", lambda: [doctor.manifest.Drift("a.b", "changed")])
    monkeypatch.setattr(doctor.manifest, "installed_version", lambda: "0.6.0")
    assert "a.b: changed" in doctor.check_hooks().detail
    assert doctor.check_sglang().way_out == "pip install sglang==0.5.23"


def test_the_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "anchortp_sglang.cli", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "inject" in done.stdout


FLEET = {
    "fleet": True,
    "servers": [
        {
            "name": "a1",
            "url": "http://10.0.0.1:20001",
            "node": "n1",
            "up": True,
            "status": STATUS | {"open_requests": 7},
        },
        {"name": "b2", "url": "http://10.0.0.2:20002", "node": "n2", "up": False, "error": "ClientError: refused"},
    ],
    "ingress": {"open": 3, "served": 40, "failed": 1, "moved": 5, "longest_pause_s": 0.41},
    "serve": {
        "status": "RUNNING",
        "deployments": {"Server": {"status": "UPDATING", "replicas": {"RUNNING": 1, "STARTING": 1}, "message": "why"}},
    },
}


def test_status_of_a_fleet_shows_every_server_and_what_the_ingress_has_moved(server):
    server.answers["/anchortp/status"] = (200, FLEET)
    done = CliRunner().invoke(app, ["status", "--fleet", "--url", server.url], env={"COLUMNS": "160"})
    assert done.exit_code == 0
    for said in ("fleet: RUNNING", "1 running, 1 starting: why", "degraded", "3/2", "lost: ClientError", "5 moves"):
        assert said in done.output, said


def test_status_of_a_fleet_at_one_server_says_that_it_is_none(server):
    done = CliRunner().invoke(app, ["status", "--fleet", "--url", server.url])
    assert done.exit_code == 1 and "is one server" in done.output
