"""``anchortp parity``: serve a checkpoint with our server and with stock SGLang at TP=1, and compare the answers.

They are real servers over loopback HTTP, one after the other; ours comes first, as it refuses an unsupported model at
once.
"""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import time
import urllib.error
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from anchortp_sglang.bench import parity as comparison
from anchortp_sglang.bench.parity import Answer, BadAnswer, Comparison, Delta, Round, Verdict
from anchortp_sglang.cli.plan import ExpertSplit
from anchortp_sglang.planning.model.families import FAMILIES
from anchortp_sglang.planning.model.wrappers import language_model
from anchortp_sglang.startup.preflight import read_config
from anchortp_sglang.testing.server import Server, ServerFailed
from anchortp_sglang.testing.stock_server import ABSORB_LATENTS

STOCK = "anchortp_sglang.testing.stock_server"
OURS = "anchortp_sglang.launch_server"
REFUSAL = "anchortp: cannot start: "  # launch_server._refuse
FEWEST_SLOTS = 4096
RECOVERY_TIMEOUT_S = 180.0  # above --anchor-recovery-deadline


class NotServed(RuntimeError):
    """A server did not start or answer; the text says which one, and why."""


@dataclass(frozen=True)
class Job:
    """The comparison to make, with all checks that need no server."""

    model: Path
    reference: Path
    tp_size: int
    new_tokens: int
    lose: int | None
    flags: tuple[str, ...]
    our_flags: tuple[str, ...]
    stock_flags: tuple[str, ...]
    stock_answers: Path | None
    start_timeout_s: float

    def __post_init__(self) -> None:
        if self.tp_size < 1:
            raise ValueError(f"--tp: at least one device is needed, not {self.tp_size}")
        if self.new_tokens < 1:
            raise ValueError(f"--tokens: at least one token is needed, not {self.new_tokens}")
        if self.lose is not None and not 0 <= self.lose < self.tp_size:
            raise ValueError(f"--lose: device {self.lose} is not among the devices 0 to {self.tp_size - 1}")
        if self.lose is not None and self.tp_size == 1:
            raise ValueError("--lose: no device would be left; use --tp 2 or more")
        if not (self.reference / "config.json").is_file():
            raise ValueError(f"--reference: {self.reference} is no folder with a config.json")

    @property
    def prompts(self) -> list[list[int]]:
        return comparison.make_prompts(_vocab_size(read_config(self.model)))

    @property
    def query(self) -> dict[str, Any]:
        """The query that stored answers of stock must belong to."""
        flags = [*self.flags, *self.stock_flags]
        return {"model": str(self.reference.resolve()), "flags": flags, "new_tokens": self.new_tokens}


def parity(
    model: Annotated[Path, typer.Option("--model", metavar="DIR", help="Folder of the checkpoint.")],
    tp_size: Annotated[int, typer.Option("--tp", help="Devices on our side; stock SGLang has one.")],
    widths: Annotated[
        str | None, typer.Option("--widths", metavar="N,N,…", help="--anchor-widths of our side.")
    ] = None,
    rotate_heads: Annotated[bool, typer.Option("--rotate-heads", help="--anchor-rotate-heads of our side.")] = False,
    experts: Annotated[ExpertSplit, typer.Option("--experts", help="How experts are split.")] = ExpertSplit.TP,
    lose: Annotated[
        int | None, typer.Option("--lose", metavar="DEVICE", help="Compare, lose this device, compare again.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", metavar="DIR", help="Another checkpoint for stock, for instance the original."),
    ] = None,
    stock_answers: Annotated[
        Path | None,
        typer.Option("--stock-answers", metavar="FILE", help="Keep stock's answers in FILE; reuse them if it exists."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="New tokens of each answer.")] = 64,
    tolerance: Annotated[float, typer.Option("--tolerance", help="Largest allowed difference of logprobs.")] = 1e-4,
    dtype: Annotated[str, typer.Option("--dtype", help="Dtype of both sides.")] = "float32",
    device: Annotated[str, typer.Option("--device", help="Device of both sides.")] = "cpu",
    start_timeout_s: Annotated[float, typer.Option("--start-timeout", help="Limit for each start, in seconds.")] = 600,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Compare greedy tokens and logprobs with stock SGLang at TP=1. Exit code 1 if they differ."""
    try:
        job = Job(
            model=model,
            reference=model if reference is None else reference,
            tp_size=tp_size,
            new_tokens=tokens,
            lose=lose,
            flags=_flags(dtype, device, tokens),
            our_flags=_our_flags(tp_size, widths, rotate_heads, experts, lose),
            stock_flags=_stock_flags(model, stock_answers),
            stock_answers=stock_answers,
            start_timeout_s=start_timeout_s,
        )
        rounds = run(job)
    except (ValueError, NotServed) as error:
        _fail(str(error))
    found = comparison.verdict(rounds, tolerance)
    if as_json:
        answer = {"equal": found.equal, "verdict": found.text, "tolerance": tolerance}
        typer.echo(json.dumps(answer | {"rounds": comparison.as_json(rounds)}, indent=2))
    else:
        Console().print(parity_view(rounds, found, tolerance))
    raise typer.Exit(found.exit_code)


def run(job: Job) -> list[Round]:
    """Serve and query both sides. Raises NotServed, or ValueError for an unreadable checkpoint."""
    prompts, ours, stock = job.prompts, list[tuple[str, list[Answer]]](), _stored_answers(job)
    with _folder() as folder, _ended_by_sigterm():
        env = {"TMPDIR": str(folder)}  # removed at the end, as stock leaves its sockets behind
        flags = (*job.flags, *job.our_flags)
        server = Server(job.model, job.tp_size, *flags, log=folder / "anchortp.log", module=OURS, env=env)
        with _serving(f"anchortp-sglang, TP={job.tp_size}", server, job.start_timeout_s):
            ours.append(("" if job.lose is None else "before loss", _query(server, prompts, job.new_tokens)))
            if job.lose is not None:
                _lose(server, job.lose)
                ours.append(("after loss", _query(server, prompts, job.new_tokens)))
        if stock is None:
            flags = (*job.flags, *job.stock_flags)
            server = Server(job.reference, 1, *flags, log=folder / "stock.log", module=STOCK, env=env)
            with _serving("stock SGLang, TP=1", server, job.start_timeout_s):
                stock = _query(server, prompts, job.new_tokens)
            if job.stock_answers is not None:
                job.stock_answers.write_text(json.dumps({"asked": job.query} | comparison.answers_as_json(stock)))
    return [comparison.compare_all(when, stock, answers) for when, answers in ours]


def parity_view(rounds: Sequence[Round], found: Verdict, tolerance: float) -> RenderableType:
    """Show a line for each prompt, and the verdict, in at most 80 columns."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    headings = ["prompt", "tokens\nequal", "distinct", "prefill\nmax", "\nmean", "decode\nmax", "\nmean"]
    named = any(each.when for each in rounds)
    for heading in ["", *headings] if named else headings:
        table.add_column(heading, justify="left" if heading in ("", "tokens\nequal") else "right", no_wrap=True)
    for each in rounds:
        for one in each.comparisons:
            cells = _cells(one, tolerance)
            table.add_row(*[each.when, *cells] if named else cells)
        table.add_section()
    legend = Text("distinct: how many different new tokens, ours/stock\nmax, mean: |delta logprob|", "dim")
    return Group(table, legend, Text(found.text, "bold green" if found.equal else "bold red"))


def _cells(one: Comparison, tolerance: float) -> list[str | Text]:
    same = Text("yes", "green") if one.tokens_equal else Text(f"no, at {one.first_difference}", "bold red")
    distinct = f"{one.distinct_tokens}/{one.distinct_stock_tokens}"
    return [str(one.prompt_tokens), same, distinct, *_delta(one.prefill, tolerance), *_delta(one.decode, tolerance)]


def _delta(delta: Delta, tolerance: float) -> tuple[Text, Text]:
    if delta.unpaired:
        return Text("NaN", "bold red"), Text("-")
    if not delta.pairs:
        return Text("-"), Text("-")
    return Text(f"{delta.max:.1e}", "" if delta.within(tolerance) else "bold red"), Text(f"{delta.mean:.1e}")


def _flags(dtype: str, device: str, tokens: int) -> tuple[str, ...]:
    slots = max(FEWEST_SLOTS, 2 * (max(comparison.PROMPT_LENGTHS) + tokens))
    flags = {"--dtype": dtype, "--device": device, "--max-total-tokens": str(slots), "--random-seed": "1"}
    return tuple(word for flag in flags.items() for word in flag)


def _our_flags(
    tp_size: int, widths: str | None, rotate_heads: bool, experts: ExpertSplit, lose: int | None
) -> tuple[str, ...]:
    flags = [] if widths is None else ["--anchor-widths", widths]
    flags += ["--anchor-rotate-heads"] if rotate_heads else []
    flags += ["--ep-size", str(tp_size)] if experts is ExpertSplit.EP else []
    flags += [] if lose is None else ["--anchor-allow-injection"]
    return tuple(flags)


def _stored_answers(job: Job) -> list[Answer] | None:
    """Read the stored answers, if any. Raises ValueError if they are unreadable or belong to another query."""
    path = job.stock_answers
    if path is None or not path.exists():
        return None
    try:
        stored = json.loads(path.read_text())
        query, answers = stored["asked"], comparison.answers_from_json(stored)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--stock-answers: {path} cannot be read ({error}); remove it") from None
    if query != job.query:
        raise ValueError(f"--stock-answers: {path} holds the answers to another query ({query}); name another file")
    return answers


def _stock_flags(model: Path, answers: Path | None) -> tuple[str, ...]:
    """Return the flags that stock SGLang needs for a model on a CPU.

    They are for a prefill with latent attention, and for a model of images, to start without asking it about one.
    Raises ValueError for a model that it cannot serve, and of which there are no stored ``answers``.
    """
    family = FAMILIES.get((read_config(model).get("architectures") or [""])[0])
    if family is not None and family.without_stock and not (answers and answers.exists()):
        raise ValueError(f"{model}: there is nothing to compare with, as {family.without_stock}")
    of_latents = (ABSORB_LATENTS,) if family is not None and family.latent_kv else ()
    stored = json.loads((model / "config.json").read_text())
    of_images = () if language_model(stored) == stored else ("--skip-server-warmup",)
    return of_latents + of_images


def _vocab_size(config: dict[str, Any]) -> int:
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"config.json has no usable vocab_size: {size!r}")
    return size


def _query(server: Server, prompts: Sequence[list[int]], new_tokens: int) -> list[Answer]:
    """Send the prompts one after the other, so that batching causes no difference."""
    return [
        comparison.read_answer(prompt, server.post("/generate", comparison.request(prompt, new_tokens)))
        for prompt in prompts
    ]


def _lose(server: Server, device: int) -> None:
    """Kill the device's anchor and rank, and wait until the others serve."""
    _print(server.inject(device, "device")["detail"])
    deadline = time.monotonic() + RECOVERY_TIMEOUT_S
    while (status := server.status())["state"] != "degraded":
        if status["state"] == "down" or time.monotonic() > deadline:
            failed = [recovery["failed"] for recovery in status["recoveries"] if recovery["failed"]]
            raise NotServed(f"the server did not recover from the loss of device {device}: {failed or status['state']}")
        time.sleep(0.05)
    _print(f"recovered: TP={status['tp_size']}")


@contextmanager
def _serving(name: str, server: Server, timeout_s: float) -> Iterator[None]:
    """Start the server, and stop it at the end of the block, whose errors become NotServed."""
    _print(f"starting {name} …")
    try:
        _print(f"{name} is ready after {server.start(timeout_s):.1f} s")
        yield
    except urllib.error.HTTPError as error:
        raise NotServed(f"{name} refused a request: {error.read().decode(errors='replace')}") from None
    except (ServerFailed, BadAnswer, OSError, HTTPException) as error:
        raise NotServed(f"{name}: {_refusal(server) or f'{error}{chr(10)}{server.tail()}'}") from None
    finally:
        server.stop()


def _refusal(server: Server) -> str:
    """Return our launcher's refusal at the end of its log, or ""."""
    _, found, text = server.tail(200).rpartition(REFUSAL)
    return found and f"cannot start: {text.strip()}"


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="anchortp-parity-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end the servers too, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _print(text: str) -> None:
    typer.echo(f"anchortp: {text}", err=True)


def _fail(text: str) -> NoReturn:
    _print(text)
    raise typer.Exit(2)
