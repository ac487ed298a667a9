"""Requests that were accepted stay accepted: a fault makes them wait, but a full queue does not end them."""

import time
from contextlib import ExitStack

from faults import kill_rank, recovered
from histories import Unbroken, assert_exactly_once, assert_identical, outcomes, prompt, request

from anchortp_sglang.testing.streams import Streams

RUNNING = 4
LOW = [request(prompt(7000 + seed, 40), 300) | {"priority": 0} for seed in range(RUNNING)]
HIGH = request(prompt(7100, 40), 300) | {"priority": 100}
LATE = [request(prompt(7200 + priority, 40), 4) | {"priority": priority} for priority in (5, 6)]
"""Of a higher priority than those that run, but not so much higher that they take their place."""


def test_a_killed_rank_ends_no_request_of_a_full_queue(launch):
    """Four run and one waits, which a fifth of a higher priority has put back in the queue.

    After the fault two more come. The queue has room for one, and the other must not take the place of one that waits
    to go on.
    """
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
            # One that arrives before the server goes on is kept like those that were open.
            streams[-1].wait_tokens(len(streams[-1].histories[0].output_ids) + 3)
            late = []
            for each in LATE:
                late.append(stack.enter_context(Streams(server.url, [each])))
                time.sleep(0.1)
            ended = [stream.histories[0].error for stream in streams if stream.histories[0].done]
            assert not ended, "the queue was not full any more, or one of them was ended"
        assert "higher priority" in late[0].histories[0].error
        assert late[1].histories[0].error is None
        histories = [stream.histories[0] for stream in streams]
        assert_identical(expected, outcomes(histories))
        for history in histories:
            assert_exactly_once(history)
