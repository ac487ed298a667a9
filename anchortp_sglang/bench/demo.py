"""``make demo``: eight clients stream from a TP=4 server that loses a rank, then a device; they see two pauses.

    python -m anchortp_sglang.bench.demo [--tokens 240] [--record run.json]

Exit status: 0 if every stream is identical to the unbroken run, 1 if not or if anything failed, 130 after Ctrl-C.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import urllib.error
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from anchortp_sglang.bench.demo_view import Fault, Screen, fault_table, verdict
from anchortp_sglang.testing.openai_streams import ClientStream, OpenAIStreams
from anchortp_sglang.testing.server import Server, ServerFailed
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

TP_SIZE = 4
KILLED_DEVICE, LOST_DEVICE = 1, 2
PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue in the morning?",
    "How many days are there in a year?",
    "Write a short story about a river and a bridge.",
    "Once upon a time there was a ship with four anchors.",
    "What happens when one of four devices dies?",
    "Explain tensor parallelism to a young engineer.",
    "Who takes over the load when an anchor is lost?",
)
_RECOVERY_TIMEOUT_S = 60.0


class DemoFailed(RuntimeError):
    """The demo could not run to its end; the text says why."""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    os.environ["no_proxy"] = "127.0.0.1"  # for the clients below
    folder = Path(tempfile.mkdtemp(prefix="anchortp-demo-"))
    log = folder / "server.log"
    screen = Screen()
    try:
        with screen:
            identical = _run(screen, folder, log, options)
    except KeyboardInterrupt:
        screen.print_line("stopped")
        shutil.rmtree(folder, ignore_errors=True)
        return 130
    except (ServerFailed, DemoFailed, TimeoutError) as error:
        screen.fail(str(error), log)
        return 1
    except OSError as error:
        screen.fail(f"the server does not answer any more, or a file cannot be written: {error}", log)
        return 1
    if not identical:
        screen.fail("the streams differ from the unbroken run, see above", log)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def _run(screen: Screen, folder: Path, log: Path, options: argparse.Namespace) -> bool:
    checkpoint = write_checkpoint(folder / "model", "qwen3")
    screen.print_line("made a small Qwen3 checkpoint (random weights, float32, 4 KV heads)")
    flags = ("--device", "cpu", "--dtype", "float32", "--max-total-tokens", "16384", "--anchor-allow-injection")
    server = Server(checkpoint, TP_SIZE, *flags, log=log)
    try:
        screen.follow_start(log)
        took_s = server.start()
        screen.watch(server)
        screen.print_line(f"server with TP={TP_SIZE} ready after {took_s:.1f} s")
        expected = _unbroken(screen, server, options.tokens)
        streams, faults = _broken(screen, server, options.tokens)
    finally:
        screen.phase = "stopping the server"
        screen.unwatch()
        server.stop()
    if options.record:
        options.record.write_text(json.dumps(_record(streams, faults), indent=1) + "\n")
    screen.finish(fault_table(faults, streams), verdict(expected, streams))
    return [s.outcome() for s in streams] == [s.outcome() for s in expected]


def _unbroken(screen: Screen, server: Server, tokens: int) -> list[ClientStream]:
    with OpenAIStreams(server.url, PROMPTS, tokens) as clients:
        screen.show(clients, "first, an unbroken run of the same 8 prompts to compare with")
        clients.wait()
    _check(clients.streams)
    screen.print_line(f"unbroken run recorded: {clients.tokens} tokens in 8 streams")
    return clients.streams


def _broken(screen: Screen, server: Server, tokens: int) -> tuple[list[ClientStream], list[Fault]]:
    with OpenAIStreams(server.url, PROMPTS, tokens) as clients:
        screen.show(clients, "8 open streams")
        clients.wait(tokens // 4)
        faults = [_fault(screen, server, f"SIGKILL of rank {KILLED_DEVICE}", _kill_rank)]
        clients.wait(tokens * 5 // 8)
        faults.append(_fault(screen, server, f"loss of device {LOST_DEVICE}", _lose_device))
        clients.wait()
    screen.print_line(f"all streams ended: {clients.tokens} tokens")
    # Read again: the tokens that replayed requests reuse are counted while they are prefilled.
    accounts = {recovery["generation"]: recovery for recovery in server.status()["recoveries"]}
    return clients.streams, [replace(fault, recovery=accounts[fault.recovery["generation"]]) for fault in faults]


def _fault(screen: Screen, server: Server, title: str, cause: Callable[[Server], str]) -> Fault:
    before = server.status()
    at = time.monotonic()
    screen.print_line(f"[bold red]{title}[/]")
    screen.print_line(cause(server))
    after = server.wait_serving(before["generation"] + 1, _RECOVERY_TIMEOUT_S)
    while after["recoveries"][-1]["tfs_s"] is None:
        if time.monotonic() - at > _RECOVERY_TIMEOUT_S:
            raise DemoFailed(f"no token came within {_RECOVERY_TIMEOUT_S:g} s of the {title}")
        time.sleep(0.05)
        after = server.status()
    recovery = after["recoveries"][-1]
    screen.print_line(f"recovered: TP={after['tp_size']}, first token {recovery['tfs_s']:.2f} s after detection")
    return Fault(title, at, time.monotonic(), before["tp_size"], after["tp_size"], recovery)


def _kill_rank(server: Server) -> str:
    pid = server.status()["devices"][KILLED_DEVICE]["rank_pid"]
    os.kill(pid, signal.SIGKILL)
    return f"kill -9 {pid}"


def _lose_device(server: Server) -> str:
    try:
        return str(server.inject(LOST_DEVICE, "device")["detail"])
    except urllib.error.HTTPError as error:
        raise DemoFailed(f"the fault was refused: {error.read().decode(errors='replace')}") from None


def _check(streams: Sequence[ClientStream]) -> None:
    broken = [f"stream {n}: {s.error}" for n, s in enumerate(streams, 1) if s.error]
    if broken:
        raise DemoFailed("the unbroken run failed: " + "; ".join(broken))


def _record(streams: Sequence[ClientStream], faults: Sequence[Fault]) -> dict[str, Any]:
    """Return the run as JSON for tools/draw_recovery.py. Times are seconds since the first token."""
    start = min(s.arrivals[0][0] for s in streams)
    return {
        "streams": [[[round(at - start, 4), tokens] for at, tokens in s.arrivals] for s in streams],
        "faults": [
            {
                "title": fault.title,
                "at_s": round(fault.at - start, 4),
                "devices_before": fault.devices_before,
                "devices_after": fault.devices_after,
                "recovery": fault.recovery,
            }
            for fault in faults
        ],
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description="A live server loses a rank, then a device.")
    parser.add_argument("--tokens", type=int, default=240, help="tokens of each stream (default: 240, at least 64)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write what happened as JSON")
    options = parser.parse_args(argv)
    if not 64 <= options.tokens <= 1500:
        parser.error("--tokens takes 64 to 1500")
    return options


def _end(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
