"""The detokenizer's side of recoveries: entry point, and the answer to a fence."""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from anchortp_sglang.rank.messages import Fence, Ping, Reseed

_OTHER_PEERS_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class DetokenizerSpec:
    server_args: Any
    port_args: Any


def run(spec: DetokenizerSpec, pipe: Connection) -> None:
    """Run the detokenizer until it is killed; replaces ``run_detokenizer_process``, without its SIGQUIT."""
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
    """AFTER DetokenizerManager.init_ipc_channels: watch the connections of the PULL socket."""
    events = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
    manager._anchortp_peers = _Peers(manager.recv_from_scheduler.get_monitor_socket(events))


def after_init_request_dispatcher(result: None, manager: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER DetokenizerManager.init_request_dispatcher: handle fences, pings and reseeds."""
    from sglang.utils import TypeBasedDispatcher

    ours = [
        (Fence, lambda fence: _answer(manager, fence)),
        (Ping, lambda ping: ping),
        (Reseed, lambda reseed: _reseed(manager, reseed)),
    ]
    manager._request_dispatcher += TypeBasedDispatcher(ours)


def _reseed(manager: Any, reseed: Reseed) -> None:
    """Continue each request where the dead detokenizer left it."""
    from sglang.srt.managers.detokenizer_manager import DecodeStatus

    for row, rid in enumerate(reseed.rids):
        ids = manager._clamp_decode_ids(reseed.decode_ids[row], manager.vocab_size)
        flags = [reseed.skip_special[row]], [reseed.space_special[row]]

        def decode(ids: list[int], flags: tuple[list[bool], list[bool]] = flags) -> str:
            return str(manager._grouped_batch_decode([ids], *flags)[0])

        text, read_offset = _committed(decode, ids, reseed.context_tokens[row], reseed.sent_chars[row])
        manager.decode_status[rid] = DecodeStatus(
            decoded_text=text,
            decode_ids=ids,
            surr_offset=0,
            read_offset=read_offset,
            sent_offset=reseed.sent_chars[row],
        )


def _committed(
    decode: Callable[[list[int]], str], ids: list[int], context_tokens: int, sent_chars: int
) -> tuple[str, int]:
    """Return the text that the dead detokenizer had finished, and where in ``ids`` it ends.

    It reaches as far as the text sent, up to a token that ends a character. SGLang relies on it: while a character is
    incomplete it sends nothing after the last space of the *unfinished* text, and takes what it counted as sent back
    (``_decode_batch_token_id_output``). If all text were unfinished, some would be sent twice.
    """
    skipped = len(decode(ids[:context_tokens]))
    for end in range(len(ids), context_tokens, -1):
        text = decode(ids[:end])[skipped:]
        if text and not text.endswith("�") and len(text) <= sent_chars:
            return text, end
    return "", context_tokens


class _Peers:
    """Connections on a socket, counted from its monitor's events."""

    def __init__(self, monitor: zmq.Socket[bytes]) -> None:
        self.monitor = monitor
        self.count = 0

    def wait_for_one(self, timeout_s: float) -> None:
        """Wait until one connection is left (the sender's), or time is up.

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
    """Push everything the dead rank 0 has sent to TokenizerManager, then the fence after it."""
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
