"""Requests that were accepted stay accepted: a fault makes them wait, but a full queue does not end them."""

from contextlib import ExitStack

from faults import kill_rank, recovered
from histories import Unbroken, assert_exactly_once, assert_identical, outcomes, prompt, request

from anchortp_sglang.testing.streams import Streams

RUNNING = 4
LOW = [request(prompt(7000 + seed, 40), 120) | {"priority": 0} for seed in range(RUNNING)]
HIGH = request(prompt(7100, 40), 120) | {"priority": 100}


def test_a_killed_rank_ends_no_request_of_a_full_queue(launch):
    """Four run and one waits, which a fifth of a higher priority has put back in the queue."""
    flags = ("--max-running-requests", str(RUNNING), "--max-queued-requests", "1", "--enable-priority-scheduling")
    with launch(2, *flags) as server:
        unbroken = Unbroken(server)
        expected = [unbroken([each])[0] for each in (*LOW, HIGH)]
        with ExitStack() as stack:
            streams = []
            for each in (*LOW, HIGH):
                streams.append(stack.enter_context(Streams(server.url, [each])))
                streams[-1].wait_tokens(2)
            assert not any(stream.histories[0].done for stream in streams), "nobody was put back for the last one"
            recovered(server, kill_rank(server, 1), "process")
        histories = [stream.histories[0] for stream in streams]
        assert_identical(expected, outcomes(histories))
        for history in histories:
            assert_exactly_once(history)
