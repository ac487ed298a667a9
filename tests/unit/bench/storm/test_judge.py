"""A storm's schedule comes from its seed alone; its judge notices what it must, and a broken tool would show here."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp_sglang.bench.storm import log as storm_log
from anchortp_sglang.bench.storm.faults import Struck
from anchortp_sglang.bench.storm.judge import RIGHT, Answer, Verdict, judge
from anchortp_sglang.bench.storm.leaks import Holdings, kinds_of_files
from anchortp_sglang.bench.storm.requests import Request, make_requests
from anchortp_sglang.bench.storm.run import Report
from anchortp_sglang.bench.storm.schedule import KINDS, TARGETS, Blow, bursts, match_kinds
from anchortp_sglang.bench.storm.view import summary

# ---- the schedule


@given(st.integers(), st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_a_seed_gives_one_schedule_of_as_many_faults_as_asked_for(seed, faults):
    one = list(bursts(seed, faults))
    assert one == list(bursts(seed, faults))
    assert sum(len(burst.blows) for burst in one) == faults
    assert [burst.number for burst in one] == list(range(len(one)))
    for blow in (blow for burst in one for blow in burst.blows):
        assert blow.kind in KINDS and 0 <= blow.draw < 1 and 0 <= blow.after_s <= 0.5
        assert (blow.pause_s > 0) == (blow.manner == "pause")


def test_another_seed_gives_another_schedule():
    assert list(bursts(1, 50)) != list(bursts(2, 50))


def test_the_whole_matrix_is_dealt_before_it_is_dealt_again():
    deck = sum(cards * len(manners) for cards, manners in TARGETS.values())
    dealt = [blow.kind for burst in bursts(7, deck) for blow in burst.blows]
    assert set(dealt) == set(KINDS)


def test_some_blows_come_at_once_and_some_into_a_recovery():
    later = [blow.after_s for burst in bursts(3, 200) for blow in burst.blows[1:]]
    assert 0.0 in later and any(0 < after_s < 0.5 for after_s in later)


def test_kinds_are_chosen_by_target_and_by_manner():
    assert match_kinds("rank:kill") == ("rank:kill",)
    assert match_kinds("spare") == ("spare:kill", "spare:crash", "spare:stop", "spare:pause")
    assert match_kinds("device,:stop")[0] == "rank:stop" and "device:kill" in match_kinds("device,:stop")
    assert match_kinds("all") == KINDS
    assert {blow.kind for burst in bursts(0, 40, match_kinds("rank:kill")) for blow in burst.blows} == {"rank:kill"}
    with pytest.raises(ValueError, match="nobody"):
        match_kinds("rank,nobody")


def test_a_log_is_replayed_as_it_was_drawn(tmp_path):
    drawn = storm_log.draw(5, 30, "all", "stream,batch", 3, 4)
    log = storm_log.Writer(tmp_path / "log")
    log.write(drawn.to_json())
    log.write({"burst": 0})
    assert storm_log.read(tmp_path / "log") == drawn
    assert {request.kind for request in drawn.make_requests(2048)} == {"stream", "batch"}
    assert log.text() + "\n" == (tmp_path / "log").read_text()


@pytest.mark.parametrize("text", ["", "{}", "nonsense", json.dumps({"bursts": [{"number": 0, "rest_s": 0}]})])
def test_what_is_no_log_is_refused(tmp_path, text):
    (tmp_path / "log").write_text(text)
    with pytest.raises(ValueError, match="no log of a storm"):
        storm_log.read(tmp_path / "log")


def test_the_same_seed_asks_the_same():
    assert make_requests(3, 2048) == make_requests(3, 2048) != make_requests(4, 2048)
    assert {request.way for request in make_requests(3, 2048)} == {"whole", "leave", "abort", "refused"}


# ---- the judge

STREAM = Request("stream", "/generate", {"stream": True})
CHAT = Request("chat stream", "/v1/chat/completions", {"stream": True})
LEAVE = Request("disconnect", "/generate", {"stream": True}, "leave")
ABORT = Request("abort", "/generate", {"stream": True}, "abort")
BAD = Request("bad input", "/generate", {}, "refused")


def generated(ids, *, finish=None, logprob=-1.5):
    meta = {"finish_reason": finish, "prompt_tokens": 3, "completion_tokens": len(ids), "id": "x", "e2e_latency": 3.0}
    meta["output_token_logprobs"] = [[logprob, token, None] for token in ids]
    return {"text": "".join(chr(97 + token) for token in ids), "output_ids": ids, "meta_info": meta}


def answer(*messages, ended=True, code=200):
    made = Answer(code, ended=ended)
    for message in messages:
        made.take(copy.deepcopy(message))
    return made


LENGTH = {"type": "length", "length": 4}
EXPECTED = answer(generated([1, 2, 3, 4], finish=LENGTH))


def ruled(request, got, expected=EXPECTED):
    return judge(request, expected, got)


def test_an_equal_answer_is_right_however_it_was_cut_into_messages():
    assert ruled(STREAM, answer(generated([1]), generated([1, 2, 3]), generated([1, 2, 3, 4], finish=LENGTH))) == RIGHT


@pytest.mark.parametrize(
    ("ids", "wrong"),
    [([1, 2, 9, 4], 1), ([1, 2, 2, 3, 4], 3), ([1, 2, 3], 1), ([1, 3, 4], 3)],
    ids=["changed", "doubled", "the last one lost", "one in the middle lost"],
)
def test_a_wrong_token_is_noticed_and_counted(ids, wrong):
    verdict = ruled(STREAM, answer(generated(ids, finish=LENGTH)))
    assert (verdict.ruling, verdict.wrong_tokens) == ("wrong", wrong)


def test_tokens_that_are_taken_back_are_noticed():
    verdict = ruled(STREAM, answer(generated([1, 9]), generated([1, 2, 3, 4], finish=LENGTH)))
    assert verdict.ruling == "failed" and "taken back" in verdict.why


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta.update(finish_reason={"type": "stop", "matched": 4}),
        lambda meta: meta.update(prompt_tokens=7),
        lambda meta: meta.update(completion_tokens=5),
        lambda meta: meta["output_token_logprobs"].pop(),
        lambda meta: meta["output_token_logprobs"][2].__setitem__(0, -1.6),
    ],
    ids=["finish reason", "prompt tokens", "completion tokens", "a logprob is missing", "a logprob is wrong"],
)
def test_whatever_else_differs_is_wrong(change):
    message = generated([1, 2, 3, 4], finish=LENGTH)
    change(message["meta_info"])
    assert ruled(STREAM, answer(message)).ruling == "wrong"


def test_logprobs_may_differ_by_rounding_and_times_by_anything():
    message = generated([1, 2, 3, 4], finish=LENGTH, logprob=-1.50001)
    message["meta_info"] |= {"e2e_latency": 99.0, "id": "y", "cached_tokens": 3}
    assert ruled(STREAM, answer(message)) == RIGHT


@pytest.mark.parametrize("got", [answer(), Answer(0, error="ConnectionResetError"), Answer(503, error="down")])
def test_a_missing_stream_is_noticed(got):
    assert ruled(STREAM, got).ruling != "right"


def test_a_stream_that_breaks_off_has_failed():
    assert ruled(STREAM, answer(generated([1, 2]), ended=False)).ruling == "failed"


def test_an_error_in_mid_stream_is_a_failure():
    assert ruled(STREAM, answer(generated([1, 2]), {"error": {"message": "gave up"}})).ruling == "failed"


def test_a_stream_that_the_server_gave_up_has_failed_and_is_not_wrong():
    aborted = {"type": "abort", "message": "The server cannot recover"}
    assert ruled(STREAM, answer(generated([1, 2], finish=aborted))).ruling == "failed"


@pytest.mark.parametrize("sent", [LEAVE, ABORT])
def test_what_came_before_a_client_left_must_be_right(sent):
    aborted = {"type": "abort", "message": "Abort"}
    assert ruled(sent, answer(generated([1, 2], finish=aborted))) == RIGHT
    assert ruled(sent, answer(generated([1, 3], finish=aborted))).ruling == "wrong"
    assert ruled(sent, answer(generated([1, 2, 3, 4], finish=LENGTH))) == RIGHT  # it was too late
    assert ruled(sent, answer(generated([1, 2, 3], finish=LENGTH))).ruling == "wrong"


def test_an_aborted_stream_must_end_and_one_that_was_left_need_not():
    assert ruled(ABORT, answer(generated([1, 2]), ended=False)).ruling == "failed"
    assert ruled(LEAVE, answer(generated([1, 2]), ended=False)) == RIGHT


@pytest.mark.parametrize("code", [0, 200, 500, 503])
def test_a_bad_request_must_get_a_400(code):
    assert judge(BAD, None, Answer(400, error="no")) == RIGHT
    assert judge(BAD, None, Answer(code)).ruling == "failed"


def chunk(text, finish=None, index=0, usage=None):
    choices = [] if text is None else [{"index": index, "delta": {"content": text}, "finish_reason": finish}]
    return {"choices": choices, "usage": usage}


def test_openai_streams_are_joined_by_choice():
    usage = {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6, "prompt_tokens_details": None}
    expected = answer(chunk("ab"), chunk("xy", index=1), chunk("c", "stop"), chunk(None, usage=usage))
    other_cut = answer(chunk("a"), chunk("bc", "stop"), chunk("xy", index=1), chunk(None, usage=usage))
    doubled = answer(chunk("ab"), chunk("xy", index=1), chunk("bc", "stop"), chunk(None, usage=usage))
    assert ruled(CHAT, other_cut, expected) == RIGHT
    assert ruled(CHAT, doubled, expected).ruling == "wrong"
    assert ruled(CHAT, answer(chunk("abc", "stop"), chunk("xy", index=1)), expected).ruling == "wrong"  # no usage


def test_logprobs_of_tokens_within_a_character_depend_on_how_chunks_were_cut():
    def streamed(*tokens):
        content = [{"token": token, "logprob": -1.0} for token in tokens]
        choice = {"index": 0, "delta": {"content": "sea"}, "finish_reason": "stop", "logprobs": {"content": content}}
        usage = {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4, "prompt_tokens_details": None}
        return answer({"choices": [choice], "usage": None}, {"choices": [], "usage": usage})

    assert ruled(CHAT, streamed("s", "\ufffd", "ea"), streamed("s", "ea")) == RIGHT
    assert ruled(CHAT, streamed("s", "ea", "ea"), streamed("s", "ea")).ruling == "wrong"


# ---- leaks, and the report

FIGURES = {"files of main": 90, "memory of main (MiB)": 700, "zombies": 0, "files in /dev/shm": 3}
BEFORE = Holdings(FIGURES, {"rank": (4, 4), "spare": (4, 4), "detokenizer": (1, 1)})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"files of main": 100}, "files of main: 90 before, 100 after"),
        ({"memory of main (MiB)": 900}, "memory of main"),
        ({"zombies": 1}, "zombies"),
        ({"files in /dev/shm": 4}, "files in /dev/shm"),
        ({"files anchor-#.sock": 1}, "files anchor-#.sock: 0 before, 1 after"),
    ],
)
def test_a_leak_is_noticed(more, said):
    (told,) = BEFORE.leaked(Holdings(FIGURES | more, BEFORE.roles))
    assert said in told


def test_files_are_counted_by_kind_whichever_process_they_are_of(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("anchor-0.sock", "run/anchor-11.sock", "gauge_mostrecent_71.db", "counter_0.db", "server.log"):
        (tmp_path / name).touch()
    assert kinds_of_files(tmp_path) == {"run": 1, "anchor-#.sock": 2, "gauge_mostrecent_#.db": 1}


@pytest.mark.parametrize(("role", "filled"), [("spare", (0, 4)), ("detokenizer", (2, 1))])
def test_a_process_too_many_or_too_few_is_noticed(role, filled):
    (told,) = BEFORE.leaked(Holdings(FIGURES, {**BEFORE.roles, role: filled}))
    assert role in told


def test_a_narrower_server_has_fewer_ranks_and_no_leak():
    assert BEFORE.leaked(Holdings(FIGURES, {"rank": (3, 3), "spare": (3, 3), "detokenizer": (1, 1)})) == []


def test_what_pools_take_is_no_leak():
    assert BEFORE.leaked(Holdings(FIGURES | {"files of main": 92}, BEFORE.roles)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"judged": [(STREAM, Verdict("wrong", "", 2))]},
        {"judged": [(BAD, Verdict("failed"))]},
        {"leaks": ["zombies"]},
        {"problems": ["not serving"]},
        {"struck": [Struck(Blow("rank:kill", 0, 0), 1, "serving", [1], effect=False)]},
    ],
)
def test_anything_wrong_spoils_the_report(wrong):
    fine = {"judged": [(STREAM, RIGHT)], "struck": [Struck(Blow("rank:kill", 0, 0), 1, "serving", [1], effect=True)]}
    assert summary(Report(**fine))["ok"]
    assert not summary(Report(**fine | wrong))["ok"]


def test_a_fault_that_found_nobody_is_told_apart():
    told = summary(Report(struck=[Struck(Blow("spare:kill", 0, 0), 1, "serving")]))
    assert told["faults"] == {"spare:kill": {"no victim": 1}} and told["ok"]
