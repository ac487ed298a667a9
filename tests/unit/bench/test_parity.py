"""``anchortp parity``, as far as it needs no server: what counts as equal, what is told, and the exit codes."""

import dataclasses
import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from anchortp_sglang.bench.parity import (
    PROMPT_LENGTHS,
    Answer,
    BadAnswer,
    answers_as_json,
    answers_from_json,
    as_json,
    compare,
    compare_all,
    make_prompts,
    read_answer,
    verdict,
)
from anchortp_sglang.cli import parity
from anchortp_sglang.cli.app import app

TOLERANCE = 1e-4
STOCK = Answer(prompt_logprobs=(-1.0, -2.0, -3.0), tokens=(7, 8, 9, 8), logprobs=(-0.5, -0.25, -0.125, -1.0))
NAN = float("nan")


def judged(ours, stock=STOCK, tolerance=TOLERANCE):
    return verdict([compare_all("", [STOCK, stock], [STOCK, ours])], tolerance)


def changed(answer=STOCK, **fields):
    return dataclasses.replace(answer, **fields)


def test_equal_answers_are_equal():
    found = compare(STOCK, STOCK)
    assert (found.prompt_tokens, found.first_difference) == (4, None)
    assert (found.distinct_tokens, found.distinct_stock_tokens) == (3, 3)
    assert (found.prefill.max, found.prefill.mean, found.prefill.pairs, found.prefill.unpaired) == (0, 0, 3, 0)
    assert (found.decode.max, found.decode.pairs) == (0, 4)
    assert found.equal(0)
    assert judged(STOCK).exit_code == 0


def test_noise_within_the_tolerance_is_equal():
    found = judged(changed(prompt_logprobs=(-1.0, -2.00005, -3.0)))
    assert found.exit_code == 0
    assert "5.0e-05" in found.text
    assert "repeat" not in found.text


@pytest.mark.parametrize("position", [0, 2, 3])
def test_a_changed_token_is_placed_and_what_follows_it_is_not_compared(position):
    tokens = [token + (n >= position) for n, token in enumerate(STOCK.tokens)]
    logprobs = [value - (n > position) for n, value in enumerate(STOCK.logprobs)]
    ours = changed(tokens=tuple(tokens), logprobs=tuple(logprobs))
    found = compare(STOCK, ours)
    assert found.first_difference == position
    assert (found.decode.max, found.decode.pairs) == (0, position + 1)
    assert not found.equal(TOLERANCE)
    assert judged(ours).exit_code == 1
    assert f"prompt of 4, token {position}" in judged(ours).text


@pytest.mark.parametrize("part", ["prompt_logprobs", "logprobs"])
@pytest.mark.parametrize("position", [0, 2])
@pytest.mark.parametrize("shift", [-0.001, 0.001])
def test_a_shifted_logprob_is_told_in_its_part_and_differs(part, position, shift):
    values = list(getattr(STOCK, part))
    values[position] += shift
    ours = changed(**{part: tuple(values)})
    prefill, decode = compare(STOCK, ours).prefill, compare(STOCK, ours).decode
    hit, spared = (prefill, decode) if part == "prompt_logprobs" else (decode, prefill)
    assert hit.max == pytest.approx(0.001)
    assert hit.mean == pytest.approx(0.001 / len(values))
    assert spared.max == 0
    assert judged(ours).exit_code == 1
    assert "1.0e-03" in judged(ours).text
    assert judged(ours, tolerance=0.01).exit_code == 0


@pytest.mark.parametrize(
    ("ours", "position"),
    [
        (Answer(STOCK.prompt_logprobs, STOCK.tokens[:3], STOCK.logprobs[:3]), 3),
        (Answer(STOCK.prompt_logprobs, (*STOCK.tokens, 5), (*STOCK.logprobs, -9.0)), 4),
    ],
    ids=["shorter", "longer"],
)
def test_an_answer_of_another_length_differs_where_it_ends(ours, position):
    found = compare(STOCK, ours)
    assert found.first_difference == position
    assert found.decode.unpaired == 0
    assert judged(ours).exit_code == 1


@pytest.mark.parametrize("value", [None, NAN, float("-inf")])
@pytest.mark.parametrize("part", ["prompt_logprobs", "logprobs"])
def test_a_logprob_that_is_no_number_is_never_equal(value, part):
    broken = changed(**{part: (value, *getattr(STOCK, part)[1:])})
    assert judged(broken).exit_code == 1
    assert judged(broken, stock=broken).exit_code == 1
    assert "not a number" in judged(broken, stock=broken).text
    assert json.dumps(as_json([compare_all("", [STOCK], [broken])]), allow_nan=False)


def test_prompt_logprobs_of_another_number_differ():
    assert judged(changed(prompt_logprobs=STOCK.prompt_logprobs[:2])).exit_code == 1


def test_a_constant_output_is_told():
    constant = changed(tokens=(7, 7, 7, 7))
    assert compare(constant, constant).distinct_stock_tokens == 1
    found = judged(constant, stock=constant)
    assert found.exit_code == 0
    assert "1 of 2 answers repeat one token" in found.text


def test_a_single_new_token_is_no_constant_output():
    short = Answer((), (7,), (-0.5,))
    assert "repeat" not in judged(short, stock=short).text


def test_a_difference_after_a_loss_decides():
    rounds = [
        compare_all("before loss", [STOCK], [STOCK]),
        compare_all("after loss", [STOCK], [changed(tokens=(7, 8, 9, 9))]),
    ]
    found = verdict(rounds, TOLERANCE)
    assert found.exit_code == 1
    assert "after loss: prompt of 4, token 3" in found.text


def test_nothing_compared_is_not_equal():
    assert verdict([], TOLERANCE).exit_code == 1


@pytest.mark.parametrize("vocab_size", [16, 512, 151936])
def test_prompts_are_always_the_same_and_within_the_vocabulary(vocab_size):
    prompts = make_prompts(vocab_size)
    assert prompts == make_prompts(vocab_size)
    assert tuple(map(len, prompts)) == PROMPT_LENGTHS == (1, 5, 33, 128, 300)
    assert all(0 <= token < vocab_size for prompt in prompts for token in prompt)
    assert len(set(prompts[-1])) > min(vocab_size, 300) // 2


def answer_body(**changes):
    body = {
        "output_ids": [7, 8],
        "meta_info": {
            "input_token_logprobs": [[None, 1, None], [-1.5, 2, None]],
            "output_token_logprobs": [[-0.5, 7, None], [None, 8, None]],
        },
    }
    return body | changes


def test_an_answer_is_read_as_sglang_gives_it():
    assert read_answer([1, 2], answer_body()) == Answer((-1.5,), (7, 8), (-0.5, None))


@pytest.mark.parametrize(
    ("prompt", "body"),
    [
        ([1, 3], answer_body()),
        ([1, 2, 3], answer_body()),
        ([1, 2], answer_body(output_ids=[7])),
        ([1, 2], answer_body(output_ids=[])),
        ([1, 2], answer_body(meta_info={})),
        ([1, 2], {"error": {"message": "no"}}),
        ([1, 2], []),
    ],
)
def test_an_answer_to_something_else_is_not_compared(prompt, body):
    with pytest.raises(BadAnswer):
        read_answer(prompt, body)


# ---- the command, with the servers left out


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 512}')
    return tmp_path


@pytest.fixture
def command(checkpoint, monkeypatch):
    """command(answer of ours, *arguments): the outcome of the command if the servers had answered so."""

    def run(ours, *arguments):
        monkeypatch.setattr(parity, "run", lambda job: [compare_all("", [STOCK] * 5, [ours] * 5)])
        return invoke("--model", str(checkpoint), "--tp", "2", *arguments)

    return run


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(app, ["parity", *arguments])


def test_the_command_shows_a_table_and_ends_with_the_verdicts_code(command):
    same, other = command(STOCK), command(changed(tokens=(7, 8, 9, 9)))
    assert (same.exit_code, other.exit_code) == (0, 1)
    assert same.stdout.count("yes") == 5 and "EQUAL" in same.stdout
    assert other.stdout.count("no, at 3") == 5 and "DIFFERENT" in other.stdout


def test_the_tolerance_is_the_users(command):
    shifted = changed(logprobs=(-0.501, *STOCK.logprobs[1:]))
    assert command(shifted).exit_code == 1
    assert command(shifted, "--tolerance", "0.01").exit_code == 0


def test_json_says_what_the_table_says(command):
    done = command(changed(tokens=(7, 8, 9, 9)), "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["equal"]) == (1, False)
    assert [one["first_difference"] for one in found["rounds"][0]["prompts"]] == [3] * 5


def test_the_widest_table_fits_a_terminal():
    long = Answer((-1.0,) * 299, tuple(range(100)), (-0.1,) * 100)
    ours = [changed(long, tokens=(*range(99), 7)), changed(long, logprobs=(None,) * 100)]
    rounds = [compare_all(when, [long, long], ours) for when in ("before loss", "after loss")]
    console = Console(width=80, file=io.StringIO())
    console.print(parity.parity_view(rounds, verdict(rounds, TOLERANCE), TOLERANCE))
    text = console.file.getvalue()
    assert "…" not in text
    for told in ("before loss", "after loss", "prompt", "no, at 99", "100/100", "0.0e+00", "NaN"):
        assert told in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tp", "0"], "--tp"),
        (["--tp", "2", "--tokens", "0"], "--tokens"),
        (["--tp", "2", "--lose", "2"], "--lose"),
        (["--tp", "2", "--lose", "-1"], "--lose"),
        (["--tp", "1", "--lose", "0"], "no device would be left"),
        (["--tp", "2", "--reference", "/nonexistent"], "--reference"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(checkpoint, arguments, told):
    done = invoke("--model", str(checkpoint), *arguments)
    assert done.exit_code == 2
    assert told in done.output


@pytest.mark.parametrize("config", [None, "{", "{}", '{"vocab_size": "many"}'])
def test_a_model_that_cannot_be_read_is_told(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    done = invoke("--model", str(tmp_path), "--tp", "2")
    assert done.exit_code == 2
    assert "config.json" in done.output


def test_kept_answers_come_back_as_they_were() -> None:
    answers = [Answer((None, -0.5), (7, 9), (-1.25, None)), Answer((), (3,), (-2.0,))]
    text = json.dumps(answers_as_json(answers))
    assert answers_from_json(json.loads(text)) == answers
    with pytest.raises(BadAnswer, match="2 tokens came with 1 logprobs"):
        answers_from_json({"answers": [{"prompt_logprobs": [], "tokens": [1, 2], "logprobs": [-1.0]}]})
