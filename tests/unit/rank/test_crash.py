"""What is read out of an exception that ended a rank, and out of a fault."""

import pytest
import torch.distributed as dist

from anchortp_sglang.rank.crash import Crash, describe
from anchortp_sglang.recovery.requests.evidence import evidence


class Request:
    """Stands where SGLang's Req does: what counts is the module of its class."""

    __module__ = "sglang.srt.managers.schedule_batch"

    def __init__(self, rid):
        self.rid = rid


class Batch:
    __module__ = "sglang.srt.managers.schedule_batch"

    def __init__(self, *rids):
        self.reqs = [Request(rid) for rid in rids]


def crash_of(work):
    try:
        work()
    except BaseException as error:
        return describe(error)
    raise AssertionError("it did not fail")


def fail(*_):
    raise ValueError("no")


def test_the_request_in_the_innermost_frame_is_named_and_not_its_batch():
    def step(batch):
        for request in batch.reqs:
            handle(request)

    def handle(request):
        if request.rid == "b":
            fail()

    crash = crash_of(lambda: step(Batch("a", "b", "c")))
    assert crash.rids == {"b"} and crash.text == "ValueError: no" and not crash.peer_lost


def test_a_batch_is_named_where_no_single_request_is():
    def step(batch):
        fail()

    assert crash_of(lambda: step(Batch("a", "b"))).rids == {"a", "b"}


def test_other_objects_with_a_rid_are_no_requests():
    class Other:
        rid = "other"

    def step(other):
        fail()

    assert crash_of(lambda: step(Other())).rids == frozenset()


def test_a_long_text_is_cut():
    def work():
        raise ValueError("x" * 10**6)

    assert len(crash_of(work).text) < 1000


def test_a_failed_collective_is_known_as_such():
    assert crash_of(lambda: dist.new_group([0])).peer_lost, "torch.distributed fails without a process group"


OWN, CONSEQUENCE = Crash("ValueError: no", frozenset("a"), False), Crash("connection closed", frozenset("b"), True)


@pytest.mark.parametrize(
    ("crashes", "kind", "rids"),
    [
        ([OWN], "exception", {"a"}),
        ([OWN, CONSEQUENCE], "exception", {"a"}),
        ([OWN, Crash("other", frozenset("c"), False)], "exception", {"a", "c"}),
        ([CONSEQUENCE], "signal", set()),
        ([OWN, None], "signal", set()),
        ([None], "signal", set()),
        ([], "signal", set()),
    ],
)
def test_only_a_rank_that_fails_by_itself_says_that_a_request_cannot_be_served(crashes, kind, rids):
    found = evidence(crashes, None, "why")
    assert (found.kind, set(found.rids)) == (kind, rids)


def test_a_hang_says_since_when():
    found = evidence([], 12.5, "no progress")
    assert (found.kind, found.since) == ("hang", 12.5)
