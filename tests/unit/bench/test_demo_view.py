"""What the demo concludes and shows from what its clients received."""

import io

import pytest
from rich.console import Console

from anchortp_sglang.bench.demo_view import Fault, Screen, fault_table, verdict
from anchortp_sglang.testing.openai_streams import ClientStream

RECOVERY = {
    "tfs_s": 0.5,
    "reload_bytes": 7_000_000,
    "copied_bytes": 0,
    "requests_replayed": 2,
    "tokens_reused": 9,
    "tokens_recomputed": 1,
    "stages": [{"name": "detected", "at_s": 0.0}, {"name": "first_token", "at_s": 0.5}],
}


def stream(text="abc", tokens=3, arrivals=((1.0, 1), (1.1, 2), (1.9, 3)), **fields):
    return ClientStream("chat", "hello", text, tokens, "length", list(arrivals), done=True, **fields)


def plain(*parts, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(*parts, sep="\n")
    return console.file.getvalue()


def test_equal_streams_are_identical():
    assert "1 of 1 streams identical" in plain(verdict([stream()], [stream()]))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (stream(text="abX"), "text differs from character 2 on"),
        (stream(text="ab"), "text differs from character 2 on"),
        (stream(tokens=4), "4 tokens (length) instead of 3 (length)"),
        (stream(text="a", tokens=1, error="APIError: gone"), "ended after 1 tokens with APIError: gone"),
    ],
)
def test_a_stream_that_differs_in_anything_is_named(other, told):
    text = plain(verdict([stream(), stream()], [stream(), other]))
    assert "1 of 2 streams identical" in text
    assert f"stream 2: {told}" in text


def test_the_pause_is_the_longest_gap_that_overlaps_the_fault():
    one = stream(arrivals=[(0.0, 1), (0.7, 2), (1.0, 3), (1.05, 4), (1.6, 5), (3.0, 6)])
    assert one.pause_around(1.02, 1.7) == (pytest.approx(1.4), 3.0)
    assert one.pause_around(1.02, 1.5) == (pytest.approx(0.55), 1.6)


def test_pauses_and_tokens_are_counted_for_each_fault():
    fault = Fault("loss of device 2", 1.2, 2.0, 4, 3, RECOVERY)
    text = plain(fault_table([fault], [stream(), stream()]))
    for row in ("0.80 s", "0.70 s", "4 → 3", "7.0 MB", "9 / 1", "first_token"):
        assert row in text
    assert text.split("tokens received after it")[1].split("│")[1].strip() == "2"


def test_without_a_terminal_lines_are_printed_whole(tmp_path):
    console = Console(file=io.StringIO(), width=20)
    log = tmp_path / "server.log"
    log.write_text("")
    with Screen(console) as screen:
        screen.print_line("a line that is longer than the console is wide")
        screen.fail("it broke [here]", log)
    text = console.file.getvalue()
    assert "a line that is longer than the console is wide\n" in text
    assert "it broke [here]" in text
    assert str(log) in text
