"""The series anchortp_*, as SGLang's /metrics shows them: from the files of prometheus_client's multiprocess mode."""

import asyncio
import json
import re
import shutil
import struct
import subprocess
import sys

import pytest
import yaml
from places import ROOT
from prometheus_rules import problems, value

from anchortp_sglang.http import metrics

SERVER = """
import sys
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from timeline_cases import STATUS
from anchortp_sglang.http.metrics import Metrics
from anchortp_sglang.recovery.report.record import Recoveries

metrics, recoveries = Metrics(), Recoveries()
recoveries.on_finished.append(metrics.observe)
metrics.refresh(STATUS, recoveries.totals())
for cause, tfs_s in (("process", 0.3), ("device", 0.6), ("process", None)):
    recovery = recoveries.begin()
    recovery.cause, recovery.tfs_s = cause, tfs_s
    recovery.stages = [("reaped", 0.05), ("detected", 0.0), ("planned", 0.07)]
    recovery.bytes_moved = {"reload": 100, "copy": 7}
    recovery.requests_replayed, recovery.tokens = 8, lambda: (30, 5)
    recovery.failed = None if tfs_s else "too few devices"
    recoveries.finish(recovery)
for _ in range(3):  # scraped again and again
    metrics.refresh(STATUS | {"run_dir": {"lost": "its parent is gone"}, "suspects": 2}, recoveries.totals())
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
sys.stdout.write(generate_latest(registry).decode())
"""


@pytest.fixture(scope="module")
def exposed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    env = {"PROMETHEUS_MULTIPROC_DIR": str(folder), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/unit'}"}
    done = subprocess.run([sys.executable, "-c", SERVER], env=env, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_series_follow_the_conventions(exposed):
    assert problems(exposed) == []


@pytest.mark.parametrize(
    "text",
    [
        "# HELP a_total Things.\n# TYPE a_total gauge\na_total 1\n",
        "# TYPE a gauge\na 1\n",
        "# HELP a_ms Time.\n# TYPE a_ms gauge\na_ms 1\n",
        '# HELP a Things.\n# TYPE a gauge\na{pid="3"} 1\n',
        "# HELP a Things.\n# TYPE a gauge\na 1\na 1\n",
        '# HELP a_seconds Time.\n# TYPE a_seconds histogram\na_seconds_bucket{le="1"} 3\n'
        'a_seconds_bucket{le="+Inf"} 2\na_seconds_count 2\na_seconds_sum 1\n',
    ],
    ids=["a gauge named total", "no help", "milliseconds", "a pid label", "twice", "falling buckets"],
)
def test_the_checker_sees_what_breaks_them(text):
    assert problems(text)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say(exposed):
    done = subprocess.run(["promtool", "check", "metrics"], input=exposed, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_values_are_those_of_the_recoveries_however_often_they_are_asked_for(exposed):
    assert value(exposed, "anchortp_recoveries_total", cause="process") == 2
    assert value(exposed, "anchortp_recoveries_total", cause="hang") == 0
    assert value(exposed, "anchortp_recoveries_failed_total") == 1
    assert value(exposed, "anchortp_bytes_moved_total", kind="reload") == 300
    assert value(exposed, "anchortp_requests_replayed_total") == 24
    assert value(exposed, "anchortp_tokens_recomputed_total") == 15
    assert value(exposed, "anchortp_generation") == 3
    assert value(exposed, "anchortp_devices", state="serving") == 3
    assert value(exposed, "anchortp_devices", state="lost") == 1
    assert value(exposed, "anchortp_server_state", state="degraded") == 1
    assert value(exposed, "anchortp_server_state", state="down") == 0
    assert value(exposed, "anchortp_mirror_lag_tokens") == 20
    assert value(exposed, "anchortp_run_dir_lost") == 1
    assert value(exposed, "anchortp_suspect_requests") == 2
    assert value(exposed, "anchortp_requests_ended_total", reason="unservable") == 3
    assert value(exposed, "anchortp_tfs_seconds_count") == 2
    assert value(exposed, "anchortp_tfs_seconds_sum") == pytest.approx(0.9)
    assert value(exposed, "anchortp_recovery_stage_seconds_sum", stage="planned") == pytest.approx(0.06)


def names_in(expressions):
    found = {name for text in expressions for name in re.findall(r"anchortp_\w+", text)}
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in found}


def exposed_names(exposed):
    return {line.split()[2] for line in exposed.splitlines() if line.startswith("# TYPE")}


OF_INGRESSES = {"anchortp_fleet_move_seconds", "anchortp_fleet_requests"}


@pytest.mark.parametrize("file", ["grafana-dashboard.json", "fleet-dashboard.json"])
def test_the_dashboards_ask_for_series_that_exist(exposed, file):
    board = json.loads((ROOT / "launch" / file).read_text())
    asked = names_in(target["expr"] for panel in board["panels"] for target in panel.get("targets", []))
    assert asked and asked <= exposed_names(exposed) | OF_INGRESSES
    source = (ROOT / "anchortp_sglang/fleet/ingress.py").read_text()
    assert all(f'"{name}"' in source for name in asked & OF_INGRESSES)
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len(places), "panels lie on one another"
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in board["panels"])


def test_the_alerts_ask_for_series_that_exist_and_say_what_to_do(exposed):
    rules = yaml.safe_load((ROOT / "launch/prometheus-alerts.yml").read_text())["groups"][0]["rules"]
    assert names_in(rule["expr"] for rule in rules) <= exposed_names(exposed)
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"].keys() == {"summary", "description"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_the_alerts():
    done = subprocess.run(
        ["promtool", "check", "rules", str(ROOT / "launch/prometheus-alerts.yml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_file_that_a_process_has_just_begun_is_waited_for(tmp_path, monkeypatch):
    from prometheus_client import CollectorRegistry, make_asgi_app, multiprocess

    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(tmp_path))
    app, scope = make_asgi_app(registry), {"type": "http", "method": "GET", "path": "/", "headers": []}
    begun, sent, tries = tmp_path / "counter_1.db", [], []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    async def answer():
        tries.append(None)
        if len(tries) == 3:
            begun.write_bytes(bytes(1 << 16))  # as the process does next
        await app(scope | {"query_string": b""}, receive, send)

    begun.write_bytes(b"")
    asyncio.run(metrics.scrape(answer))
    assert len(tries) == 3 and [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 200

    begun.write_bytes(b"")
    monkeypatch.setattr(metrics, "_SCRAPE_TIMEOUT_S", 0.05)
    with pytest.raises(struct.error):
        asyncio.run(metrics.scrape(answer))
