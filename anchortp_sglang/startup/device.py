"""Settles what must be known before SGLang is imported: platform, environment, stand-ins. Imports no SGLang."""

import os
from collections.abc import Mapping

from anchortp_sglang.platforms.base import Defaults, Platform
from anchortp_sglang.platforms.cpu.platform import CpuPlatform
from anchortp_sglang.platforms.cuda.platform import CudaPlatform
from anchortp_sglang.platforms.cuda.probe import ProbeError
from anchortp_sglang.startup.folders import home_defaults

_DRIVER = "/dev/nvidiactl"
_OVERLAP_OFF = "disable_overlap_schedule"


def tp_size_of(given: Mapping[str, object]) -> int:
    text = given.get("tp_size", 1)
    try:
        return int(str(text))
    except ValueError:
        raise ValueError(f"--tp-size takes a number, not {text!r}") from None


def choose_platform(given: Mapping[str, object]) -> Platform:
    """Choose the server's platform by ``--device``, or without it as SGLang does: GPUs if there are any.

    The only place that tells platforms apart. Raises ValueError for an unknown platform, or one that cannot be reached.
    """
    device = given.get("device") or ("cuda" if _has_gpus(os.environ) else "cpu")
    if device == "cpu":
        return CpuPlatform()
    if device != "cuda":
        raise ValueError(f"--device {device} is not supported; use --device cuda or --device cpu")
    try:
        return CudaPlatform.of_this_machine()
    except ProbeError as error:
        raise ValueError(f"--device cuda: {error} (or use --device cpu)") from None


def _has_gpus(environ: Mapping[str, str]) -> bool:
    """Return whether NVIDIA's driver is there and no setting hides its GPUs."""
    return environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1") and os.path.exists(_DRIVER)


def prepare(platform: Platform, given: Mapping[str, object], overlap: str = "auto") -> Defaults:
    """Set the environment for the platform and install stand-ins; returns its flags, too.

    ``overlap``: as ``--anchor-overlap`` takes it. Raises ValueError for contradicting settings.
    """
    defaults = platform.defaults(given, os.environ, tp_size_of(given))
    _set_overlap(defaults.flags, given, overlap)
    os.environ.update(defaults.env)
    os.environ.update(home_defaults(os.environ))
    install_stand_ins()
    return defaults


def _set_overlap(flags: dict[str, object], given: Mapping[str, object], overlap: str) -> None:
    """Change the platform's ``flags`` to what ``--anchor-overlap`` says."""
    off = _OVERLAP_OFF in given and given[_OVERLAP_OFF] is not False
    if _OVERLAP_OFF in given and overlap == ("on" if off else "off"):
        raise ValueError(f"--anchor-overlap {overlap} contradicts --disable-overlap-schedule: leave one of them out")
    if overlap == "on":
        flags.pop(_OVERLAP_OFF, None)
    elif overlap == "off" and _OVERLAP_OFF not in given:
        flags[_OVERLAP_OFF] = True


def install_stand_ins() -> None:
    """Install stand-ins for modules that cannot load on this machine, and for torch's knowledge of its GPUs."""
    from anchortp_sglang.platforms.cpu import sgl_kernel_stub
    from anchortp_sglang.platforms.cuda import answers

    sgl_kernel_stub.install()
    answers.install(os.environ)


def as_arguments(flags: Mapping[str, object]) -> list[str]:
    """Return fields as command-line arguments; True is a bare switch."""
    arguments = []
    for name, value in flags.items():
        arguments.append("--" + name.replace("_", "-"))
        if value is not True:
            arguments.append(str(value))
    return arguments
