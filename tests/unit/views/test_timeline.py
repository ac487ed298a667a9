"""Recoveries drawn: rows, page and picture, from a status as servers give it."""

import re
from html.parser import HTMLParser

import pytest
from timeline_cases import GIVEN_UP, KILL, LOSS, STATUS, rank, recovery, stages

from anchortp_sglang.recovery.report.stages import durations, end_s, headline, rows, ticks
from anchortp_sglang.views.picture import to_svg
from anchortp_sglang.views.timeline_page import SHOWN, main_part, page
from anchortp_sglang.views.timeline_plot import picture

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Reader(HTMLParser):
    """Checks that tags are closed in order; collects text, attributes that load something, and tips."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.loads, self.tips = [], "", [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.loads += [value for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        self.tips += [found["title"]] if "title" in found else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" not in self.open and "script" not in self.open:
            self.text += data


def read(html):
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


def test_the_servers_stages_follow_one_another_and_ranks_have_rows_of_their_own():
    server, *devices = rows(LOSS)
    assert [bar.stage for bar in server.bars][:3] == ["detected", "reaped", "fenced"]
    assert all(a.end_s == b.start_s for a, b in zip(server.bars, server.bars[1:], strict=False))
    assert [row.label for row in devices] == ["device 0", "device 1", "device 2", "device 3"]
    assert [row.lost for row in devices] == [False, False, True, False]
    assert devices[3].note == "rank 2"


def test_several_devices_lost_at_once_are_all_named():
    both = LOSS | {"lost": [1, 2], "ranks": [rank(0, 0), rank(1, 3)]}
    assert [row.lost for row in rows(both)] == [False, False, True, True, False]
    assert headline(both).startswith("devices 1, 2 lost")


def test_stages_of_ranks_last_as_long_as_those_of_the_slowest_and_bytes_do_not_shorten_the_next():
    slow = [rank(0, 0, moved_bytes=1), rank(1, 1, moved_bytes=1)]
    slow[1]["stages"][-1]["at_s"] += 1.0
    took = dict(durations(recovery(1, "process", 1, slow)))
    assert took["reaped"] == pytest.approx(0.06) and took["ready"] == pytest.approx(0.35)
    assert took["bytes_moved"] == pytest.approx(0.08), "from attached on, beside the groups"
    assert took["groups_ready"] == pytest.approx(0.15) and took["bound"] == pytest.approx(1.04)


def test_bytes_move_beside_the_other_stages_only_where_there_were_some():
    assert {row.moving is None for row in rows(KILL)} == {True}
    moving = rows(LOSS)[1].moving
    assert (moving.stage, moving.took_s) == ("bytes_moved", pytest.approx(0.08))


def test_a_rank_that_stamped_nothing_yet_has_an_empty_row():
    assert rows(recovery(1, "process", 1, [rank(0, 0) | {"stages": []}]))[1].bars == ()


def test_a_recovery_that_has_just_begun_can_be_drawn():
    begun = {"generation": 0, "cause": "process", "device": -1, "reason": "", "stages": stages(detected=0.0)}
    assert end_s(begun) == 0.0
    read(page({"state": "recovering", "recoveries": [begun]}))


def test_a_second_fault_in_a_recovery_goes_on_in_the_same_row():
    names = ["detected", "reaped", "detected", "reaped", "planned"]
    twice = KILL | {"stages": [{"name": name, "at_s": 0.1 * n} for n, name in enumerate(names)]}
    assert [bar.stage for bar in rows(twice)[0].bars] == names


@pytest.mark.parametrize("total_s", [0.0, 1e-4, 0.07, 0.58, 1.0, 9.9, 61.0, 3600.0])
def test_ticks_are_few_round_and_within_the_picture(total_s):
    marks = ticks(total_s)
    assert 1 <= len(marks) <= 6
    assert marks[0] == 0.0 and marks[-1] <= total_s
    assert marks == sorted(set(marks))


def test_the_page_says_what_happened_and_loads_nothing():
    html = page(STATUS)
    told = read(html)
    for wanted in ("degraded", "TP=3", "device 2 lost, on with TP=3", "11.0 MiB", "0.58 s", "0 / 1469", "groups ready"):
        assert wanted in told.text
    assert any("bytes moved: 0.080 s" in tip for tip in told.tips)
    assert told.loads == ["data:,"], "only the empty icon"
    assert not re.search(r"https?://|@import|url\(", html)
    assert 'name="viewport"' in html and "prefers-color-scheme: dark" in html


def test_what_the_server_tells_is_text_and_no_markup():
    html = main_part(STATUS)
    assert "<b>" not in html and "&lt;b&gt;--anchor-min-devices" in html


def test_the_newest_recovery_comes_first_and_old_ones_are_left_out():
    many = [recovery(number, "process", 0, [rank(0, 0)]) for number in range(1, 41)]
    text = read(main_part(STATUS | {"recoveries": many})).text
    shown = [int(number) for number in re.findall(r"generation (\d+) ·", text)]
    assert shown == list(range(40, 40 - SHOWN, -1))


def test_bars_lie_within_their_track():
    for left, width in re.findall(r"left:([\d.]+)%;width:([\d.]+)%", page(STATUS)):
        assert float(left) >= 0 and float(left) + float(width) <= 100.02


def test_the_picture_shows_every_device_and_a_legend_within_its_edges():
    drawn = picture([KILL, LOSS])
    texts = [label.text for label in drawn.labels]
    assert "device 2 lost" in texts and "groups ready" in texts
    assert all(box.x >= 0 and box.x + box.width <= drawn.width for box in drawn.boxes)
    assert all(label.y < drawn.height for label in drawn.labels)
    assert to_svg(drawn).startswith("<svg")


def test_a_recovery_that_was_given_up_says_so():
    assert headline(GIVEN_UP) == "device 0 lost"
    assert "gave up: 1 of 4 devices are left" in read(main_part(STATUS)).text
