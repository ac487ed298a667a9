"""A result of SGLang's benchmark counts only if every request got all of its tokens."""

import math

import pytest

from anchortp_sglang.bench.serving_load import NEW_TOKENS, ServingLoad, _figures
from anchortp_sglang.testing.server import ServerFailed

GOOD = (0.1, NEW_TOKENS, [0.01] * (NEW_TOKENS - 1), "")
ERROR_AT_ONCE = (0.0, NEW_TOKENS, [], "")  # an error in the stream: its client says that it succeeded
ENDED_EARLY = (0.1, 1, [], "")
REFUSED = (0.0, 0, [], "Bad Request")


def result(*requests):
    ttfts, lengths, itls, errors = map(list, zip(*requests, strict=True))
    figures = {"output_throughput": 50.0, "median_ttft_ms": 100.0, "median_itl_ms": 10.0, "p99_itl_ms": 20.0}
    return figures | {"ttfts": ttfts, "output_lens": lengths, "itls": itls, "errors": errors}


def test_figures_are_in_seconds():
    found = _figures(result(GOOD, GOOD), 2)
    assert (found.throughput, found.ttft_s, found.itl_s, found.itl_p99_s) == (50.0, 0.1, 0.01, 0.02)


@pytest.mark.parametrize("bad", [ERROR_AT_ONCE, ENDED_EARLY, REFUSED])
def test_a_request_without_all_of_its_tokens_ends_the_measurement(bad):
    with pytest.raises(ServerFailed, match="1 of 2 requests did not get all"):
        _figures(result(GOOD, bad), 2)
    with pytest.raises(ServerFailed, match="1 of 2"):
        _figures(result(GOOD), 2)


@pytest.mark.parametrize(
    "load", [{"rate_per_s": 0.0}, {"rate_per_s": math.inf}, {"rate_per_s": math.nan}, {"batch": 0}]
)
def test_a_load_of_nothing_or_of_everything_at_once_is_refused(load):
    with pytest.raises(ValueError, match="a load needs"):
        ServingLoad(**load)


def test_a_round_has_some_seconds_of_arrivals_or_three_batches():
    assert [str(load) for load in (ServingLoad(2), ServingLoad(batch=32))] == ["2 requests/s", "batch 32"]
    assert (ServingLoad(2).prompts, ServingLoad(0.1).prompts, ServingLoad(batch=32).prompts) == (16, 8, 96)
