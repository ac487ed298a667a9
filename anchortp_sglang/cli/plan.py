"""``anchortp plan``: predicts the cost of losing or regaining devices. Needs no GPU and no server.

Imports neither SGLang nor torch, so that it answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from anchortp_sglang.planning.layout.coverage import CoverageError, check_names
from anchortp_sglang.planning.model.axes import UnsupportedModel, has_experts, read_model_axes
from anchortp_sglang.planning.model.plan_model import PlanModel, plan_model
from anchortp_sglang.planning.model.wrappers import language_model, language_tensor
from anchortp_sglang.planning.placement.migration_types import InfeasiblePlan
from anchortp_sglang.planning.prediction.changes import Change, InvalidChange
from anchortp_sglang.planning.prediction.presets import MACHINES, machine
from anchortp_sglang.planning.prediction.scenario import Scenario, answer_all
from anchortp_sglang.planning.prediction.topology import InvalidTopology, Topology
from anchortp_sglang.planning.prediction.topology_file import topology_from_json
from anchortp_sglang.planning.prediction.what_if import WhatIf

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
DEFAULT_TOPOLOGY = "8xH100-NVLink"
MOST_DEVICES = 4096


class StrategyChoice(StrEnum):
    """How the next ownership is made; ``auto`` takes the strategy that is predicted to finish first."""

    AUTO = "auto"
    CONTIGUOUS = "contiguous"
    ADOPT = "adopt"


class ExpertSplit(StrEnum):
    """How a mixture of experts is split: each expert's columns over all devices, or whole experts dealt out."""

    TP = "tp"
    EP = "ep"


class BadInput(ValueError):
    """A command that cannot be answered; the text names the option or field."""


def plan(
    model: Annotated[Path, typer.Option("--model", help="A config.json, or the folder of a checkpoint.")],
    devices: Annotated[int, typer.Option("--devices", help="Devices at the start; their ids are 0, 1, …")],
    lose: Annotated[
        list[str] | None, typer.Option("--lose", metavar="IDS", help="Devices lost at once: 3, or 3,5.")
    ] = None,
    then: Annotated[
        list[str] | None, typer.Option("--then", metavar="IDS", help="Devices lost after that; may be repeated.")
    ] = None,
    rejoin: Annotated[
        list[str] | None, typer.Option("--rejoin", metavar="IDS", help="Devices that join at the end.")
    ] = None,
    all_failures: Annotated[bool, typer.Option("--all-failures", help="Try the loss of each device.")] = False,
    topology: Annotated[
        str,
        typer.Option("--topology", metavar="NAME|FILE", help=f"A JSON file, or one of {', '.join(MACHINES)}, resized."),
    ] = DEFAULT_TOPOLOGY,
    strategy: Annotated[
        StrategyChoice, typer.Option("--strategy", help="How the next ownership is made.")
    ] = StrategyChoice.AUTO,
    experts: Annotated[ExpertSplit, typer.Option("--experts", help="How experts are split.")] = ExpertSplit.TP,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Dtype of the weights, if not the config's.")] = None,
    mem_fraction: Annotated[
        float, typer.Option("--mem-fraction-static", help="Share of device memory for weights and KV cache.")
    ] = 0.88,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the last change into this .png or .svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Predict what would move, and how long clients would wait, if devices were lost or came back."""
    try:
        changes = _changes(devices, lose or [], then or [], rejoin or [], all_failures)
        highest = max([devices - 1, *(device for change in changes for device in change.joined)])
        if highest >= MOST_DEVICES:
            raise BadInput(f"--devices: ids go up to {MOST_DEVICES - 1}, not to {highest}")
        scenario = Scenario(
            model=read_model(model, experts.value, dtype),
            topology=read_topology(topology, highest + 1),
            devices=devices,
            strategy=strategy.value,
            mem_fraction=mem_fraction,
        )
        if not 0 < mem_fraction <= 1:
            raise BadInput(f"--mem-fraction-static: a share above 0 and up to 1, not {mem_fraction:g}")
        if plot is not None and plot.suffix.lower() not in (".png", ".svg"):
            raise BadInput(f"--plot: {plot} must end in .png or .svg")
        if all_failures:
            return _try_each(scenario, plot, as_json)
        answers = answer_all(scenario, changes)
    except (BadInput, InvalidChange, InvalidTopology, UnsupportedModel) as error:
        _fail(str(error), 2)
    except InfeasiblePlan as error:
        _fail(str(error), 1)
    titles = [_title(scenario, change) for change in changes]
    if plot is not None:
        _plot(titles[-1], answers[-1], plot)
    if as_json:
        return _print_json(_chain_json(answers))
    from anchortp_sglang.views.plan import answer_view

    console = Console()
    for title, answer in zip(titles, answers, strict=True):
        console.print(answer_view(title, answer, console.width))


def read_model(path: Path, experts: str, dtype: str | None = None) -> PlanModel:
    """Read a config.json, or a checkpoint's folder, as a server would. An index beside it must fit.

    Raises BadInput for a file that cannot be read, UnsupportedModel for a model that is not supported.
    """
    file = path / CONFIG if path.is_dir() else path
    config = language_model(_read_json("--model", file))
    model = read_model_axes(config, dtype, whole_experts=experts == "ep" and has_experts(config))
    index = file.with_name(INDEX)
    if index.exists():
        names = _read_json("--model", index).get("weight_map")
        if not isinstance(names, dict):
            raise BadInput(f"--model: {index} has no weight_map, which maps tensors to files")
        try:
            check_names(model, map(language_tensor, names))
        except CoverageError as error:
            raise BadInput(f"--model: {index}: {error}") from None
    return plan_model(model)


def read_topology(name: str, devices: int) -> Topology:
    """Read a topology file, or take a ready-made one, for ``devices`` devices. Raises InvalidTopology or BadInput."""
    path = Path(name)
    if name.lower() not in (known.lower() for known in MACHINES) and (path.exists() or path.suffix == ".json"):
        return topology_from_json(_read_text("--topology", path)).resized(devices)
    return machine(name, devices)


def _changes(devices: int, lose: list[str], then: list[str], rejoin: list[str], all_failures: bool) -> list[Change]:
    if devices < 1:
        raise BadInput(f"--devices: at least one device is needed, not {devices}")
    if all_failures:
        if lose or then or rejoin:
            raise BadInput("--all-failures: tries each device by itself; leave --lose, --then and --rejoin out")
        return []
    changes = [Change("--lose", lost=_ids("--lose", lose))] if lose else []
    changes += [Change("--then", lost=_ids("--then", [ids])) for ids in then]
    changes += [Change("--rejoin", joined=_ids("--rejoin", rejoin))] if rejoin else []
    if not changes:
        raise BadInput("--lose: name the device that is lost, or --rejoin one, or try --all-failures")
    return changes


def _ids(option: str, values: Sequence[str]) -> tuple[int, ...]:
    texts = [text.strip() for value in values for text in value.split(",")]
    for text in texts:
        if not text.isdecimal():
            raise BadInput(f"{option}: {text!r} is no device id; ids are 0, 1, …, several as in 3,5")
    return tuple(map(int, texts))


def _try_each(scenario: Scenario, plot: Path | None, as_json: bool) -> None:
    if plot is not None:
        raise BadInput("--plot: draws a single change; use it with --lose")
    answers: list[tuple[int, WhatIf | str]] = []
    for device in range(scenario.devices):
        try:
            answers.append((device, answer_all(scenario, [Change("--devices", lost=(device,))])[-1]))
        except InfeasiblePlan as error:
            answers.append((device, str(error)))
    if as_json:
        _print_json([{"lost": [device]} | _answer_json(answer) for device, answer in answers])
    else:
        from anchortp_sglang.views.plan import failures_view

        Console().print(failures_view(_title(scenario, None), [(str(device), answer) for device, answer in answers]))
    if any(isinstance(answer, str) for _, answer in answers):
        raise typer.Exit(1)


def _answer_json(answer: WhatIf | str) -> dict[str, object]:
    return {"infeasible": answer} if isinstance(answer, str) else answer.as_json()


def _chain_json(answers: Sequence[WhatIf]) -> dict[str, object]:
    """Return the last change's answer; with several changes, also all of them under "steps"."""
    last = answers[-1].as_json()
    return last if len(answers) == 1 else last | {"steps": [answer.as_json() for answer in answers]}


def _title(scenario: Scenario, change: Change | None) -> str:
    name = f"{scenario.model.architecture}, {scenario.devices} devices like {scenario.topology.name}"
    return name if change is None else f"{name}: {change}"


def _plot(title: str, answer: WhatIf, path: Path) -> None:
    from anchortp_sglang.views.picture import PictureError, save
    from anchortp_sglang.views.plan_plot import gantt

    try:
        save(gantt(title, answer.timeline, answer.recovery, answer.restart), path)
    except (OSError, PictureError) as error:
        _fail(f"--plot: {error}", 2)


def _read_text(option: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{option}: {path} cannot be read: {error}") from None


def _read_json(option: str, path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(_read_text(option, path))
    except ValueError as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{option}: {path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{option}: {path} must hold an object, not {type(value).__name__}")
    return value


def _fail(text: str, code: int) -> NoReturn:
    typer.echo(f"anchortp: {text}", err=True)
    raise typer.Exit(code)


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
