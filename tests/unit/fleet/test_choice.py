"""Which server a request goes to: its prefix's, by the servers' shares, unless that one has too much to do."""

import collections
import random

import pytest

from anchortp_sglang.fleet.choice import BOUND, PREFIX_BYTES, SLACK, Candidate, choose, key_of

IDLE = [Candidate(f"s{number}", 0) for number in range(4)]


def keys(count):
    return [str(number).encode() for number in range(count)]


def test_a_prefix_always_goes_to_the_same_server_whoever_chooses():
    for key in keys(50):
        assert len({choose(key, random.sample(IDLE, 4)) for _ in range(5)}) == 1


def test_the_loss_of_a_server_moves_only_its_own_prefixes():
    for key in keys(200):
        before, after = choose(key, IDLE), choose(key, IDLE[1:])
        assert before in ("s0", after)


def test_prefixes_fall_to_servers_in_proportion_to_what_is_left_of_them():
    half = [Candidate("half", 0, 0.5), Candidate("whole", 0, 1.0)]
    counts = collections.Counter(choose(key, half) for key in keys(3000))
    assert counts["half"] / 3000 == pytest.approx(1 / 3, abs=0.03)


def test_a_server_with_too_much_to_do_gets_no_more_of_its_prefixes():
    key = b"one prompt for all"
    loads = collections.Counter()
    for _ in range(400):
        loads[choose(key, [Candidate(one.name, loads[one.name]) for one in IDLE])] += 1
    assert max(loads.values()) <= BOUND * 100 + SLACK + 1
    assert len(loads) == 4


def test_without_a_key_the_least_loaded_server_is_taken_by_what_is_left_of_it():
    assert choose(b"", [Candidate("a", 3), Candidate("b", 2)]) == "b"
    assert choose(b"", [Candidate("a", 3), Candidate("b", 2, 0.5)]) == "a"


def test_the_key_is_the_session_or_the_beginning_of_the_prompt():
    first = b'{"model": "m", "messages": [{"role": "system", "content": "' + b"x" * 600 + b'"}]}'
    longer = first[:-1] + b', "max_tokens": 3}'
    assert key_of("", first) == key_of("", longer) and len(key_of("", first)) == PREFIX_BYTES
    assert key_of("talk", first) == b"talk"
    assert key_of("", b'{"input_ids": [1, 2]}').startswith(b"[1, 2]")
    assert key_of("", b"") == b""
