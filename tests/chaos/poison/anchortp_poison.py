"""Requests that no check can foresee: a plugin of SGLang's that makes ranks fail when they compute certain tokens.

For servers under test: this folder goes on their PYTHONPATH. Every prompt that begins with one of the pairs below is
poison; what it does, it does in the forward pass of each rank.
"""

import os
import signal
import time

MARK = 7
RAISE, DIE, RAISE_SOMEWHERE, HANG = (MARK, 1), (MARK, 2), (MARK, 3), (MARK, 4)
"""Raise; be killed by a signal; raise where the code has no single request; make no progress any more."""


def load() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    scheduler = "sglang.srt.managers.scheduler.Scheduler."
    HookRegistry.register(scheduler + "run_batch", before_run_batch, HookType.BEFORE)
    HookRegistry.register(scheduler + "init_model_worker", before_init_model_worker, HookType.BEFORE)


def before_init_model_worker(*args, **kwargs) -> None:
    """Crash in each start, as long as the file is there that ANCHORTP_POISONED_START names."""
    if os.path.exists(os.environ.get("ANCHORTP_POISONED_START", "")):
        os.kill(os.getpid(), signal.SIGSEGV)


def before_run_batch(scheduler, batch, *args, **kwargs) -> None:
    for request in batch.reqs:
        _act(tuple(request.origin_input_ids[:2]), request)


def _act(mark, request) -> None:
    if mark == RAISE:
        raise RuntimeError("poisoned")
    if mark == DIE:
        os.kill(os.getpid(), signal.SIGSEGV)
    if mark == HANG:
        time.sleep(3600.0)
    if mark == RAISE_SOMEWHERE:
        del request
        _fail()


def _fail() -> None:
    raise RuntimeError("poisoned somewhere")
