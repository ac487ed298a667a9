"""Builds the stand-ins for libcuda.so.1 and libnvidia-ml.so.1 (see driver.c), and says how to run a process on them."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
UUIDS = ("GPU-00000000-0000-0000-0000-000000000001", "GPU-00000000-0000-0000-0000-000000000002")


def why_not() -> str | None:
    """Why the stand-ins cannot be used here."""
    if shutil.which("gcc") is None:
        return "no gcc to build the stand-in driver"
    if importlib.util.find_spec("cuda.bindings") is None:
        return "cuda-bindings is not installed"
    return None if header() else "no cuda.h to build the stand-in driver against"


@functools.cache
def header() -> Path | None:
    """NVIDIA's cuda.h."""
    packages = Path(sysconfig.get_paths()["purelib"])
    found = [*packages.glob("nvidia/*/include/cuda.h"), *Path("/usr/local").glob("cuda*/include/cuda.h")]
    return found[0] if found else None


def build(folder: Path) -> dict[str, str]:
    """Compile into ``folder``; the environment in which processes load the stand-ins."""
    cuda_h = header()
    assert cuda_h is not None
    for name, source in (("libcuda.so.1", "driver.c"), ("libnvidia-ml.so.1", "nvml.c")):
        command = ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run([*command, f"-I{cuda_h.parent}", str(HERE / source)], check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}
