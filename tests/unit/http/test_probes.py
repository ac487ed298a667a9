"""Which answer each probe gets, in each state of the server."""

import pytest

from anchortp_sglang.http.probes import PROBES, Tokenizer, answer
from anchortp_sglang.recovery.state_machine import Phase

UP = Tokenizer(starting=False, leaving=False)
STARTING = Tokenizer(starting=True, leaving=False)
LEAVING = Tokenizer(starting=False, leaving=True)
RECOVERING = (Phase.FENCING, Phase.STARTING, Phase.REPLAYING)


def answers(phase, tokenizer):
    return {path: answer(path, phase, tokenizer) for path in PROBES}


def test_while_serving_only_liveness_is_answered_without_asking_sglang():
    ours = {"/health": 200, "/health_generate": None, "/ready": None, "/ping": None}
    assert answers(Phase.SERVING, UP) == ours


@pytest.mark.parametrize("phase", RECOVERING)
def test_in_a_recovery_it_lives_but_takes_no_new_requests(phase):
    ours = {"/health": 200, "/health_generate": 200, "/ready": 503, "/ping": None}
    assert answers(phase, UP) == ours


@pytest.mark.parametrize("tokenizer", [STARTING, LEAVING])
@pytest.mark.parametrize("phase", [Phase.SERVING, *RECOVERING])
def test_before_the_first_generation_and_while_it_leaves_sglang_says_503(phase, tokenizer):
    """Nobody may take a server for started because a rank died while it was starting."""
    assert set(answers(phase, tokenizer).values()) <= {None, 503}
