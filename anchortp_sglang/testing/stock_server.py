"""``python -m anchortp_sglang.testing.stock_server <flags of sglang.launch_server>``: stock SGLang, for comparison.

It installs none of our hooks. With ``--device cpu``, the default as for our launcher, it sets what SGLang needs on a
machine without a GPU; with any other device it is ``python -m sglang.launch_server``. ``--absorb-latents`` also
registers DeepSeek's latent attention for the CPU (platforms/cpu/latent_attention.py); stock serves no such model there
without it.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence

from anchortp_sglang.hooks.flags import given_flags
from anchortp_sglang.platforms.cpu import sgl_kernel_stub
from anchortp_sglang.platforms.cpu.environment import cpu_defaults
from anchortp_sglang.startup.device import as_arguments, tp_size_of

ABSORB_LATENTS = "--absorb-latents"


def main(argv: Sequence[str]) -> None:
    """Serve until stopped."""
    absorb = ABSORB_LATENTS in argv
    argv = [argument for argument in argv if argument != ABSORB_LATENTS]
    given = given_flags(argv)
    if (given.get("device") or "cpu") == "cpu":
        argv = [*argv, *_prepare_cpu(given)]
    if absorb:
        from anchortp_sglang.platforms.cpu import latent_attention

        latent_attention.register()
    sys.argv = [sys.argv[0], *argv]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def _prepare_cpu(given: dict[str, str]) -> list[str]:
    """Set the environment, install the stand-in for sgl_kernel, and return the arguments to add."""
    defaults = cpu_defaults(given, os.environ, tp_size_of(given), sorted(os.sched_getaffinity(0)))
    os.environ.update(defaults.env)
    sgl_kernel_stub.install()
    sgl_kernel_stub.install_operators()
    _fork_children()
    return as_arguments(defaults.flags)


def _fork_children() -> None:
    """Make SGLang fork its processes: they inherit the stand-in and need not import SGLang again.

    Engine's _set_envs_and_config (sglang.srt.entrypoints.engine) would set the method back to spawn.
    """
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *args, **kwargs: None


if __name__ == "__main__":
    main(sys.argv[1:])
