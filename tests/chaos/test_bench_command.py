"""``anchortp bench`` on real servers, cut short."""

import json
import subprocess
import sys

SIDE = {"tfs_s", "ttp_s", "pause_s", "failed_requests", "wrong_tokens", "throughput_before", "throughput_after"}


def bench(*arguments):
    command = [sys.executable, "-m", "anchortp_sglang.cli", "bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr
    return done


def test_a_killed_rank_under_arriving_clients_costs_them_no_token(tmp_path):
    record, plot = tmp_path / "record.json", tmp_path / "plot.svg"
    short = ("--faults", "process", "--before", "4", "--after", "21")
    done = bench("recovery", "--sides", "ours", *short, "--json", "--record", str(record), "--plot", str(plot))
    report = json.loads(done.stdout)
    assert report.keys() == {"ours"} and report["ours"].keys() == SIDE
    (tfs_s,) = report["ours"]["tfs_s"]
    assert 0 < tfs_s < 10
    assert (report["ours"]["failed_requests"], report["ours"]["wrong_tokens"]) == (0, 0)
    (run,) = json.loads(record.read_text())["sides"]["ours"]["runs"]
    assert run["requests"] > 20 and run["pauses_s"]
    assert plot.read_text().startswith("<svg")
    assert "ours: fault 1 of 1 (process): tokens again after" in done.stderr
