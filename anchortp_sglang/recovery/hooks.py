"""Hooks in main: SGLang's launch and TokenizerManager, tied to this server's coordinator."""

import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

from anchortp_sglang.recovery.coordinator import Coordinator
from anchortp_sglang.recovery.ledger import TokenCountMismatch
from anchortp_sglang.refusals import check_generate_request

log = logging.getLogger(__name__)

_FIRST_START_TIMEOUT_S = 3600.0

_coordinator: Coordinator | None = None


def install_coordinator(coordinator: Coordinator) -> None:
    """Make it this process's; the hooks below act on it."""
    global _coordinator
    _coordinator = coordinator


def coordinator() -> Coordinator:
    if _coordinator is None:
        raise RuntimeError("no coordinator: start the server with anchortp_sglang.launch_server or Engine")
    return _coordinator


def launch_scheduler_processes(
    cls: type, server_args: Any, port_args: Any, run_scheduler_process_func: Any, **kwargs: Any
) -> tuple[Any, None]:
    """REPLACE Engine._launch_scheduler_processes; procs=None keeps ranks out of the stock watchdog."""
    from sglang.srt.entrypoints.engine import SchedulerInitResult

    mine = coordinator()
    mine.cluster.use_ports(port_args)
    mine.start_first()
    infos: list[dict[str, Any]] = []
    assert mine.generation is not None
    return SchedulerInitResult(
        scheduler_infos=infos,
        all_child_pids=[child.pid for child in mine.generation.ranks],
        wait_for_ready=lambda: infos.extend(mine.wait_first(_FIRST_START_TIMEOUT_S)),
        block_until_scheduler_exits=lambda: None,
    ), None


def launch_detokenizer(
    cls: type, server_args: Any, port_args: Any, run_detokenizer_process_func: Any
) -> tuple[list[Any], list[str]]:
    """REPLACE Engine._launch_detokenizer_subprocesses."""
    coordinator().cluster.start_detokenizer(server_args)
    return [], []


def after_set_envs(result: None, *args: Any, **kwargs: Any) -> None:
    """AFTER engine._set_envs_and_config, which installs a handler that kills the whole tree."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGQUIT, _ignore_sigquit)


def on_sigquit(handler: Any, signum: Any = None, frame: Any = None) -> None:
    """REPLACE SignalHandler.running_phase_sigquit_handler, which kills the whole tree."""
    _ignore_sigquit(signum, frame)


def _ignore_sigquit(signum: Any, frame: Any) -> None:
    log.warning("anchortp: SIGQUIT ignored; the death of a rank is seen by its pidfd")


def after_auto_create_handle_loop(result: None, tokenizer_manager: Any) -> None:
    """AFTER TokenizerManager.auto_create_handle_loop: its event loop is known from here on."""
    mine = coordinator()
    if mine.ledger is None:
        mine.attach(tokenizer_manager)


def around_dispatch(original: Callable[..., None], tokenizer_manager: Any, message: Any) -> None:
    """AROUND TokenizerManager._dispatch_to_scheduler: recorded, or held back in an outage."""
    ledger = coordinator().ledger
    assert ledger is not None
    ledger.dispatch(message)


async def around_async_dispatch(original: Callable[..., Any], tokenizer_manager: Any, message: Any) -> None:
    """AROUND TokenizerManager._async_dispatch_to_scheduler (control messages)."""
    ledger = coordinator().ledger
    assert ledger is not None
    ledger.dispatch(message)


async def around_handle_batch_output(original: Callable[..., Any], tokenizer_manager: Any, output: Any) -> None:
    """AROUND TokenizerManager._handle_batch_output: nothing doubled, nothing missing reaches a client.

    Must not raise: print_exception_wrapper would kill the whole tree.
    """
    mine = coordinator()
    assert mine.ledger is not None
    try:
        fresh = mine.ledger.delivered(output)
    except TokenCountMismatch as error:
        mine.on_mismatch(error)
        return
    await original(tokenizer_manager, output)
    mine.ledger.forget(output.rids)
    if fresh:
        mine.on_tokens(fresh)


class NotResumable(ValueError):
    """A request that could not be continued after a fault; SGLang answers ValueErrors with 400."""


def before_generate_request(tokenizer_manager: Any, obj: Any, request: Any = None) -> None:
    """BEFORE TokenizerManager.generate_request: every way in passes here; streams are checked earlier too."""
    _admit(obj)


async def around_serve_generate_request(original: Callable[..., Any], obj: Any, request: Any) -> Any:
    """AROUND http_server.serve_generate_request: a stream's status is sent before its generator runs."""
    from sglang.srt.entrypoints.http_server import _create_error_response

    try:
        _admit(obj)
    except NotResumable as error:
        return _create_error_response(error)
    return await original(obj, request)


def before_handle_streaming_request(serving: Any, adapted_request: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE OpenAIServingChat/Completion._handle_streaming_request; handle_request turns it into a 400."""
    _admit(adapted_request)


def _admit(obj: Any) -> None:
    reason = check_generate_request(obj)
    if reason is not None:
        raise NotResumable(reason)
