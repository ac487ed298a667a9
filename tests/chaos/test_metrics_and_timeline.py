"""What a server has open, and what a recovery leaves on /metrics and on the page."""

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import browser
import pytest
from faults import kill_rank, lose_device, recovered
from histories import prompt, request, until
from openings import disagreements, documented, openings
from prometheus_client.parser import text_string_to_metric_families

from anchortp_sglang.testing.streams import Streams

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests/unit"))
from prometheus_rules import only, problems, value  # noqa: E402

REQUESTS = [request(prompt(4000 + seed, 30), 120) for seed in range(4)]
RANK_STAGES = {"attached", "groups_ready", "bytes_moved", "weights_bound", "bound"}


@pytest.fixture(scope="module")
def observed(launch):
    with launch(3, "--enable-metrics", "--enable-metrics-for-all-schedulers") as server:
        yield server


def get(server, path):
    with urllib.request.urlopen(server.url + path, timeout=30) as answer:
        return answer.read().decode()


def under_load(server, fault, cause):
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(20)
        recovered(server, fault(server), cause)
    until(lambda: server.status()["recoveries"][-1]["tfs_s"] is not None, "no token after the fault")
    return server.status()["recoveries"][-1]


def test_every_new_rank_reports_its_stages_in_order(observed):
    record = under_load(observed, lambda server: kill_rank(server, 1), "process")
    assert [rank["device"] for rank in record["ranks"]] == [0, 1, 2]
    planned = next(stage["at_s"] for stage in record["stages"] if stage["name"] == "planned")
    for rank in record["ranks"]:
        at = {stage["name"]: stage["at_s"] for stage in rank["stages"]}
        assert at.keys() == RANK_STAGES | {"kv_kept", "prefixes_rebuilt"}
        assert planned <= at["attached"] <= at["groups_ready"] <= at["weights_bound"] <= at["bound"] <= record["tfs_s"]


def test_what_it_has_open_is_what_the_docs_list_and_as_private(observed):
    """After a recovery, with the next one's ranks forked ahead."""
    rows = documented(ROOT / "docs/operations.md")
    assert len(rows) > 5
    until(
        lambda: not disagreements(rows, openings(observed)),
        lambda: "\n".join(disagreements(rows, openings(observed))),
    )


def test_the_metrics_tell_of_it_once_and_by_the_conventions(observed):
    text = get(observed, "/metrics")
    ours = only(text, "anchortp_")
    assert problems(ours) == []
    assert "sglang:num_running_reqs" in text, "the ranks' own series are there as well"
    status = observed.status()
    record = status["recoveries"][-1]
    assert value(ours, "anchortp_recoveries_total", cause="process") == len(status["recoveries"])
    assert value(ours, "anchortp_generation") == status["generation"]
    assert value(ours, "anchortp_devices", state="serving") == 3
    assert value(ours, "anchortp_requests_replayed_total") == record["requests_replayed"]
    assert value(ours, "anchortp_tokens_reused_total") == record["tokens_reused"]
    assert value(ours, "anchortp_tfs_seconds_sum") == pytest.approx(record["tfs_s"], abs=1e-3)
    assert value(get(observed, "/metrics/"), "anchortp_generation") == status["generation"]


def gauges_of_rank(text, rank):
    families = text_string_to_metric_families(text)
    samples = [sample for family in families if family.type == "gauge" for sample in family.samples]
    return {sample.name for sample in samples if sample.labels.get("tp_rank") == str(rank)}


def counts(text):
    families = [family for family in text_string_to_metric_families(text) if family.type in ("counter", "histogram")]
    samples = [sample for family in families for sample in family.samples]
    return {(sample.name, *sorted(sample.labels.items())): sample.value for sample in samples}


def test_gauges_are_of_living_ranks_and_counts_never_fall(observed):
    before = get(observed, "/metrics")
    assert all(gauges_of_rank(before, rank) for rank in range(3))
    under_load(observed, lambda server: kill_rank(server, 1), "process")
    after = counts(get(observed, "/metrics"))
    assert {name: value for name, value in counts(before).items() if after.get(name, -1) < value} == {}
    assert any(name[0].startswith("sglang:") and dict(name[1:]).get("tp_rank") == "1" for name in after)


def test_a_lost_device_shows_up_in_the_metrics(observed):
    assert gauges_of_rank(get(observed, "/metrics"), 2)
    record = under_load(observed, lambda server: lose_device(server, 2), "device")
    # The standby for three devices is killed a second after the recovery.
    until(lambda: not gauges_of_rank(get(observed, "/metrics"), 2), "there is no rank 2 any more", 10)
    text = get(observed, "/metrics")
    assert gauges_of_rank(text, 1)
    ours = only(text, "anchortp_")
    assert value(ours, "anchortp_devices", state="lost") == 1
    assert value(ours, "anchortp_recoveries_total", cause="device") == 1
    assert value(ours, "anchortp_bytes_moved_total", kind="reload") == record["reload_bytes"] > 0
    assert all(rank["moved_bytes"] > 0 for rank in record["ranks"])


def test_the_page_shows_the_recoveries_without_a_browser(observed):
    html = get(observed, "/anchortp/timeline")
    for told in ("device 2 lost, on with TP=2", "rank on device 1 died", "groups ready", "degraded"):
        assert told in html
    part = get(observed, "/anchortp/timeline?part=main")
    assert "<html" not in part and "device 2 lost" in part


def test_the_command_line_draws_the_same_recoveries(observed, tmp_path):
    command = [sys.executable, "-m", "anchortp_sglang.cli", "timeline", "--url", observed.url, "--last", "2"]
    for name, magic in (("out.png", b"\x89PNG"), ("out.svg", b"<svg")):
        done = subprocess.run([*command, "--plot", str(tmp_path / name)], capture_output=True, text=True, check=True)
        assert (tmp_path / name).read_bytes().startswith(magic)
        assert "prefixes_rebuilt" in done.stdout


@pytest.mark.skipif(bool(browser.MISSING), reason=f"not installed: {', '.join(browser.MISSING)}")
def test_a_browser_shows_the_page_and_sees_the_next_recovery_by_itself(observed, tmp_path):
    shots = Path(os.environ.get("ANCHORTP_SCREENSHOTS", tmp_path))
    with browser.browser() as window:
        for width, dark in ((1200, False), (1200, True), (390, False)):
            window.dark(dark)
            window.open(f"{observed.url}/anchortp/timeline", width, 1500)
            until(lambda: window.ask("document.getElementById('live').textContent") == "live", "the page is not live")
            assert window.ask("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
            assert window.ask("document.querySelectorAll('.recovery .bar').length") > 20
            assert window.ask("performance.getEntriesByType('resource').every(r => r.name.includes('part=main'))")
            window.screenshot(shots / f"timeline-{width}{'-dark' if dark else ''}.png")
        before = window.ask("document.querySelectorAll('.recovery').length")
        window.ask("document.querySelector('details').open = true")
        under_load(observed, lambda server: kill_rank(server, 0), "process")
        until(lambda: window.ask("document.querySelectorAll('.recovery').length") == before + 1, "no news on the page")
        assert window.ask("document.querySelectorAll('details[open]').length") == 1, "what was open stays open"
        assert window.errors() == []
