"""The display of ``make demo``: a line for each event, a live picture below, a table at the end.

Without a terminal only the lines and the table are printed.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from anchortp_sglang.testing.openai_streams import ClientStream, OpenAIStreams
from anchortp_sglang.testing.server import Server

_POLL_S = 0.2
_PLAIN_PROGRESS_S = 3.0
_PAUSE_SHOWN_S = 0.25
_COMPACT_BELOW_LINES = 18  # with fewer, all streams share one bar
_COLOURS = {"serving": "green", "degraded": "yellow", "recovering": "yellow", "lost": "red", "down": "bold red"}

_START_PHASES = (
    ("anchortp: importing SGLang", "importing SGLang, once for all processes"),
    ("anchortp: SGLang imported", "checking flags, model and plan; installing hooks"),
    ("installed and verified", "forking the zygote; starting anchors and ranks"),
    ("Load weight begin", "ranks fill the anchors with weights"),
    ("KV Cache is allocated", "ranks bind KV to the anchors"),
    ("Uvicorn running", "HTTP is up; first request as a warm-up"),
)
"""(text in the server's log, the step that begins with it)."""


@dataclass(frozen=True)
class Fault:
    """A fault and its recovery, an entry of the server's status. Times are this process's time.monotonic()."""

    title: str
    at: float
    until: float
    devices_before: int
    devices_after: int
    recovery: dict[str, Any]


class Screen:
    """The demo's display. ``print_line`` prints events; inside the block a terminal also has a live picture."""

    def __init__(self, console: Console | None = None) -> None:
        self.phase = ""
        self._console = console or Console(highlight=False)
        self._started = time.monotonic()
        self._clients: OpenAIStreams | None = None
        self._caption = ""
        self._status: dict[str, Any] = {}
        self._poller: _Poller | None = None
        live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(get_renderable=self._picture, console=self._console, transient=True) if live else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unwatch()
        if self._live:
            self._live.stop()

    def print_line(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        elapsed_s = time.monotonic() - self._started
        self._console.print(f"[dim]{elapsed_s:6.1f} s[/]  {text}", soft_wrap=self._live is None)

    def fail(self, text: str, log: Path) -> None:
        self._console.print("failed:", style="bold red", end=" ")
        self._console.print(text, markup=False)
        if log.exists():
            self._console.print(f"the server's log: {log}", markup=False, soft_wrap=True)

    def finish(self, *parts: RenderableType) -> None:
        """Remove the picture and print ``parts``."""
        self._clients, self.phase = None, ""
        if self._live:
            self._live.stop()
        self._console.print(*parts, sep="\n")

    def follow_start(self, log: Path) -> None:
        """Print a line for each step of a starting server, read from its log."""
        lines = _tail(log)
        phases = list(_START_PHASES)

        def poll() -> None:
            for line in lines:
                if line is None:
                    return
                if phases and phases[0][0] in line:
                    self.phase = phases.pop(0)[1]
                    self.print_line(self.phase)

        self._poll(poll)

    def watch(self, server: Server) -> None:
        """Poll a running server's status and draw it."""
        self.phase = ""
        last_progress = time.monotonic()

        def poll() -> None:
            nonlocal last_progress
            self._status = server.status()
            if self._live is None and self._clients and time.monotonic() - last_progress > _PLAIN_PROGRESS_S:
                last_progress = time.monotonic()
                total = self._clients.max_tokens * len(self._clients.streams)
                self.print_line(f"{self._clients.tokens} of {total} tokens")

        self._poll(poll)

    def unwatch(self) -> None:
        if self._poller:
            self._poller.stop()
            self._poller = None

    def show(self, clients: OpenAIStreams, caption: str) -> None:
        """Draw these streams from now on."""
        self._clients, self._caption = clients, caption
        self.print_line(caption)

    def _poll(self, poll: Callable[[], None]) -> None:
        self.unwatch()
        self._poller = _Poller(poll)
        self._poller.start()

    def _picture(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._status:
            parts += [_headline(self._status), _devices(self._status)]
        if self._clients:
            compact = self._console.height < _COMPACT_BELOW_LINES
            parts.append(_total(self._clients) if compact else _bars(self._clients, self._console.width))
        if self.phase:
            parts.append(Text(f"… {self.phase}", style="cyan"))
        return Group(*parts)


class _Poller(threading.Thread):
    """A thread that calls ``poll`` until ``stop``, even if the server does not answer."""

    def __init__(self, poll: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._poll = poll
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(_POLL_S):
            try:
                self._poll()
            except (OSError, ValueError):
                continue

    def stop(self) -> None:
        self._ended.set()
        self.join(timeout=2.0)


def _tail(path: Path) -> Iterator[str | None]:
    """Yield the file's lines as they are written, and None whenever there is no new one."""
    while not path.exists():
        yield None
    with path.open(errors="replace") as file:
        while True:
            yield file.readline() or None


def _headline(status: dict[str, Any]) -> Text:
    state = str(status["state"])
    line = Text.assemble((state, _COLOURS.get(state, "")))
    return line.append(f"  TP={status['tp_size']}  generation {status['generation']}", style="dim")


def _devices(status: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for device in status["devices"]:
        state = str(device["state"])
        held = decimal(device["weight_bytes"] + device["kv_bytes"]) if state == "serving" else ""
        rank = f"rank {device['rank']}, pid {device['rank_pid']}" if device["rank"] is not None else ""
        table.add_row(f"device {device['id']}", Text(f"● {state}", style=_COLOURS.get(state, "")), rank, held)
    return table


def _bars(clients: OpenAIStreams, width: int) -> Group:
    return Group(*(_bar(n, s, clients.max_tokens, width) for n, s in enumerate(clients.streams, 1)))


def _bar(number: int, stream: ClientStream, total: int, width: int) -> Text:
    line = Text(f"stream {number} {stream.face:10} ", no_wrap=True, overflow="crop")
    columns = max(5, min(60, width - 46))
    filled = columns * stream.tokens // total
    paused_s = time.monotonic() - stream.arrivals[-1][0] if stream.arrivals and not stream.done else 0.0
    paused = paused_s > _PAUSE_SHOWN_S
    line.append("━" * filled, style="yellow" if paused else "green").append("─" * (columns - filled), style="dim")
    line.append(f" {stream.tokens:4}/{total}")
    if stream.error:
        line.append("  error", style="bold red")
    elif paused:
        line.append(f"  pause {paused_s:.1f} s", style="yellow")
    return line


def _total(clients: OpenAIStreams) -> Text:
    return Text(f"{clients.tokens} of {clients.max_tokens * len(clients.streams)} tokens in 8 streams")


def fault_table(faults: Sequence[Fault], streams: Sequence[ClientStream]) -> Table:
    """Make a table with a column for each fault: what clients saw and what the server did."""
    table = Table(
        title="what happened",
        title_justify="left",
        caption="Indented: the server's own stages, from the moment it noticed the fault.",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    columns = []
    for fault, following in zip(faults, [*faults[1:], None], strict=True):
        table.add_column(fault.title, justify="right")
        columns.append(_column(fault, following.at if following else float("inf"), streams))
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "") for column in columns))
    return table


def _column(fault: Fault, until: float, streams: Sequence[ClientStream]) -> dict[str, str]:
    recovery = fault.recovery
    pauses = [stream.pause_around(fault.at, fault.until) for stream in streams]
    lengths_s = [length_s for length_s, _ in pauses]
    tfs_s = min(end for _, end in pauses) - fault.at
    received = sum(s.tokens_at(until) - s.tokens_at(fault.at) for s in streams)
    return {
        "pause seen by clients, median": f"{median(lengths_s):.2f} s",
        "pause seen by clients, max": f"{max(lengths_s):.2f} s",
        "TFS: fault to first new token": f"{tfs_s:.2f} s",
        **{f"  {stage['name']}": f"{stage['at_s']:.3f} s" for stage in recovery["stages"]},
        "devices": f"{fault.devices_before} → {fault.devices_after}",
        "read from the checkpoint": decimal(recovery["reload_bytes"]),
        "copied within devices": decimal(recovery["copied_bytes"]),
        "requests replayed": str(recovery["requests_replayed"]),
        "their tokens kept / recomputed": f"{recovery['tokens_reused']} / {recovery['tokens_recomputed']}",
        "tokens received after it": str(received),
    }


def verdict(expected: Sequence[ClientStream], streams: Sequence[ClientStream]) -> Text:
    """Return whether every stream equals the unbroken run, and where one differs."""
    problems = [
        f"stream {number}: {_difference(before, after)}"
        for number, (before, after) in enumerate(zip(expected, streams, strict=True), 1)
        if before.outcome() != after.outcome()
    ]
    same, tokens = len(streams) - len(problems), sum(stream.tokens for stream in streams)
    line = f"{same} of {len(streams)} streams identical to the unbroken run, {tokens} tokens: text, counts, finish"
    return Text("\n".join([line, *problems]), style="bold red" if problems else "bold green")


def _difference(before: ClientStream, after: ClientStream) -> str:
    if after.error:
        return f"ended after {after.tokens} tokens with {after.error}"
    if before.text == after.text:
        return f"{after.tokens} tokens ({after.finish_reason}) instead of {before.tokens} ({before.finish_reason})"
    pairs = enumerate(zip(before.text, after.text, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(before.text), len(after.text)))
    return f"text differs from character {at} on ({len(before.text)} and {len(after.text)} characters)"
