"""Recovery records: stages in order, what ranks report, counts frozen when the generation is replaced."""

from anchortp_sglang.recovery.record import Recoveries


def test_a_record_lists_its_stages_in_the_order_of_time():
    recovery = Recoveries().begin()
    recovery.stage("late", recovery.began + 2.0)
    recovery.stage("early", recovery.began + 1.0)
    stages = recovery.to_json()["stages"]
    assert stages == [{"name": "early", "at_s": 1.0}, {"name": "late", "at_s": 2.0}]


def test_a_stage_of_the_ranks_is_done_when_the_last_rank_is_and_bytes_add_up():
    recovery = Recoveries().begin()
    began = recovery.began
    infos = [
        {"stamps": {"bound": began + 1.0, "moved": began + 0.5}, "moved_bytes": {"copy": 10, "reload": 1}},
        {"stamps": {"bound": began + 3.0, "moved": began + 0.2}, "moved_bytes": {"copy": 5}},
    ]
    recovery.add_ranks(infos)
    entry = recovery.to_json()
    assert {s["name"]: s["at_s"] for s in entry["stages"]}["bound"] == 3.0
    assert (entry["copied_bytes"], entry["reload_bytes"], entry["p2p_bytes"]) == (15, 1, 0)


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
