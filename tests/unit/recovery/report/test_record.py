"""Recovery records: stages in order, what ranks report, counts frozen when the generation is replaced."""

from anchortp_sglang.recovery.report.record import Recoveries


def test_a_record_lists_its_stages_in_the_order_of_time():
    recovery = Recoveries().begin()
    recovery.stage("late", recovery.began + 2.0)
    recovery.stage("early", recovery.began + 1.0)
    stages = recovery.to_json()["stages"]
    assert stages == [{"name": "early", "at_s": 1.0}, {"name": "late", "at_s": 2.0}]


def info(rank, device, stamps, moved_bytes):
    return {"rank": rank, "device": device, "stamps": stamps, "moved_bytes": moved_bytes, "rebuilt": {}}


def test_a_stage_of_the_ranks_is_done_when_the_last_rank_is_and_bytes_add_up():
    recovery = Recoveries().begin()
    began = recovery.began
    infos = [
        info(0, 4, {"bound": began + 1.0, "moved": began + 0.5}, {"copy": 10, "reload": 1}),
        info(1, 7, {"bound": began + 3.0, "moved": began + 0.2, "fork": began}, {"copy": 5}),
    ]
    recovery.add_ranks(infos)
    entry = recovery.to_json()
    assert {s["name"]: s["at_s"] for s in entry["stages"]}["bound"] == 3.0
    assert (entry["copied_bytes"], entry["reload_bytes"], entry["p2p_bytes"]) == (15, 1, 0)
    assert entry["ranks"][1] == {
        "rank": 1,
        "device": 7,
        "stages": [{"name": "bytes_moved", "at_s": 0.2}, {"name": "bound", "at_s": 3.0}],
        "moved_bytes": 5,
    }


def test_reused_tokens_stay_what_they_were_when_the_next_recovery_began():
    recoveries = Recoveries()
    first = recoveries.begin()
    counters = [(7, 1)]
    first.tokens = lambda: counters[0]
    assert first.to_json()["tokens_reused"] == 7
    recoveries.begin()
    counters[0] = (100, 100)
    assert (first.to_json()["tokens_reused"], first.to_json()["tokens_recomputed"]) == (7, 1)


def test_only_the_last_recoveries_are_kept():
    recoveries = Recoveries()
    for generation in range(40):
        recoveries.begin().generation = generation
    kept = [entry["generation"] for entry in recoveries.to_json()]
    assert kept == list(range(8, 40))


def test_totals_count_finished_recoveries_also_those_no_longer_listed():
    recoveries = Recoveries()
    for number in range(40):
        recovery = recoveries.begin()
        recovery.cause = "device" if number % 4 == 0 else "process"
        recovery.bytes_moved = {"reload": 10}
        recovery.requests_replayed = 2
        recovery.tokens = lambda: (3, 1)
        recovery.failed = "no device left" if number == 0 else None
        recoveries.finish(recovery)
    recoveries.begin()  # not over
    totals = recoveries.totals()
    assert totals.causes == {"device": 10, "process": 30}
    assert (totals.bytes_moved["reload"], totals.requests_replayed, totals.failed) == (400, 80, 1)
    assert (totals.tokens_reused, totals.tokens_recomputed) == (120, 40)
    assert recoveries.totals() == totals, "asking changes nothing"


def test_an_observer_that_fails_does_not_disturb_the_recovery():
    recoveries, seen = Recoveries(), []
    recoveries.on_finished += [lambda recovery: 1 / 0, seen.append]
    recovery = recoveries.begin()
    recoveries.finish(recovery)
    assert seen == [recovery] and recovery.finished
