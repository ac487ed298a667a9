"""Restores the grammars of resumed requests, which constrain their output (JSON schema, regex, structural tags, …).

A new rank compiles a request's grammar as for a new one (constrained/grammar_manager.py), and then it stands before the
first token. It must accept the tokens that the client has, as it did when they were sampled.

A grammar that still compiles is a Future in GrammarManager's queue; the request comes to the waiting queue when all
ranks have compiled it (``get_ready_grammar_requests``). A cached one is there at once. Both pass
``Scheduler._add_request_to_queue``, and so does a request that was retracted, whose grammar SGLang keeps.
"""

from typing import Any


def expect(req: Any) -> None:
    """Note that the request's grammar, which does not exist yet, will be behind its output tokens."""
    req.anchortp_grammar_behind = True


def restore(req: Any, processor: Any) -> None:
    """Advance a grammar that is behind over the request's output tokens; once, and only if there is one.

    ``processor``: the scheduler's SchedulerBatchResultProcessor, which advances grammars. A token that the grammar does
    not accept ends the request with SGLang's error, as in an unbroken run. A grammar that failed to compile is gone by
    now (``Req.set_finish_with_abort``).
    """
    if not getattr(req, "anchortp_grammar_behind", False):
        return
    req.anchortp_grammar_behind = False
    if req.grammar is None:
        return
    for token in req.output_ids:
        processor._accept_grammar_tokens(req, token)
        # As process_batch_result_decode does after each token: llguidance's accept_token sets it at an end token, which
        # a request with ignore_eos outlives.
        req.grammar.finished = req.finished()
        if req.to_finish is not None:
            return
