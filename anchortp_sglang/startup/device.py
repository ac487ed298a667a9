"""Settles what must be known before SGLang is imported: platform, environment, stand-ins. Imports no SGLang."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from anchortp_sglang.platforms.base import Defaults, Platform
from anchortp_sglang.platforms.cpu.platform import CpuPlatform
from anchortp_sglang.platforms.cuda.platform import CudaPlatform
from anchortp_sglang.platforms.cuda.probe import ProbeError
from anchortp_sglang.startup.folders import home_defaults

_TP_FLAGS = ("--tp-size", "--tp", "--tensor-parallel-size")
_ALIASES = dict.fromkeys(_TP_FLAGS, "tp_size") | {"--model": "model_path"}


def given_flags(argv: Sequence[str]) -> dict[str, str]:
    """Return ServerArgs field -> text for every flag of a command line and of its --config file (YAML)."""
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


def choose_platform(given: Mapping[str, object], experimental_cuda: bool = False) -> Platform:
    """Choose the server's platform by ``--device``; the only place that tells platforms apart.

    Raises ValueError for an unknown platform, one that the operator must ask for (``experimental_cuda``), or one that
    cannot be reached.
    """
    device = given.get("device") or "cpu"
    if device == "cpu":
        return CpuPlatform()
    if device == "cuda" and experimental_cuda:
        try:
            return CudaPlatform.of_this_machine()
        except ProbeError as error:
            raise ValueError(f"--device cuda: {error}") from None
    raise ValueError(
        f"--device {device} is not supported; use --device cpu (for cuda, where no recovery has come through "
        "yet, there is --anchor-experimental-cuda)"
    )


def prepare(platform: Platform, given: Mapping[str, object], overlap: str = "auto") -> Defaults:
    """Set the environment for the platform and install stand-ins; returns its flags, too.

    ``overlap``: as ``--anchor-overlap`` takes it. Raises ValueError for contradicting settings.
    """
    defaults = platform.defaults(given, os.environ, tp_size_of(given))
    defaults.flags.update(_overlap_flags(platform, given, overlap))
    os.environ.update(defaults.env)
    os.environ.update(home_defaults(os.environ))
    install_stand_ins()
    return defaults


def _overlap_flags(platform: Platform, given: Mapping[str, object], overlap: str) -> dict[str, object]:
    """Return the flag that switches SGLang's overlap schedule off, unless it is to be on or the flag is given."""
    wanted = platform.overlaps if overlap == "auto" else overlap == "on"
    if "disable_overlap_schedule" in given:
        if overlap != "auto" and wanted == (given["disable_overlap_schedule"] is not False):
            raise ValueError(
                f"--anchor-overlap {overlap} contradicts --disable-overlap-schedule: leave one of them out"
            )
        return {}
    return {} if wanted else {"disable_overlap_schedule": True}


def install_stand_ins() -> None:
    """Install stand-ins for modules that SGLang imports by name and that cannot load on this machine."""
    from anchortp_sglang.platforms.cpu import sgl_kernel_stub

    sgl_kernel_stub.install()


def as_arguments(flags: Mapping[str, object]) -> list[str]:
    """Return fields as command-line arguments; True is a bare switch."""
    arguments = []
    for name, value in flags.items():
        arguments.append("--" + name.replace("_", "-"))
        if value is not True:
            arguments.append(str(value))
    return arguments
