"""``anchortp bench`` on real servers, cut short."""

import json
import subprocess
import sys

import pytest

SIDE = {"tfs_s", "ttp_s", "pause_s", "failed_requests", "wrong_tokens", "throughput_before", "throughput_after"}


def bench(*arguments, timeout_s=290):
    command = [sys.executable, "-m", "anchortp_sglang.cli", "bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.timeout(600)
def test_a_killed_rank_under_arriving_clients_costs_ours_no_token_and_stock_its_streams(tmp_path):
    record, plot = tmp_path / "record.json", tmp_path / "plot.svg"
    short = ("--faults", "process", "--before", "4", "--after", "21")
    done = bench("recovery", *short, "--json", "--record", str(record), "--plot", str(plot), timeout_s=590)
    report = json.loads(done.stdout)
    assert report.keys() == {"ours", "stock", "ratios"}
    assert report["ours"].keys() == report["stock"].keys() == SIDE
    (tfs_s,) = report["ours"]["tfs_s"]
    assert 0 < tfs_s < 10 and report["ratios"]["tfs"] > 5
    assert (report["ours"]["failed_requests"], report["ours"]["wrong_tokens"]) == (0, 0)
    assert report["stock"]["failed_requests"] > 0
    sides = json.loads(record.read_text())["sides"]
    (run,) = sides["ours"]["runs"]
    assert run["requests"] > 20 and run["pauses_s"]
    assert sides["ours"]["memory_bytes"] < sides["stock"]["memory_bytes"]
    assert plot.read_text().startswith("<svg")
    assert "ours: fault 1 of 1 (process): tokens again after" in done.stderr


def test_both_sides_are_loaded_in_turn_when_nothing_fails(tmp_path):
    record = tmp_path / "rounds.json"
    done = bench("overhead", "--rounds", "1", "--clients", "4", "--json", "--record", str(record))
    assert json.loads(done.stdout).keys() == {"throughput", "ttft_s", "itl_s"}
    rounds = json.loads(record.read_text())
    assert [each["side"] for each in rounds] == ["stock", "ours", "ours", "stock"]
    assert all(each["throughput"] > 10 for each in rounds)
