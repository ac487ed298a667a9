"""Inside the detokenizer: entry point, and the answer to a fence."""

import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from anchortp_sglang.recovery.wire import Fence, Reseed

_OTHER_PEERS_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class DetokenizerSpec:
    server_args: Any
    port_args: Any


def run(spec: DetokenizerSpec, pipe: Connection) -> None:
    """Be the detokenizer until killed; stands in for ``run_detokenizer_process``, minus its SIGQUIT."""
    import setproctitle
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager
    from sglang.srt.runtime_context import publish
    from sglang.srt.utils import configure_logger

    setproctitle.setproctitle("sglang::detokenizer")
    configure_logger(spec.server_args)
    publish(spec.server_args, role="detokenizer")
    try:
        manager = DetokenizerManager(spec.server_args, spec.port_args)
        pipe.send(("ready", {}))
        manager.event_loop()
    except BaseException:
        traceback.print_exc()


def after_init_ipc_channels(result: None, manager: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER DetokenizerManager.init_ipc_channels: watch who is connected to the PULL."""
    events = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
    manager._anchortp_peers = _Peers(manager.recv_from_scheduler.get_monitor_socket(events))


def after_init_request_dispatcher(result: None, manager: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER DetokenizerManager.init_request_dispatcher: handle fences and reseeds."""
    from sglang.utils import TypeBasedDispatcher

    ours = [(Fence, lambda fence: _answer(manager, fence)), (Reseed, lambda reseed: _reseed(manager, reseed))]
    manager._request_dispatcher += TypeBasedDispatcher(ours)


def _reseed(manager: Any, reseed: Reseed) -> None:
    """Take up each request where the dead detokenizer left it: all of its tokens again, minus the text sent."""
    from sglang.srt.managers.detokenizer_manager import DecodeStatus

    rows = zip(reseed.rids, reseed.decode_ids, reseed.context_tokens, reseed.sent_chars, strict=True)
    for rid, decode_ids, context_tokens, sent_chars in rows:
        manager.decode_status[rid] = DecodeStatus(
            decoded_text="",
            decode_ids=manager._clamp_decode_ids(decode_ids, manager.vocab_size),
            surr_offset=0,
            read_offset=context_tokens,
            sent_offset=sent_chars,
        )


class _Peers:
    """Connections on a socket, counted from its monitor's events."""

    def __init__(self, monitor: zmq.Socket[bytes]) -> None:
        self.monitor = monitor
        self.count = 0

    def wait_for_one(self, timeout_s: float) -> None:
        """Until one connection is left (the sender's), or time is up.

        The I/O thread may not have read a dead peer's last bytes yet, so an empty queue alone proves nothing;
        DISCONNECTED comes after end-of-file, when all of that peer's messages are in the queue.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left = 0.0 if self.count <= 1 else max(0.0, deadline - time.monotonic())
            if not self.monitor.poll(int(left * 1000)):
                return
            accepted = recv_monitor_message(self.monitor)["event"] == zmq.EVENT_ACCEPTED
            self.count += 1 if accepted else -1


def _answer(manager: Any, fence: Fence) -> Fence:
    """Push everything the dead rank 0 still said to TokenizerManager, then the fence behind it."""
    from sglang.srt.managers.io_struct import sock_recv, sock_send

    started = time.monotonic()
    manager._anchortp_peers.wait_for_one(_OTHER_PEERS_TIMEOUT_S)
    fence.waited_s = time.monotonic() - started
    while True:
        try:
            message = sock_recv(manager.recv_from_scheduler, zmq.NOBLOCK)
        except zmq.Again:
            return fence
        fence.drained += 1
        output = manager._request_dispatcher(message)
        if output is not None:
            sock_send(manager.send_to_tokenizer, output)
