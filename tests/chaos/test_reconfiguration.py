"""Devices that leave and join on purpose: open streams go on, and until the moment of change nothing has happened."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error

import psutil
import pytest
from faults import kill, kill_rank, lose_device, recovered
from histories import Unbroken, assert_exactly_once, assert_identical, outcomes, prompt, request, stands_still, until

from anchortp_sglang.cli import client
from anchortp_sglang.testing.process_tree import is_gone
from anchortp_sglang.testing.streams import Streams

REQUESTS = [request(prompt(4100 + seed, 40), 200) for seed in range(4)]
CHANGES = int(os.environ.get("ANCHORTP_CHANGES", "2"))


@pytest.fixture(scope="module")
def elastic(launch):
    with launch(4, "--anchor-min-devices", "2", "--anchor-start-devices", "1,0,3") as server:
        yield server, Unbroken(server)


@pytest.fixture
def server(elastic):
    """A server whose four devices serve, before a test and after it."""
    server, _ = elastic
    change(server, devices=[0, 1, 2, 3])
    yield server
    server.wait_serving(0)
    change(server, devices=[0, 1, 2, 3])
    assert states(server) == ["serving"] * 4


@pytest.fixture
def unbroken(elastic):
    return elastic[1]


def change(server, **body):
    return server.post("/anchortp/reconfigure", body)


def refusal(server, **body):
    with pytest.raises(urllib.error.HTTPError) as refused:
        change(server, **body)
    return refused.value.code, json.load(refused.value)["detail"]


def states(server):
    return [device["state"] for device in server.status()["devices"]]


def rank_pids(server):
    return [device["rank_pid"] for device in server.status()["devices"]]


def check(expected, streams):
    assert_identical(expected, outcomes(streams.histories))
    for history in streams.histories:
        assert_exactly_once(history)


def standbys(server):
    """The pids of rank 1 of what stands by, or is built to."""
    found = set()
    for child in psutil.Process(server.pid).children(recursive=True):
        try:
            if "anchortp::standby_TP1" in " ".join(child.cmdline()):
                found.add(child.pid)
        except psutil.Error:
            continue
    return found


def standing_by(server):
    """The same, once the usual standby is complete: what appears afterwards is built for a change of devices."""
    until(lambda: server.status()["standby"] == "ready", "no standby stands by", 60)
    return standbys(server)


@contextlib.contextmanager
def slowed(pid):
    """Lets a process run for a tenth of the time."""
    over = threading.Event()

    def slow():
        with contextlib.suppress(ProcessLookupError):
            while not over.is_set():
                os.kill(pid, signal.SIGSTOP)
                over.wait(0.027)
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.003)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Change:
    """A change that another thread asks for. ``built``: the pid of a rank of its generation, while that is built."""

    def __init__(self, server, **body):
        before = standing_by(server)
        self._answers = []
        self._thread = threading.Thread(target=self._ask, args=(server, body))
        self._thread.start()
        self.built = until(lambda: next(iter(standbys(server) - before), None), "nothing is built", 60)

    def _ask(self, server, body):
        try:
            self._answers.append(change(server, **body))
        except urllib.error.HTTPError as error:
            self._answers.append((error.code, json.load(error)["detail"]))

    def answer(self):
        """The answer, or the code and the text of the refusal."""
        self._thread.join(60)
        return self._answers[0]


def test_a_server_that_was_started_with_fewer_devices_grows(elastic):
    server, unbroken = elastic
    assert states(server) == ["serving", "serving", "drained", "serving"]
    expected = unbroken(REQUESTS)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(10)
        assert change(server, rejoin=[2])["devices"] == [0, 1, 2, 3]
    check(expected, streams)


def test_streams_go_on_when_a_device_is_drained_and_taken_back(server, unbroken):
    expected = unbroken(REQUESTS)
    before = server.status()
    anchor = before["devices"][2]["anchor_pid"]
    dry = change(server, drain=[2], dry_run=True)
    assert not dry["changed"] and server.status()["generation"] == before["generation"]
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(10)
        drained = change(server, drain=[2], generation=before["generation"])
        assert (drained["devices"], drained["plan"]) == ([0, 1, 3], dry["plan"])
        until(lambda: is_gone(anchor), "the anchor of a drained device is still there", 10)
        status = server.status()
        assert states(server) == ["serving", "serving", "drained", "serving"]
        assert status["state"] == "degraded" and status["generation"] == drained["generation"]
        for asked in ({}, {"generation": before["generation"]}):  # the answer may have been lost
            again = change(server, drain=[2], **asked)
            assert (again["changed"], again["generation"]) == (False, drained["generation"])
        assert refusal(server, rejoin=[2], generation=before["generation"])[0] == 409
        back = change(server, rejoin=[2])
        assert states(server) == ["serving"] * 4
    check(expected, streams)
    for answer, record in zip((drained, back), server.status()["recoveries"][-2:], strict=True):
        assert (record["cause"], record["device"], record["lost"]) == ("planned", -1, [])
        assert record["generation"] == answer["generation"]
        assert record["kv"]["slots_kept"] and not record["kv"]["slots_dropped"] and not record["kv"]["slots_restored"]
        assert record["tokens_recomputed"] <= 2 * len(REQUESTS)  # the step in flight, and the last token
        assert record["reload_bytes"] == 0 and record["p2p_bytes"] > 0
        assert "weights_bound" not in {stage["name"] for rank in record["ranks"] for stage in rank["stages"]}
        plan = answer["plan"]
        assert plan["least_bytes"] <= plan["moved_bytes"] <= 1.3 * plan["least_bytes"]
        assert 0 < plan["least_s"] < answer["seconds"]


def test_the_prefix_cache_is_as_it_was_after_a_change(server):
    text = request(prompt(4200, 300), 4)
    first = server.post("/generate", text)["meta_info"]
    cached = [server.post("/generate", text)["meta_info"]["cached_tokens"]]
    for devices in ([0, 1, 3], [0, 3], [0, 1, 2, 3]):
        change(server, devices=devices)
        cached.append(server.post("/generate", text)["meta_info"]["cached_tokens"])
    assert first["cached_tokens"] < cached[0] == min(cached) == max(cached)


@pytest.mark.parametrize(
    "body, code, text",
    [
        ({}, 400, "give one of devices, drain and rejoin"),
        ({"widths": [2, 1, 1]}, 400, "give a width of at least 1 to each of 4 devices"),
        ({"devices": [0, 1, 2], "widths": [2, 2, 1]}, 400, "widths 2,2,1 do not add up to the 4 KV heads"),
        ({"drain": []}, 400, "give one of"),
        ({"drain": [1], "rejoin": [2]}, 400, "give one of"),
        ({"drain": [1], "rebalance": "speed"}, 400, "give it alone"),
        ({"rebalance": "fairness"}, 400, "Invalid enum value"),
        ({"drain": ["1"]}, 400, "Expected `int`"),
        ({"drain": [1], "force": True}, 400, "unknown field"),
        ({"rejoin": [7]}, 400, r"devices [7] are none of [0, 1, 2, 3]"),
        ({"devices": [0, -1]}, 400, r"devices [-1] are none of"),
        ({"devices": [3]}, 400, "1 devices are fewer than --anchor-min-devices 2"),
        ({"drain": [0, 1, 2, 3]}, 400, "0 devices are fewer"),
        ({"drain": [0], "generation": 10**6}, 409, "serves, not 1000000"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(server, body, code, text):
    before = server.status()
    found = refusal(server, **body)
    assert found[0] == code and text in found[1], found
    after = server.status()
    assert (after["generation"], after["devices"]) == (before["generation"], before["devices"])


def test_shares_follow_new_widths_and_become_equal_again_when_a_device_joins(server, unbroken):
    expected = unbroken(REQUESTS)
    heads = [device["kv_bytes"] for device in server.status()["devices"]]
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(10)
        change(server, devices=[0, 1, 2], widths=[1, 2, 1])
        now = [device["kv_bytes"] for device in server.status()["devices"]]
        assert now == [heads[0], 2 * heads[1], heads[2], 0]
        change(server, widths=[2, 1, 1])
        now = [device["kv_bytes"] for device in server.status()["devices"]]
        assert now == [2 * heads[0], heads[1], heads[2], 0]
        assert not change(server, widths=[2, 1, 1])["changed"]
        change(server, rejoin=[3])
    check(expected, streams)
    assert [device["kv_bytes"] for device in server.status()["devices"]] == heads


def test_a_slow_device_is_given_less_and_no_token_differs(server, unbroken):
    expected = unbroken(REQUESTS)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(10)
        change(server, devices=[0, 1, 2], widths=[1, 2, 1])
        before = server.status()["devices"]
        with slowed(before[1]["rank_pid"]):
            answer = change(server, rebalance="speed")
        speeds = {each["id"]: each["bytes_per_s"] for each in answer["measured"]}
        assert speeds[1] == min(speeds.values())
        after = server.status()["devices"]
        assert answer["changed"] and after[1]["kv_bytes"] < before[1]["kv_bytes"]
        assert after[1]["weight_bytes"] < before[1]["weight_bytes"]
        assert not change(server, rebalance="memory", dry_run=True)["changed"]
    check(expected, streams)


def test_a_pause_outlives_a_change(server, unbroken):
    expected = unbroken(REQUESTS)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(10)
        client.tell(server.url, client.PAUSE)
        change(server, drain=[3])
        until(lambda: stands_still(streams), "tokens arrive")
        assert server.status()["paused"]
        client.tell(server.url, client.CONTINUE)
    check(expected, streams)


def test_an_operator_that_goes_away_leaves_the_serving_generation_as_it_is(server, unbroken):
    expected = unbroken(REQUESTS)
    before = rank_pids(server)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(10)
        others = standing_by(server)
        command = [sys.executable, "-m", "anchortp_sglang.cli", "drain", "--device", "1", "--url", server.url]
        drain = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        built = until(lambda: next(iter(standbys(server) - others), None), "nothing is built", 60)
        assert refusal(server, drain=[3])[1].startswith("a change of devices is under way")
        drain.send_signal(signal.SIGINT)
        said, _ = drain.communicate(timeout=20)
        assert drain.returncode not in (0, None) and b"Traceback" not in said, said
        until(lambda: states(server) == ["serving"] * 4, "the change is still under way")
        until(lambda: is_gone(built), "what was built is still there", 15)
    check(expected, streams)
    assert rank_pids(server) == before


@pytest.mark.parametrize(
    "kind, victim", [("drain", "rank"), ("drain", "built"), ("drain", "device"), ("rejoin", "device")]
)
def test_a_fault_while_the_next_generation_is_built_is_only_that_fault(server, unbroken, kind, victim):
    expected = unbroken(REQUESTS)
    if kind == "rejoin":
        change(server, drain=[1])
    before = rank_pids(server)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(10)
        asked = Change(server, **{kind: [1]})
        if victim == "built":
            kill(asked.built)
        elif victim == "rank":
            recovered(server, kill_rank(server, 0), "process")
        else:
            recovered(server, lose_device(server, 3), "device")
        code, text = asked.answer()
        assert code in (409, 503) and any(
            why in text for why in ("a fault came first", "could not be built", "died")
        ), text
        assert (rank_pids(server) == before) is (victim == "built")
    check(expected, streams)
    second = "drained" if kind == "rejoin" else "serving"
    assert states(server) == ["serving", second, "serving", "lost" if victim == "device" else "serving"]


def test_an_anchor_that_dies_before_its_device_has_joined_leaves_the_others_serving(server):
    change(server, drain=[2])
    before = rank_pids(server)
    rejoin = Change(server, rejoin=[2])
    kill(server.status()["devices"][2]["anchor_pid"])
    code, text = rejoin.answer()
    assert code in (409, 503), text
    assert rank_pids(server) == before and states(server)[2] == "drained"
    assert change(server, rejoin=[2])["changed"]


def test_ranks_that_die_as_they_take_over_leave_the_old_devices_serving(server, unbroken):
    expected = unbroken(REQUESTS)
    with server.log.open() as log:
        for _ in range(5):
            with Streams(server.url, REQUESTS) as streams:
                streams.wait_tokens(10)
                log.seek(0, os.SEEK_END)
                drain = Change(server, drain=[1])
                until(lambda: "recovery: forked after" in log.read(), "the new generation does not take over", 60, 0.0)
                kill(drain.built)
                answer = drain.answer()
                server.wait_serving(server.status()["generation"])
            check(expected, streams)
            if isinstance(answer, tuple):
                break
            change(server, rejoin=[1])  # it was ready before it died
    assert answer[0] == 409 and "a fault came in between" in answer[1], answer
    assert states(server) == ["serving"] * 4


def test_a_device_that_was_lost_comes_back_with_the_cache(server, unbroken):
    expected = unbroken(REQUESTS)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(10)
        recovered(server, lose_device(server, 0), "device")
        assert states(server)[0] == "lost"
        change(server, rejoin=[0])
        assert states(server) == ["serving"] * 4
    check(expected, streams)
    record = server.status()["recoveries"][-1]
    assert record["reload_bytes"] == 0 and record["kv"]["slots_dropped"] == 0


def test_without_a_warm_standby_a_server_grows_when_devices_appear_and_changes_on_order(launch, tmp_path):
    """A directory in the place of its socket keeps an anchor from starting."""
    obstacle = []

    def obstruct(server):
        obstacle.append(tmp_path / f"run-{server.port}" / "anchor-1.fds")
        obstacle[0].mkdir(mode=0o700, parents=True)
        obstacle[0].parent.chmod(0o700)

    arguments = ("--anchor-run-dir", str(tmp_path), "--anchor-start-devices", "available", "--anchor-rejoin", "auto")
    arguments += ("--anchor-standby", "cold", "--anchor-min-devices", "1")
    with launch(2, *arguments, before_start=obstruct) as server:
        alone = server.status()
        assert alone["state"] == "degraded" and states(server) == ["serving", "lost"]
        assert "anchor-1.fds" in alone["devices"][1]["reason"]
        obstacle[0].rmdir()
        with Streams(server.url, REQUESTS) as streams:
            pass
        until(lambda: states(server) == ["serving"] * 2, "it does not grow", 60, 0.1)
        assert server.status()["devices"][1]["reason"] == ""
        expected = Unbroken(server)(REQUESTS)
        check(expected, streams)
        with Streams(server.url, REQUESTS) as streams:
            streams.wait_tokens(10)
            change(server, drain=[0])
            assert states(server) == ["drained", "serving"]
            streams.wait_tokens(60)
            change(server, rejoin=[0])
            assert states(server) == ["serving"] * 2
        check(expected, streams)
        assert not standbys(server)
        with Streams(server.url, REQUESTS) as streams:
            streams.wait_tokens(10)
            recovered(server, lose_device(server, 1), "device")
            until(lambda: states(server) == ["serving"] * 2, "a lost device does not come back by itself", 60, 0.1)
        check(expected, streams)


def test_devices_come_and_go_while_ranks_and_devices_die(server, unbroken):
    expected = unbroken(REQUESTS)
    rng = random.Random(4300)
    widths = [3, 4, 2, 4]
    for number in range(CHANGES):
        with Streams(server.url, REQUESTS) as streams:
            streams.wait_tokens(10)
            devices = sorted(rng.sample(range(4), widths[number % len(widths)]))
            server.wait_serving(0)
            if number % 2:  # a rank dies at some moment of the change, which may have to be asked for again
                pidfd = os.pidfd_open(rng.choice(serving_pids(server)))
                dying = threading.Timer(rng.random(), signal.pidfd_send_signal, [pidfd, signal.SIGKILL])
                dying.start()
                with contextlib.suppress(urllib.error.HTTPError):
                    change(server, devices=devices)
                dying.join()
                os.close(pidfd)
                until(lambda: serves_again(server), "the server does not recover", 60)
                change(server, devices=devices)
            else:
                change(server, devices=devices)
            time.sleep(rng.random())
            if number % 4 == 0:
                lost = rng.choice(devices)
                recovered(server, lose_device(server, lost), "device")
                devices.remove(lost)
            else:
                recovered(server, kill_rank(server, rng.randrange(len(devices))), "process")
        check(expected, streams)
        assert [device["id"] for device in server.status()["devices"] if device["rank"] is not None] == devices


def serves_again(server):
    """Whether the server serves with ranks that are all alive."""
    return server.status()["state"] in ("serving", "degraded") and not any(map(is_gone, serving_pids(server)))


def serving_pids(server):
    return [pid for pid in rank_pids(server) if pid is not None]
