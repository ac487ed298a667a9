"""What must be settled before SGLang is imported: device, environment, stand-ins. Imports no SGLang."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from anchortp_sglang.platforms.cpu.environment import Defaults, cpu_defaults, describe
from anchortp_sglang.platforms.cuda.environment import cuda_defaults
from anchortp_sglang.platforms.cuda.probe import GpuFacts, ProbeError, visible_gpus
from anchortp_sglang.startup.cgroups import cpu_quota, memory_room
from anchortp_sglang.startup.folders import home_defaults

log = logging.getLogger(__name__)

_TP_FLAGS = ("--tp-size", "--tp", "--tensor-parallel-size")
_ALIASES = dict.fromkeys(_TP_FLAGS, "tp_size") | {"--model": "model_path"}


def given_flags(argv: Sequence[str]) -> dict[str, str]:
    """ServerArgs field -> text, for every flag of a command line and of its --config file (YAML)."""
    given: dict[str, str] = {}
    for index, token in enumerate(argv):
        if token.startswith("--"):
            flag, has_value, value = token.partition("=")
            if not has_value:
                value = argv[index + 1] if index + 1 < len(argv) else ""
            given[_ALIASES.get(flag, flag[2:].replace("-", "_"))] = value
    if "config" in given:
        given = _config_file(given["config"]) | given
    return given


def _config_file(path: str) -> dict[str, str]:
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from None
    return {str(key).replace("-", "_"): str(value) for key, value in (settings or {}).items()}


def tp_size_of(given: Mapping[str, object]) -> int:
    text = given.get("tp_size", 1)
    try:
        return int(str(text))
    except ValueError:
        raise ValueError(f"--tp-size takes a number, not {text!r}") from None


def prepare(given: Mapping[str, object], gpus: Sequence[GpuFacts] = ()) -> Defaults:
    """Set the environment for the device and install stand-ins; returns the flags to add as well.

    ``gpus``: those of ``gpus_for``, if the device is cuda. Raises ValueError for another device than cpu or (with
    ``gpus``) cuda, and for what contradicts itself.
    """
    device = given.get("device") or "cpu"
    if device == "cuda" and gpus:
        defaults = cuda_defaults(given, os.environ, shared=tp_size_of(given) > len(gpus))
    elif device == "cpu":
        cores = sorted(os.sched_getaffinity(0))
        defaults = cpu_defaults(given, os.environ, tp_size_of(given), cores, cpu_quota(), _limited_bytes())
    else:
        raise ValueError(
            f"--device {device} is not supported; use --device cpu (for cuda, which has never run on a GPU, there is "
            "--anchor-experimental-cuda)"
        )
    os.environ.update(defaults.env)
    os.environ.update(home_defaults(os.environ))
    install_stand_ins()
    return defaults


def _limited_bytes() -> int | None:
    """What the cgroup leaves of memory; None if it is the host that sets the limit."""
    of_host = psutil.virtual_memory().available
    room = memory_room(of_host)
    return room.nbytes if room.nbytes < of_host else None


def gpus_for(given: Mapping[str, object], experimental_cuda: bool) -> list[GpuFacts]:
    """The visible GPUs if the flags ask for them and the operator for the experiment; else none.

    Asked before SGLang is imported, by another process. Raises ValueError if they cannot be asked.
    """
    if given.get("device") != "cuda" or not experimental_cuda:
        return []
    try:
        return visible_gpus()
    except ProbeError as error:
        raise ValueError(f"--device cuda: {error}") from None


def install_stand_ins() -> None:
    """Modules that cannot load on this machine and that SGLang imports by name."""
    from anchortp_sglang.platforms.cpu import sgl_kernel_stub

    sgl_kernel_stub.install()


def as_arguments(flags: Mapping[str, object]) -> list[str]:
    """Fields as command-line arguments; True is a bare switch."""
    arguments = []
    for name, value in flags.items():
        arguments.append("--" + name.replace("_", "-"))
        if value is not True:
            arguments.append(str(value))
    return arguments


__all__ = ["as_arguments", "describe", "given_flags", "gpus_for", "install_stand_ins", "prepare", "tp_size_of"]
