"""``anchortp bench``: recoveries and overhead compared with stock SGLang on this machine, and a storm of faults."""

from __future__ import annotations

import json
import math
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, NoReturn

import psutil
import typer
from rich.console import Console
from rich.table import Table

from anchortp_sglang.bench.model_sizes import VOCAB_SIZE, ModelSize
from anchortp_sglang.views.picture import PictureError, check, save

app = typer.Typer(no_args_is_help=True, help="Measure recoveries, and the overhead while nothing fails.")

SizeOption = Annotated[ModelSize, typer.Option("--size", help="Size of the random checkpoint, in parameters.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
RecordOption = Annotated[Path | None, typer.Option("--record", metavar="FILE", help="Write all figures as JSON.")]
SlotsOption = Annotated[int, typer.Option("--slots", min=1024, help="KV slots (tokens) of each server.")]


class Sides(StrEnum):
    BOTH = "both"
    OURS = "ours"
    STOCK = "stock"


@app.command()
def recovery(
    size: SizeOption = ModelSize.TINY,
    tp_size: Annotated[int, typer.Option("--tp", min=2, help="Ranks of each server.")] = 4,
    faults: Annotated[
        str, typer.Option("--faults", help="Faults to inject: process, device, hang.")
    ] = "process,device,hang",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Repetitions of each fault.")] = 1,
    rate: Annotated[float, typer.Option("--rate", help="Clients per second (Poisson).")] = 2.0,
    before_s: Annotated[float, typer.Option("--before", help="Seconds of load before a fault.")] = 20.0,
    after_s: Annotated[float, typer.Option("--after", min=21.0, help="Seconds of load after a recovery.")] = 22.0,
    hang_timeout_s: Annotated[float, typer.Option("--hang-timeout", help="Seconds until a rank counts as hung.")] = 4.0,
    slots: SlotsOption = 16384,
    sides: Annotated[Sides, typer.Option("--sides", help="Measure both sides or one.")] = Sides.BOTH,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw throughput over time (.png, .svg).")
    ] = None,
    record: RecordOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cause the same faults under the same load in our server and in stock SGLang, which is restarted at once.

    Exit code 1 if a request failed on our side or a token differs from the unbroken run, 2 if a server did not start.
    """
    from anchortp_sglang.bench import recovery as recovery_bench
    from anchortp_sglang.bench import recovery_view
    from anchortp_sglang.bench.load import Load

    plan_of = {
        "tp_size": tp_size,
        "faults": _faults(faults),
        "seeds": seeds,
        "load": _checked(lambda: Load(rate, 24, VOCAB_SIZE)),
        "flags": _flags(slots),
        "sides": ("stock", "ours") if sides is Sides.BOTH else (sides.value,),
        "before_s": before_s,
        "after_s": after_s,
        "hang_timeout_s": hang_timeout_s,
    }
    _check_files(record, plot)
    with _measuring(size) as (model, folder, progress):
        plan = recovery_bench.Plan(model=model, **plan_of)
        results = recovery_bench.run(plan, folder, progress)
    report, details = recovery_bench.summary(results), recovery_bench.details(plan, results)
    title = f"{size.value} model, TP={tp_size}, {len(plan.runs())} faults ({faults}), {rate:g} clients/s"
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        Console().print(recovery_view.report_view(report, details, title))
    if record is not None:
        record.write_text(json.dumps({"title": title, "report": report, "sides": details}, indent=1) + "\n")
    if plot is not None:
        _draw(recovery_view.picture(details, title), plot)
    ours = report.get("ours")
    raise typer.Exit(1 if ours and (ours["failed_requests"] or ours["wrong_tokens"]) else 0)


@app.command()
def overhead(
    size: SizeOption = ModelSize.TINY,
    tp_size: Annotated[int, typer.Option("--tp", min=1, help="Ranks of each server.")] = 1,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds of stock, ours, ours, stock.")] = 8,
    clients: Annotated[int, typer.Option("--clients", min=1, help="Concurrent streams.")] = 8,
    rates: Annotated[
        str, typer.Option("--rates", metavar="R,R,...", help="Run sglang.bench_serving instead, at R requests/s.")
    ] = "",
    batches: Annotated[
        str,
        typer.Option("--batches", metavar="N,N,...", help="Run sglang.bench_serving instead, N requests at a time."),
    ] = "",
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Use SGLang's overlap schedule, its default, on both sides.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="cpu, or cuda: both servers share the GPUs.")] = "cpu",
    slots: SlotsOption = 16384,
    record: RecordOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare throughput and times to the first and between tokens with stock SGLang while nothing fails."""
    from anchortp_sglang.bench import overhead as bench
    from anchortp_sglang.bench.serving_load import ServingLoad

    _check_files(record)
    if device not in bench.DEVICES:
        _fail(f"--device takes {' or '.join(bench.DEVICES)}, not {device!r}")
    loads: list[bench.ServerLoad] = [
        *(ServingLoad(rate_per_s=rate) for rate in _numbers("--rates", rates, float)),
        *(ServingLoad(batch=batch) for batch in _numbers("--batches", batches, int)),
    ]
    with _measuring(size) as (model, folder, progress):
        sides = bench.both_sides(model, tp_size, device, slots, folder, overlap)
        loads = loads or [bench.StreamsLoad(clients, VOCAB_SIZE)]
        measured = bench.by_load(bench.run(model, sides, loads, rounds, progress))
    if record is not None:
        rows = [asdict(each) for of_load in measured.values() for each in of_load]
        record.write_text(json.dumps(rows, indent=1) + "\n")
    found = {load: bench.compare(of_load) for load, of_load in measured.items()}
    if as_json:
        figures = {load: {name: asdict(r) for name, r in ratios.items()} for load, ratios in found.items()}
        return typer.echo(json.dumps(figures, indent=2))
    Console().print(_overhead_table(measured, found, f"{size.value} model, TP={tp_size}, {rounds} rounds"))


def _overhead_table(measured: dict[str, Any], found: dict[str, Any], title: str) -> Table:
    table = Table(title=f"ours over stock: {title}")
    for heading in ("load", "", "ratio", "spread over rounds", "ours", "stock"):
        table.add_column(heading, justify="left" if heading in ("load", "") else "right")
    names = {
        "throughput": "tokens/s",
        "ttft_s": "time to first token",
        "itl_s": "time between tokens",
        "itl_p99_s": "the same, 99th percentile",
    }
    for load, ratios in found.items():
        for name, ratio in ratios.items():
            values = [
                _figure(name, [getattr(r.figures, name) for r in measured[load] if r.side == side])
                for side in ("ours", "stock")
            ]
            spread = f"{ratio.low:.3f} – {ratio.high:.3f}"
            table.add_row(load if name == "throughput" else "", names[name], f"{ratio.median:.3f}", spread, *values)
        table.add_section()
    return table


@app.command()
def storm(
    seed: Annotated[int, typer.Option("--seed", help="Seed of schedule and requests.")] = 0,
    faults: Annotated[int, typer.Option("--faults", min=1, help="Number of faults, over all servers.")] = 100,
    kinds: Annotated[
        str, typer.Option("--kinds", help="Faults by target, manner or both: rank,:kill,spare:stop. Default: all.")
    ] = "all",
    requests: Annotated[
        str,
        typer.Option("--requests", metavar="KINDS", help="Kinds of requests, named as in the report. Default: all."),
    ] = "all",
    limit_s: Annotated[
        float, typer.Option("--time-limit", metavar="SECONDS", help="End after this time, even if faults are left.")
    ] = math.inf,
    tp_size: Annotated[int, typer.Option("--tp", min=2, help="Ranks of a new server.")] = 4,
    clients: Annotated[int, typer.Option("--clients", min=1, help="Concurrent clients.")] = 6,
    slots: SlotsOption = 8192,
    overlap: Annotated[bool, typer.Option("--overlap", help="Use SGLang's overlap schedule.")] = False,
    log: Annotated[
        Path | None,
        typer.Option("--log", metavar="FILE", help="Write every action as JSON lines, and keep servers' logs."),
    ] = None,
    replay: Annotated[
        Path | None, typer.Option("--replay", metavar="FILE", help="Repeat the storm of a --log.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Inject faults of every kind into a server under mixed load, and judge every answer.

    Exit code 1 if a token was wrong, a good request failed, a bad one was not refused, something leaked, or the server
    did not serve again; 2 if it did not start.
    """
    from anchortp_sglang.bench.storm import log as storm_log
    from anchortp_sglang.bench.storm import run as bench
    from anchortp_sglang.bench.storm import view as storm_view

    _check_files(log)
    schedule = _checked(
        lambda: (
            storm_log.read(replay)
            if replay
            else storm_log.draw(seed, faults, kinds, requests, tp_size, clients, overlap)
        )
    )
    writer = storm_log.Writer(log)
    with _measuring(ModelSize.TINY) as (model, folder, progress):
        writer.write(schedule.to_json())
        made = schedule.make_requests(VOCAB_SIZE)
        storm_run = bench.Storm(made, schedule.seed, schedule.clients, writer.write, progress, limit_s)
        logs = str(folder / "storm" if log is None else log.with_suffix(""))
        outcome = bench.run(model, schedule, slots, storm_run, folder, logs, progress)
    figures = storm_view.summary(outcome)
    title = f"seed {schedule.seed}, TP={schedule.tp_size}, {schedule.clients} clients"
    typer.echo(json.dumps(figures, indent=2)) if as_json else Console().print(storm_view.view(figures, title))
    if not figures["ok"]:
        typer.echo(writer.text(), err=True)
    raise typer.Exit(0 if figures["ok"] else 1)


@app.command()
def decisions(
    seed: Annotated[int, typer.Option("--seed", help="Seed of the first schedule; the others count up.")] = 0,
    schedules: Annotated[int, typer.Option("--schedules", min=1, help="Number of schedules.")] = 100_000,
    as_json: JsonOption = False,
) -> None:
    """Play simulated schedules of requests and faults against the coordinator's decisions; no server is started.

    Exit code 1 if a schedule breaks an invariant; its seed and its last steps are printed.
    """
    from anchortp_sglang.bench.decisions import play

    outcome, violations = play(range(seed, seed + schedules))
    counts = {"schedules": schedules, "violations": len(violations)} | outcome
    typer.echo(
        json.dumps(counts, indent=2) if as_json else ", ".join(f"{count} {name}" for name, count in counts.items())
    )
    for violation in violations[:3]:
        typer.echo(violation, err=True)
    raise typer.Exit(1 if violations else 0)


def _numbers(flag: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """Return the numbers of an option, separated by commas; end the command if they are not above 0."""
    try:
        found = [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [0]
    if not all(0 < number < math.inf for number in found):
        _fail(f"{flag} takes numbers above 0, separated by commas, not {text!r}")
    return found


def _figure(name: str, values: list[float]) -> str:
    middle = sorted(values)[len(values) // 2]
    return f"{middle:.1f}" if name == "throughput" else f"{1000 * middle:.2f} ms"


def _faults(text: str) -> tuple[Any, ...]:
    names = tuple(text.split(","))
    if not set(names) <= {"process", "device", "hang"}:
        _fail(f"--faults takes process, device and hang, separated by commas, not {text!r}")
    return names


def _checked(make: Any) -> Any:
    try:
        return make()
    except ValueError as error:
        _fail(str(error))


def _flags(slots: int) -> tuple[str, ...]:
    return "--device", "cpu", "--dtype", "float32", "--max-total-tokens", str(slots)


def _draw(picture: Any, path: Path) -> None:
    try:
        save(picture, path)
    except (PictureError, OSError) as error:
        _fail(str(error))


def _check_files(record: Path | None, plot: Path | None = None) -> None:
    """End the command before measuring if a file could not be written."""
    for path in filter(None, (record, plot)):
        if not path.parent.is_dir():
            _fail(f"{path} cannot be written: there is no folder {path.parent}")
    try:
        if plot is not None:
            check(plot)
    except PictureError as error:
        _fail(str(error))


@contextmanager
def _measuring(size: ModelSize) -> Iterator[tuple[Path, Path, Any]]:
    """Yield (checkpoint, folder for logs, progress). An error in the block ends the command and keeps the logs."""
    from anchortp_sglang.bench.model_sizes import make_model
    from anchortp_sglang.testing.server import ServerFailed

    folder = Path(tempfile.mkdtemp(prefix="anchortp-bench-"))
    console, began = Console(stderr=True, highlight=False), time.monotonic()
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with console.status("") as status:

            def progress(text: str) -> None:
                elapsed_s = time.monotonic() - began
                status.update(f"{elapsed_s:6.0f} s  {text}")
                if not console.is_terminal:
                    console.print(f"{elapsed_s:6.0f} s  {text}", markup=False, soft_wrap=True)

            progress(f"writing a checkpoint of size {size.value}")
            yield make_model(folder / "model", size), folder, progress
    except (ServerFailed, OSError, HTTPException, psutil.Error) as error:
        shutil.rmtree(folder / "model", ignore_errors=True)
        _fail(f"{error or type(error).__name__}\nlogs: {folder}")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    shutil.rmtree(folder, ignore_errors=True)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _fail(text: str) -> NoReturn:
    typer.echo(f"anchortp: {text}", err=True)
    raise typer.Exit(2)
