"""The arithmetic of the recovery benchmark: histories in, figures out."""

import dataclasses
import io
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from anchortp_sglang.bench.load import Load
from anchortp_sglang.bench.overhead import ORDER, Figures, Round, by_load, compare
from anchortp_sglang.bench.recovery import Plan, SideResult, details
from anchortp_sglang.bench.recovery_stats import (
    Damage,
    Stream,
    damage,
    first_token,
    goodput,
    outcome,
    pause,
    percentile,
    ratios,
    side_summary,
)
from anchortp_sglang.bench.recovery_view import picture, report_view
from anchortp_sglang.views.picture import to_svg

TOKENS = st.lists(st.integers(0, 9), max_size=30)


def stream(*times, error=None, sent=None, expected=None, ended=None):
    tokens = tuple(range(len(times)))
    arrivals = tuple((at, n) for n, at in enumerate(times, 1))
    sent = times[0] - 0.1 if sent is None else sent
    ended = times[-1] + (0.5 if error else 0.0) if ended is None else ended
    return Stream(sent, ended, arrivals, tokens, tokens if expected is None else tuple(range(expected)), error)


def every(step, *spans):
    return [start + n * step for start, end in spans for n in range(round((end - start) / step))]


def test_tfs_ends_the_silence_that_the_fault_began_not_with_what_was_in_flight():
    one = stream(9.9, 10.05, 10.1, 12.0, 12.1)
    other = stream(9.95, 10.2, 12.5)
    assert first_token([one, other], 10.0) == 12.0


def test_a_longer_lull_long_after_the_fault_is_not_the_interruption():
    assert first_token([stream(9.9, 10.1, 10.6, 10.7, 12.0, 18.0)], 10.0) == 12.0
    assert first_token([stream(9.9, 10.1, 10.6, 10.7, *every(0.1, (10.8, 13.0)), 18.0)], 10.0) == 10.6


def test_a_silence_in_which_nobody_waits_is_not_the_interruption():
    paused, next_one = stream(9.9, 10.3, 10.4), stream(12.5, 12.6, sent=12.4)
    assert first_token([paused, next_one], 10.0) == 10.3
    broken = stream(9.9, 10.1, error="gone", expected=9)
    assert first_token([broken, next_one], 10.0) == 12.5
    assert first_token([stream(9.0, 9.9), next_one], 10.0) == 12.5


def test_who_was_refused_long_before_the_fault_does_not_wait():
    gone = stream(1.0, 2.0, error="gone", ended=3.0)
    assert first_token([gone, stream(9.9, 10.3, 10.4), stream(12.5, 12.6, sent=12.4)], 10.0) == 10.3


def test_a_token_that_was_on_its_way_is_no_recovery_if_nothing_follows():
    broken = stream(9.9, 10.05, error="gone", expected=9)
    assert first_token([broken], 10.0) is None


def test_a_request_that_waited_for_its_first_token_and_broke_has_a_pause():
    waiting = Stream(5.0, 10.5, (), (), (1, 2), "gone")
    later = stream(19.9, 20.0, 20.1)
    assert outcome([waiting, later], 0.0, 10.0, 40.0).pauses_s == (pytest.approx(14.9),)
    refused_before = Stream(5.0, 6.0, (), (), (1, 2), "refused")
    assert outcome([refused_before, later], 0.0, 10.0, 40.0).pauses_s == ()


def test_what_a_broken_stream_was_given_is_checked_too():
    broken = Stream(9.0, 10.5, ((9.1, 3),), (0, 7, 2), (0, 1, 2, 3, 4), "gone")
    found = outcome([broken], 0.0, 10.0, 40.0)
    assert (found.damage, found.undelivered) == (Damage(changed=1), 2)


def test_after_a_fault_that_ended_everything_there_is_no_tfs():
    dead = stream(9.0, 9.9, error="gone", expected=20)
    found = outcome([dead], 0.0, 10.0, 40.0)
    assert (found.tfs_s, found.ttp_s, found.pauses_s) == (None, None, (math.inf,))
    assert (found.failed, found.undelivered, found.damage.wrong) == (1, 18, 0)


def test_the_pause_is_the_longest_gap_of_a_stream_that_was_open_at_the_fault():
    assert pause(stream(9.0, 9.9, 10.4, 10.5, 11.5), 10.0, 10.4) == pytest.approx(1.0)
    assert pause(stream(9.0, 9.9, 10.4), 10.0, 10.4) == pytest.approx(0.5)


def test_a_broken_streams_pause_lasts_until_somebody_is_served_again():
    assert pause(stream(9.0, 9.9, 10.1, error="gone"), 10.0, 60.0) == pytest.approx(49.9)
    assert pause(Stream(9.5, 12.0, (), (), (1,), "refused"), 10.0, 60.0) == pytest.approx(50.5)


def test_streams_that_were_over_or_not_begun_have_no_pause():
    over, later, open_ = stream(1.0, 9.0), stream(11.0, 12.0), stream(9.0, 10.5)
    assert len(outcome([over, later, open_], 0.0, 10.0, 40.0).pauses_s) == 1


def test_a_steady_side_with_one_gap_has_its_figures():
    streams = [stream(*every(0.1, (0.05 + s / 100, 10.0), (11.0 + s / 100, 40.0)), sent=0.0) for s in range(5)]
    found = outcome(streams, 0.0, 10.0, 40.0)
    assert found.tfs_s == pytest.approx(1.0)
    assert found.ttp_s == 0.0
    assert found.throughput_before == pytest.approx(50, rel=0.02)
    assert found.throughput_after == pytest.approx(50, rel=0.02)
    assert found.itl_s == (pytest.approx(0.1), pytest.approx(0.1))
    assert found.failed == 0 and found.damage == Damage()
    silent = [rate for at, rate in found.goodput if 0 <= at < 1]
    assert silent == [0.0, 0.0]


def test_ttp_holds_throughput_against_what_the_clients_that_came_asked_for():
    """Nobody comes for a while after the recovery: little is delivered, and nothing is missing."""

    def served(sent, tokens=20, delay=0.1, error=None):
        times = [sent + delay + 0.1 * n for n in range(tokens)]
        arrivals = tuple((at, n) for n, at in enumerate(times, 1))
        ended = times[-1] if times else sent
        return Stream(sent, ended, arrivals, tuple(range(tokens)), tuple(range(20)), error)

    before = [served(sent) for sent in every(0.5, (0.0, 9.0))]
    after = [served(sent) for sent in every(0.5, (11.0, 12.0), (20.0, 45.0))]
    assert outcome([*before, *after], 0.0, 10.0, 45.0).ttp_s < 0.2
    refused = [served(sent, 0, error="refused") for sent in every(0.5, (10.0, 16.0))]
    late = [served(sent) for sent in every(0.5, (16.0, 45.0))]
    # Until 16.0 everybody was refused: a window may miss 5% of its 400 tokens.
    found = outcome([*before, *refused, served(10.5), *late], 0.0, 10.0, 45.0)
    assert found.ttp_s == pytest.approx(5.5, abs=1.0)


def test_goodput_leaves_out_requests_that_failed():
    good, bad = stream(*every(0.1, (0.0, 20.0))), stream(*every(0.1, (0.0, 10.0)), error="gone")
    assert outcome([good, bad], 0.0, 10.0, 20.0).goodput == goodput([good], 0.0, 10.0, 20.0)


@given(TOKENS)
def test_equal_tokens_are_no_damage(tokens):
    assert damage(tokens, tokens) == Damage()


@given(TOKENS, st.data())
def test_a_token_taken_out_is_lost_one_put_in_is_doubled_one_exchanged_is_changed(tokens, data):
    place = data.draw(st.integers(0, len(tokens)))
    more = [*tokens[:place], 77, *tokens[place:]]
    assert damage(tokens, more) == Damage(lost=1)
    assert damage(more, tokens) == Damage(doubled=1)
    other = [*tokens[:place], 88, *tokens[place:]]
    assert damage(other, more) == Damage(changed=1)


@given(TOKENS, TOKENS)
def test_any_difference_is_seen(one, other):
    assert (damage(one, other).wrong > 0) == (one != other)


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0.01, 1.0))
def test_a_percentile_is_one_of_the_values_and_at_least_that_share_is_not_above_it(values, share):
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9


def some_outcomes(tfs_s, gap_s):
    streams = [stream(*every(0.1, (0.0, 10.0), (10.0 + gap_s, 60.0)), sent=0.0) for _ in range(3)]
    return [outcome(streams, 0.0, 10.0, 60.0) for _ in range(tfs_s)]


def test_the_report_has_exactly_the_promised_keys():
    ours, stock = side_summary(some_outcomes(2, 0.5)), side_summary(some_outcomes(2, 20.0))
    keys = {"tfs_s", "ttp_s", "pause_s", "failed_requests", "wrong_tokens", "throughput_before", "throughput_after"}
    assert ours.keys() == stock.keys() == keys
    assert ours["pause_s"].keys() == {"p50", "p99", "max"}
    assert ratios(ours, stock) == {"tfs": pytest.approx(40, rel=0.01), "ttp": 0.0, "throughput_before": 1.0}


def test_ratios_of_a_side_without_figures_are_null():
    nothing = side_summary([])
    assert ratios(nothing, nothing) == {"tfs": None, "ttp": None, "throughput_before": None}


def test_what_was_never_reached_is_worse_than_anything_that_was():
    ours, stock = side_summary([]) | {"tfs_s": [0.5, 0.7, None]}, side_summary([]) | {"tfs_s": [7.0, None, 70.0]}
    assert ratios(ours, stock)["tfs"] == 100.0
    assert ratios(ours | {"tfs_s": [0.5, None, None]}, stock)["tfs"] is None


def told(plan, name, outcomes):
    result = SideResult(name, 12.0, 3 << 30, outcomes)
    return details(plan, {name: result})[name]


def test_table_and_picture_show_both_sides(tmp_path):
    sides = {"ours": some_outcomes(3, 0.5), "stock": some_outcomes(3, 20.0)}
    summary = {name: side_summary(outcomes) for name, outcomes in sides.items()}
    summary["ratios"] = ratios(summary["ours"], summary["stock"])
    plan = Plan(tmp_path, 4, ("process", "device", "hang"), 1, Load(1.0, 4, 512), ())
    every_figure = {name: told(plan, name, outcomes) for name, outcomes in sides.items()}
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(report_view(summary, every_figure, "a title"))
    text = console.export_text()
    for wanted in ("40× faster", "0.50 s", "20.00 s", "no request failed", "12.00 s", "  after hang", "(ideal 1.33×)"):
        assert wanted in text
    drawn = picture(every_figure, "a title")
    assert all(box.x + box.width <= drawn.width and box.y + box.height <= drawn.height for box in drawn.boxes)
    assert "first token 20.0 s after the fault" in to_svg(drawn)
    assert "watched until here" not in to_svg(drawn)
    for run in every_figure["ours"]["runs"]:
        run["goodput"] = run["goodput"][:40]
    assert to_svg(picture(every_figure, "a title")).count("watched until here") == 1


def test_arrivals_are_poisson_and_the_same_for_a_seed():
    load = Load(rate_per_s=4.0, pool=10, vocab_size=512)
    first = list(itertools.islice(load.arrivals(7), 4000))
    assert first == list(itertools.islice(load.arrivals(7), 4000))
    assert first != list(itertools.islice(load.arrivals(8), 4000))
    times = [at for at, _ in first]
    gaps = [b - a for a, b in itertools.pairwise([0.0, *times])]
    assert sum(gaps) / len(gaps) == pytest.approx(0.25, rel=0.06)
    variance = sum((gap - 0.25) ** 2 for gap in gaps) / len(gaps)
    assert math.sqrt(variance) == pytest.approx(0.25, rel=0.1), "exponential gaps spread as widely as they are long"
    assert {number for _, number in first} == set(range(10))


def test_the_load_mixes_lengths_and_shares_prefixes():
    prompts = [tuple(r["input_ids"]) for r in Load(1.0, 48, 512).requests()]
    assert len({len(prompt) for prompt in prompts}) >= 8
    heads = [prompt[:40] for prompt in prompts if len(prompt) > 48]
    assert max(heads.count(head) for head in heads) >= 4
    assert len(set(prompts)) == 48


@pytest.mark.parametrize("bad", [{"rate_per_s": 0.0}, {"pool": 0}])
def test_a_load_of_nothing_is_refused(bad):
    with pytest.raises(ValueError, match="a load needs"):
        Load(**({"rate_per_s": 1.0, "pool": 4, "vocab_size": 512} | bad))


def test_every_fault_is_made_with_every_seed(tmp_path):
    plan = Plan(tmp_path, 4, ("process", "hang"), 2, Load(1.0, 4, 512), ())
    assert plan.runs() == [("process", 0), ("hang", 0), ("process", 1), ("hang", 1)]


def test_overhead_is_the_median_of_paired_ratios():
    def quartet(ours, stock):
        pace = {"ours": ours, "stock": stock}
        return [Round(side, "load", Figures(pace[side], 0.1, 0.01, 0.02)) for side in ORDER]

    found = compare([*quartet(99, 100), *quartet(198, 200), *quartet(50, 100)])["throughput"]
    assert (found.median, found.low, found.high) == (0.99, 0.5, 0.99)
    with pytest.raises(ValueError, match="quartets"):
        compare(quartet(1, 1)[:3])
    other = [dataclasses.replace(each, load="other") for each in quartet(3, 3)]
    mixed = [each for pair in zip(quartet(1, 1), other, strict=True) for each in pair]
    assert {load: len(rounds) for load, rounds in by_load(mixed).items()} == {"load": 4, "other": 4}
