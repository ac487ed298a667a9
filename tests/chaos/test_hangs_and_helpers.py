"""What is not a rank's death: a stopped rank, a dead detokenizer, a dead zygote, health in between."""

import os
import signal

import pytest
from faults import Fault, child_named, kill, kill_rank, recovered
from histories import assert_exactly_once, assert_identical, outcomes, prompt, request, until
from tokenizers import Tokenizer

from anchortp_sglang.recovery.processes.pidfd import process_state
from anchortp_sglang.testing.streams import Streams

REQUESTS = [request(prompt(200 + seed, 30), 120) for seed in range(8)]

ALPHABET = "éâĂ€😀"
"""Characters of two, three and four bytes. No token of the tiny tokenizer holds two bytes of one."""


@pytest.fixture
def multibyte(checkpoint):
    """Requests whose text is full of such characters: a bias keeps greedy decoding among their bytes."""
    tokens = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(ALPHABET).ids
    bias = {str(token): 60.0 for token in tokens}
    return [request(prompt(300 + seed, 20), 120, logit_bias=bias) for seed in range(5)]


def has_multibyte(text):
    return any(0x7F < ord(character) != 0xFFFD for character in text)


def check(expected, histories):
    assert_identical(expected, outcomes(histories))
    for history in histories:
        assert_exactly_once(history)


def test_a_stopped_rank_is_taken_for_hung_and_replaced(server, unbroken):
    """In a later generation than the first, which hangs must be watched for as well."""
    recovered(server, kill_rank(server, 0), "process")
    rank = 2
    expected = unbroken(REQUESTS)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(15)
        status = server.status()
        pid = next(d["rank_pid"] for d in status["devices"] if d["rank"] == rank)
        os.kill(pid, signal.SIGSTOP)
        until(lambda: process_state(pid) == "T", "the rank was not stopped")
        device = next(d["id"] for d in status["devices"] if d["rank"] == rank)
        recovered(server, Fault(status["generation"], device, pid, 0.0), "hang")
    check(expected, streams.histories)


def test_text_of_multibyte_characters_survives_a_killed_rank(server, unbroken, multibyte):
    expected = unbroken(multibyte)
    assert all(has_multibyte(one.text) for one in expected), "no multi-byte text to test with"
    with Streams(server.url, multibyte) as streams:
        streams.wait_tokens(37)
        recovered(server, kill_rank(server, 0), "process")
    check(expected, streams.histories)


def test_a_killed_detokenizer_is_replaced_without_a_changed_character(server, unbroken, multibyte):
    requests = multibyte[:4] + REQUESTS[:4]
    expected = unbroken(requests)
    with Streams(server.url, requests) as streams:
        streams.wait_tokens(40)
        generation, pid = server.status()["generation"], child_named(server, "sglang::detokenizer")
        kill(pid)
        recovered(server, Fault(generation, -1, pid, 0.0), "process")
    check(expected, streams.histories)
    assert child_named(server, "sglang::detokenizer") != pid


def test_a_killed_zygote_takes_its_ranks_along_and_all_are_replaced(server, unbroken):
    """Its children end with it, by their parent-death signal."""
    expected = unbroken(REQUESTS)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(20)
        status = server.status()
        pid = child_named(server, "anchortp::zygote", grandchildren=False)
        kill(pid)
        record = server.wait_serving(status["generation"] + 1)["recoveries"][-1]
    check(expected, streams.histories)
    forked_s = next(stage["at_s"] for stage in record["stages"] if stage["name"] == "forked")
    assert forked_s < 3, "the zygote in reserve need not import SGLang"
    # The next fault finds the new zygote.
    expected = unbroken(REQUESTS)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(20)
        recovered(server, kill_rank(server, 1), "process")
    check(expected, streams.histories)
