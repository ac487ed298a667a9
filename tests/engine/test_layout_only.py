"""Models that SGLang builds but cannot serve here: their parameters are what its own loader makes of them."""

import re

import pytest

from anchortp_sglang.testing.server import free_port
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint
from anchortp_sglang.testing.tiny_quantized import write_quantized

SHAPE = {"num_layers": 2, "num_q_heads": 8, "num_kv_heads": 4}
GROUP = 32


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """written(kind): the folder of a quantized qwen3, or of "gpt_oss"."""

    def write(kind):
        folder = tmp_path_factory.mktemp("layout")
        if kind == "gpt_oss":
            return write_checkpoint(folder / kind, kind, **SHAPE)
        dtype = "float16" if kind in ("awq", "gptq") else "bfloat16"
        plain = write_checkpoint(folder / "plain", "qwen3", dtype=dtype, **SHAPE)
        return write_quantized(plain, folder / kind, kind, GROUP)

    return write


@pytest.mark.parametrize(
    ("kind", "flags", "parameters"),
    [
        ("gpt_oss", ["--dtype", "float32", "--attention-backend", "triton", "--moe-runner-backend", "triton"], 29),
        ("fp8-block", ["--dtype", "bfloat16"], 27),
        ("fp8-tensor", ["--dtype", "bfloat16"], 27),
        ("awq", ["--dtype", "float16"], 35),
        ("gptq", ["--dtype", "float16"], 43),
    ],
)
def test_parameters_are_those_of_sglangs_own_loader(forge, places, written, kind, flags, parameters):
    """(Per-channel FP8 is not among them: SGLang asks CUDA for its version when it builds such layers.)"""
    argv = ["--model-path", str(written(kind)), "--tp-size", "1", "--max-total-tokens", "1024"]
    done = forge.run("engine_jobs:load_beside_stock", env=places, argv=[*argv, *flags, "--port", str(free_port())])
    found = re.search(r"(\d+) parameters are equal, (\d+) differ: (.*)", done.output)
    assert found, done.output[-3000:]
    assert found.groups() == (str(parameters), "0", "[]")


def test_a_start_is_refused_with_the_reason(forge, places, written):
    for kind, reason in (("gpt_oss", "kernels that know sinks"), ("fp8-block", "no kernels for block FP8 on a CPU")):
        argv = ["--model-path", str(written(kind)), "--tp-size", "2", "--port", str(free_port())]
        done = forge.run("engine_jobs:launch", env=places, argv=argv)
        assert done.code == 2
        assert reason in done.output[done.output.index("anchortp: cannot start: ") :]
