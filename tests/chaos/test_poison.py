"""Requests that make ranks fail are found, ended with the reason, and cost the others no token."""

import os
import threading
import time
import urllib.error
from pathlib import Path

import pytest
from faults import kill, kill_rank, recovered
from forge import LAUNCHER
from histories import Unbroken, assert_identical, outcomes, prompt, request, until

from anchortp_sglang.testing.streams import Streams

POISON = Path(__file__).parent / "poison"
RAISES, DIES, RAISES_SOMEWHERE, HANGS = ([7, n] for n in range(1, 5))
"""How prompts begin that poison/anchortp_poison.py makes ranks fail with."""
GOOD = [request(prompt(2000 + seed, 30), 150) for seed in range(4)]


@pytest.fixture(scope="module")
def poisoned(launch, tmp_path_factory):
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(POISON)])
    marker = tmp_path_factory.mktemp("poison") / "start"
    env = {"PYTHONPATH": path, "ANCHORTP_POISONED_START": str(marker)}
    with launch(2, "--anchor-hang-timeout", "4", env=env, module=LAUNCHER) as server:
        server.marker = marker
        yield server


@pytest.fixture(scope="module")
def unbroken(poisoned):
    return Unbroken(poisoned)


only_if_asked = pytest.mark.skipif("ANCHORTP_HANGS" not in os.environ, reason="takes a minute: set ANCHORTP_HANGS=1")


def bad(mark, **more):
    return request([*mark, *prompt(2100, 20)], 30) | more


def refusal(server, body):
    """(HTTP status, text) of a request that must not be answered."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        server.post("/generate", body, timeout_s=120)
    return raised.value.code, raised.value.read().decode()


@pytest.mark.parametrize(
    ("mark", "words", "most_generations"),
    [
        (RAISES, "RuntimeError: poisoned", 4),
        (RAISES_SOMEWHERE, "RuntimeError: poisoned somewhere", 4),
        (DIES, "", 9),
        pytest.param(HANGS, "", 9, marks=only_if_asked),
    ],
    ids=["raises", "raises without naming a request", "dies by a signal", "hangs"],
)
def test_it_is_ended_and_the_others_go_on(poisoned, unbroken, mark, words, most_generations):
    expected = unbroken(GOOD)
    before = poisoned.status()["generation"]
    with Streams(poisoned.url, GOOD) as streams:
        streams.wait_tokens(10)
        code, text = refusal(poisoned, bad(mark))
        assert code == 500 and "no other request can have been the cause" in text and words in text
    assert_identical(expected, outcomes(streams.histories))
    generations = poisoned.wait_serving(before + 1)["generation"] - before
    assert 2 <= generations <= most_generations, "no fault, or too many"


def test_a_stream_and_a_batch_are_ended_too_and_of_the_batch_only_the_item(poisoned, unbroken):
    (expected,) = unbroken(GOOD[:1])
    with Streams(poisoned.url, [bad(RAISES)]) as streams:
        (history,) = streams.wait(60)
    assert "RuntimeError: poisoned" in f"{history.error} {history.finish_reason}"
    both = {
        "input_ids": [GOOD[0]["input_ids"], bad(RAISES)["input_ids"]],
        "sampling_params": GOOD[0]["sampling_params"],
    }
    code, text = refusal(poisoned, both)  # SGLang answers a batch with the error of an item
    assert code == 500 and "RuntimeError: poisoned" in text
    answer = poisoned.post("/generate", GOOD[0])
    assert tuple(answer["output_ids"]) == expected.output_ids


def test_good_requests_survive_kills_in_quick_succession(poisoned, unbroken):
    """Each as soon as the server serves again, so that hardly a token comes in between, and none at first."""
    requests = [*GOOD, *(request(prompt(2200 + seed, 1500), 10) for seed in range(2))]
    expected = unbroken(requests)
    first = poisoned.status()["generation"]
    with Streams(poisoned.url, requests) as streams:
        for count in range(12):
            fault = kill_rank(poisoned, count % 2)
            poisoned.wait_serving(fault.generation + 1)
        streams.wait(120)
    assert_identical(expected, outcomes(streams.histories))
    assert poisoned.status()["generation"] >= first + 12


def test_every_generation_gets_somebody_on(poisoned, unbroken):
    """Long prompts with input logprobs, all of which a generation cannot compute before the next kill."""
    asked = {"return_logprob": True, "logprob_start_len": 0, "stream": True}
    requests = [request(prompt(2300 + seed, 900), 12) | asked for seed in range(8)]
    expected = unbroken(requests)
    began = time.monotonic()
    with Streams(poisoned.url, requests):
        pass
    period_s = 0.3 * (time.monotonic() - began)
    over = threading.Event()
    kills = []

    def kill_on():
        while not over.wait(period_s):
            kills.append(kill_rank(poisoned, len(kills) % 2))
            poisoned.wait_serving(kills[-1].generation + 1)

    poisoned.flush_cache()
    thread = threading.Thread(target=kill_on)
    thread.start()
    try:
        with Streams(poisoned.url, requests) as streams:
            streams.wait(120)
    finally:
        over.set()
        thread.join()
    assert len(kills) >= 3, "the requests were done before it could get difficult"
    assert_identical(expected, outcomes(streams.histories))
    for history in streams.histories:
        assert len(history.meta["input_token_logprobs"]) == 900


def test_input_logprobs_that_a_client_has_are_not_computed_again(poisoned, unbroken):
    asked = {"return_logprob": True, "logprob_start_len": 0}
    requests = [request(prompt(2400 + seed, 400), 60) | asked for seed in range(4)]
    expected = unbroken(requests)
    with Streams(poisoned.url, requests) as streams:
        streams.wait_tokens(10)
        record = recovered(poisoned, kill_rank(poisoned, 1), "process")
        streams.wait(60)
    assert_identical(expected, outcomes(streams.histories))
    after = poisoned.status()["recoveries"][-1]
    assert record["generation"] == after["generation"]
    assert after["tokens_recomputed"] <= 4 * 4 and after["tokens_reused"] >= 4 * 400


def test_the_status_tells_of_requests_that_were_ended(poisoned):
    ended = poisoned.status()["requests_ended"]["unservable"]
    refusal(poisoned, bad(RAISES))
    assert poisoned.status()["requests_ended"]["unservable"] == ended + 1


def test_starts_that_crash_alike_are_given_up_early_and_tried_again_later(poisoned, unbroken):
    (expected,) = unbroken(GOOD[:1])
    poisoned.marker.touch()
    try:
        with Streams(poisoned.url, GOOD[:1]) as streams:
            streams.wait_tokens(10)
            began = time.monotonic()
            kill_rank(poisoned, 0)
            until(lambda: poisoned.status()["state"] == "down", "it does not give up", timeout_s=60, poll_s=0.2)
            assert time.monotonic() - began < 40, "it went on until its deadline"
            (history,) = streams.wait(10)
        said = f"{history.error} {history.finish_reason}"
        assert "3 starts in a row failed in the same way" in said and "died while it was starting SIG" in said
        assert refusal(poisoned, GOOD[0])[0] == 503
    finally:
        poisoned.marker.unlink()
    poisoned.wait_serving(0, timeout_s=40)
    assert tuple(poisoned.post("/generate", GOOD[0])["output_ids"]) == expected.output_ids
    assert poisoned.status()["requests_ended"]["given_up"] == 1


def test_it_leaves_nothing_behind(poisoned):
    """After a hundred generations: no more descriptors and threads than after a few."""
    pid = poisoned.pid
    until(lambda: poisoned.status()["state"] == "serving", "it does not serve")
    time.sleep(2.5)  # spares are forked a second after a recovery
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    for count in range(3):
        before = poisoned.status()["generation"]
        kill(poisoned.status()["devices"][count % 2]["rank_pid"])
        poisoned.wait_serving(before + 1)
    time.sleep(2.5)
    assert abs(len(os.listdir(f"/proc/{pid}/fd")) - descriptors) <= 4
