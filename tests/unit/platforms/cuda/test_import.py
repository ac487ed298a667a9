"""Main imports SGLang's CUDA paths and resolves its arguments, and CUDA stays untouched: the zygote can be forked."""

import json
import subprocess
import sys
import textwrap

import fake_cuda
import pytest
from fake_cuda import UUIDS

from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

pytestmark = pytest.mark.skipif(fake_cuda.why_not() is not None, reason=str(fake_cuda.why_not()))

START = textwrap.dedent("""
    import json, os, sys
    from anchortp_sglang.startup import device
    defaults = device.prepare(device.choose_platform({"device": "cuda"}), {"device": "cuda", "tp_size": 2})
    from anchortp_sglang.hooks import preload
    preload.import_sglang()
    from sglang.srt.server_args import prepare_server_args
    arguments = ["--model-path", sys.argv[1], "--tp-size", "2", *device.as_arguments(defaults.flags)]
    prepare_server_args(arguments).resolve_once()

    import sgl_kernel, torch
    from anchortp_sglang.startup.fork_guard import unfit_to_fork
    from anchortp_sglang.memory.cuda_driver import device_by_uuid
    from sglang.srt.utils import is_cuda
    found = {
        "is_cuda": is_cuda(), "sgl_kernel": sgl_kernel.__file__, "flashinfer": "flashinfer" in sys.modules,
        "unfit": unfit_to_fork(), "name": torch.cuda.get_device_name(1),
        "capability": torch.cuda.get_device_capability(), "free": torch.cuda.mem_get_info(),
    }
    print(json.dumps(found), flush=True)
    if os.fork() == 0:
        print(device_by_uuid(sys.argv[2]), flush=True)
        os._exit(0)
    os.wait()
""")


def test_main_stays_fit_to_fork_with_all_of_sglang_imported(tmp_path):
    env = fake_cuda.build(tmp_path) | {"TRITON_CACHE_DIR": str(tmp_path / "triton")}
    model = write_checkpoint(tmp_path / "model", "qwen3")
    command = [sys.executable, "-W", "ignore", "-c", START, str(model), UUIDS[1]]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, found, ordinal = done.stdout.strip().splitlines()
    answers = json.loads(found)
    assert answers["unfit"] is None
    assert (answers["is_cuda"], answers["flashinfer"]) == (True, True)
    assert answers["sgl_kernel"] is not None, "the stand-in was imported, not the real one"
    assert (answers["name"], answers["capability"], answers["free"]) == ("Fake GPU", [9, 0], [1 << 30, 1 << 30])
    assert ordinal == "1"  # a child can use the driver
