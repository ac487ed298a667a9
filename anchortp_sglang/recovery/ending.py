"""Ends a server on SIGTERM and SIGINT: at once while it starts, after its open requests while it serves.

A handler is there from the first moment, since the kernel drops these signals for a PID 1 without one. Cleanups are
registered as resources are made. They run right in the handler, as an exception might be swallowed on its way out of
SGLang's start.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import psutil

from anchortp_sglang.recovery.state_machine import Phase

if TYPE_CHECKING:
    from anchortp_sglang.recovery.coordinator import Coordinator

log = logging.getLogger("anchortp_sglang")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_POLL_S = 0.2
_LAST_WORDS_S = 0.5  # for answers on their way to clients

_cleanups: list[Callable[[], None]] = []
_serving = False


def on_end(cleanup: Callable[[], None]) -> None:
    """Register a cleanup for an end by a signal. The last one runs first; each must tolerate a partial cleanup."""
    _cleanups.append(cleanup)


def end_at_once_on_signals() -> None:
    """End at once on SIGTERM and SIGINT; for a server that starts."""
    for number in _SIGNALS:
        signal.signal(number, _on_start_signal)


def ignore_signals() -> None:
    """Ignore SIGTERM and SIGINT during cleanup, which must not begin twice."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_by(number: int) -> NoReturn:
    """Clean up, and end like a process that this signal has killed."""
    _say(f"{signal.Signals(number).name}: ending at once")
    _clean_up()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # PID 1 is not killed


def drain_on_signals(loop: asyncio.AbstractEventLoop, tokenizer_manager: Any, coordinator: "Coordinator") -> None:
    """Let open requests finish at the first signal, and end at once at the second; for a server that serves.

    Call it on the loop, once SGLang has installed its handler of SIGTERM (TokenizerManager.auto_create_handle_loop) and
    uvicorn that of SIGINT (Server.capture_signals).
    """
    global _serving
    _serving = True
    draining = _Draining(tokenizer_manager, coordinator)
    for number in _SIGNALS:
        loop.add_signal_handler(number, draining.on_signal, number, signal.getsignal(number))


def _on_start_signal(number: int, frame: Any) -> None:
    if _serving and number == signal.SIGINT:
        raise KeyboardInterrupt  # uvicorn has drained, raises the signal again and expects this exception
    end_by(number)


class _Draining:
    def __init__(self, tokenizer_manager: Any, coordinator: "Coordinator") -> None:
        self._tm = tokenizer_manager
        self._coordinator = coordinator
        self._task: asyncio.Task[None] | None = None

    def on_signal(self, number: int, stock: Any) -> None:
        if self._task is not None:
            end_by(number)
        if number == signal.SIGTERM:
            self._tm.signal_handler_class(self._tm).sigterm_handler(number)
        else:
            stock(number, None)
        self._task = asyncio.get_running_loop().create_task(self._end_unless_serving())

    async def _end_unless_serving(self) -> None:
        """End a server that is down or recovering; SGLang ends one that serves, once no request is open.

        SGLang's TokenizerManager.sigterm_watchdog would wait for requests that a server that is down never answers, and
        in a recovery for ranks that cannot be told to exit.
        """
        while self._awaits_answers():
            await asyncio.sleep(_POLL_S)
        inflight = self._coordinator.inflight
        if inflight is not None and inflight.refusal is not None:
            inflight.give_up(inflight.refusal)
        await asyncio.sleep(_LAST_WORDS_S)
        _say("no open request can be answered any more: ending")
        _clean_up()
        os._exit(0)

    def _awaits_answers(self) -> bool:
        phase = self._coordinator.state.phase
        return phase is Phase.SERVING or (phase is not Phase.DOWN and bool(self._tm.rid_to_state))


def _clean_up() -> None:
    ignore_signals()
    for cleanup in reversed(_cleanups):
        try:
            cleanup()
        except Exception:  # the other cleanups must still run
            traceback.print_exc()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _say(text: str) -> None:
    """Write to stderr without print, which must not be re-entered when a signal interrupts it."""
    os.write(2, f"anchortp: {text}\n".encode())
