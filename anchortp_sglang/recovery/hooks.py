"""Ties SGLang's launch and TokenizerManager, in main, to this server's coordinator."""

import logging
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from anchortp_sglang.admission.checks import check_message
from anchortp_sglang.admission.long_texts import is_long, run_in_thread
from anchortp_sglang.recovery.coordinator import Coordinator
from anchortp_sglang.recovery.processes.descriptors import log_ways
from anchortp_sglang.recovery.requests import adapters
from anchortp_sglang.recovery.requests.down import ServerDown
from anchortp_sglang.recovery.requests.inflight import TokenCountMismatch
from anchortp_sglang.recovery.requests.pause import pause_and_abort

log = logging.getLogger(__name__)

_FIRST_START_TIMEOUT_S = 3600.0

_coordinator: Coordinator | None = None


def install_coordinator(coordinator: Coordinator) -> None:
    """Make this coordinator the process's own; the hooks below act on it."""
    global _coordinator
    _coordinator = coordinator


def installed_coordinator() -> Coordinator:
    """Return this process's coordinator. Raises RuntimeError in a server that was started without one."""
    if _coordinator is None:
        raise RuntimeError("no coordinator: start the server with anchortp_sglang.launch_server or Engine")
    return _coordinator


def launch_scheduler_processes(
    cls: type, server_args: Any, port_args: Any, run_scheduler_process_func: Any, **kwargs: Any
) -> tuple[Any, None]:
    """REPLACE Engine._launch_scheduler_processes; procs=None keeps ranks out of the stock watchdog."""
    from sglang.srt.entrypoints.engine import SchedulerInitResult

    coordinator = installed_coordinator()
    coordinator.processes.take_ports(port_args)
    coordinator.start_first()
    generation, infos = coordinator.generation, list[dict[str, Any]]()
    assert generation is not None

    def wait_for_ready() -> None:
        infos.extend(coordinator.wait_first(_FIRST_START_TIMEOUT_S))
        log_ways(generation)

    return SchedulerInitResult(
        scheduler_infos=infos,
        all_child_pids=[child.pid for child in generation.ranks],
        wait_for_ready=wait_for_ready,
        block_until_scheduler_exits=lambda: None,
    ), None


def launch_detokenizer(
    cls: type, server_args: Any, port_args: Any, run_detokenizer_process_func: Any
) -> tuple[list[Any], list[str]]:
    """REPLACE Engine._launch_detokenizer_subprocesses."""
    installed_coordinator().processes.start_detokenizer(server_args)
    return [], []


def after_set_envs(result: None, *args: Any, **kwargs: Any) -> None:
    """AFTER engine._set_envs_and_config, which installs a handler that kills the whole tree."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGQUIT, _ignore_sigquit)


def on_sigquit(handler: Any, signum: Any = None, frame: Any = None) -> None:
    """REPLACE SignalHandler.running_phase_sigquit_handler, which kills the whole tree."""
    _ignore_sigquit(signum, frame)


def _ignore_sigquit(signum: Any, frame: Any) -> None:
    log.warning("anchortp: SIGQUIT is ignored: the server notices dead ranks by their pidfds")


def after_auto_create_handle_loop(result: None, tokenizer_manager: Any) -> None:
    """AFTER TokenizerManager.auto_create_handle_loop: its event loop is known from here on."""
    coordinator = installed_coordinator()
    if coordinator.inflight is None:
        coordinator.attach(tokenizer_manager)


def around_dispatch(original: Callable[..., None], tokenizer_manager: Any, message: Any) -> None:
    """AROUND TokenizerManager._dispatch_to_scheduler: record the message, or hold it back in an outage."""
    _dispatch(message)


async def around_async_dispatch(original: Callable[..., Any], tokenizer_manager: Any, message: Any) -> None:
    """AROUND TokenizerManager._async_dispatch_to_scheduler (control messages)."""
    _dispatch(message)


async def around_pause_generation(original: Callable[..., Any], tokenizer_manager: Any, message: Any) -> None:
    """AROUND TokenizerManager.pause_generation: end open requests without keeping others from going on."""
    if message.mode != "abort":
        return await original(tokenizer_manager, message)
    await pause_and_abort(tokenizer_manager, installed_coordinator().inflight)


def _dispatch(message: Any) -> None:
    """Record and send a message. Raises ValueError for one whose effect a recovery would lose (``SERVED_MESSAGES``)."""
    refusal = check_message(type(message).__name__)
    if refusal is not None:
        raise ValueError(refusal)
    inflight = installed_coordinator().inflight
    assert inflight is not None
    inflight.dispatch(message)


async def around_tokenize_texts(original: Callable[..., Any], tokenizer_manager: Any, texts: Any, *args: Any) -> Any:
    """AROUND TokenizerManager._tokenize_texts: tokenize long texts in a thread."""
    if not is_long(texts) or tokenizer_manager.async_dynamic_batch_tokenizer is not None:
        return await original(tokenizer_manager, texts, *args)
    tokens = await run_in_thread(original, tokenizer_manager, texts, *args)
    inflight = installed_coordinator().inflight
    if inflight is not None and inflight.refusal is not None:  # the request's state is gone by now
        raise ServerDown(inflight.refusal)
    return tokens


async def around_control_call(original: Callable[..., Any], communicator: Any, message: Any) -> Any:
    """AROUND FanOutCommunicator.__call__: end the call if the server goes down before the ranks have answered."""
    inflight = installed_coordinator().inflight
    assert inflight is not None
    call = original
    if isinstance(message, adapters.MESSAGES):

        def call(communicator: Any, message: Any) -> Any:
            return inflight.control.adapters.run(partial(original, communicator), message)

    return await inflight.control_calls.run(call, communicator, message)


async def around_handle_batch_output(original: Callable[..., Any], tokenizer_manager: Any, output: Any) -> None:
    """AROUND TokenizerManager._handle_batch_output: let no doubled or missing token reach a client.

    Must not raise: print_exception_wrapper would kill the whole tree.
    """
    coordinator = installed_coordinator()
    assert coordinator.inflight is not None
    try:
        fresh = coordinator.inflight.delivered(output)
    except TokenCountMismatch as error:
        coordinator.on_mismatch(error)
        return
    await original(tokenizer_manager, output)
    coordinator.inflight.forget(output.rids)
    if fresh:
        coordinator.on_tokens(fresh)
